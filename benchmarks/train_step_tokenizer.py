"""One tokenizer train step of stage I beside PyTorch.

The step is `training.steps.make_tokenizer_step` as stage I builds it: encoder,
residual quantization with rows of the LLM's token table (language_driven, 4
codes a position, 16 dimensions, 2048 ids of which 261 are reserved), decoder,
L1, L2, commitment and codebook losses, backward, clipping, AdamW, gains and
what is measured for the log; in float32. Torch does the same eagerly, in both
memory formats; the faster one counts. Both begin with the same parameters, and
codes, loss and gradient norm of the first step must agree, so that the same
thing is timed. All are timed in turns, one step each, and the medians compared:

  python benchmarks/train_step_tokenizer.py
  python benchmarks/train_step_tokenizer.py --model=vqgan --threads=1

`AdamW(fused=True)`, searching only the rows that may be codes, and convolutions
where ours rearranges are torch's fastest eager settings on CPU. The load
average is printed, because the figures mean nothing on a busy machine, and with
several threads least of all: torch's wait for each other where a core is taken.
There, use --threads=1 --cpu-time, which counts the process's CPU time.
"""

import argparse
import collections
import dataclasses
import math
import os
import time

# These settings of some machines slow BLAS.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
  os.environ.pop(name, None)

import numpy as np  # noqa: E402

# What differs from the default config.
MODELS = {
  "small": {},
  # VQ-GAN's way: convolutions from the full resolution on.
  "vqgan": {
    "image_size": 64,
    "data.global_batch_size": 16,
    "tokenizer.channels": 64,
    "tokenizer.channel_multipliers": (1, 2, 4),
    "tokenizer.stem_patch": 1,
    "tokenizer.attention": True,
  },
}


def torch_autoencoder(config, params):
  """Builds the twin of `models.tokenizer` in PyTorch.

  Args:
    config: TokenizerConfig.
    params: {"encoder", "decoder"}: Flax parameters to copy.

  Returns:
    A module, float32[B, 3, H, W] -> float32[B, 3, H, W].
  """
  import torch
  from torch import nn
  from torch.nn import functional

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


def random_parameters(config, seed=0):
  """Draws parameters of encoder and decoder without a zero among them."""
  import jax
  import jax.numpy as jnp

  from unicode_jax.models import tokenizer

  size, grid = config.image_size, config.grid_size
  encoder, decoder = tokenizer.Encoder(config), tokenizer.Decoder(config)
  shapes = {
    "encoder": jax.eval_shape(
      encoder.init, jax.random.key(0), jnp.zeros((1, size, size, 3))
    )["params"],
    "decoder": jax.eval_shape(
      decoder.init,
      jax.random.key(0),
      jnp.zeros((1, grid, grid, config.code_dim)),
    )["params"],
  }
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    name, shape = path[-1].key, shape.shape
    noise = rng.normal(size=shape).astype(np.float32)
    if name == "kernel":
      return noise / math.sqrt(math.prod(shape[:-1]))
    return (name == "scale") + 0.1 * noise

  return jax.tree_util.tree_map_with_path(draw, shapes)


def make_stage(overrides):
  """Builds the tokenizer's half of stage I, without its data.

  Args:
    overrides: What differs from the default config.

  Returns:
    The stage, its config, and its first state with `random_parameters`.
  """
  import jax
  import jax.numpy as jnp

  from unicode_jax import config as config_lib, loading
  from unicode_jax.models import llama as llama_lib
  from unicode_jax.stages import tokenizer as tokenizer_stage

  config = config_lib.apply_overrides(config_lib.default_config(), overrides)
  # Only its token table matters.
  llama = llama_lib.LlamaConfig(
    vocab_size=config.text.vocab_size,
    embed_dim=config.llm.embed_dim,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    mlp_dim=8,
    tie_embeddings=True,
  )
  valid = np.arange(config.text.vocab_size) >= config_lib.RESERVED_TOKENS
  model = dataclasses.replace(loading.build_model(config), llama=llama)
  stage = tokenizer_stage.TokenizerStage(config, None, model, valid)
  state = jax.jit(stage.init)(jax.random.key(0))
  drawn = jax.tree.map(jnp.array, random_parameters(model.tokenizer))
  variables = state.variables.replace(
    params={**state.variables.params, **drawn}
  )
  return stage, config, state.replace(variables=variables)


def jax_step(stage, state, image):
  """Returns a function that does one train step and gives its metrics."""
  import jax
  import jax.numpy as jnp

  phase = stage.phase(0)
  step = jax.jit(phase.step, donate_argnums=0)
  batch = {"image": jnp.asarray(image)}

  def run():
    nonlocal state
    state, metrics = jax.block_until_ready(step(state, batch, phase.constants))
    return {
      "loss": float(metrics["tokenizer/loss"]),
      "gradient_norm": float(metrics["tokenizer/gradient_norm"]),
    }

  return run


def torch_quantize(z, table, valid, gain, depth):
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
  import torch
  from torch.nn import functional

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


def torch_step(stage, config, variables, image, channels_last):
  """The same in eager PyTorch; the metrics hold the codes, too."""
  import torch
  from torch.nn import functional

  from unicode_jax.training import optimizer as optimizer_lib

  layout = torch.channels_last if channels_last else torch.contiguous_format
  model = torch_autoencoder(stage.model.tokenizer, variables.params)
  model = model.to(memory_format=layout)
  table = torch.nn.Parameter(
    torch.tensor(np.array(variables.params["codebook"]["table"]))
  )
  valid = torch.tensor(np.flatnonzero(stage.valid))
  depth, gain = stage.model.depth, None
  loss_weights = config.tokenizer.loss

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
  image = torch.tensor(image.transpose(0, 3, 1, 2)).contiguous(
    memory_format=layout
  )

  def run():
    nonlocal gain
    optimizer.zero_grad()
    features = model.encoder(image)
    grid = features.permute(0, 2, 3, 1)
    z = grid.reshape(-1, grid.shape[-1])
    rows = functional.normalize(table, dim=1)
    codes, partial, fits = torch_quantize(z.detach(), rows, valid, gain, depth)
    quantized = (z + (partial[-1] - z).detach()).reshape(grid.shape)
    quantized = quantized.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    output = model.decoder(quantized)
    loss = (
      loss_weights.l1 * functional.l1_loss(output, image)
      + loss_weights.l2 * functional.mse_loss(output, image)
      + loss_weights.commitment * (z - partial.detach()).square().mean()
      + loss_weights.codebook * (z.detach() - partial).square().mean()
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    learning_rate = next(learning_rates)
    for group in optimizer.param_groups:
      group["lr"] = learning_rate
    optimizer.step()
    with torch.no_grad():
      decay = config.codebook.gain_decay
      gain = fits if gain is None else decay * gain + (1 - decay) * fits
      # What our step measures for the log.
      error = (output.clamp(-1, 1) - image).square().mean((1, 2, 3))
      offset = len(table) * torch.arange(depth)[:, None]
      metrics = {
        "psnr": (10 * torch.log10(4 / error.clamp(min=4e-10))).mean(),
        "feature_std": z.std(correction=0),
        "code_counts": torch.bincount(
          (codes + offset).ravel(), minlength=depth * len(table)
        ),
        "residual_energy": (z - partial).square().sum((1, 2))
        / z.square().sum(),
      }
    return metrics | {
      "loss": loss.item(),
      "gradient_norm": norm.item(),
      "codes": codes.T.reshape(*grid.shape[:-1], depth),
    }

  return run


def check(ours, codes, theirs, name):
  """Stops unless the first step of one equals the other's.

  Args:
    ours: Metrics of our first step.
    codes: int32[B, h, w, D], our codes at that step.
    theirs: Metrics of torch's first step.
    name: What torch ran.
  """
  same = np.mean(theirs["codes"].numpy() == codes)
  errors = {
    metric: abs(theirs[metric] - ours[metric]) / ours[metric]
    for metric in ("loss", "gradient_norm")
  }
  print(
    f"{name}: {same:.3%} of {codes.size} codes are jax's, loss off by "
    f"{errors['loss']:.1e}, gradient norm by {errors['gradient_norm']:.1e}"
  )
  if not (
    same >= 0.999 and errors["loss"] <= 1e-4 and errors["gradient_norm"] <= 1e-2
  ):
    raise SystemExit("the two steps differ: nothing timed")


def main():
  """Checks, times and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", choices=MODELS, default="small")
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--cpu-time", action="store_true")
  args = parser.parse_args()
  # Affinity is what XLA sizes its thread pool by.
  cpus = sorted(os.sched_getaffinity(0))[: args.threads]
  os.sched_setaffinity(0, cpus)
  os.environ["JAX_PLATFORMS"] = "cpu"

  import jax
  import torch

  torch.set_num_threads(len(cpus))
  stage, config, state = make_stage(MODELS[args.model])
  batch, size = config.data.global_batch_size, config.image_size
  image = np.random.default_rng(1).uniform(-1, 1, (batch, size, size, 3))
  image = image.astype(np.float32)

  encode = jax.jit(lambda variables: stage.model.encode(variables, image).codes)
  codes = np.array(encode(state.variables))
  trained = [state.variables.params[name] for name in stage.trained]
  count = sum(leaf.size for leaf in jax.tree.leaves(trained))
  variables = state.variables
  runs = {
    "torch channels_last": torch_step(stage, config, variables, image, True),
    "torch NCHW": torch_step(stage, config, variables, image, False),
  }
  runs = {"jax": jax_step(stage, state, image)} | runs
  del state, variables

  # The learning rate begins at 0, so the third loss is the first to show what
  # the optimizers did.
  first = {name: [run() for _ in range(4)] for name, run in runs.items()}
  for name in list(runs)[1:]:
    check(first["jax"][0], codes, first[name][0], name)
  for name, metrics in first.items():
    losses = " ".join(f"{step['loss']:.4f}" for step in metrics)
    print(f"{name}: first losses {losses}")

  clock = time.process_time if args.cpu_time else time.perf_counter
  seconds = {name: [] for name in runs}
  for _ in range(args.repeats):
    for name, run in runs.items():
      start = clock()
      run()
      seconds[name].append(clock() - start)

  print(
    f"{args.model}: batch {batch}, {stage.model.tokenizer}, RQ depth "
    f"{stage.model.depth} of {config.text.vocab_size} ids, {count / 1e6:.2f} M "
    f"trained parameters, {len(cpus)} threads, "
    f"{'CPU' if args.cpu_time else 'wall'} time, {args.repeats} repeats, "
    f"load {os.getloadavg()[0]:.1f}"
  )
  medians = {}
  for name, values in seconds.items():
    low, medians[name], high = np.percentile(values, [10, 50, 90])
    print(
      f"{name:20} {1e3 * medians[name]:8.1f} ms ({1e3 * low:.1f} to "
      f"{1e3 * high:.1f}, 10th to 90th percentile), "
      f"{batch / medians[name]:.1f} images/s"
    )
  best = min(list(medians)[1:], key=medians.get)
  ratios = np.array(seconds["jax"]) / np.array(seconds[best])
  low, median, high = np.percentile(ratios, [10, 50, 90])
  print(f"jax / {best}: {median:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
  main()
