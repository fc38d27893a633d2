"""Fills in a template of YAML: `render.py FILE NAME=VALUE ... -- WORDS`.

Every $name becomes JSON, which YAML contains, so that no value can be taken for
syntax: a number for the names in NUMBERS, otherwise a quoted string. $command
is the list of what stands behind `--`, `final_statuses=2 3` a list of numbers.
Standard library alone; launch/gke.sh runs it.
"""

import json
import pathlib
import string
import sys

NUMBERS = {"slices", "hosts", "chips", "max_restarts", "grace_seconds"}


def render(template: str, values: dict[str, str], command: list[str]) -> str:
  """Returns the template with all names filled in.

  Args:
    template: YAML with $names in place of whole values.
    values: What each name stands for.
    command: The program and its arguments.

  Raises:
    KeyError: If the template has a name that has no value.
  """
  filled = {
    name: json.dumps(int(value) if name in NUMBERS else value)
    for name, value in values.items()
  }
  statuses = [int(status) for status in values["final_statuses"].split()]
  filled["final_statuses"] = json.dumps(statuses)
  # Kubernetes would expand $(NAME).
  words = [word.replace("$(", "$$(") for word in command]
  filled["command"] = json.dumps(words)
  body = template[template.index("apiVersion:") :]
  return string.Template(body).substitute(filled)


def main(argv: list[str]) -> None:
  """Prints the filled-in template."""
  split = argv.index("--")
  file, *pairs = argv[1:split]
  values = dict(pair.split("=", 1) for pair in pairs)
  template = pathlib.Path(file).read_text(encoding="utf-8")
  sys.stdout.write(render(template, values, argv[split + 1 :]))


if __name__ == "__main__":
  main(sys.argv)
