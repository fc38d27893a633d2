"""Exports a run to PyTorch, as a Hugging Face folder.

  python -m unicode_jax.export --workdir=RUN --out=DIR

transformers' AutoModelForCausalLM and AutoTokenizer load the language model
with no code of this project, and so does what serves such folders. To read and
draw pictures the folder brings a `modeling_unicode.py` of plain PyTorch, and a
model card that says how. `--workdir` is a run of stage I or II, or what
`unicode_jax.convert` made.
"""

import os
import re

from absl import flags

from unicode_jax import command, config as config_lib
from unicode_jax.convert import folders


def main() -> None:
  """Exports what the flags name.

  Raises:
    ConfigError: If a flag names nothing that can be exported.
  """
  values = flags.FLAGS
  out = folders.new(values.out)
  if values.license and not re.fullmatch(r"[\w.+-]+", values.license):
    raise config_lib.ConfigError(
      f"--license={values.license!r} must be a name as model hubs spell it, "
      "such as apache-2.0"
    )
  stage = config_lib.read_run(values.workdir).stage
  os.environ["JAX_PLATFORMS"] = "cpu"  # Only the host's memory has to suffice.
  # JAX takes seconds to import, so only flags that can work get to it.
  from unicode_jax import loading
  from unicode_jax.convert import exporting

  if stage in ("pretrain", "instruct"):
    loaded = loading.load(values.workdir, values.step)
  else:
    loaded = loading.load_llm(values.workdir, values.step)
  exporting.export(loaded, out, values.dtype, values.license)
  print(f"exported to {out}")


def run() -> None:
  """Runs the command; exit statuses are those of `unicode_jax.command`."""
  flags.DEFINE_string("workdir", None, "Run folder.", required=True)
  flags.DEFINE_string("out", None, "Folder to make.", required=True)
  flags.DEFINE_integer(
    "step", None, "Which checkpoint; the newest if unset.", lower_bound=0
  )
  flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16", "float16"],
    "Of the language model's weights; they are trained in float32.",
  )
  flags.DEFINE_string(
    "license", None, "Of the weights, for the model card, such as apache-2.0."
  )
  command.run(main, "nothing was made")


if __name__ == "__main__":
  run()
