"""Imported and exported language models beside transformers.

  python benchmarks/hf_parity.py

For each architecture a tiny random model of transformers is imported, run here
in every way that a model is run, and exported again. Errors are the largest
difference of logits, divided by the largest logit:

  forward     whole sequences
  cached      a prompt, then token by token behind it
  padded      prompts of different lengths, padded on the left
  packed      three sequences in one row, beside each alone in transformers
  round trip  imported, exported, loaded by transformers

and "greedy" is the share of 5 continuations of 24 tokens that are the same.

Then a model of --parameters million is imported and exported in processes of
their own; their peak of anonymous memory (what files are mapped is not in it),
less that of a tiny model's, is divided by the model's size in float32. So is
that of exporting each of --runs, of any stage with a language model.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from unicode_jax import loading, sampling
from unicode_jax.convert import exporting, importing
from unicode_jax.data import text_tokenizer as text_tokenizer_lib
from unicode_jax.models import llama as llama_lib

SIZES = dict(
  vocab_size=384,
  hidden_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=80,
  max_position_embeddings=64,
)
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 3.0,
  "original_max_position_embeddings": 32,
}
# Name -> class of transformers, what differs from SIZES.
FAMILIES = {
  "llama": ("Llama", {}),
  "llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 10}),
  "smollm2": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
  "mistral": ("Mistral", {"sliding_window": 5}),
  "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
  "qwen3": ("Qwen3", {"head_dim": 16}),
}
LENGTHS = (13, 21, 6)  # Of sequences that are padded or packed.
NEW_TOKENS = 24


def save_tokenizer(folder) -> None:
  """Trains and saves a small text tokenizer."""
  text_tokenizer_lib.train_text_tokenizer(
    ["a rooster stands on a red circle", "what does the image show?"], 300
  ).save(folder)


def make(name: str, folder, tokenizer, sizes=SIZES, **save):
  """Saves a random model of a family, away from its tame start.

  Args:
    name: of `FAMILIES`.
    folder: to save it in.
    tokenizer: folder of a text tokenizer, which is copied.
    sizes: of its config.
    **save: arguments of `save_pretrained`.

  Returns:
    transformers' model.
  """
  kind, changes = FAMILIES[name]
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind}Config")(
    **(sizes | changes), attn_implementation="eager"
  )
  model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight += 0.2 * torch.randn_like(weight)
  model.save_pretrained(folder, **save)
  for file in pathlib.Path(tokenizer).iterdir():
    shutil.copy(file, folder)
  return model


@torch.no_grad()
def their_logits(model, ids) -> np.ndarray:
  """Returns transformers' logits of ids [B, T]."""
  return model(torch.as_tensor(np.asarray(ids))).logits.numpy()


def _run(loaded: loading.LoadedLlm):
  """Returns the compiled model: (ids [B, T], ...) -> logits, cache."""
  run = jax.jit(llama_lib.Llama(loaded.llama).apply)

  def call(ids, *args):
    ids = jnp.asarray(ids)[..., None]
    return run({"params": loaded.params}, ids, *args)

  return call


def error(ours, theirs) -> float:
  """Returns the largest difference, divided by the largest entry."""
  theirs = np.asarray(theirs)
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def forward_error(loaded, model, ids) -> float:
  """Compares whole sequences [B, T]."""
  return error(_run(loaded)(ids)[0], their_logits(model, ids))


def cached_error(loaded, model, ids) -> float:
  """Compares half a sequence as a prompt and the rest token by token."""
  run, half = _run(loaded), ids.shape[1] // 2
  cache = llama_lib.init_cache(loaded.llama, *ids.shape)
  logits, cache = run(ids[:, :half], None, None, cache)
  steps = [logits]
  for t in range(half, ids.shape[1]):
    logits, cache = run(ids[:, t : t + 1], None, None, cache)
    steps.append(logits)
  return error(jnp.concatenate(steps, 1), their_logits(model, ids))


def padded_error(loaded, model, ids) -> float:
  """Compares prompts of different lengths, padded on the left on both sides."""
  T = max(LENGTHS)
  mask = np.arange(T) >= T - np.array(LENGTHS)[:, None]
  ids = np.where(mask, ids[: len(LENGTHS), :T], 0)
  positions = np.maximum(mask.cumsum(1) - 1, 0)
  ours, _ = _run(loaded)(
    ids, jnp.asarray(positions), jnp.asarray(mask, jnp.int32)
  )
  with torch.no_grad():
    theirs = model(
      torch.as_tensor(ids),
      attention_mask=torch.as_tensor(mask.astype(np.int64)),
      position_ids=torch.as_tensor(positions),
    ).logits.numpy()
  return error(np.asarray(ours)[mask], theirs[mask])


def packed_error(loaded, model, ids) -> float:
  """Compares sequences in one row with each alone."""
  parts = [row[:n] for row, n in zip(ids, LENGTHS)]
  positions = np.concatenate([np.arange(n) for n in LENGTHS])
  segments = np.repeat(np.arange(len(LENGTHS)) + 1, LENGTHS)
  ours, _ = _run(loaded)(
    np.concatenate(parts)[None],
    jnp.asarray(positions)[None],
    jnp.asarray(segments)[None],
  )
  theirs = [their_logits(model, part[None])[0] for part in parts]
  return error(ours[0], np.concatenate(theirs))


def greedy_agreement(loaded, model, prompts) -> float:
  """Returns the share of prompts, of ids [n] each, that both continue alike."""
  prompts = [np.asarray(prompt) for prompt in prompts]
  K = loaded.llama.vocab_size
  grammar = sampling.make_grammar(
    K,
    valid=np.zeros(K, bool),
    control_ids=(),
    image_start=None,
    image_end=None,
    stop_ids=[loaded.text_tokenizer.eos_id],
    codes_per_image=0,
    vocab_size=K,
    allow_images=False,
  )
  answers = sampling.generate(
    loaded.llama,
    loaded.params,
    [prompt[:, None].astype(np.int32) for prompt in prompts],
    grammar,
    sampling.SamplingConfig(temperature=0.0, max_new_tokens=NEW_TOKENS),
    jax.random.key(0),
  )
  same = 0
  for prompt, answer in zip(prompts, answers):
    theirs = model.generate(
      torch.as_tensor(prompt)[None],
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      max_new_tokens=NEW_TOKENS,
      do_sample=False,
      eos_token_id=loaded.text_tokenizer.eos_id,
      pad_token_id=0,
    )[0, len(prompt) :].tolist()
    if theirs and theirs[-1] == loaded.text_tokenizer.eos_id:
      theirs.pop()
    same += theirs == [int(i) for i in np.ravel(answer)]
  return same / len(prompts)


def measure(name: str, folder: pathlib.Path) -> dict[str, float]:
  """Takes one architecture there and back.

  Args:
    name: of `FAMILIES`.
    folder: for the files; empty.

  Returns:
    Errors by the names of the module's docstring, and "greedy".
  """
  save_tokenizer(folder / "tokenizer")
  model = make(name, folder / "theirs", folder / "tokenizer")
  run = importing.import_checkpoint(folder / "theirs", folder / "run")
  loaded = loading.load_llm(run)
  ids = np.random.default_rng(0).integers(4, SIZES["vocab_size"], (5, 40))
  found = {
    "forward": forward_error(loaded, model, ids),
    "cached": cached_error(loaded, model, ids),
    "padded": padded_error(loaded, model, ids),
    "packed": packed_error(loaded, model, ids),
  }
  back = transformers.AutoModelForCausalLM.from_pretrained(
    exporting.export(loaded, folder / "back")
  ).eval()
  found["round trip"] = error(their_logits(back, ids), their_logits(model, ids))
  prompts = [row[: 4 + 3 * i] for i, row in enumerate(ids)]
  found["greedy"] = greedy_agreement(loaded, model, prompts)
  return found


def peak_anonymous_bytes(*arguments: str) -> tuple[int, float]:
  """Runs a command of this package; returns its peak and its seconds."""
  start, peak = time.perf_counter(), 0
  process = subprocess.Popen([sys.executable, "-m", *arguments])
  while process.poll() is None:
    try:
      status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
      break
    lines = [x.split() for x in status.splitlines() if x.startswith("RssAnon")]
    peak = max([peak, *(1024 * int(line[1]) for line in lines)])
    time.sleep(0.005)
  if process.wait():
    raise SystemExit(f"{' '.join(arguments)} failed")
  return peak, time.perf_counter() - start


def memory(folder: pathlib.Path, sizes) -> list[tuple[str, int, float]]:
  """Imports and exports a model in processes of their own.

  Args:
    folder: for the files; empty.
    sizes: of the model.

  Returns:
    What was done, peak bytes, seconds.
  """
  save_tokenizer(folder / "tokenizer")
  make("llama", folder / "theirs", folder / "tokenizer", sizes)
  return [
    (
      "import",
      *peak_anonymous_bytes(
        "unicode_jax.convert",
        f"--path={folder / 'theirs'}",
        f"--out={folder / 'run'}",
      ),
    ),
    (
      "export",
      *peak_anonymous_bytes(
        "unicode_jax.export",
        f"--workdir={folder / 'run'}",
        f"--out={folder / 'back'}",
      ),
    ),
  ]


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--families", nargs="+", default=list(FAMILIES))
  parser.add_argument(
    "--parameters", type=float, default=400, help="million; 0 for no memory"
  )
  parser.add_argument("--runs", nargs="+", default=[], type=pathlib.Path)
  args = parser.parse_args()
  print(
    f"transformers {transformers.__version__}, torch {torch.__version__}, jax "
    f"{jax.__version__}, float32 on {jax.default_backend()}\n"
  )
  titles = ["forward", "cached", "padded", "packed", "round trip", "greedy"]
  print("| architecture | " + " | ".join(titles) + " |")
  print("|---" * (len(titles) + 1) + "|")
  with tempfile.TemporaryDirectory() as folder:
    for name in args.families:
      found = measure(name, pathlib.Path(folder, name))
      cells = [f"{found[title]:.1e}" for title in titles[:-1]]
      print(f"| {name} | {' | '.join(cells)} | {found['greedy']:.0%} |")
  if not args.parameters:
    return
  # Four times as wide as deep; a layer has 11 squares of its width or so.
  layers = max(1, round((args.parameters * 1e6 / 11 / 64**2) ** (1 / 3)))
  sizes = SIZES | {
    "vocab_size": 32000,
    "hidden_size": 64 * layers,
    "num_hidden_layers": layers,
    "intermediate_size": 8 * 64 * layers // 3,
  }
  with tempfile.TemporaryDirectory() as folder:
    base = memory(pathlib.Path(folder), SIZES)
  with tempfile.TemporaryDirectory() as folder:
    large = memory(pathlib.Path(folder), sizes)
    weights = pathlib.Path(folder, "theirs").glob("*.safetensors")
    size = sum(file.stat().st_size for file in weights)
  print(f"\n{size / 2**30:.2f} GiB in float32:\n")
  print("| | peak over the model's size | seconds |\n|---|---|---|")
  for (what, low, _), (_, peak, seconds) in zip(base, large):
    print(f"| {what} | {(peak - low) / size:.2f} | {seconds:.1f} |")
  for run in args.runs:
    with tempfile.TemporaryDirectory() as folder:
      peak, seconds = peak_anonymous_bytes(
        "unicode_jax.export", f"--workdir={run}", f"--out={folder}/out"
      )
      files = pathlib.Path(folder).glob("out/*.safetensors")
      size = sum(file.stat().st_size for file in files)
    low = dict((what, low) for what, low, _ in base)["export"]
    print(
      f"| export of {run.name} | {(peak - low) / size:.2f} | {seconds:.1f} |"
    )


if __name__ == "__main__":
  main()
