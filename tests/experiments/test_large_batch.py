"""The experiment of large batches: what it leaves, how it refuses, and that a second run computes nothing."""

import csv
import json
import sys
from pathlib import Path

import pytest

import bsjax.study.large_batch
import bsjax.train.pool
from bsjax.records import read_records
from bsjax.study import run_command
from bsjax.study.large_batch_plan import ARMS
from experiments import large_batch

CLAIMS = ["warmup_needed", "cosine_helps", "lars_lamb_help"]
FURTHER = ["training_curves", "large_batch_searches"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("large_batch") / "out"
  assert large_batch.run("quadratic", folder, smoke=True) == folder / "report.html"
  return folder


def test_the_smoke_run_leaves_a_whole_report(out: Path) -> None:
  claims = json.loads((out / "claims.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
  assert [claim["id"] for claim in claims] == CLAIMS
  page = (out / "report.html").read_text()
  assert page.count("data:image/png;base64,") == len(CLAIMS) + len(FURTHER)
  for name in [*CLAIMS, *FURTHER]:
    assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  with open(out / "results.csv", newline="") as handle:
    rows = list(csv.DictReader(handle))
  assert len(rows) == len(read_records(out / "large_batch"))
  assert {row["arm"] for row in rows} == {*ARMS, "rule_constant", "rule_warmup"}
  assert {row["kind"] for row in rows} == {"search", "repeat", "final"}
  study = json.loads((out / "study.json").read_text())
  assert study["counts"] == {state: sum(row["state"] == state for row in rows) for state in ("complete", "diverged")}


def test_the_smoke_run_is_short_and_the_claims_compare_its_largest_batch_size(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  assert study["batch_sizes"] == [512]
  assert {entry["num_steps"] for entry in study["tuned"]["512"].values()} == {large_batch.SMOKE_STEPS}
  page = (out / "report.html").read_text()
  assert "At batch size 512 momentum and momentum + warm-up end with a test loss of" in page


def test_a_second_run_computes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def never(*_: object, **__: object) -> None:
    pytest.fail("something was trained again")

  monkeypatch.setattr(bsjax.train.pool, "build_segment", never)
  before = {name: (out / name).read_bytes() for name in ("claims.json", "results.csv", "report.html", "study.json")}
  large_batch.run("quadratic", out, smoke=True)
  assert {name: (out / name).read_bytes() for name in before} == before


def test_all_arms_diverged_leaves_a_report(tmp_path: Path) -> None:
  large_batch.run(
    "quadratic", tmp_path, smoke=True, arms=("momentum_constant", "momentum_warmup"), base_learning_rate=1e15
  )
  assert {record.status["state"] for record in read_records(tmp_path / "large_batch")} == {"diverged"}
  assert {claim["verdict"] for claim in json.loads((tmp_path / "claims.json").read_text())} == {"inconclusive"}
  page = (tmp_path / "report.html").read_text()
  assert "At batch size 512 no arm was trained to its end" in page
  assert "momentum_warmup_cosine was not trained: add momentum_warmup_cosine to --arms" in page


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setattr(sys, "argv", ["large_batch", *arguments])
  code = run_command(
    large_batch._prepare_from_flags, documentation="", module=large_batch.__name__, flag_values=large_batch._FLAGS
  )
  large_batch._FLAGS.unparse_flags()
  assert code == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--batch_sizes=4,64", "--batch_sizes has 4, wanted more than 8"),
    ("--batch_sizes=64,x", "--batch_sizes=64,x, wanted whole numbers, such as 256,1024, separated by commas"),
    ("--batch_sizes=1024", "--batch_sizes has 1024, wanted more than 8"),
    ("--reference_batch_size=600", "--reference_batch_size=600, wanted 1 to 512"),
    ("--arms=lars", "--arms=lars, wanted some of momentum_constant"),
    ("--num_epochs=1", "--num_epochs=1 is less than 2 steps at batch size 512"),
    ("--num_trials=0", "--num_trials=0, wanted 4 to 500"),
    ("--final_seeds=1", "--final_seeds=1, wanted 2"),
    ("--no_such_flag=1", "no_such_flag"),
  ],
)
def test_bad_flag_is_one_line_and_touches_nothing(
  argument: str,
  message: str,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  out = tmp_path / "out"
  assert message in refused(["--workload=quadratic", f"--out={out}", argument], capsys, monkeypatch)
  assert not out.exists()


def test_a_folder_of_other_settings_is_refused_and_left_alone(
  out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  before = sorted(out.rglob("*"))
  line = refused(["--workload=quadratic", f"--out={out}", "--smoke", "--final_seeds=3"], capsys, monkeypatch)
  assert "final_seeds" in line
  assert sorted(out.rglob("*")) == before
