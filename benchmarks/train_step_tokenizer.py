"""One tokenizer train step (forward, backward, AdamW) beside PyTorch.

The same encoder and decoder, without quantizer, on the same pictures, in
float32. Torch runs eagerly, in both memory formats; the faster one counts. The
parameters are copied first and the outputs must agree, so that the same thing
is timed. All are timed in turns, one step each, and the medians compared:

  python benchmarks/train_step_tokenizer.py
  python benchmarks/train_step_tokenizer.py --model=vqgan --threads=1

`AdamW(fused=True)` and convolutions where ours rearranges are torch's fastest
eager settings on CPU. The figures mean nothing on a busy machine, so the load
average is printed with them; with one thread, add --cpu-time to count the
process's CPU time, which a busy machine disturbs less.
"""

import argparse
import collections
import math
import os
import time

# These settings of some machines slow BLAS.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
  os.environ.pop(name, None)

import numpy as np  # noqa: E402

MODELS = {
  # The small preset of configs/pretrain.py.
  "small": {
    "image_size": 32,
    "code_dim": 16,
    "channels": 128,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "stem_patch": 4,
    "batch": 64,
  },
  # VQ-GAN's way: convolutions from the full resolution on.
  "vqgan": {
    "image_size": 64,
    "code_dim": 64,
    "channels": 64,
    "channel_multipliers": (1, 2, 4),
    "num_res_blocks": 1,
    "stem_patch": 1,
    "attention": True,
    "batch": 16,
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


def reconstruct(config, params, image):
  """Encodes and decodes, without quantizing."""
  from unicode_jax.models import tokenizer

  features = tokenizer.Encoder(config).apply(
    {"params": params["encoder"]}, image
  )
  return tokenizer.Decoder(config).apply(
    {"params": params["decoder"]}, features
  )


def jax_step(config, params, image):
  """Returns a function that does one train step and gives the loss."""
  import jax
  import jax.numpy as jnp
  import optax

  from unicode_jax.training import reconstruction_loss

  optimizer = optax.adamw(1e-3, weight_decay=0.01)

  def loss_fn(params, image):
    reconstruction = reconstruct(config, params, image)
    return reconstruction_loss.l1_loss(
      image, reconstruction
    ) + reconstruction_loss.l2_loss(image, reconstruction)

  @jax.jit(donate_argnums=(0, 1))
  def step(params, state, image):
    loss, grads = jax.value_and_grad(loss_fn)(params, image)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = jax.tree.map(jnp.asarray, params)
  state = [params, optimizer.init(params)]
  image = jnp.asarray(image)

  def run():
    *state[:], loss = step(*state, image)
    return float(loss)

  return run


def torch_step(config, params, image, channels_last):
  """The same in eager PyTorch."""
  import torch
  from torch.nn import functional

  layout = torch.channels_last if channels_last else torch.contiguous_format
  model = torch_autoencoder(config, params).to(memory_format=layout)
  optimizer = torch.optim.AdamW(
    model.parameters(), 1e-3, weight_decay=0.01, fused=True
  )
  image = torch.tensor(image.transpose(0, 3, 1, 2)).contiguous(
    memory_format=layout
  )

  def run():
    optimizer.zero_grad()
    output = model(image)
    loss = functional.l1_loss(output, image) + functional.mse_loss(
      output, image
    )
    loss.backward()
    optimizer.step()
    return loss.item()

  return run


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

  import torch

  from unicode_jax.models import tokenizer

  torch.set_num_threads(len(cpus))
  shape = dict(MODELS[args.model])
  batch = shape.pop("batch")
  config = tokenizer.TokenizerConfig(**shape)
  params = random_parameters(config)
  size = config.image_size
  image = np.random.default_rng(1).uniform(-1, 1, (batch, size, size, 3))
  image = image.astype(np.float32)

  with torch.no_grad():
    theirs = torch_autoencoder(config, params)(
      torch.tensor(image[:2].transpose(0, 3, 1, 2))
    )
  error = np.abs(
    reconstruct(config, params, image[:2])
    - theirs.numpy().transpose(0, 2, 3, 1)
  ).max()
  if error > 1e-4:
    raise SystemExit(f"the two networks differ by {error:.2g}: nothing timed")

  runs = {
    "jax": jax_step(config, params, image),
    "torch channels_last": torch_step(config, params, image, True),
    "torch NCHW": torch_step(config, params, image, False),
  }
  clock = time.process_time if args.cpu_time else time.perf_counter
  for name, run in runs.items():
    print(f"{name}: first losses {run():.4f} {run():.4f}")
  seconds = {name: [] for name in runs}
  for _ in range(args.repeats):
    for name, run in runs.items():
      start = clock()
      run()
      seconds[name].append(clock() - start)

  count = sum(p.numel() for p in torch_autoencoder(config, params).parameters())
  print(
    f"{args.model}: batch {batch}, {shape}, {count / 1e6:.2f} M parameters, "
    f"{len(cpus)} threads, {'CPU' if args.cpu_time else 'wall'} time, "
    f"{args.repeats} repeats, load {os.getloadavg()[0]:.1f}"
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
