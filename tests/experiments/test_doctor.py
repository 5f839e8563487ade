"""The doctor's command: its lines, its exit codes, its file."""

import json
import sys
from pathlib import Path

import pytest

import bsjax.study.doctor
from bsjax.study import run_command
from bsjax.study.doctor import CHECKS
from experiments import doctor

ROOT = Path(__file__).parents[2]
SUM = """
import dataclasses
import jax
from bsjax.workloads import load_workload

def make():
  good = load_workload("quadratic")
  def train_loss(params, model_state, batch, key):
    return jax.vmap(good.example_loss, (None, None, 0))(params, model_state, batch).sum(), model_state
  return dataclasses.replace(good, train_loss=train_loss)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
  """Keeps the checks that compile little."""
  few = {name: CHECKS[name] for name in ("arrays", "mean", "data", "metrics")}
  monkeypatch.setattr(bsjax.study.doctor, "CHECKS", few)


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
  doctor._FLAGS.unparse_flags()
  for name in list(doctor._FLAGS):
    doctor._FLAGS[name].unparse()
  monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
  return run_command(
    doctor._prepare_from_flags, documentation="", module="experiments.doctor", flag_values=doctor._FLAGS
  )


def test_nothing_to_fix_is_exit_code_0(tmp_path: Path, monkeypatch, capsys) -> None:
  monkeypatch.chdir(tmp_path)
  assert command(["--workload=quadratic"], monkeypatch) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[:2] for line in lines] == [["ok", name] for name in ("arrays", "mean", "data", "metrics")]
  assert list(tmp_path.iterdir()) == []


def test_a_smoke_run_makes_few_checks(monkeypatch, capsys) -> None:
  assert command(["--workload=quadratic", "--smoke"], monkeypatch) == 0
  assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["ok", "metrics"]]
  assert [d.check for d in doctor.run("quadratic", smoke=True)] == ["metrics"]


def test_something_to_fix_is_exit_code_1_and_the_file_says_the_same(tmp_path: Path, monkeypatch, capsys) -> None:
  (tmp_path / "own.py").write_text(SUM)
  workload, out = f"{tmp_path / 'own.py'}:make", tmp_path / "out"
  assert command([f"--workload={workload}", f"--out={out}"], monkeypatch) == 1
  lines = capsys.readouterr().out.splitlines()
  content = json.loads((out / "doctor.json").read_text())
  assert [f"{d['status']:<5} {d['check']:<14} {d['message']}" for d in content["diagnoses"]] == lines
  assert [d["check"] for d in content["diagnoses"] if d["status"] == "fix"] == ["mean"]
  numbers = content["diagnoses"][1]["numbers"]
  assert numbers["loss_twice"] == pytest.approx(2 * numbers["loss"])
  assert content["workload"] == workload
  assert len(content["workload_sha256"]) == 64
  # The user mends the file and looks again: the folder is the same, the workload is not.
  (tmp_path / "own.py").write_text(SUM.replace(".sum()", ".mean()"))
  assert command([f"--workload={workload}", f"--out={out}"], monkeypatch) == 0
  assert "fix" not in {d["status"] for d in json.loads((out / "doctor.json").read_text())["diagnoses"]}


def test_from_python_nothing_is_printed_or_written(tmp_path: Path, monkeypatch, capsys) -> None:
  monkeypatch.chdir(tmp_path)
  assert [(d.check, d.status) for d in doctor.run("quadratic")] == [
    (name, "ok") for name in ("arrays", "mean", "data", "metrics")
  ]
  assert capsys.readouterr().out == ""
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workload=nowhere"], "'nowhere' is unknown"),
    (["--out=README.md"], "--out=README.md is a file, wanted a folder"),
    (["--batch_sizes=3"], "batch_sizes"),
    (["words"], "unexpected argument 'words'"),
  ],
)
def test_bad_flag_is_one_line(arguments: list[str], message: str, monkeypatch, capsys) -> None:
  monkeypatch.chdir(ROOT)
  assert command(["--workload=quadratic", *arguments], monkeypatch) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.count("\n") == 1
  assert captured.out == ""


def test_help_is_one_screen(monkeypatch, capsys) -> None:
  monkeypatch.setattr(sys, "argv", ["doctor", "--help"])
  code = run_command(
    doctor._prepare_from_flags, documentation=doctor.__doc__, module="experiments.doctor", flag_values=doctor._FLAGS
  )
  shown = capsys.readouterr().out
  assert code == 0
  assert "package.module:function" in shown
  assert len(shown.splitlines()) <= 40
  assert max(map(len, shown.splitlines())) <= 140
