"""A user's file or module: what is found, and what goes wrong in one clear line, through the command."""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bsjax.data import Source
from bsjax.study import run_command
from bsjax.workloads import check_workload, load_workload, workload_settings
from experiments import doctor

ROOT = Path(__file__).parents[2]
GOOD = (ROOT / "docs" / "examples" / "my_model.py").read_text()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
  """Starts every test in a folder of its own, and forgets the modules that it imports."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  yield tmp_path
  for name in [name for name in sys.modules if name.split(".")[0] in ("package", "mine", "neighbour")]:
    del sys.modules[name]


def refusal(workload: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
  """Runs the command in this process and returns its one line of error."""
  doctor._FLAGS.unparse_flags()
  monkeypatch.setattr(sys, "argv", ["doctor", f"--workload={workload}"])
  code = run_command(
    doctor._prepare_from_flags, documentation="", module="experiments.doctor", flag_values=doctor._FLAGS
  )
  assert code == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("error: ")
  assert captured.err.count("\n") == 1
  return captured.err.removesuffix("\n")


MISSING = "which is not installed: pip install not_a_package (or the distribution that holds it), or start in the folder that holds it"
BAD = {
  # what the file holds, and the end of the line that it earns
  "raises on import": (
    "x = 1\nraise RuntimeError('no such\\nthing')",
    "the file failed with RuntimeError: no such (line 2 of own.py)",
  ),
  "exits on import": ("import sys\nsys.exit(3)", "the file failed with SystemExit: 3 (line 2 of own.py)"),
  "raises in the function": (
    "def make():\n  return 1 / 0",
    "make failed with ZeroDivisionError: division by zero (line 2 of own.py)",
  ),
  "fails in a library": (
    "import jax.numpy as jnp\ndef make():\n  return jnp.ones(2) @ jnp.ones(3)",
    "(line 3 of own.py)",
  ),
  "fails in bsjax": (
    "from bsjax.probes.leaves import dot\ndef make():\n  return dot(None, None)",
    "'NoneType' object has no attribute 'dtype' (line 3 of own.py)",
  ),
  "returns the wrong thing": ("def make(): return 3", "own.py:make returned int, wanted a bsjax.workloads.Workload"),
  "returns nothing": ("def make(): pass", "returned NoneType, wanted a bsjax.workloads.Workload"),
  "missing package": (
    "import not_a_package.part",
    f"needs the package not_a_package, {MISSING} (line 1 of own.py)",
  ),
  "missing package in the function": (
    "def make():\n  import not_a_package",
    f"needs the package not_a_package, {MISSING} (line 2 of own.py)",
  ),
  "missing part of a package": (
    "import numpy.nothing",
    "the file failed with ModuleNotFoundError: No module named 'numpy.nothing' (line 1 of own.py)",
  ),
  "syntax error": ("x = 1\n\ndef make(:\n", "syntax error in line 3 of own.py: invalid syntax"),
  "indentation": (
    "def make():\nreturn 1",
    "syntax error in line 2 of own.py: expected an indented block after function definition on line 1",
  ),
  "another function": ("def other(): return 3", "no function 'make' in own.py; it has other"),
  "no function": ("make = 3", "no function 'make' in own.py; it has none"),
  "relative import": (
    "from .model import net",
    "give package.module:function, from the folder that holds the package (line 1 of own.py)",
  ),
  "arguments of its own": (
    "def make(width, depth, data_dir): pass",
    "the function needs width, depth, and gets only data_dir, fake_data, manual_dir: give defaults",
  ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_file_is_one_line(text: str, message: str, folder: Path, capsys, monkeypatch) -> None:
  (folder / "own.py").write_text(text)
  line = refusal("own.py:make", capsys, monkeypatch)
  assert "own.py:make" in line
  assert line.replace(f"{folder}/", "").endswith(message)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (('["w"] +', '["v"] +'), "example_loss failed with KeyError: 'v' (line 20 of own.py)"),
    (('params={"w"', 'parameters={"w"'), "init failed with TypeError"),
    (("return Variables(", "return dict("), "init returned dict, wanted bsjax.types.Variables(params, model_state)"),
    (('"label"])\n\n\ndef example_m', '"label"])[None]\n\n\ndef example_m'), "example_loss returned shape (1,), wanted a sc"),
    (("target=target", "output_loss=example_loss, target=target"), "example_outputs and output_loss belong together"),
    (('"validation_accuracy"', '"accuracy"'), "target metric 'accuracy' is not validation_ + one of ['accuracy', 'loss']"),
    (('"max"', '"higher"'), "target.direction='higher', wanted 'max' or 'min'"),
    (("0.93", "float('nan')"), "target.goal=nan, wanted a finite number"),
    (("target=target", "target='accuracy'"), "target is of type str, wanted a bsjax.workloads.Target"),
    (("preset=preset", "preset={}"), "preset is of type dict, wanted a bsjax.workloads.Preset"),
    (("(1, 8, 64, 512)", "()"), "preset has batch_sizes=() and reference_batch_size=32, wanted whole numbers from 1"),
    (("(1, 8, 64, 512)", "(8.0, 64.0)"), "preset has batch_sizes=(8.0, 64.0)"),
    (("target=target", "batch_norm='Running', target=target"), "batch_norm='Running', wanted one of none, running, batch"),
    (("mean_train_loss(example_loss)", "None"), "train_loss is None, wanted a function"),
    (("mean_train_loss(example_loss)", "lambda p, s, b, k: p['b'][0]"), "train_loss returned shape (), wanted (mean loss"),
    (("mean_train_loss(example_loss)", "lambda p, s, b, k: (p, s, k)"), "train_loss returned 3 values, wanted (mean loss"),
    (("mean_train_loss(example_loss)", "lambda p, s, b, k: b['images']"), "train_loss failed with KeyError: 'images'"),
    (("mean_train_loss(example_loss)", "lambda p, s, b, k: (p['b'], s)"), "train_loss returned shape (10,), wanted a scal"),
    (('"b": jnp.zeros(10)', '"b": 0.0'), "params['b'] is the Python number 0.0, wanted a floating-point array"),
    (('"b": jnp.zeros(10)', '"b": jnp.zeros(10, int)'), "params['b'] is int32, wanted a floating-point array"),
    (('"label"])\n\n\ndef example_m', '"label"]).astype("bfloat16")\n\n\ndef example_m'), "example_loss is bfloat16, wanted f"),
    (('"label"])\n\n\ndef example_m', '"label"]).astype(int)\n\n\ndef example_m'), "example_loss is int32, wanted float32, w"),
    (('{"loss": example_loss(params, model_state, example), ', "0 if True else {"), "example_metrics returned shape (), wanted s"),
    (("validation_accuracy", "validation_f1"), "target metric 'validation_f1' is not validation_ + one of ['accuracy', 'l"),
    (('load_source("digits", split)', "split"), "a split is of type str, wanted a bsjax.data.Source"),
    (('"digits"', '"digit"'), "unknown data set 'digit'; known are"),
    (("jnp.argmax(", "jnp.argmux("), "example_metrics failed with AttributeError: module 'jax.numpy' has no attribute"),
  ],
  ids=lambda value: value[1] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_bad_workload_is_one_line(change, message: str, folder: Path, capsys, monkeypatch) -> None:
  assert change[0] in GOOD
  (folder / "own.py").write_text(GOOD.replace(*change))
  assert message in refusal("own.py:make_workload", capsys, monkeypatch).replace(f"{folder}/", "")


@pytest.mark.parametrize(
  ("workload", "message"),
  [
    ("nowhere.py:f", "'nowhere.py' is not a Python file: give path/to/file.py:function, or package.module:function"),
    ("README.md:f", "no module 'README' in {folder}, or installed: give path"),
    ("package.nothing:f", "no module 'package.nothing' in {folder}, or installed: give path"),
    ("some/where:f", "'some/where' is not a Python file, nor the name of a module: give path"),
    ("package:f", "no function 'f' in package; it has none"),
    ("package.wrong:f", "the module failed with ValueError: x (line 1 of {folder}/package/wrong.py)"),
    ("package.lacking:f", "needs the package not_a_package, which is not installed: pip install not_a_package"),
    ("digits_mpl", "'digits_mpl' is unknown: use one of digits_mlp,"),
    (":f", "'' is not a Python file, nor the name of a module"),
  ],
)
def test_what_cannot_be_found_is_one_line(workload: str, message: str, folder: Path, capsys, monkeypatch) -> None:
  (folder / "package").mkdir()
  (folder / "package" / "__init__.py").touch()
  (folder / "package" / "wrong.py").write_text("raise ValueError('x')")
  (folder / "package" / "lacking.py").write_text("import not_a_package")
  assert message.format(folder=folder) in refusal(workload, capsys, monkeypatch)


def test_a_module_is_imported_from_the_current_folder(folder: Path) -> None:
  """With relative imports, which a file alone cannot have; its settings hold the hash of the module's source."""
  package = folder / "mine" / "models"
  package.mkdir(parents=True)
  (package / "net.py").write_text(GOOD)
  (package / "study.py").write_text("from .net import make_workload as build\ndef make(): return build()\n")
  assert load_workload("mine.models.study:make").name == "my_softmax_regression"
  assert workload_settings("mine.models.study:make") == {
    "workload": "mine.models.study:make",
    "workload_sha256": hashlib.sha256((package / "study.py").read_bytes()).hexdigest(),
  }


def test_a_file_imports_its_neighbours(folder: Path) -> None:
  """As `python there/study.py` could, also when the function is called; what was found before still comes first."""
  (folder / "there").mkdir()
  (folder / "there" / "neighbour.py").write_text(GOOD)
  (folder / "there" / "study.py").write_text(
    "import neighbour\ndef make():\n  from neighbour import make_workload\n  return make_workload()\n"
  )
  before = list(sys.path)
  for _ in range(2):
    assert load_workload("there/study.py:make").name == "my_softmax_regression"
  assert sys.path == [*before, str(folder / "there")]


def test_settings_of_a_file_hold_its_hash_and_of_a_name_none(folder: Path) -> None:
  (folder / "own.py").write_text(GOOD)
  assert workload_settings("own.py:make_workload")["workload_sha256"] == hashlib.sha256(GOOD.encode()).hexdigest()
  assert workload_settings("digits_mlp") == {"workload": "digits_mlp"}


def test_a_file_may_define_dataclasses_and_take_the_folders(folder: Path) -> None:
  """Dataclasses with postponed annotations look for their module by name."""
  text = "from __future__ import annotations\nimport dataclasses\n" + GOOD.split('"""\n', 1)[1]
  text += "\n\n@dataclasses.dataclass\nclass Net:\n  width: int = 3\n"
  text += (
    "\n\ndef make(data_dir, manual_dir=None, *rest, **more):\n  assert data_dir == 'there'\n  return make_workload()\n"
  )
  (folder / "own.py").write_text(text)
  assert load_workload("own.py:make", data_dir="there").name == "my_softmax_regression"


def test_the_whole_chain_is_kept_for_who_debugs(folder: Path) -> None:
  (folder / "own.py").write_text("def make(): raise KeyError('x')")
  with pytest.raises(ValueError, match=re.escape("make failed with KeyError")) as caught:
    load_workload("own.py:make")
  causes, error = [], caught.value.__cause__
  while error is not None:
    causes.append(type(error))
    error = error.__cause__
  assert causes[-1] is KeyError


@pytest.mark.parametrize(
  ("arrays", "lengths"),
  [({"image": np.ones((3, 8, 8, 1)), "label": np.ones(2)}, "{'image': 3, 'label': 2}"), ({}, "{}")],
)
def test_arrays_of_different_lengths_are_refused(arrays, lengths) -> None:
  """In a compiled program the label of the third image would be that of the second."""
  workload = dataclasses.replace(load_workload("quadratic"), validation=Source("mine", "validation", arrays))
  message = f"own.py:f: split 'validation' of 'mine' has arrays of lengths {lengths}, wanted at least one array, all of"
  with pytest.raises(ValueError, match=re.escape(message)):
    check_workload(workload, "own.py:f")
