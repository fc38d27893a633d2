"""Imports a pretrained language model of the PyTorch world.

  python -m unicode_jax.convert --from=hf --path=DIR --out=runs/smollm2

`--path` is a Hugging Face folder with safetensors (LLaMA 1-3, Vicuna, SmolLM2,
Mistral, Qwen2, Qwen2.5, Qwen3), or a GGUF file of the LLaMA architecture.
Nothing is unpickled.
"""

from collections.abc import Sequence
import os
import sys

from absl import app, flags, logging

from unicode_jax import config as config_lib


def main(argv: Sequence[str]) -> int:
  """Imports what the flags name.

  Args:
    argv: What is left of the command line after flags: the program's name.

  Returns:
    The exit status.

  Raises:
    ConfigError: If a flag names nothing that can be imported.
  """
  if len(argv) > 1:
    raise config_lib.ConfigError(f"unexpected argument {argv[1]!r}")
  values = flags.FLAGS
  if not values["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # what libraries say is not progress
  os.environ["JAX_PLATFORMS"] = "cpu"  # Only the host's memory has to suffice.
  # JAX takes seconds to import, so only flags that can work get to it.
  from unicode_jax.convert import importing

  print(f"imported to {importing.import_checkpoint(values.path, values.out)}")
  return 0


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.main`."""
  flags.DEFINE_enum("from", "hf", ["hf"], "What --path is: Hugging Face's.")
  flags.DEFINE_string(
    "path", None, "Folder with safetensors, or GGUF file.", required=True
  )
  flags.DEFINE_string("out", None, "Run folder to make.", required=True)
  try:
    app.run(main)
  except config_lib.ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted: nothing was made", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
  run()
