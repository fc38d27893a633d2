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
  from unicode_jax.convert import importing

  print(f"imported to {importing.import_checkpoint(path, out)}")


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
