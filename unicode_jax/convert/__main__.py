"""Imports a pretrained language model of the PyTorch world.

  python -m unicode_jax.convert --from=hf --path=DIR --out=runs/smollm2

`--path` is a Hugging Face folder with safetensors (LLaMA 1-3, Vicuna, SmolLM2,
Mistral, Qwen2, Qwen2.5, Qwen3), or a GGUF file of the LLaMA architecture.
Nothing is unpickled.
"""

from absl import app, flags

from unicode_jax import config as config_lib

_FROM = flags.DEFINE_enum(
  "from", "hf", ["hf"], "What --path is: Hugging Face's."
)
_PATH = flags.DEFINE_string(
  "path", None, "Folder with safetensors, or GGUF file.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Run folder to make.", required=True)


def main(argv):
  """Imports what the flags name."""
  del argv
  from unicode_jax.convert import importing  # pylint: disable=g-import-not-at-top

  try:
    out = importing.import_checkpoint(_PATH.value, _OUT.value)
  except config_lib.ConfigError as error:
    raise SystemExit(f"error: {error}") from None
  print(f"imported to {out}")


if __name__ == "__main__":
  app.run(main)
