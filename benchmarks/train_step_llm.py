"""One LLM train step (forward, backward, AdamW) beside transformers on PyTorch.

Same shapes, float32, same threads, tied head, every token in the loss. The two
are timed in turns, one step each, and the medians are compared:

  python benchmarks/train_step_llm.py --model=small
  python benchmarks/train_step_llm.py --model=wide --threads=1

`torch.optim.AdamW(fused=True)` and scaled-dot-product attention are torch's
fastest eager settings on CPU. The figures mean nothing on a busy machine, so
the load average is printed with them; with one thread, add --cpu-time to count
the process's CPU time, which a busy machine disturbs less.

XLA gives its temporary memory back after every step, and taking it again costs
page faults. Keeping it is worth 10-15 % to jax and almost nothing to torch:

  MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 python ...
"""

import argparse
import os
import time

# These settings of some machines slow numpy's (and so torch's users') BLAS.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
  os.environ.pop(name, None)

MODELS = {
  # The small preset of configs/pretrain.py.
  "small": dict(
    vocab_size=2048,
    embed_dim=192,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    mlp_dim=512,
    batch=8,
    length=128,
  ),
  "wide": dict(
    vocab_size=4096,
    embed_dim=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=8,
    mlp_dim=704,
    batch=8,
    length=512,
  ),
}


def jax_step(shape, ids, labels, overrides):
  """Returns a function that does one train step and gives the loss."""
  import jax
  import jax.numpy as jnp
  import optax

  from unicode_jax.models import llama
  from unicode_jax.training import losses

  config = llama.LlamaConfig(tie_embeddings=True, **shape, **overrides)
  model = llama.Llama(config)
  token_ids = jnp.asarray(ids[..., None])
  params = model.init(jax.random.key(0), token_ids[:1, :1])["params"]
  optimizer = optax.adamw(1e-3, weight_decay=0.01)

  def loss_fn(params, token_ids, labels):
    hidden, _ = model.apply({"params": params}, token_ids, return_hidden=True)
    mask = jnp.ones(labels.shape)
    kernel = llama.head_kernel(params, config)
    return losses.next_token_loss(hidden, kernel, labels, mask)[0]

  @jax.jit(donate_argnums=(0, 1))
  def step(params, state, token_ids, labels):
    loss, grads = jax.value_and_grad(loss_fn)(params, token_ids, labels)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = [params, optimizer.init(params)]
  labels = jnp.asarray(labels)

  def run():
    *state[:], loss = step(*state, token_ids, labels)
    return float(loss)

  return run


def torch_step(shape, ids, labels, threads):
  """The same with Hugging Face's model in eager PyTorch."""
  import torch
  import transformers

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=shape["vocab_size"],
      hidden_size=shape["embed_dim"],
      num_hidden_layers=shape["num_layers"],
      num_attention_heads=shape["num_heads"],
      num_key_value_heads=shape["num_kv_heads"],
      intermediate_size=shape["mlp_dim"],
      tie_word_embeddings=True,
    )
  )
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), 1e-3, weight_decay=0.01, fused=True
  )
  ids, labels = torch.tensor(ids).long(), torch.tensor(labels).long()

  def run():
    optimizer.zero_grad()
    out = model(input_ids=ids, labels=labels, shift_labels=labels)
    out.loss.backward()
    optimizer.step()
    return out.loss.item()

  return run


def main():
  """Times the two in turns and prints medians, spread and ratio."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", choices=MODELS, default="small")
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--cpu-time", action="store_true")
  parser.add_argument("--scan", action="store_true", help="scan over layers")
  args = parser.parse_args()
  # Affinity is what XLA sizes its thread pool by.
  cpus = sorted(os.sched_getaffinity(0))[: args.threads]
  os.sched_setaffinity(0, cpus)
  os.environ["JAX_PLATFORMS"] = "cpu"

  import numpy as np

  shape = dict(MODELS[args.model])
  batch, length = shape.pop("batch"), shape.pop("length")
  tokens = np.random.default_rng(0).integers(
    0, shape["vocab_size"], (batch, length + 1), np.int32
  )
  ids, labels = tokens[:, :-1], tokens[:, 1:]
  runs = {
    "jax": jax_step(shape, ids, labels, {"scan_layers": args.scan}),
    "torch": torch_step(shape, ids, labels, len(cpus)),
  }
  clock = time.process_time if args.cpu_time else time.perf_counter
  for name, run in runs.items():
    print(f"{name}: first losses {run():.3f} {run():.3f}")
  seconds = {name: [] for name in runs}
  for _ in range(args.repeats):
    for name, run in runs.items():
      start = clock()
      run()
      seconds[name].append(clock() - start)

  print(
    f"{args.model}: batch {batch} x {length}, {shape}, {len(cpus)} threads, "
    f"{'CPU' if args.cpu_time else 'wall'} time, {args.repeats} repeats, "
    f"load {os.getloadavg()[0]:.1f}"
  )
  for name, values in seconds.items():
    low, median, high = np.percentile(values, [10, 50, 90])
    print(
      f"{name:6} {1e3 * median:8.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f},"
      f" 10th to 90th percentile), {batch * length / median:.0f} tokens/s"
    )
  ratios = np.array(seconds["jax"]) / np.array(seconds["torch"])
  low, median, high = np.percentile(ratios, [10, 50, 90])
  print(f"jax / torch: {median:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
  main()
