"""A sweep: what it trains does not depend on interruptions, cutting trials changes no minimum, edges are left, misses are told."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest

from bsjax.analysis.steps_to_result import steps_to_result, sweep_records
from bsjax.records import read_records
from bsjax.study import steps as steps_module
from bsjax.study import sweep as module
from bsjax.study.steps import with_validation
from bsjax.study.sweep import Sweep, run_sweep
from bsjax.study.sweep_plan import (
  FIRST_FINAL_SEED,
  QUANTISATION,
  fine_every,
  make_sweep_plan,
  most_steps,
  pilot_every,
  space_of,
  sweep_config,
  sweep_hparams,
)
from bsjax.study.sweep_progress import SweepProgress
from bsjax.train import make_mesh, make_trial
from bsjax.types import Hparams
from bsjax.workloads import Workload, load_workload

SIZES = (2, 32)


def swept(folder: Path, workload: Workload | None = None, **overrides: object) -> tuple[Sweep, dict]:
  """A small sweep of the quadratic, its records and its description."""
  workload = workload or load_workload("quadratic")
  options = {"batch_sizes": SIZES, "num_trials": 24, "final_seeds": 2, "num_epochs": 1, "num_steps": 128} | overrides
  plan = make_sweep_plan(workload, **options)
  folder.mkdir(exist_ok=True)
  with SweepProgress(workload, plan) as progress:
    sweep = Sweep(workload, plan, folder, make_mesh(data=1), {}, progress)
    return sweep, run_sweep(sweep)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep, dict]:
  folder = tmp_path_factory.mktemp("sweep") / "whole"
  return folder, *swept(folder)


def contents(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.glob("*/*.json*"))
    if path.name != "status.json"
  }


def of(folder: Path, kind: str, batch_size: int) -> list:
  found = [r for r in read_records(folder) if (r.trial["kind"], r.trial["config"]["batch_size"]) == (kind, batch_size)]
  return sorted(found, key=lambda record: record.trial["seed"])


def test_an_interrupted_sweep_ends_with_the_same_records(whole, tmp_path):
  folder, _, description = whole
  shutil.copytree(folder, tmp_path / "again")
  records = sorted((tmp_path / "again").glob("*/"))
  for path in records[::2]:
    shutil.rmtree(path)
  left = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("*/*.json*")}
  _, again = swept(tmp_path / "again")
  assert json.dumps(again) == json.dumps(description)
  assert contents(tmp_path / "again") == contents(folder)
  assert {path: path.stat().st_mtime_ns for path in left} == left


def test_cutting_trials_changes_no_minimum(whole, tmp_path, monkeypatch):
  """Without cuts every trial runs its budget: more records' rows, the same best points and steps to result."""
  folder, sweep, description = whole
  monkeypatch.setattr(module, "GIVE_UP_FACTOR", 10**6)
  uncut, described = swept(tmp_path / "uncut")
  for size in SIZES:
    cut_trials, full_trials = of(folder, "sweep", size), of(tmp_path / "uncut", "sweep", size)
    assert len(cut_trials) == len(full_trials) == description["sweep"][str(size)]["num_trials"]
    budget = description["sweep"][str(size)]["num_steps"]
    shortened = [r for r in cut_trials if r.trial["config"]["num_steps"] < budget]
    assert len(shortened) == len(cut_trials)
    for knows, trials in (
      (of(folder, "pilot", size), cut_trials[:16]),
      (cut_trials[:16], cut_trials[16:24]),
    ):
      known = min(steps for r in knows if (steps := sweep.steps(r)))
      assert all(4 * known <= r.trial["config"]["num_steps"] < 4 * known + 8 for r in trials)
    fewest = min(steps for r in cut_trials if (steps := sweep.steps(r)))
    assert fewest == min(steps for r in full_trials if (steps := uncut.steps(r)))
    assert description["sweep"][str(size)]["best"] == described["sweep"][str(size)]["best"]
    for cut, full in zip(cut_trials, full_trials, strict=True):
      assert cut.metrics == full.metrics[: len(cut.metrics)]
      assert sweep.steps(cut) in (uncut.steps(full), None)
      if sweep.steps(cut) is None and uncut.steps(full) is not None:
        assert uncut.steps(full) > 4 * fewest - description["sweep"][str(size)]["eval_every"]


def test_a_pilot_that_promised_too_much_changes_nothing(whole, tmp_path, monkeypatch):
  """No trial of the first round arrives in 4 steps: all of them get their whole budget."""
  folder, sweep, description = whole
  monkeypatch.setattr(module, "_run_pilot", lambda *_: 1)
  monkeypatch.setattr(module, "fine_every", lambda fewest, budget: description["sweep"]["32"]["eval_every"])
  again, described = swept(tmp_path / "hasty", batch_sizes=(32,))
  trials = [sweep_records(d, read_records(f), 32) for d, f in ((description, folder), (described, tmp_path / "hasty"))]
  budget = description["sweep"]["32"]["num_steps"]
  assert all(record.trial["config"]["num_steps"] >= budget for record in trials[1][:16])
  assert len(of(tmp_path / "hasty", "sweep", 32)) == len(trials[1]) + 16  # those cut too soon stay on disk
  assert min(steps for r in trials[1] if (steps := again.steps(r))) == min(
    steps for r in trials[0] if (steps := sweep.steps(r))
  )
  assert described["sweep"]["32"]["best"] == description["sweep"]["32"]["best"]


def test_of_equal_trials_the_sweep_and_the_analysis_take_the_same(whole):
  """Two points arrive at the same step, the later one nearer to the goal: both take the first."""
  folder, sweep, description = whole
  records = sweep_records(description, read_records(folder), 32)
  best = description["sweep"]["32"]["best"]
  later = next(number for number in range(len(records)) if number > best)
  rows = [dict(row) for row in records[best].metrics]
  metric = sweep.workload.target.metric
  rows[-1][metric] -= 1e-3  # the goal of the quadratic is a small loss
  tied = [*records]
  tied[later] = records[later]._replace(metrics=rows, status={"state": "complete"})
  assert module._nearest(sweep, tied) == best
  (result,) = [r for r in steps_to_result(description, tied) if r.batch_size == 32]
  assert result.point == best


def test_final_seeds_repeat_the_best_point(whole):
  folder, sweep, description = whole
  for size in SIZES:
    entry = description["sweep"][str(size)]
    trials = of(folder, "sweep", size)
    best = trials[entry["best"]]
    assert sweep.steps(best) == min(steps for record in trials if (steps := sweep.steps(record)))
    finals = of(folder, "final", size)
    assert [record.trial["seed"] for record in finals] == [FIRST_FINAL_SEED, FIRST_FINAL_SEED + 1]
    assert all(record.trial["hparams"] == best.trial["hparams"] for record in finals)


def test_targets_are_looked_for_finely_enough(whole):
  folder, sweep, description = whole
  for size in SIZES:
    every = description["sweep"][str(size)]["eval_every"]
    fewest = min(steps for record in of(folder, "sweep", size) if (steps := sweep.steps(record)))
    assert every == 1 or every <= QUANTISATION * fewest
    pilot = of(folder, "pilot", size)
    lengths = {record.trial["config"]["num_steps"] for record in pilot}
    assert len(pilot) == 8 * len(lengths)
    assert min(lengths) < description["sweep"][str(size)]["num_steps"] / 8  # a sixteenth of the budget comes first
    reached = {record.trial["config"]["num_steps"] for record in pilot if sweep.steps(record)}
    assert reached == {max(lengths)}  # it went on until one arrived, and no further


@pytest.mark.parametrize(("base", "side"), [(1e-3, "high"), (100.0, "low")])
def test_spaces_whose_best_point_sits_on_an_edge_are_widened(tmp_path, base, side):
  """Centres a hundred times off: 16 times around them do not hold the best rate, about 0.3 to 1.5."""
  sweep, description = swept(tmp_path / side, base_learning_rate=base, scaling_rule="none", batch_sizes=(32,))
  entry = description["sweep"]["32"]
  (first,) = space_of(sweep.plan, 32)
  found = entry["space"]["learning_rate"]
  trials = of(tmp_path / side, "sweep", 32)
  assert len(trials) == entry["num_trials"] > 24
  if side == "high":
    assert found["low"] == first.low
    assert found["high"] > first.high
    assert trials[entry["best"]].trial["hparams"]["learning_rate"] > first.high
  else:
    assert found["high"] == first.high
    assert found["low"] < first.low
  assert all(record.trial["hparams"]["learning_rate"] <= found["high"] * (1 + 1e-12) for record in trials)


def test_a_target_that_nobody_reaches_is_told(tmp_path):
  """The space is widened towards the trial that came nearest, and the answer is none."""
  workload = load_workload("quadratic")
  beyond = dataclasses.replace(workload, target=workload.target._replace(goal=-1.0))
  _, description = swept(tmp_path / "beyond", beyond, batch_sizes=(32,), num_trials=5, base_learning_rate=1e-8)
  entry = description["sweep"]["32"]
  trials = of(tmp_path / "beyond", "sweep", 32)
  assert entry["best"] is None
  assert entry["num_trials"] == len(trials) == 5 + 3 * 2
  assert entry["edges"] == {"learning_rate": "high"}
  assert not of(tmp_path / "beyond", "final", 32)
  assert all(r.metrics[-1]["step"] >= 128 for r in trials if r.status["state"] == "complete")


def test_the_schedule_spans_the_budget_however_soon_a_trial_is_cut():
  workload = load_workload("quadratic")
  plan = make_sweep_plan(workload, schedule="cosine", warmup="gradual", warmup_fraction=0.1, num_steps=1000)
  hparams = sweep_hparams(plan, {"learning_rate": 0.3}, 1000, batch_size=32)
  assert (hparams.learning_rate, hparams.warmup_steps, hparams.decay_steps) == (0.3, 100, 900)
  trial = make_trial(sweep_config(plan, workload, batch_size=32, num_steps=200, every=7), hparams, 0)
  assert (trial.config.num_steps, trial.hparams.decay_steps) == (203, 900)


def test_how_finely_to_look():
  assert pilot_every(100) == 1
  assert pilot_every(12_800) == 100
  assert fine_every(1000, 8000) == 10
  assert fine_every(99, 8000) == 1
  assert fine_every(None, 8000) == 80


def test_budgets_and_spaces_of_a_plan():
  digits = load_workload("digits_mlp")
  plan = make_sweep_plan(digits, num_epochs=10, num_steps=50, space="momentum:reverse_log:0.5:0.99")
  assert most_steps(plan, batch_size=64, train_size=1024) == 160
  assert most_steps(plan, batch_size=1024, train_size=1024) == 50
  rate, momentum = space_of(plan, 128)
  assert (rate.low, rate.high) == (pytest.approx(0.4 / 16), pytest.approx(0.4 * 16))  # the square root of 4 times 0.2
  assert momentum.name == "momentum"
  fixed = make_sweep_plan(digits, space="learning_rate:log:0.1:1")
  assert space_of(fixed, 1) == space_of(fixed, 1024)


BAD = {
  "batch_sizes": ((8, 2000), "--batch_sizes has 2000, wanted 1 to 1024"),
  "num_epochs": (math.inf, "--num_epochs=inf, wanted a finite number above 0"),
  "num_trials": (0, "--num_trials=0, wanted 1 to 500"),
  "final_seeds": (-1, "--final_seeds=-1, wanted at least 0"),
  "optimizer": ("rmsprop", "--optimizer=rmsprop, wanted one of sgd, momentum"),
  "schedule": ("step", "--schedule=step, wanted one of constant, linear, cosine, inverse_sqrt"),
  "scaling_rule": ("cubic", "--scaling_rule=cubic, wanted one of none, linear, sqrt"),
  "warmup": ("gradual", "--warmup=gradual with --warmup_fraction=0"),
  "warmup_fraction": (0.1, "--warmup=none with --warmup_fraction=0.1"),
  "momentum": (1.0, "--momentum=1, wanted 0 <= momentum < 1"),
  "weight_decay": (-0.1, "--weight_decay=-0.1, wanted a finite number"),
  "space": ("momentum:log:0:1", "a log scale cannot reach 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_named(name):
  value, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    make_sweep_plan(load_workload("digits_mlp"), **{name: value})


def test_beta2_forgets_half_in_as_many_examples_at_every_batch_size():
  workload = load_workload("digits_mlp")
  plan = make_sweep_plan(workload, optimizer="adam", half_life=1000.0)
  for size in (1, 100):
    hparams = sweep_hparams(plan, {"learning_rate": 0.1}, 10, batch_size=size)
    assert hparams.beta2 ** (1000 / size) == pytest.approx(0.5)
  searched = sweep_hparams(plan, {"learning_rate": 0.1, "beta2": 0.9}, 10, batch_size=1)
  assert searched.beta2 == 0.9
  default = sweep_hparams(make_sweep_plan(workload), {"learning_rate": 0.1}, 10, batch_size=1)
  assert default.beta2 == Hparams(0.1).beta2


def test_only_batches_larger_than_the_microbatch_accumulate():
  workload = load_workload("digits_mlp")
  plan = make_sweep_plan(workload, microbatch_size=16, batch_sizes=(4, 16, 64))
  sizes = [
    sweep_config(plan, workload, batch_size=size, num_steps=4, every=1).microbatch_size for size in plan.batch_sizes
  ]
  assert sizes == [0, 0, 16]
  with pytest.raises(ValueError, match="a divisor of every larger batch size, so of 64"):
    make_sweep_plan(workload, microbatch_size=24, batch_sizes=(4, 64))
  with pytest.raises(ValueError, match="which has batch norm"):
    make_sweep_plan(dataclasses.replace(workload, batch_norm="running"), microbatch_size=16, batch_sizes=(4, 64))


def test_the_noise_rule_centres_rates_between_linear_and_constant():
  workload = load_workload("digits_mlp")
  plan = make_sweep_plan(
    workload, scaling_rule="noise", noise_scale=32.0, base_learning_rate=0.1, reference_batch_size=32
  )
  centres = [math.sqrt(d.low * d.high) for size in (1, 32, 1024) for d in space_of(plan, size)]
  assert centres == pytest.approx([0.1 * 2 / 33, 0.1, 0.1 * 2 / (1 + 1 / 32)])


def test_adaptive_optimizers_begin_at_their_own_rates():
  workload = load_workload("digits_mlp")
  rates = [make_sweep_plan(workload, optimizer=name).base_learning_rate for name in ("momentum", "adam", "lars")]
  assert rates == [workload.preset.base_learning_rate, 0.003, 20.0]
  assert make_sweep_plan(workload, optimizer="adam", base_learning_rate=0.5).base_learning_rate == 0.5


def test_the_target_may_be_looked_for_on_fewer_examples():
  workload = load_workload("digits_mlp")
  assert with_validation(workload, None) is workload
  fewer = with_validation(workload, 100)
  assert len(fewer.validation) == 100
  for name, array in fewer.validation.arrays.items():
    assert (array == workload.validation.arrays[name][:100]).all()
  assert fewer.test is workload.test


@pytest.fixture
def copied(whole, tmp_path) -> tuple[Sweep, dict]:
  """The whole sweep, in a folder of its own."""
  folder, sweep, description = whole
  shutil.copytree(folder, tmp_path / "copy")
  return sweep._replace(folder=tmp_path / "copy"), description


def test_quality_is_tried_from_the_fastest_point_to_the_slowest_that_arrived(whole):
  _, sweep, description = whole
  records = sweep_records(description, read_records(sweep.folder), 32)
  ranked = sorted((steps, r.trial["seed"]) for r in records if (steps := sweep.steps(r)) is not None)
  points, seeds = steps_module._spread(sweep, description, 32, 5)
  places = [[seed for _, seed in ranked].index(seed) for seed in seeds]
  assert places[0] == 0
  assert places[-1] == len(ranked) - 1
  assert len(places) == 5
  assert max(b - a for a, b in itertools.pairwise(places)) - min(b - a for a, b in itertools.pairwise(places)) <= 1
  rates = {r.trial["seed"]: r.trial["hparams"]["learning_rate"] for r in records}
  assert [point["learning_rate"] for point in points] == [rates[seed] for seed in seeds]
  assert len(steps_module._spread(sweep, description, 32, 1)[0]) == 1
  assert len(steps_module._spread(sweep, description, 32, 10**6)[0]) == len(ranked)


def test_the_best_point_is_judged_at_fresh_seeds_whichever_it_is(copied, monkeypatch):
  sweep, description = copied
  monkeypatch.setattr(steps_module, "best_quality", lambda study, records: len(records) - 1)
  with SweepProgress(sweep.workload, sweep.plan) as progress:
    steps_module._measure_quality(sweep._replace(progress=progress), description, 3)
  for size in SIZES:
    tried, judged = of(sweep.folder, "quality", size), of(sweep.folder, "quality_final", size)
    _, seeds = steps_module._spread(sweep, description, size, 3)
    last = next(record for record in tried if record.trial["seed"] == seeds[-1])
    assert [record.trial["seed"] for record in judged] == [FIRST_FINAL_SEED, FIRST_FINAL_SEED + 1]
    assert all(r.trial["hparams"]["learning_rate"] == last.trial["hparams"]["learning_rate"] for r in judged)
    budget = description["sweep"][str(size)]["num_steps"]
    assert all(record.metrics[-1]["step"] >= budget for record in (*tried, *judged))
    assert all(row["probe"] == "test" for record in judged for row in record.probes)
    assert all(0 < len(record.probes) <= 32 for record in judged)


def test_where_no_trial_arrived_no_quality_is_measured(copied):
  sweep, description = copied
  target = sweep.workload.target._replace(goal=-1.0)
  beyond = sweep._replace(workload=dataclasses.replace(sweep.workload, target=target))
  with SweepProgress(sweep.workload, sweep.plan) as progress:
    steps_module._measure_quality(beyond._replace(progress=progress), description, 3)
  assert not of(sweep.folder, "quality", 32)


def test_a_trial_that_diverged_is_never_the_nearest(whole):
  """Though it came nearer to the target than any other before it did."""
  folder, sweep, description = whole
  records = sweep_records(description, read_records(folder), 32)
  alive = [records[0]._replace(metrics=[{"step": 1, sweep.workload.target.metric: 5.0}])]
  dead = records[1]._replace(metrics=[{"step": 1, sweep.workload.target.metric: 1.0}], status={"state": "diverged"})
  assert module._nearest(sweep, [dead, *alive]) == 1
  assert module._nearest(sweep, [dead]) is None
