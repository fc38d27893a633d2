"""Decoding with a KV cache beside transformers' `generate` on PyTorch.

The same weights, prompts and number of new tokens, float32, same threads. The
two are timed in turns, one whole call each (prompt included), and the medians
are compared. Greedy answers must agree, or the comparison means nothing; their
agreement is printed.

  python benchmarks/decode.py --batch=8
  python benchmarks/decode.py --batch=1 --threads=1 --modes=greedy

`generate` runs with its default, growing cache, which was the faster of the two
here; --static is the other. The figures mean nothing on a busy machine, so the
load average is printed with them; with one thread, add --cpu-time to count the
process's CPU time, which a busy machine disturbs less.
"""

import argparse
import os
import platform
import time

# These settings of some machines slow numpy's (and so torch's users') BLAS.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
  os.environ.pop(name, None)

SHAPE = dict(
  vocab_size=4096,
  embed_dim=256,
  num_layers=6,
  num_heads=8,
  num_kv_heads=8,
  mlp_dim=704,
)
# Our settings; transformers calls all of them the same.
MODES = {
  "greedy": dict(temperature=0.0),
  "sample": dict(temperature=1.0),
  "filtered": dict(temperature=0.9, top_k=50, top_p=0.9),
}


def torch_model(threads):
  """Returns Hugging Face's model with random weights."""
  import torch
  import transformers

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=SHAPE["vocab_size"],
    hidden_size=SHAPE["embed_dim"],
    num_hidden_layers=SHAPE["num_layers"],
    num_attention_heads=SHAPE["num_heads"],
    num_key_value_heads=SHAPE["num_kv_heads"],
    intermediate_size=SHAPE["mlp_dim"],
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
  )
  return transformers.LlamaForCausalLM(config).eval()


def torch_decode(model, ids, new_tokens, settings, static):
  """Returns a function that answers all prompts and gives the new ids."""
  import torch
  import transformers

  greedy = settings["temperature"] == 0
  how = {} if greedy else {"top_k": 0, "top_p": 1.0} | settings
  generation = transformers.GenerationConfig(
    max_new_tokens=new_tokens,
    do_sample=not greedy,
    pad_token_id=0,
    cache_implementation="static" if static else None,
    **how,
  )
  inputs = torch.tensor(ids).long()

  @torch.inference_mode()
  def run():
    out = model.generate(
      inputs,
      attention_mask=torch.ones_like(inputs),
      generation_config=generation,
    )
    return out[:, ids.shape[1] :].numpy()

  return run


def jax_params(model):
  """Copies the weights of a tied Hugging Face model."""
  state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  params = {
    "embed_tokens": {"embedding": state["model.embed_tokens.weight"]},
    "final_norm": {"scale": state["model.norm.weight"]},
  }
  for i in range(model.config.num_hidden_layers):
    at = f"model.layers.{i}."
    layer = {
      "attention_norm": {"scale": state[at + "input_layernorm.weight"]},
      "mlp_norm": {"scale": state[at + "post_attention_layernorm.weight"]},
    }
    for group, theirs, names in (
      ("attention", "self_attn", "qkvo"),
      ("mlp", "mlp", ("gate", "up", "down")),
    ):
      layer[group] = {
        f"{n}_proj": {"kernel": state[f"{at}{theirs}.{n}_proj.weight"].T}
        for n in names
      }
    params[f"layers_{i}"] = layer
  return params


def jax_decode(params, ids, new_tokens, settings):
  """The same with this package."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from unicode_jax import sampling
  from unicode_jax.models import llama

  config = llama.LlamaConfig(tie_embeddings=True, **SHAPE)
  params = jax.tree.map(jnp.asarray, params)
  K = SHAPE["vocab_size"]
  grammar = sampling.make_grammar(
    K,
    valid=np.zeros(K, bool),
    control_ids=(),
    image_start=None,
    image_end=None,
    stop_ids=(),
    codes_per_image=0,
    vocab_size=K,
    allow_images=False,
  )
  how = sampling.SamplingConfig(max_new_tokens=new_tokens, **settings)
  prompts = list(ids[..., None])

  def run():
    out = sampling.generate(
      config, params, prompts, grammar, how, jax.random.key(0)
    )
    return np.stack(out)

  return run


def cpu_name():
  """Returns the processor's name, where the system tells it."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      names = [line.split(":")[1] for line in file if "model name" in line]
    return names[0].strip()
  except (OSError, IndexError):
    return platform.processor() or platform.machine()


def main():
  """Times the two in turns and prints medians, spread and ratio."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--prompt", type=int, default=32, help="its tokens")
  parser.add_argument("--new-tokens", type=int, default=256)
  parser.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES])
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--cpu-time", action="store_true")
  parser.add_argument("--static", action="store_true", help="torch's cache")
  args = parser.parse_args()
  # Affinity is what XLA sizes its thread pool by.
  cpus = sorted(os.sched_getaffinity(0))[: args.threads]
  os.sched_setaffinity(0, cpus)
  os.environ["JAX_PLATFORMS"] = "cpu"

  import numpy as np

  ids = np.random.default_rng(0).integers(
    0, SHAPE["vocab_size"], (args.batch, args.prompt), np.int32
  )
  model = torch_model(len(cpus))
  params = jax_params(model)
  clock = time.process_time if args.cpu_time else time.perf_counter
  print(
    f"batch {args.batch}, {args.prompt} + {args.new_tokens} tokens, {SHAPE}, "
    f"{len(cpus)} threads of {cpu_name()}, "
    f"{'CPU' if args.cpu_time else 'wall'} time, {args.repeats} repeats"
  )
  for mode in args.modes:
    settings = MODES[mode]
    runs = {
      "jax": jax_decode(params, ids, args.new_tokens, settings),
      "torch": torch_decode(model, ids, args.new_tokens, settings, args.static),
    }
    answers = {name: run() for name, run in runs.items()}
    for answer in answers.values():
      assert answer.shape == (args.batch, args.new_tokens), answer.shape
    seconds = {name: [] for name in runs}
    for _ in range(args.repeats):
      for name, run in runs.items():
        start = clock()
        run()
        seconds[name].append(clock() - start)
    same = ""
    if settings["temperature"] == 0:
      agreement = np.mean(answers["jax"] == answers["torch"])
      same = f", {agreement:.1%} of the tokens agree"
    print(f"{mode} {settings}, load {os.getloadavg()[0]:.1f}{same}")
    for name, values in seconds.items():
      rates = args.batch * args.new_tokens / np.array(values)
      low, median, high = np.percentile(rates, [10, 50, 90])
      print(
        f"  {name:6} {median:7.0f} tokens/s ({low:.0f} to {high:.0f}, 10th to "
        "90th percentile)"
      )
    ratios = np.array(seconds["torch"]) / np.array(seconds["jax"])
    low, median, high = np.percentile(ratios, [10, 50, 90])
    print(f"  jax is {median:.2f} times as fast ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
  main()
