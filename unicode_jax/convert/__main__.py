"""Imports a pretrained language model of the PyTorch world.

  python -m unicode_jax.convert --from=hf --path=DIR --out=runs/smollm2

`--path` is a Hugging Face folder with safetensors (LLaMA 1-3, Vicuna, SmolLM2,
Mistral, Qwen2, Qwen2.5, Qwen3), or a GGUF file of the LLaMA architecture.
Nothing is unpickled.
"""

import os

from absl import flags

from unicode_jax import command
from unicode_jax.convert import folders


def main() -> None:
  """Imports what the flags name.

  Raises:
    ConfigError: If a flag names nothing that can be imported.
  """
  values = flags.FLAGS
  out, path = folders.new(values.out), folders.source(values.path)
  os.environ["JAX_PLATFORMS"] = "cpu"  # Only the host's memory has to suffice.
  # JAX takes seconds to import, so only flags that can work get to it.
  from unicode_jax import loading
  from unicode_jax.convert import importing
  from unicode_jax.data import text_tokenizer

  importing.import_checkpoint(path, out)
  print(f"imported to {out}")
  tokenizer = text_tokenizer.load_text_tokenizer(out / loading.TEXT_TOKENIZER)
  spare = tokenizer.spare_tokens()
  start, end = spare[-2:] if len(spare) > 1 else ("TOKEN", "TOKEN")
  print(
    "stage I from it: python -m unicode_jax.main --config=configs/pretrain.py "
    f"--config.llm_from={out} --config.text.image_start='{start}' "
    f"--config.text.image_end='{end}'"
  )
  print(
    "the two tokens delimit images: any that text never holds"
    + (f", such as {', '.join(spare[:16])}" if len(spare) > 1 else "")
  )


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  flags.DEFINE_enum("from", "hf", ["hf"], "What --path is: Hugging Face's.")
  flags.DEFINE_string(
    "path", None, "Folder with safetensors, or GGUF file.", required=True
  )
  flags.DEFINE_string("out", None, "Run folder to make.", required=True)
  command.run(main, "nothing was made")


if __name__ == "__main__":
  run()
