"""The main command: what it leaves, how it refuses, and that a kill changes nothing."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bsjax.records import RecordError, read_records
from bsjax.study import run_command
from experiments import batch_size_study

ROOT = Path(__file__).parents[2]
CLAIMS = [
  "variance_inverse_b",
  "direction_stable",
  "oscillation",
  "more_steps",
  "generalizes",
  "flat_minima",
  "throughput",
  "linear_scaling",
]
SMALL = {
  "batch_sizes": (4, 64, 512),
  "num_epochs": 2,
  "num_steps": 48,
  "num_rates": 3,
  "tuning_seeds": 2,
  "final_seeds": 3,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("study") / "out"
  report = batch_size_study.run("digits_mlp", folder, **SMALL)
  assert report == folder / "report.html"
  return folder


def test_claims_json(out: Path) -> None:
  claims = json.loads((out / "claims.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
  assert [claim["id"] for claim in claims] == CLAIMS
  for claim in claims:
    assert list(claim) == [
      "id", "statement", "source", "expected", "measured", "ci_low", "ci_high", "unit", "n", "verdict", "figure",
    ]  # fmt: skip
    assert claim["verdict"] in ("holds", "fails", "inconclusive")
  by_id = {claim["id"]: claim for claim in claims}
  assert by_id["variance_inverse_b"]["measured"] == pytest.approx(-1, abs=0.2)


def test_figures_and_report(out: Path) -> None:
  page = (out / "report.html").read_text()
  assert page.count("data:image/png;base64,") == len(CLAIMS)
  assert "http://" not in page.replace("http://www.w3.org", "")
  for claim in CLAIMS:
    assert (out / "figures" / f"{claim}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figures" / f"{claim}.pdf").read_bytes().startswith(b"%PDF")


def test_results_csv_has_a_row_per_trial(out: Path) -> None:
  with open(out / "results.csv", newline="") as handle:
    rows = list(csv.DictReader(handle))
  records = read_records(out / "batch_size_study")
  assert {row["id"] for row in rows} <= {record.id for record in records}
  assert len(rows) == len({row["id"] for row in rows})
  trained = [record for record in records if record.trial["kind"] == "train"]
  assert len([row for row in rows if row["kind"] == "train"]) == len(trained)


def test_three_seeds_at_each_tuned_rate_and_both_budgets(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  records = read_records(out / "batch_size_study")
  for budget in ("epochs", "steps"):
    for batch_size in ("4", "64", "512"):
      rate = study["tuned"][budget][batch_size]["learning_rate"]
      seeds = {
        record.trial["seed"]
        for record in records
        if record.trial["kind"] == "train"
        and record.trial["config"]["batch_size"] == int(batch_size)
        and record.trial["config"]["num_steps"] == study["budgets"][budget]["num_steps"][batch_size]
        and record.trial["hparams"]["learning_rate"] == rate
      }
      assert set(study["final_seeds"]) <= seeds
      assert len(study["final_seeds"]) >= 3


def test_the_test_set_is_read_at_the_end_only(out: Path) -> None:
  for record in read_records(out / "batch_size_study"):
    assert not any("test" in name for row in record.metrics for name in row)
    assert all(row["step"] == record.trial["config"]["num_steps"] for row in record.probes if row["probe"] == "test")


def test_trial_json_says_where_it_comes_from(out: Path) -> None:
  for record in read_records(out / "batch_size_study"):
    assert {
      "id",
      "kind",
      "config",
      "hparams",
      "seed",
      "code_revision",
      "device",
      "jax",
      "command_line",
    } <= record.trial.keys()
    assert record.trial["id"] == record.id


def test_a_second_run_computes_nothing(out: Path) -> None:
  before = {path: path.stat().st_mtime_ns for path in out.glob("batch_size_study/*/*")}
  claims = (out / "claims.json").read_bytes()
  batch_size_study.run("digits_mlp", out, **SMALL)
  assert {path: path.stat().st_mtime_ns for path in out.glob("batch_size_study/*/*")} == before
  assert (out / "claims.json").read_bytes() == claims


def exit_code(arguments: list[str]) -> int:
  """Runs the command in this process."""
  batch_size_study._FLAGS.unparse_flags()
  for name in list(batch_size_study._FLAGS):
    batch_size_study._FLAGS[name].unparse()
  old = sys.argv
  sys.argv = ["batch_size_study", *arguments]
  try:
    return run_command(
      batch_size_study._prepare_from_flags,
      documentation="",
      module="experiments.batch_size_study",
      flag_values=batch_size_study._FLAGS,
    )
  finally:
    sys.argv = old


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
  """Runs the command in this process and returns its one line of error."""
  assert exit_code(arguments) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("error: ")
  assert captured.err.count("\n") == 1
  return captured.err


BAD_FLAGS = [
  (["--nonsense=1"], "nonsense"),
  (["--num_steps=many"], "num_steps=many"),
  (["--num_steps=-1"], "num_steps=-1, wanted at least 1"),
  (["--num_epochs=nan"], "num_epochs=nan, wanted a finite number"),
  (["--optimizer=sdg"], "optimizer=sdg"),
  (["--schedule=cos"], "schedule=cos"),
  (["--scaling_rule=cubic"], "scaling_rule=cubic"),
  (["--workload=digits"], "'digits' is unknown: use one of"),
  (["--workload=nowhere.py:f"], "not a Python file"),
  (["--base_learning_rate=0"], "base_learning_rate=0.0, wanted a finite number above 0"),
  (["--base_learning_rate=-0.1"], "base_learning_rate=-0.1"),
  (["--base_learning_rate=inf"], "base_learning_rate=inf"),
  (["--batch_sizes=1024"], "the training set has 512 examples"),
  (["--batch_sizes=1,x"], "wanted whole numbers, such as 1,8,64, separated by commas"),
  (["--batch_sizes=-4"], "--batch_sizes has -4, wanted at least 1"),
  (["--batch_sizes=1.5"], "wanted whole numbers"),
  (["--final_seeds=1"], "final_seeds=1, wanted at least 3"),
  (["--momentum=1"], "momentum=1.0"),
  (["--weight_decay=-1"], "weight_decay=-1.0"),
  (["--warmup_fraction=2"], "warmup_fraction=2.0"),
  (["--trial_devices=99"], "needs"),
  (["more", "words"], "unexpected argument 'more'"),
]


@pytest.mark.parametrize(
  ("arguments", "message"), BAD_FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_flag_is_one_line_and_touches_nothing(
  arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  folder = tmp_path / "out"
  assert message in refused(["--workload=quadratic", f"--out={folder}", *arguments], capsys)
  assert not folder.exists()


def test_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  (tmp_path / "mine.txt").write_text("mine")
  assert "mine.txt" in refused(["--workload=quadratic", f"--out={tmp_path}"], capsys)
  assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unwritable_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  (tmp_path / "file").write_text("")
  assert "cannot be written" in refused(["--workload=quadratic", f"--out={tmp_path}/file/out"], capsys)


def test_other_settings_are_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
  assert "was started with other settings" in refused(["--workload=quadratic", f"--out={out}"], capsys)


def test_an_edited_workload_file_does_not_continue_the_old_study(tmp_path: Path) -> None:
  mine = tmp_path / "mine.py"
  mine.write_text((ROOT / "docs" / "examples" / "my_model.py").read_text())
  batch_size_study.prepare(f"{mine}:make_workload", tmp_path / "out")
  batch_size_study.prepare(f"{mine}:make_workload", tmp_path / "out")
  mine.write_text(mine.read_text().replace("0.01 *", "0.02 *"))
  with pytest.raises(RecordError, match="workload_sha256 was"):
    batch_size_study.prepare(f"{mine}:make_workload", tmp_path / "out")


KILLED = {
  "batch_sizes": (4, 64),
  "num_epochs": 4.0,
  "num_steps": 64,
  "num_rates": 3,
  "tuning_seeds": 2,
  "final_seeds": 3,
}


def flags_of(settings: dict[str, object]) -> list[str]:
  return [
    f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in settings.items()
  ]


def command(folder: Path, *more: str) -> list[str]:
  start = [sys.executable, "-m", "experiments.batch_size_study", "--workload=quadratic", f"--out={folder}"]
  return [*start, *flags_of(KILLED), *more]


def test_help_is_one_screen() -> None:
  done = subprocess.run([*command(Path("unused")), "--help"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0
  assert "--workload" in done.stdout
  assert len(done.stdout.splitlines()) <= 40
  assert max(map(len, done.stdout.splitlines())) <= 130


def deterministic(folder: Path) -> dict[str, bytes]:
  """All results but times: rows and trials of everything trained, the tidy table, the study."""
  kept = {}
  for path in sorted(folder.glob("batch_size_study/*/*")):
    trial = json.loads((path.parent / "trial.json").read_text())
    if trial["kind"] != "timing" and path.name in ("metrics.jsonl", "probes.jsonl"):
      kept[str(path.relative_to(folder))] = path.read_bytes()
  for name in ("results.csv", "study.json"):
    kept[name] = (folder / name).read_bytes()
  return kept


def complete_trials(folder: Path) -> dict[Path, int]:
  """The folders of complete trials, and when they became so."""
  return {
    path.parent: path.stat().st_mtime_ns
    for path in folder.glob("batch_size_study/*/status.json")
    if json.loads(path.read_text())["state"] == "complete"
  }


def test_kill_nine_and_run_again(tmp_path: Path) -> None:
  """The real command, killed for real in the middle: the same command computes what is missing, to the bits of a whole run in Python."""
  killed = tmp_path / "killed"
  child = subprocess.Popen(command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 240
  while len(complete_trials(killed)) < 4 and time.monotonic() < deadline:
    assert child.poll() is None, "the study ended before it could be killed"
    time.sleep(0.02)
  os.kill(child.pid, signal.SIGKILL)
  child.wait()
  assert not (killed / "report.html").exists()
  finished = complete_trials(killed)
  assert finished
  done = subprocess.run(command(killed), cwd=ROOT, capture_output=True, text=True, timeout=280)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.strip().endswith("report.html")
  batch_size_study.run("quadratic", tmp_path / "whole", **KILLED)
  assert finished.items() <= complete_trials(killed).items()
  assert deterministic(killed) == deterministic(tmp_path / "whole")


def test_truncated_record_is_named_and_nothing_is_lost(
  out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  folder = tmp_path / "copy"
  shutil.copytree(out, folder)
  victim = sorted(folder.glob("batch_size_study/*/metrics.jsonl"))[0]
  victim.write_bytes(victim.read_bytes()[:-7])
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
  assert exit_code(["--workload=digits_mlp", f"--out={folder}", *flags_of(SMALL)]) == 2
  lines = capsys.readouterr().err.replace("\r", "\n").splitlines()  # after the bar of progress
  (error,) = [line for line in lines if line.startswith("error: ")]
  assert str(victim) in error
  assert "run again to compute it anew" in error
  assert {path: path.read_bytes() for path in before} == before
