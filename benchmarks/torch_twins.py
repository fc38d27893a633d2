"""PyTorch twins of jax_steps.py's train steps, eager or compiled.

The same parameters, losses and optimizers, written the way that is fastest in
PyTorch: transformers' model with scaled-dot-product attention, convolutions
where ours rearranges, a search of only the rows that may be codes,
`AdamW(fused=True)`. `torch.compile` in its default mode gets the forward and
backward pass; clipping and the optimizer are kernels of their own already. With
bfloat16, parameters stay float32 and autocast chooses what is rounded.
"""

import collections
from collections.abc import Callable
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional
import transformers

from unicode_jax.convert import architectures, names
from unicode_jax.models import llama as llama_lib, tokenizer as tokenizer_lib
from unicode_jax.training import optimizer as optimizer_lib


def autoencoder(config: tokenizer_lib.TokenizerConfig, params) -> nn.Module:
  """Builds the twin of `models.tokenizer` in PyTorch.

  Args:
    config: TokenizerConfig.
    params: {"encoder", "decoder"}: Flax parameters to copy.

  Returns:
    A module, float32[B, 3, H, W] -> float32[B, 3, H, W].
  """

  def group_norm(width):
    return nn.GroupNorm(width // math.gcd(16, width), width, eps=1e-6)

  class Residual(nn.Module):
    def __init__(self, width):
      super().__init__()
      self.norm1, self.norm2 = group_norm(width), group_norm(width)
      self.conv1 = nn.Conv2d(width, width, 3, padding=1)
      self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
      h = self.conv1(functional.silu(self.norm1(x)))
      return x + self.conv2(functional.silu(self.norm2(h)))

  class Attention(nn.Module):
    def __init__(self, width):
      super().__init__()
      self.norm = group_norm(width)
      self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
      h = self.norm(x).flatten(2).transpose(1, 2)
      q, k, v = self.qkv(h).chunk(3, dim=-1)
      h = functional.scaled_dot_product_attention(q, k, v)
      return x + self.out(h).transpose(1, 2).reshape(x.shape)

  def upsample(inputs, width, block):
    projection = nn.Conv2d(inputs, width * block**2, 1)
    projection.block = block
    return nn.Sequential(
      collections.OrderedDict(proj=projection, shuffle=nn.PixelShuffle(block))
    )

  widths, last = config.widths, len(config.widths) - 1

  def level(i, num_blocks):
    layers = collections.OrderedDict()
    for block in range(num_blocks):
      layers[f"block{block}"] = Residual(widths[i])
      if config.attention and i == last and block == 0:
        layers["attention"] = Attention(widths[i])
    return nn.Sequential(layers)

  # Names as in Flax, so that the parameters find their places.
  encoder, inputs = collections.OrderedDict(), 3
  for i, width in enumerate(widths):
    name, block = (f"down{i}", 2) if i else ("stem", config.stem_patch)
    encoder[name] = nn.Conv2d(inputs, width, block, stride=block)
    encoder[f"level{i}"] = level(i, config.num_res_blocks)
    inputs = width
  encoder["norm"], encoder["silu"] = group_norm(inputs), nn.SiLU()
  encoder["head"] = nn.Conv2d(inputs, config.code_dim, 1)

  decoder = collections.OrderedDict()
  decoder["stem"] = nn.Conv2d(config.code_dim, inputs, 1)
  for i in range(last, -1, -1):
    decoder[f"level{i}"] = level(i, config.num_res_blocks + 1)
    if i:
      decoder[f"up{i}"] = upsample(widths[i], widths[i - 1], 2)
  decoder["norm"], decoder["silu"] = group_norm(widths[0]), nn.SiLU()
  decoder["head"] = upsample(widths[0], 3, config.stem_patch)
  model = nn.Sequential(
    collections.OrderedDict(
      encoder=nn.Sequential(encoder), decoder=nn.Sequential(decoder)
    )
  )

  for path, module in model.named_modules():
    if list(module.children()) or not list(module.parameters()):
      continue
    leaf = params
    for part in path.split("."):
      leaf = leaf[part]
    while len(leaf) == 1:  # The layer inside a thin wrapper.
      (leaf,) = leaf.values()
    leaf = {name: np.array(value) for name, value in leaf.items()}
    weight, bias = leaf.get("kernel", leaf.get("scale")), leaf["bias"]
    if isinstance(module, nn.Linear):
      weight = weight.T
    elif isinstance(module, nn.Conv2d):
      out, inputs, *sides = module.weight.shape
      weight = weight.reshape(*sides, inputs, out).transpose(3, 2, 0, 1)
    if block := getattr(module, "block", 0):
      # Channels are [block, block, out] here and [out, block, block] in torch.
      order = np.arange(len(bias)).reshape(block**2, -1).T.ravel()
      weight, bias = weight[order], bias[order]
    with torch.no_grad():
      module.weight.copy_(torch.tensor(weight))
      module.bias.copy_(torch.tensor(bias))
  return model


def quantize(z, table, valid, gain, depth: int):
  """Quantizes residually, as `quantizer.quantize` of kind "rq" does.

  Args:
    z: float32[N, C].
    table: float32[K, C].
    valid: int64[V], ids that may be chosen.
    gain: float32[D], None before the first fit.
    depth: D.

  Returns:
    codes int64[D, N]; the sums after each depth, float32[D, N, C], with their
    gradient to the table; and the least-squares gains float32[D].
  """
  with torch.no_grad():
    rows = table[valid]
    bias = rows.square().sum(1) / 2
    residual, codes, fits, gains = z, [], [], []
    for d in range(depth):
      if gain is None:
        scale = (residual.square().mean() / rows.square().mean()).sqrt()
      else:
        scale = gain[d]
      # Faster than torch.cdist.
      best = torch.addmm(bias, residual / scale, rows.T, alpha=-1).argmin(1)
      chosen = rows[best]
      fits.append((residual * chosen).sum() / chosen.square().sum())
      gains.append(fits[-1] if gain is None else scale)
      residual = residual - gains[-1] * chosen
      codes.append(valid[best])
    codes, fits, gains = map(torch.stack, (codes, fits, gains))
  emitted = gains[:, None, None] * functional.embedding(codes, table)
  return codes, emitted.cumsum(0), fits


def tokenizer_step(
  stage,
  config,
  params: dict,
  image: np.ndarray,
  *,
  channels_last: bool,
  compiled: bool,
  device: str,
) -> Callable[[], dict]:
  """Makes the train step of the visual tokenizer.

  Args:
    stage: Of `jax_steps.make_stage`.
    config: Its config; `tokenizer.dtype` counts here, too.
    params: Its first parameters, which are copied.
    image: float32[B, H, W, 3].
    channels_last: The memory format of images and convolutions.
    compiled: Whether `torch.compile` is used.
    device: "cpu" or "cuda".

  Returns:
    A function that does one step, waits for it, and returns metrics; these
    hold the codes int64[B, h, w, D], too.
  """
  layout = torch.channels_last if channels_last else torch.contiguous_format
  model = autoencoder(stage.model.tokenizer, params)
  model = model.to(device, memory_format=layout)
  table = nn.Parameter(
    torch.tensor(np.array(params["codebook"]["table"]), device=device)
  )
  valid = torch.tensor(np.flatnonzero(stage.valid), device=device)
  depth, gain = stage.model.depth, None
  weights = config.tokenizer.loss
  l1, l2 = weights.l1, weights.l2
  commitment, codebook = weights.commitment, weights.codebook
  decay = config.codebook.gain_decay
  half = config.tokenizer.dtype == "bfloat16"

  settings = optimizer_lib.OptimizerConfig(**config.optimizer.tokenizer)
  schedule = optimizer_lib.learning_rate_schedule(settings, config.num_steps)
  learning_rates = iter(np.array(schedule(np.arange(10_000))).tolist())
  parameters = [*model.parameters(), table]
  optimizer = torch.optim.AdamW(
    [
      {
        "params": [p for p in parameters if p.ndim > 1],
        "weight_decay": settings.weight_decay,
      },
      {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ],
    betas=(settings.b1, settings.b2),
    fused=True,
  )
  image = torch.tensor(image.transpose(0, 3, 1, 2), device=device)
  image = image.contiguous(memory_format=layout)

  def forward(gain):
    with torch.autocast(device, torch.bfloat16, enabled=half):
      features = model.encoder(image).float()
    grid = features.permute(0, 2, 3, 1)
    z = grid.reshape(-1, grid.shape[-1])
    rows = functional.normalize(table, dim=1)
    codes, partial, fits = quantize(z.detach(), rows, valid, gain, depth)
    quantized = (z + (partial[-1] - z).detach()).reshape(grid.shape)
    quantized = quantized.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    with torch.autocast(device, torch.bfloat16, enabled=half):
      output = model.decoder(quantized).float()
    loss = (
      l1 * functional.l1_loss(output, image)
      + l2 * functional.mse_loss(output, image)
      + commitment * (z - partial.detach()).square().mean()
      + codebook * (z.detach() - partial).square().mean()
    )
    with torch.no_grad():
      gain = fits if gain is None else decay * gain + (1 - decay) * fits
      # What our step measures for the log.
      error = (output.clamp(-1, 1) - image).square().mean((1, 2, 3))
      residual = (z - partial).square().sum((1, 2)) / z.square().sum()
      log = {
        "psnr": (10 * torch.log10(4 / error.clamp(min=4e-10))).mean(),
        "feature_std": z.std(correction=0),
        "residual_energy": residual,
        "codes": codes.T.reshape(*grid.shape[:-1], depth),
      }
    return loss, gain, log

  if compiled:
    forward = torch.compile(forward)
  offset = len(table) * torch.arange(depth, device=device)

  def run():
    nonlocal gain
    optimizer.zero_grad()
    loss, gain, log = forward(gain)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    learning_rate = next(learning_rates)
    for group in optimizer.param_groups:
      group["lr"] = learning_rate
    optimizer.step()
    log["code_counts"] = torch.bincount(
      (log["codes"] + offset).ravel(), minlength=depth * len(table)
    )
    _wait(device)
    return log | {"loss": loss.item(), "gradient_norm": norm.item()}

  return run


def llm_step(
  config: llama_lib.LlamaConfig,
  params: dict,
  ids: np.ndarray,
  labels: np.ndarray,
  learning_rate: float,
  weight_decay: float,
  *,
  compiled: bool,
  device: str,
) -> Callable[[], dict]:
  """Makes the train step of a language model, transformers' own.

  Args:
    config: Of our model; its dtype counts here, too.
    params: Our parameters, which are copied.
    ids: int32[B, T].
    labels: int32[B, T], the next ids.
    learning_rate: Of AdamW, per step.
    weight_decay: Of AdamW, for every parameter.
    compiled: Whether `torch.compile` is used.
    device: "cpu" or "cuda".

  Returns:
    A function that does one step, waits for it, and returns the loss.
  """
  settings = architectures.to_hugging_face(config)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      **settings, max_position_embeddings=ids.shape[1], use_cache=False
    )
  )
  params = llama_lib.with_layers_as(params, scanned=False)
  tensors = model.state_dict()
  with torch.no_grad():
    for entry in names.table(config):
      value = params
      for part in entry.path.split("/"):
        value = value[part]
      value = np.array(value)
      value = value.T if entry.transposed else value
      tensors[entry.key].copy_(torch.tensor(value))
  model = model.to(device).train()
  optimizer = torch.optim.AdamW(
    model.parameters(),
    learning_rate,
    weight_decay=weight_decay,
    fused=True,
  )
  half = config.dtype == "bfloat16"
  ids = torch.tensor(ids, device=device).long()
  labels = torch.tensor(labels, device=device).long()

  def forward():
    with torch.autocast(device, torch.bfloat16, enabled=half):
      out = model(input_ids=ids, labels=labels, shift_labels=labels)
    return out.loss

  if compiled:
    forward = torch.compile(forward)

  def run():
    optimizer.zero_grad()
    loss = forward()
    loss.backward()
    optimizer.step()
    _wait(device)
    return {"loss": loss.item()}

  return run


def _wait(device: str) -> None:
  if device == "cuda":
    torch.cuda.synchronize()
