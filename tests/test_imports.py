"""Imports go one way: the table of docs/architecture.md, checked by parsing every file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
  # room: the rooms it may import
  "types": set(),
  "tree": {"types"},
  "conv": {"types"},
  "probes": {"types", "tree", "conv"},
  "optim": {"types", "tree"},
  "models": {"types", "tree", "conv"},
  "data": {"types", "tree"},
  "records": set(),
  "workloads": {"types", "tree", "models", "data"},
  "train": {"types", "tree", "workloads", "optim", "probes", "data", "records"},
  "analysis": {"records"},
  "figures": {"records", "analysis"},
  "report": {"records", "analysis", "figures"},
  "study": {"types", "tree", "probes", "optim", "data", "records", "workloads", "train", "analysis", "report"},
}
CONFINED = {
  # outside package: the rooms that may import it
  "flax": {"models"},
  "tensorflow_datasets": {"data"},
  "grain": {"data"},
  "orbax": {"train"},
  "matplotlib": {"figures"},
  "jinja2": {"report"},
  "tqdm": {"study"},
  "absl": {"study", "experiments", "scripts", "data"},  # data: absl.logging only, to quieten TFDS
}
WITHOUT_JAX = {"records", "analysis", "figures", "report"}
FILES = sorted([*ROOT.glob("bsjax/**/*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("scripts/*.py")])


def imported(path: Path) -> list[str]:
  """Lists the dotted names a file imports, inside functions too."""
  names: list[str] = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names.append(node.module or "")
  return names


def room_of(path: Path) -> str:
  parts = path.relative_to(ROOT).parts
  return parts[0] if parts[0] != "bsjax" else Path(parts[1]).stem if len(parts) == 2 else parts[1]


def faults(room: str, names: list[str]) -> list[str]:
  """Names the imports that the tables forbid."""
  found = []
  for name in names:
    top, *rest = name.split(".")
    if top == "bsjax" and rest and room in ROOMS and rest[0] != room and rest[0] not in ROOMS[room]:
      found.append(name)
    if top == "experiments" and room in ROOMS:
      found.append(name)
    if top in CONFINED and room not in CONFINED[top]:
      found.append(name)
    if top in ("jax", "jaxlib", "optax") and room in WITHOUT_JAX:
      found.append(name)
  return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_table(path: Path) -> None:
  assert faults(room_of(path), imported(path)) == []


def test_every_room_is_in_the_table() -> None:
  assert {room_of(path) for path in FILES} - {"__init__", "experiments", "scripts"} <= ROOMS.keys()


def test_the_table_forbids() -> None:
  """The checker itself can fail: one case of each kind."""
  assert faults("probes", ["bsjax.data.order"]) == ["bsjax.data.order"]
  assert faults("analysis", ["jax.numpy", "matplotlib.figure"]) == ["jax.numpy", "matplotlib.figure"]
  assert faults("workloads", ["flax.linen", "experiments.batch_size_study"]) == [
    "flax.linen",
    "experiments.batch_size_study",
  ]


def test_reading_records_needs_no_jax() -> None:
  """A record directory can be read, judged and drawn where JAX is not installed."""
  import subprocess
  import sys

  code = "import sys; sys.modules['jax'] = None; import bsjax.records, bsjax.analysis, bsjax.figures, bsjax.report"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
