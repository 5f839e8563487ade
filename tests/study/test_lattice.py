"""Lattices grow until the best rate shows with a failing one on either side; what was expected wrongly is done again; misses are told."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from bsjax.records import read_records
from bsjax.study import lattice as module
from bsjax.study.lattice import Expected, Grown, _guess, _lay, _open_sides, carry_adam, noise_steps
from bsjax.study.scaling_rules import make_scaling_plan, sweep_plan_of
from bsjax.study.sweep import Sweep
from bsjax.study.sweep_plan import GIVE_UP_FACTOR, GUESSED_RATES
from bsjax.study.sweep_progress import SweepProgress
from bsjax.train import make_mesh
from bsjax.workloads import load_workload

SIZE = 32


@pytest.fixture(scope="module")
def workload():
  return load_workload("quadratic")


def make_sweep(folder, workload, **overrides):
  plan = make_scaling_plan(workload, **{"batch_sizes": (SIZE, 128), "optimizers": ("sgd",), "seeds": 4} | overrides)
  sweep_plan = sweep_plan_of(plan, workload, "sgd")
  folder.mkdir(exist_ok=True)
  progress = SweepProgress(workload, sweep_plan, sweeps=("sgd",))
  progress.begin(SIZE, "sgd")
  return Sweep(workload, sweep_plan, folder, make_mesh(data=1), {}, progress, "sgd")


def steps_of(sweep, grown):
  """Steps to the target and most steps, by rate and seed; of repeated trials the longest."""
  found = {}
  for record in sorted(read_records(sweep.folder), key=lambda record: record.trial["config"]["num_steps"]):
    if record.trial["kind"] == "lattice" and record.trial["config"]["eval_every"] == grown.every:
      k = round(2 * math.log2(record.trial["hparams"]["learning_rate"] / sweep.plan.base_learning_rate))
      found.setdefault(k, {})[record.trial["seed"]] = (sweep.steps(record), record.trial["config"]["num_steps"])
  return found


def nothing_was_cut_before_the_limit(sweep, grown):
  inside = [trials for k, trials in steps_of(sweep, grown).items() if grown.first <= k <= grown.last]
  limit = GIVE_UP_FACTOR * grown.fewest
  return all(steps is not None or most >= limit for trials in inside for steps, most in trials.values())


@pytest.mark.parametrize("guess", [-6, 1, 9])
def test_a_lattice_ends_beyond_failing_rates_wherever_it_begins(guess, tmp_path, workload):
  """From far below, near and far above, where rates diverge: the same best rate, and on each side a rate that fails at every seed."""
  sweep = make_sweep(tmp_path / "run", workload)
  grown = _lay(sweep, SIZE, guess, Expected(None, None), range(4))
  found = steps_of(sweep, grown)
  assert sorted(found) == list(range(grown.first, grown.last + 1))
  assert all(sorted(trials) == [0, 1, 2, 3] for trials in found.values())
  limit = GIVE_UP_FACTOR * grown.fewest
  fails = {k: all(steps is None or steps > limit for steps, _ in trials.values()) for k, trials in found.items()}
  assert any(fails[k] for k in range(grown.first, grown.best))
  assert any(fails[k] for k in range(grown.best + 1, grown.last + 1))
  assert grown.open == ()
  means = {
    k: np.mean([math.log(s or limit) for s, _ in trials.values()]) for k, trials in found.items() if not fails[k]
  }
  assert min(means, key=means.get) == grown.best
  assert grown.fewest == pytest.approx(math.exp(min(means.values())))
  # Curvature between 0.05 and 1: rates above 2 are unstable, and the best is the largest that is not far from it.
  assert 0.5 < sweep.plan.base_learning_rate * 2 ** (grown.best / 2) < 2
  assert nothing_was_cut_before_the_limit(sweep, grown)


def test_a_target_looked_for_too_rarely_or_cut_too_soon_is_done_again(tmp_path, workload):
  """Expected at 1000 steps the target would be looked for every 10; expected at half of its steps, trials would end at twice them."""
  near = dataclasses.replace(workload, target=workload.target._replace(goal=0.004))
  right = _lay(make_sweep(tmp_path / "right", near), SIZE, 4, Expected(30, 60), range(4))
  wrong = {"rarely": (1000, 2000), "soon": (2, right.fewest / 2), "before": (2, 1), "unknown": (None, 1)}
  for name, expected in wrong.items():
    sweep = make_sweep(tmp_path / name, near)
    again = _lay(sweep, SIZE, 4, Expected(*expected), range(4))
    assert (again.every, again.best) == (1, right.best)
    assert again.fewest == pytest.approx(right.fewest)
    assert again.open == ()
    assert nothing_was_cut_before_the_limit(sweep, again)


def test_no_trial_takes_more_than_four_budgets(tmp_path, workload):
  sweep = make_sweep(tmp_path / "run", workload, num_steps=24, num_epochs=0.01)
  assert sweep.budget(SIZE) == 24
  grown = _lay(sweep, SIZE, 2, Expected(10, 10_000), range(4))
  lengths = {record.trial["config"]["num_steps"] for record in read_records(sweep.folder)}
  assert max(lengths) == 4 * 24
  assert grown.fewest < 24
  assert nothing_was_cut_before_the_limit(sweep, grown)


@pytest.mark.parametrize("reference", ["not reached: made up", ""])
def test_adams_rule_is_carried_only_where_there_is_something_to_compare(reference, tmp_path, workload):
  """At the reference, 32, a best rate or none; at 128 a lattice; at 64 none; 2,000 is beyond what betas allow."""
  sizes = (SIZE, 64, 128, 2000)
  plan = make_scaling_plan(workload, batch_sizes=sizes[:3], optimizers=("adam",), seeds=4, reference_batch_size=SIZE)
  sweep_plan = dataclasses.replace(sweep_plan_of(plan, workload, "adam"), batch_sizes=sizes)
  trained = []
  sweep = SimpleNamespace(plan=sweep_plan, config=lambda *given: given, run=lambda *given: trained.append(given))
  lattices = {
    str(size): {"best_learning_rate": 0.01, "fewest_steps": 9.3, "eval_every": 2, "reason": ""} for size in sizes
  }
  lattices["64"] |= {"best_learning_rate": None, "reason": "every trial diverged"}
  lattices[str(SIZE)] |= {"reason": reference} | ({"best_learning_rate": None} if reference else {})
  skipped = carry_adam(sweep, lattices, seeds=4)
  assert skipped["64"] == "every trial diverged"
  if reference:
    assert skipped["128"] == skipped["2000"] == "no best rate at batch size 32"
    assert trained == []
    return
  assert sorted(skipped) == ["2000", "64"]
  ((config, points, seeds, kind),) = trained
  assert config == (128, 38, 2)  # four times 9.3 steps, rounded up
  assert points == [pytest.approx(points[0])] * 4
  # Four times the batch: the rate times 2, 1 - beta times 4, epsilon over 2 (Malladi et al., 2022).
  assert points[0] == pytest.approx({"learning_rate": 0.02, "momentum": 0.6, "beta2": 0.996, "epsilon": 5e-9})
  assert (list(seeds), kind) == ([0, 1, 2, 3], "adam_sqrt")


def test_batch_sizes_ascend_and_heavy_balls_begin_lower(workload):
  plan = make_scaling_plan(workload, batch_sizes=(128, 8, 32), momentum=0.75)
  assert plan.batch_sizes == (8, 32, 128)
  rates = {name: sweep_plan_of(plan, workload, name).base_learning_rate for name in plan.optimizers}
  guess = workload.preset.base_learning_rate
  assert rates == {"sgd": guess, "momentum": guess / 4, "adam": GUESSED_RATES["adam"]}


def test_the_next_batch_size_begins_where_the_square_root_rule_leads(tmp_path, workload):
  sweep = make_sweep(tmp_path / "run", workload)
  grown = Grown(0, 8, 1, 5, 40.0, (), "")
  assert _guess(sweep, 32, (128, grown)) == (3, Expected(40.0, 160.0))
  assert _guess(sweep, 2, (128, grown)) == (-1, Expected(40.0, 2560.0))


def test_a_target_out_of_reach_is_told_with_how_near(tmp_path, workload):
  out_of_reach = dataclasses.replace(workload, target=workload.target._replace(goal=-1.0))
  sweep = make_sweep(tmp_path / "run", out_of_reach, num_steps=16, num_epochs=0.01)
  grown = _lay(sweep, SIZE, 0, Expected(None, None), range(4))
  assert (grown.best, grown.fewest) == (None, None)
  values = [row["validation_loss"] for record in read_records(sweep.folder) for row in record.metrics]
  assert grown.reason == f"not reached: the nearest validation_loss is {min(values):.4g}, the target -1"


def test_rates_that_all_diverge_are_lowered_and_then_told(tmp_path, workload):
  sweep = make_sweep(tmp_path / "run", workload, num_steps=128, num_epochs=0.01)
  grown = _lay(sweep, SIZE, 40, Expected(None, None), range(4))
  assert grown.first == 40 - module.REACH * (1 + module.MOST_WIDENINGS)
  assert grown.reason == "every trial diverged"


def test_a_side_is_open_until_a_rate_fails_at_every_seed():
  nan = math.nan
  steps = np.array([[50.0, 12, 10, 11, nan], [nan, 12, 10, 11, 20]])
  assert _open_sides(steps, 2, 10.0) == ("high",)
  assert _open_sides(steps[:, :4], 2, 10.0) == ("high",)
  assert _open_sides(steps[:, 1:], 1, 10.0) == ("low", "high")
  assert _open_sides(steps[:1], 2, 10.0) == ()


@pytest.mark.parametrize(("num_steps", "every"), [(1, 1), (7, 1), (640, 4), (50, 50), (3000, 10)])
def test_noise_is_measured_at_steps_that_a_trial_has(num_steps, every):
  steps = noise_steps(num_steps, every)
  assert steps[-1] == num_steps
  assert steps[0] >= min(num_steps / module.NOISE_SPAN / 2, every)
  assert all(step > 0 and step % every == 0 for step in steps)
  assert len(steps) <= module.NOISE_STEPS
  json.dumps(steps)
