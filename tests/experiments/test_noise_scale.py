"""The experiment of gradient noise: what it leaves, how it refuses, and that an interruption changes nothing."""

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bsjax.study.noise
from bsjax.records import RecordError, read_records
from bsjax.study import make_noise_plan, run_command
from bsjax.study.noise_plan import (
  along_config,
  checkpoint_steps,
  rates_of,
  route_steps,
  stretch_config,
  temperature_branches,
  temperature_factor,
)
from bsjax.train import make_trial
from bsjax.types import Hparams
from bsjax.workloads import load_workload
from experiments import batch_size_study, noise_scale
from tests.analysis import simulate_noise

CLAIMS = ["noise_grows", "temperature", "estimators_agree", "layernorm_predicts_total"]
FIGURES = [*CLAIMS, "noise_layers"]
SMALL = {"batch_sizes": (32,), "num_epochs": 1, "seeds": 2}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("noise") / "out"
  assert noise_scale.run("quadratic", folder, smoke=True) == folder / "report.html"
  return folder


def test_the_smoke_run_leaves_a_whole_report(out: Path) -> None:
  claims = json.loads((out / "claims.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
  assert [claim["id"] for claim in claims] == CLAIMS
  page = (out / "report.html").read_text()
  assert page.count("data:image/png;base64,") == len(FIGURES)
  for name in FIGURES:
    assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
  with open(out / "results.csv", newline="") as handle:
    rows = list(csv.DictReader(handle))
  assert len(rows) == sum(len(record.probes) for record in read_records(out / "noise_scale"))


def test_every_setting_and_seed_is_measured_along_the_way(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  records = [record for record in read_records(out / "noise_scale") if record.trial["kind"] == "along"]
  found = {(r.trial["config"]["batch_size"], r.trial["hparams"]["learning_rate"], r.trial["seed"]) for r in records}
  assert found == {
    (int(size), rate, seed) for size, rates in study["learning_rates"].items() for rate in rates for seed in (0, 1)
  }
  for record in records:
    steps = record.trial["config"]["probe_steps"]
    for probe in ("noise", "hessian_noise"):
      rows = [row for row in record.probes if row["probe"] == probe]
      assert sorted({row["step"] for row in rows}) == steps
    routes = {row["step"] for row in record.probes if row["probe"] == "route"}
    assert {0, steps[-1]} <= routes
    assert len(routes) == 4 < len(steps)


def test_settings_that_share_a_seed_draw_different_batches(out: Path) -> None:
  sampled = [
    row["grad_cov_trace"]
    for record in read_records(out / "noise_scale")
    for row in record.probes
    if row["probe"] == "route" and row["route"] == "microbatch" and row["step"] == 0
  ]
  # The quadratic starts at the same point whatever the seed: only the draws differ.
  assert len(sampled) == len(set(sampled)) == 4


def test_every_stretch_starts_where_the_one_before_ended(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  records = {r.id: r for r in read_records(out / "noise_scale") if r.trial["kind"] == "temperature"}
  branches = {branch["name"]: branch for branch in study["branches"]}
  phases = {
    phase: [r for r in records.values() if r.trial["phase"] == phase] for phase in ("before", "during", "after")
  }
  assert {phase: len(found) for phase, found in phases.items()} == {"before": 2, "during": 10, "after": 10}
  # All stretches see the same number of examples.
  assert len({r.trial["config"]["batch_size"] * r.trial["config"]["num_steps"] for r in records.values()}) == 1
  for record in [*phases["during"], *phases["after"]]:
    parent = records[record.trial["config"]["parent"]]
    assert parent.trial["seed"] == record.trial["seed"]
    same = {"before", record.trial["branch"]} if record.trial["phase"] == "during" else {record.trial["branch"]}
    assert (parent.trial["phase"], parent.trial["branch"])[record.trial["phase"] == "after"] in same
    branch = branches[record.trial["branch"] if record.trial["phase"] == "during" else "unchanged"]
    assert record.trial["config"]["batch_size"] == branch["batch_size"]
    assert record.trial["hparams"]["learning_rate"] == branch["learning_rate"]
    seen = parent.trial["examples_before"] + parent.trial["config"]["num_steps"] * parent.trial["config"]["batch_size"]
    assert record.trial["examples_before"] == seen
    first, last = record.probes[0], [row for row in parent.probes if row["group"] == "all"][-1]
    # The same parameters on the same examples, by the same program.
    assert first["dataset_grad_sq_norm"] == last["dataset_grad_sq_norm"]


def test_a_second_run_computes_nothing(out: Path) -> None:
  before = {path: path.stat().st_mtime_ns for path in out.glob("noise_scale/*/*") if path.is_file()}
  claims = (out / "claims.json").read_bytes()
  noise_scale.run("quadratic", out, smoke=True)
  assert {path: path.stat().st_mtime_ns for path in out.glob("noise_scale/*/*") if path.is_file()} == before
  assert (out / "claims.json").read_bytes() == claims


def test_other_settings_are_refused(out: Path) -> None:
  with pytest.raises(RecordError, match="started with other settings"):
    noise_scale.prepare("quadratic", out, smoke=True, seeds=3)


class Fabricated:
  """Rows from the parameters' norm alone: the same for the same state. Interrupts at its `stop`-th call."""

  exact_hessian = True

  def __init__(self, stop: float = math.inf) -> None:
    self.stop, self.calls = stop, 0

  def __call__(self, trial, state):
    self.calls += 1
    if self.calls >= self.stop:
      raise KeyboardInterrupt
    norm = float(np.sum(np.asarray(state.params["w"], np.float64) ** 2))
    rng = np.random.default_rng(0)
    return [simulate_noise.noise_row(int(state.step), trace=1.0, sq_norm=0.01 + norm, sem=1e-3, rng=rng)]


def rows_of(folder: Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("noise_scale/*/*.jsonl")}


def test_an_interrupted_study_ends_with_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  measurements, two = Fabricated(), temperature_branches
  monkeypatch.setattr(bsjax.study.noise, "NoiseMeasurements", lambda workload, mesh: measurements)
  monkeypatch.setattr(bsjax.study.noise, "temperature_branches", lambda plan, workload: two(plan, workload)[:2])
  monkeypatch.setattr(bsjax.study.noise, "report_noise_study", lambda *_, **__: None)  # a function of the rows
  noise_scale.run("quadratic", tmp_path / "whole", **SMALL)
  calls = measurements.calls
  measurements.calls, measurements.stop = 0, calls * 3 // 4
  with pytest.raises(KeyboardInterrupt):
    noise_scale.run("quadratic", tmp_path / "cut", **SMALL)
  assert rows_of(tmp_path / "cut") != rows_of(tmp_path / "whole")
  measurements.calls, measurements.stop = 0, math.inf
  noise_scale.run("quadratic", tmp_path / "cut", **SMALL)
  assert 0 < measurements.calls < calls / 2
  assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_seed_that_diverges_ends_there_and_the_report_is_made(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(bsjax.study.noise, "NoiseMeasurements", lambda workload, mesh: Fabricated())
  # Curvature 1: a rate above 2 is unstable, and 50 overflows float32 within a hundred steps.
  noise_scale.run("quadratic", tmp_path, batch_sizes=(8,), learning_rates=(50.0,), num_epochs=4, seeds=2)
  records = read_records(tmp_path / "noise_scale")
  assert {(r.trial["kind"], r.status["state"]) for r in records} == {
    ("along", "diverged"),
    ("temperature", "diverged"),
  }
  assert {r.trial["phase"] for r in records if r.trial["kind"] == "temperature"} == {"before"}
  assert all(claim["verdict"] == "inconclusive" for claim in json.loads((tmp_path / "claims.json").read_text()))


@pytest.mark.parametrize("exact", [True, False])
def test_dear_measurements_are_made_at_some_checkpoints_only(exact: bool) -> None:
  asked = []

  class Asked:
    exact_hessian = exact

    def __call__(self, trial, state):
      asked.append(trial.config.probes)
      return []

  workload = load_workload("quadratic")
  config = along_config(make_noise_plan(workload), workload, 8)
  study = bsjax.study.noise._Study(*[None] * 4, Asked(), {}, None)  # type: ignore[arg-type]
  for seed in (0, 1):
    for step in config.probe_steps:
      study.probe(make_trial(config, Hparams(0.1), seed), SimpleNamespace(step=step))  # type: ignore[arg-type]
  count = {name: sum(name in names for names in asked) for name in config.probes}
  checkpoints = 2 * len(config.probe_steps)
  hessian = checkpoints if exact else 4
  assert count == {"noise": checkpoints, "hessian_noise": hessian, "adam_noise": checkpoints, "routes": 8}


# --- the plan ---


def test_checkpoints_double_and_end_with_the_last_quarter() -> None:
  assert checkpoint_steps(256, 1) == (0, 1, 2, 4, 8, 16, 32, 64, 128, 192, 213, 235, 256)
  for rows in range(1, 40):
    steps = checkpoint_steps(3 * rows, 3)
    assert steps[0] == 0
    assert steps[-1] == 3 * rows
    assert list(steps) == sorted(set(steps))
    assert not any(step % 3 for step in steps)


def test_routes_are_compared_at_four_checkpoints_from_first_to_last() -> None:
  workload = load_workload("quadratic")
  config = along_config(make_noise_plan(workload), workload, 8)
  chosen = route_steps(config)
  assert len(chosen) == 4
  assert {0, config.num_steps} <= chosen <= set(config.probe_steps)


def test_branches_divide_the_temperature_by_the_factor_and_the_control_keeps_it() -> None:
  workload = load_workload("quadratic")
  plan = make_noise_plan(workload)
  unchanged, *changed, control = temperature_branches(plan, workload)
  temperature = unchanged.learning_rate / unchanged.batch_size
  assert [temperature * b.batch_size / b.learning_rate for b in changed] == pytest.approx([16] * 3)
  assert control.learning_rate / control.batch_size == pytest.approx(temperature)
  assert control.batch_size == unchanged.batch_size // 4
  # 512 examples: 16 times 8 is a quarter of them.
  assert unchanged.batch_size == 8


def test_the_factor_is_what_the_training_set_allows() -> None:
  workload = load_workload("quadratic")
  assert [temperature_factor(workload, size) for size in (1, 2, 4, 8, 16, 32, 64)] == [None, 4, 16, 16, 4, 4, None]


def test_stretches_have_equal_examples_and_common_checkpoints() -> None:
  workload = load_workload("quadratic")
  plan = make_noise_plan(workload, num_epochs=8)
  branches = temperature_branches(plan, workload)
  configs = [stretch_config(plan, workload, branches, branch.batch_size) for branch in branches]
  examples = [[step * config.batch_size for step in config.probe_steps] for config in configs]
  assert all(each == examples[0] for each in examples)
  assert len(examples[0]) == 17
  # 32 steps of 128 examples, 16 times 2.
  assert examples[0][-1] == 32 * 128


def test_given_rates_are_those_of_every_batch_size() -> None:
  workload = load_workload("quadratic")
  assert rates_of(make_noise_plan(workload, learning_rates=(0.4, 0.1)), workload, 64) == (0.1, 0.4)
  # Base rate 0.2 at 8 examples, so 0.2 sqrt(32 / 8) = 0.4 at 32, and a quarter of it.
  assert rates_of(make_noise_plan(workload), workload, 32) == pytest.approx((0.1, 0.4))


# --- the command ---


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
  """Runs the command in this process and returns its one line of error."""
  noise_scale._FLAGS.unparse_flags()
  for name in list(noise_scale._FLAGS):
    noise_scale._FLAGS[name].unparse()
  monkeypatch.setattr(sys, "argv", ["noise_scale", *arguments])
  code = run_command(
    noise_scale._prepare_from_flags,
    documentation="",
    module="experiments.noise_scale",
    flag_values=noise_scale._FLAGS,
  )
  assert code == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("error: ")
  assert captured.err.count("\n") == 1
  return captured.err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--nonsense=1"], "nonsense"),
    (["--num_epochs=nan"], "num_epochs=nan, wanted a finite number"),
    (["--seeds=1"], "seeds=1, wanted at least 2"),
    (["--optimizer=sdg"], "optimizer=sdg"),
    (["--workload=digits"], "'digits' is unknown: use one of"),
    (["--batch_sizes=1024"], "wanted 1 to 512"),
    (["--batch_sizes=0"], "wanted 1 to 512"),
    (["--batch_sizes=1,x"], "wanted whole numbers"),
    (["--learning_rates=0.1,x"], "--learning_rates=0.1,x, wanted numbers"),
    (["--learning_rates=0"], "wanted finite numbers above 0"),
    (["--learning_rates=inf"], "wanted finite numbers above 0"),
    (["--momentum=1"], "momentum=1.0"),
    (["--trial_devices=99"], "needs"),
    (["words"], "unexpected argument 'words'"),
  ],
  ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flag_is_one_line_and_touches_nothing(
  arguments: list[str],
  message: str,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  folder = tmp_path / "out"
  assert message in refused(["--workload=quadratic", f"--out={folder}", *arguments], capsys, monkeypatch)
  assert not folder.exists()


def test_two_experiments_live_in_one_process() -> None:
  assert batch_size_study._FLAGS["out"].default != noise_scale._FLAGS["out"].default


def test_help_is_one_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  monkeypatch.setattr(sys, "argv", ["noise_scale", "--help"])
  code = run_command(
    noise_scale._prepare_from_flags,
    documentation=noise_scale.__doc__,
    module="experiments.noise_scale",
    flag_values=noise_scale._FLAGS,
  )
  shown = capsys.readouterr().out
  assert code == 0
  assert "--learning_rates" in shown
  assert len(shown.splitlines()) <= 40
  assert max(map(len, shown.splitlines())) <= 130


TRAINING_MODE = """
import dataclasses
from bsjax.workloads import load_workload

def make():
  return dataclasses.replace(load_workload("quadratic"), batch_norm="batch")
"""


@pytest.mark.parametrize("experiment", [noise_scale, batch_size_study])
def test_batch_norm_in_training_mode_is_refused_before_anything_is_written(experiment, tmp_path: Path) -> None:
  (tmp_path / "mine.py").write_text(TRAINING_MODE)
  with pytest.raises(ValueError, match=r"batch_norm='batch'.*use batch_norm='running'"):
    experiment.prepare(f"{tmp_path}/mine.py:make", tmp_path / "out")
  assert not (tmp_path / "out").exists()
