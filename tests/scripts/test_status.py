"""The state of a study, told from its files alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from bsjax.records import append_rows, create_trial, set_status
from scripts.status import main, table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path: Path) -> Path:
  """Four trials: done, diverged twice, and one that is running."""
  for name, kind, size, steps in (
    ("a", "sweep", 1024, 7),
    ("b", "sweep", 8, 0),
    ("c", "sweep", 8, 3),
    ("d", "final", 8, 2),
  ):
    folder = tmp_path / "steps_to_result" / name
    create_trial(folder, {"kind": kind, "config": {"batch_size": size}})
    append_rows(
      folder / "metrics.jsonl", [{"step": step, "examples_seen": size * step} for step in range(1, steps + 1)]
    )
  set_status(tmp_path / "steps_to_result" / "a", "complete", wall_seconds=2.5)
  set_status(tmp_path / "steps_to_result" / "b", "diverged", first_nonfinite_step=1, wall_seconds=0.25)
  set_status(tmp_path / "steps_to_result" / "c", "diverged", first_nonfinite_step=1200, wall_seconds=0.25)
  return tmp_path


def test_counts_by_kind_and_batch_size(out: Path) -> None:
  lines = [line.split() for line in table(out).splitlines()[1:]]
  assert lines == [
    ["steps_to_result", "final", "8", "1", "0", "0", "1", "0", "16", "0"],
    ["steps_to_result", "sweep", "8", "2", "0", "2", "1-1,200", "0", "0", "24", "0"],
    ["steps_to_result", "sweep", "1,024", "1", "1", "0", "0", "0", "7,168", "2"],
    ["all", "4", "1", "2", "1", "0", "7,208", "3"],
  ]


def test_parts_are_counted_by_themselves(out: Path) -> None:
  (out / "steps_to_result" / "d").rename(out / "steps_to_result" / "moved")
  (out / "steps_to_result" / "sgd").mkdir()
  (out / "steps_to_result" / "moved").rename(out / "steps_to_result" / "sgd" / "d")
  lines = [line.split()[:4] for line in table(out).splitlines()[1:]]
  assert lines == [
    ["steps_to_result", "sweep", "8", "2"],
    ["steps_to_result", "sweep", "1,024", "1"],
    ["steps_to_result/sgd", "final", "8", "1"],
    ["all", "4", "1", "2"],
  ]


def test_needs_no_jax_and_reads_a_study_that_is_being_written(out: Path) -> None:
  with open(out / "steps_to_result" / "d" / "metrics.jsonl", "a") as handle:
    handle.write('{"step": 3, "exam')
  program = "import sys; sys.modules['jax'] = None; from scripts.status import main; sys.exit(main(sys.argv[1:]))"
  done = subprocess.run([sys.executable, "-c", program, str(out)], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == table(out) + "\n"


def test_bad_calls_are_one_line(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  assert main([str(tmp_path / "nothing")]) == 2
  assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nothing'} holds no trials")
  (out / "steps_to_result" / "a" / "metrics.jsonl").write_text("{")
  assert main([str(out)]) == 2
  assert "metrics.jsonl is damaged in line 1 of 1" in capsys.readouterr().err
  assert main([]) == 2
  assert main(["--help"]) == 0
  assert "python -m scripts.status" in capsys.readouterr().out
