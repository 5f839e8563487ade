"""The experiment of sharp minima: what it leaves, how it refuses, and that an interruption changes nothing."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import bsjax.study.sharp
from bsjax.records import read_record, read_records
from bsjax.study import run_command
from experiments import sharp_minima

CLAIMS = ["flat_measures", "flat_generalizes", "sharper_line", "noise_escapes", "edge_of_stability"]
FURTHER = [
  "measures_against_batch_size",
  "spectra",
  "measures_against_test_error",
  "landscape_planes",
  "landscape_surfaces",
  "landscape_random_lines",
  "landscape_trajectory",
]
SMOKE = {"smoke": True, "num_steps": 12}
SMALL = {"batch_sizes": (16, 64), "num_epochs": 1, "num_steps": 8, "seeds": 2, "train_loss": 1.0}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("sharp") / "out"
  assert sharp_minima.run("quadratic", folder, **SMOKE) == folder / "report.html"
  return folder


def records_of(out: Path, kind: str) -> list:
  return [record for record in read_records(out / "sharp_minima") if record.trial["kind"] == kind]


def test_the_smoke_run_leaves_a_whole_report(out: Path) -> None:
  claims = json.loads((out / "claims.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
  assert [claim["id"] for claim in claims] == CLAIMS
  page = (out / "report.html").read_text()
  assert page.count("data:image/png;base64,") == len(CLAIMS) + len(FURTHER)
  for name in [*CLAIMS, *FURTHER]:
    assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
  with open(out / "results.csv", newline="") as handle:
    rows = list(csv.DictReader(handle))
  assert len(rows) == sum(len(record.probes) for record in read_records(out / "sharp_minima"))


def test_every_solution_is_measured_at_both_comparisons(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  solutions = records_of(out, "solution")
  found = {(r.trial["config"]["batch_size"], r.trial["rate_part"], r.trial["seed"]) for r in solutions}
  assert found == {(size, part, seed) for size in study["batch_sizes"] for part in (0.25, 1.0) for seed in (0, 1)}
  for record in solutions:
    losses = {row["step"]: row["train_loss"] for row in record.probes if row["probe"] == "train"}
    assert list(losses) == record.trial["config"]["probe_steps"]
    for phase in ("level", "budget"):
      rows = [row for row in record.probes if row["probe"] == "measure" and row["phase"] == phase]
      (step,) = {row["step"] for row in rows}
      assert [row["measure"] for row in rows] == study["measures"]
      assert {row["minibatch_size"] for row in rows} == {None, 8}  # the quadratic's reference batch size, for all
      if phase == "level":
        below = [at for at, loss in losses.items() if loss <= study["train_loss_level"]]
        assert step == min(below) > 0
      else:
        examples = step * record.trial["config"]["batch_size"]
        assert examples == pytest.approx(study["num_epochs"] * study["train_size"], abs=64)


def test_escapes_start_from_the_kept_solutions_and_return_to_nothing(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  solutions = {record.id: record for record in records_of(out, "solution")}
  escapes = records_of(out, "escape")
  assert {(r.trial["branch"], r.trial["seed"]) for r in escapes} == {
    (f"{a}_{b}", seed) for a in ("small", "large") for b in ("small", "large") for seed in (0, 1)
  }
  for record in escapes:
    before, after = record.trial["branch"].split("_")
    parent = solutions[record.trial["config"]["parent"]]
    assert parent.trial["config"]["batch_size"] == study["escape"][before]
    assert parent.trial["seed"] == record.trial["seed"]
    assert record.trial["config"]["batch_size"] == study["escape"][after]
    assert record.trial["hparams"]["learning_rate"] == study["escape"][f"{after}_rate"]
    distances = {row["step"]: row["from_parent"] for row in record.probes if row["probe"] == "distance"}
    assert distances.pop(0) == 0 < min(distances.values())


def test_the_edge_is_plain_descent_at_equal_steps(out: Path) -> None:
  edge = records_of(out, "edge")
  study = json.loads((out / "study.json").read_text())
  assert {r.trial["config"]["batch_size"] for r in edge} == set(study["edge"]["batch_sizes"]) == {32, 128, 512}
  assert len({r.trial["config"]["num_steps"] for r in edge}) == 1
  for record in edge:
    assert record.trial["config"]["optimizer"] == "sgd"
    tops = [row for row in record.probes if row.get("measure") == "top_eigenvalue"]
    assert [row["step"] for row in tops] == record.trial["config"]["probe_steps"]
    assert all(abs(row["value"] - 1) <= row["error"] + 1e-6 for row in tops)  # the quadratic's own


def test_landscapes_join_the_ends_of_training(out: Path) -> None:
  """On the line and on the curve, alpha 0 and 1 are the two solutions: their metrics are those measured at the end of training."""
  study = json.loads((out / "study.json").read_text())
  folder = out / "sharp_minima" / "landscapes"
  for seed in study["seeds"]:
    for path in ("line", "curve"):
      rows = [json.loads(line) for line in (folder / f"{path}_{seed}.jsonl").read_text().splitlines()]
      assert len(rows) == 25
      for alpha, size in ((0.0, "small"), (1.0, "large")):
        (row,) = (row for row in rows if row["x"] == alpha)
        (solution,) = (
          r
          for r in records_of(out, "solution")
          if (r.trial["config"]["batch_size"], r.trial["seed"], r.trial["rate_part"])
          == (study["escape"][size], seed, 1.0)
        )
        last = [r for r in solution.probes if r["probe"] == "test"][-1]
        assert row["train_loss"] == pytest.approx(last["train_loss"], rel=1e-5)
        assert row["test_loss"] == pytest.approx(last["test_loss"], rel=1e-5)


def test_a_second_run_computes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def never(*_: object, **__: object) -> None:
    pytest.fail("something was computed again")

  monkeypatch.setattr(bsjax.study.measure_curvature.Curvature, "_run", never)
  monkeypatch.setattr(bsjax.study.sharp_landscapes, "_retrace", never)
  monkeypatch.setattr(bsjax.study.landscape, "_landscape", never)
  before = (out / "claims.json").read_bytes()
  sharp_minima.run("quadratic", out, **SMOKE)
  assert (out / "claims.json").read_bytes() == before


class Fabricated:
  """Measurements that cost nothing; from the `stop`-th on they are interrupted."""

  def __init__(self) -> None:
    self.calls, self.stop = 0, math.inf

  def __call__(self, trial, state):
    self.calls += 1
    if self.calls > self.stop:
      raise KeyboardInterrupt
    return [{"probe": "test", "step": int(state.step), "train_loss": np.float32(state.step), "w": state.params["w"][0]}]


def rows_of(folder: Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("sharp_minima/*/*.jsonl")}


def test_an_interrupted_study_ends_with_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  measurements = Fabricated()
  monkeypatch.setattr(bsjax.study.sharp, "SharpMeasurements", lambda *_: measurements)
  monkeypatch.setattr(bsjax.study.sharp, "EdgeMeasurements", lambda *_: measurements)
  monkeypatch.setattr(bsjax.study.sharp, "draw_landscapes", lambda *_, **__: None)  # their own test cuts them
  monkeypatch.setattr(bsjax.study.sharp, "report_sharp_study", lambda *_, **__: None)  # a function of the rows
  sharp_minima.run("quadratic", tmp_path / "whole", **SMALL)
  calls = measurements.calls
  measurements.calls, measurements.stop = 0, calls * 3 // 4
  with pytest.raises(KeyboardInterrupt):
    sharp_minima.run("quadratic", tmp_path / "cut", **SMALL)
  assert rows_of(tmp_path / "cut") != rows_of(tmp_path / "whole")
  measurements.calls, measurements.stop = 0, math.inf
  sharp_minima.run("quadratic", tmp_path / "cut", **SMALL)
  assert 0 < measurements.calls < calls / 2
  assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def told(trial: dict, steps: list[int], step: int) -> list[dict]:
  """Makes up the rows of a checkpoint so that all five claims hold, each with a number that is known beforehand.

  Seeds differ by a factor in every eigenvalue, so that an answer that mixes them is wrong or has an interval.
  """
  size, seed, rate = trial["config"]["batch_size"], trial["seed"], trial["hparams"]["learning_rate"]
  eigenvalue = {"probe": "measure", "measure": "top_eigenvalue", "error": 0.0, "error_kind": "residual", "step": step}
  if trial["kind"] == "solution":
    phase, power = {steps[1]: ("level", 0.5), steps[-1]: ("budget", 0.25)}.get(step, ("", 0.0))
    value = size**power * trial["rate_part"] ** 0.3 * (1 + 0.1 * seed)
    error = 0.01 * value if phase == "level" else 1 - 0.01 * value
    test = {"probe": "test", "step": step, "train_loss": 0.1, "test_accuracy": 1 - error, "test_loss": -error}
    return [test, eigenvalue | {"phase": phase, "value": value}] if phase else [test]
  if trial["kind"] == "escape":
    settled = {"large_small": 0.25, "small_large": 2.0}.get(trial["branch"], 1.0)
    return [eigenvalue | {"value": (1 + seed) * (settled if 2 * step >= steps[-1] else 1.0)}]
  spike = 10.0 if step == steps[len(steps) // 2] else 1.0
  return [eigenvalue | {"value": spike * 0.95 * (size / 512) ** 0.1 * 2 / rate}]


def test_claims_tell_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """From rows to `claims.json`: every judge gets the rows meant for it, and the numbers are those that were put in."""

  def measure(trial, state):
    return told(
      read_record(tmp_path / "sharp_minima" / trial.id).trial, list(trial.config.probe_steps), int(state.step)
    )

  line = {
    -0.2: 2.0,
    0.0: 1.0,
    0.2: 2.0,
    0.8: 4.0,
    1.0: 1.0,
    1.2: 4.0,
  }  # rises by 1 around small batches, by 3 around large
  lines = {f"line_{seed}": [{"x": x, "train_loss": (1 + seed) * y} for x, y in line.items()] for seed in (0, 1)}
  monkeypatch.setattr(bsjax.study.sharp, "SharpMeasurements", lambda *_: measure)
  monkeypatch.setattr(bsjax.study.sharp, "EdgeMeasurements", lambda *_: measure)
  monkeypatch.setattr(bsjax.study.sharp, "draw_landscapes", lambda *_, **__: None)
  monkeypatch.setattr(bsjax.study.sharp, "read_landscapes", lambda _: lines)
  sharp_minima.run("quadratic", tmp_path, **SMALL | {"rate_parts": (0.25, 0.5, 1.0)})
  claims = json.loads((tmp_path / "claims.json").read_text())
  assert [claim["verdict"] for claim in claims] == ["holds"] * 5
  flat, generalizes, sharper, escapes, edge = claims
  assert flat["unit"].endswith("at equal epochs")  # the smaller of the slopes 0.5 and 0.25
  assert (flat["n"], generalizes["n"], sharper["n"], escapes["n"], edge["n"]) == (12, 12, 2, 2, 6)
  assert "from small to large" in escapes["unit"]  # the weaker of the factors 1/4 and 2
  assert (
    generalizes["measured"] == 1 == generalizes["ci_high"]
  )  # resampled settings have ties, so the lower end is below 1
  for claim, known in ((flat, 0.25), (sharper, 3.0), (escapes, 2.0), (edge, 0.95)):
    # Made-up numbers are exact to float64, and the same in every seed and at every rate: so the interval is a point.
    ends = [claim[name] for name in ("measured", "ci_low", "ci_high")]
    assert ends == pytest.approx([known] * 3, rel=1e-9), claim["id"]


def test_solutions_that_diverge_leave_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(bsjax.study.sharp, "SharpMeasurements", lambda *_: Fabricated())
  monkeypatch.setattr(bsjax.study.sharp, "EdgeMeasurements", lambda *_: Fabricated())
  # Curvature 1: a rate above 2 is unstable, and a hundred times the rule's overflows float32 within a hundred steps.
  sharp_minima.run("quadratic", tmp_path, **SMALL | {"rate_parts": (100.0,), "num_steps": 100})
  assert {r.status["state"] for r in records_of(tmp_path, "solution")} == {"diverged"}
  assert records_of(tmp_path, "escape") == []
  assert {claim["verdict"] for claim in json.loads((tmp_path / "claims.json").read_text())} == {"inconclusive"}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setattr(sys, "argv", ["sharp_minima", *arguments])
  code = run_command(
    sharp_minima._prepare_from_flags, documentation="", module=sharp_minima.__name__, flag_values=sharp_minima._FLAGS
  )
  sharp_minima._FLAGS.unparse_flags()
  assert code == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--batch_sizes=8", "--batch_sizes has 1, wanted at least 2"),
    ("--batch_sizes=8,x", "--batch_sizes=8,x, wanted whole numbers, such as 8,64, separated by commas"),
    ("--rate_parts=a", "--rate_parts=a, wanted numbers, such as 0.25,1, separated by commas"),
    ("--statistics=batch", "quadratic has no batch norm"),
    ("--statistics=train", "--statistics=train"),
    ("--num_examples=1", "--num_examples=1, wanted 2 to 512"),
    ("--seeds=1", "--seeds=1, wanted at least 2"),
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
