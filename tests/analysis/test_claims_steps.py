"""The judges of sweeps see what was put into simulated ones, and say what is missing."""

import itertools
import math

import numpy as np
import pytest

from bsjax.analysis.claims_steps import (
  LEAST_EXTENSION,
  LEAST_WIDTH_SLOPE,
  SweepRecords,
  judge_lr_sensitivity,
  judge_momentum_extends_scaling,
  judge_three_regimes,
)
from bsjax.analysis.sweep_curves import fit_sweep, steps_by_batch_size
from tests.analysis.simulate_sweep import make_study, trial_record

SIZES = tuple(4**k for k in range(6))
S_MIN, REACH, NUM_TRIALS = 200.0, 4.0, 48


def swept(
  optimizer, *, critical, sizes=SIZES, power=0.5, narrowing=0.0, seed=0, diverged=0, edges=None, num_trials=NUM_TRIALS
) -> SweepRecords:
  """Trials of a bowl in the log rate about 0.1 B^power; the width of the good rates grows as B^-narrowing."""
  rng = np.random.default_rng(seed)

  def fewest(size):
    return S_MIN * (1 + critical / size)

  study = make_study(
    sizes,
    num_steps=lambda size: int(REACH * fewest(size)),
    every=lambda size: max(1, int(fewest(size) / 100)),
    num_trials=num_trials,
    optimizer=optimizer,
    edges=edges,
  )
  records = []
  for size in sizes:
    x = rng.uniform(-2, 2, num_trials)
    excess = 2 * size ** (2 * narrowing) * x**2 + 0.05 * rng.normal(size=num_trials)
    for point in range(num_trials):
      state = "diverged" if point < diverged else "complete"
      rate = 0.1 * size**power * math.exp(x[point])
      needs = fewest(size) * math.exp(excess[point])
      records.append(trial_record(study, size, point, needs, rate=rate, momentum=0.0, state=state))
  return SweepRecords(study, records)


@pytest.fixture(scope="module")
def sgd() -> SweepRecords:
  return swept("sgd", critical=16.0, diverged=2)


@pytest.fixture(scope="module")
def momentum() -> SweepRecords:
  return swept("momentum", critical=128.0, seed=1)


@pytest.fixture(scope="module")
def bent(sgd, momentum):
  return judge_three_regimes({"sgd": sgd, "momentum": momentum})


def test_three_regimes_hold_where_the_bend_lies_well_inside():
  finding = judge_three_regimes({"sgd": swept("sgd", critical=64.0)})
  claim = finding.claim
  assert claim.verdict == "holds"
  assert claim.ci_low < 64 < claim.ci_high
  assert claim.n == len(SIZES)
  assert "sgd: the critical batch size is 63.8 [" in finding.reading
  assert "up to 12.8 [" in finding.reading  # a fifth of it


def test_three_regimes_fail_where_nothing_is_straight():
  """With a critical batch size below 4 times the smallest, not even the first doubling is nearly perfect."""
  claim = judge_three_regimes({"sgd": swept("sgd", critical=1.0)}).claim
  assert claim.verdict == "fails"
  assert claim.ci_high < 4


@pytest.mark.parametrize(("train_size", "verdict"), [(1024, "fails"), (4096, "inconclusive")])
def test_a_plateau_is_known_to_be_absent_only_at_the_whole_training_set(train_size, verdict):
  """The last doubling from 512 to 1024 saves (1 + 2) / (1 + 1) = 1.5."""
  study, records = swept("sgd", critical=1024.0)
  study["train_size"] = train_size
  claim = judge_three_regimes({"sgd": SweepRecords(study, records)}).claim
  assert claim.verdict == verdict
  assert claim.ci_low > 256


def test_a_curve_without_a_bend_is_open():
  finding = judge_three_regimes({"sgd": swept("sgd", critical=1e5)})
  assert finding.claim.verdict == "inconclusive"
  assert "no plateau was seen up to 1,024" in finding.reading
  assert "was not fitted: the curve shows no clear bend" in finding.reading


def test_one_optimizer_that_fails_decides(bent):
  both = judge_three_regimes({"momentum": swept("momentum", critical=64.0), "sgd": swept("sgd", critical=1.0)})
  assert both.claim.verdict == "fails"
  assert both.claim.unit.endswith(", sgd")
  assert "momentum:" in both.reading
  assert "sgd:" in both.reading
  assert bent.claim.unit.endswith((", sgd", ", momentum"))


def test_the_series_hold_the_curve_its_trials_and_their_states(bent, sgd, momentum):
  series = bent.series
  curve = fit_sweep(steps_by_batch_size(*sgd))
  at = series["optimizer"] == "sgd"
  np.testing.assert_array_equal(series["batch_size"][at], SIZES)
  np.testing.assert_allclose(series["steps"][at], curve.steps)
  np.testing.assert_allclose(series["perfect"][at], curve.steps[0] / np.array(SIZES))
  assert (series["steps_low"] <= series["steps"]).all()
  assert (series["steps"] <= series["steps_high"]).all()
  reached = sum(int(np.isfinite(v).sum()) for v in steps_by_batch_size(*sgd).values())
  assert (series["trial_optimizer"] == "sgd").sum() == reached
  states = {name: series[name][series["state_optimizer"] == "sgd"] for name in ("reached", "not_reached", "infeasible")}
  assert states["infeasible"].tolist() == [2] * len(SIZES)
  assert states["reached"].sum() == reached
  assert (sum(states.values()) == NUM_TRIALS).all()
  assert series["critical"][series["curve_optimizer"] == "momentum"] == pytest.approx([128], rel=0.3)
  # The training loss falls to the matching goal a fixed share of the way, so its curve is parallel.
  assert np.isfinite(series["train_steps"]).all()


def test_more_budget_buys_more_and_the_fewest_steps_reach_the_target_at_one_batch_size(bent):
  series = bent.series
  assert series["budget_optimizer"] == "sgd" or series["budget_optimizer"] == "momentum"
  fastest = series["steps"].min()
  assert (series["optimizer"][series["steps"] == fastest] == series["budget_optimizer"]).any()
  for unit in ("steps", "epochs"):
    at = series["budget_unit"] == unit
    budgets = np.unique(series["budget"][at])
    table = [series["budget_best"][at & (series["budget"] == budget)] for budget in budgets]
    assert all((np.nan_to_num(more) >= np.nan_to_num(less)).all() for less, more in itertools.pairwise(table))
    smallest, largest = (series["budget_reached"][at & (series["budget"] == b)] for b in (budgets[0], budgets[-1]))
    assert smallest.any()
    assert not smallest.all()
    assert largest.all()


def test_without_trials_that_reached_the_target_nothing_is_judged():
  study, records = swept("sgd", critical=64.0, num_trials=3)
  finding = judge_three_regimes({"sgd": SweepRecords(study, records)})
  assert finding.claim.verdict == "inconclusive"
  assert finding.claim.measured is None
  assert "and 4 are needed" in finding.reading
  assert len(finding.series["steps"]) == 0
  assert len(finding.series["state_batch_size"]) == len(SIZES)


def test_edges_are_told():
  finding = judge_three_regimes({"sgd": swept("sgd", critical=64.0, edges={16: {"learning_rate": "high"}})})
  assert "on the edge of the search at batch size 16 (high learning_rate)" in finding.reading


def test_momentum_extends_scaling_where_its_critical_batch_size_is_larger(sgd, momentum):
  finding = judge_momentum_extends_scaling({"sgd": sgd, "momentum": momentum})
  claim = finding.claim
  assert claim.verdict == "holds"
  assert claim.ci_low < 8 < claim.ci_high  # 128 / 16
  assert claim.measured == pytest.approx(8, rel=0.3)
  # (1 + 16/B) / (1 + 128/B): at B = 1 it is 17/129, at 1024 it is 0.903
  ratio = finding.series["ratio"]
  assert ratio[0] == pytest.approx(17 / 129, rel=0.1)
  assert ratio[-1] == pytest.approx((1 + 16 / 1024) / (1 + 128 / 1024), rel=0.1)
  assert (finding.series["ratio_low"] <= ratio).all()
  assert (ratio <= finding.series["ratio_high"]).all()


def test_momentum_fails_where_it_shrinks_the_critical_batch_size(sgd, momentum):
  claim = judge_momentum_extends_scaling({"sgd": momentum, "momentum": sgd}).claim
  assert claim.verdict == "fails"
  assert claim.ci_high < math.exp(LEAST_EXTENSION)


def test_momentum_is_open_where_both_are_alike_and_few():
  few = {
    name: swept(name, critical=64.0, seed=seed, num_trials=16) for seed, name in enumerate(("sgd", "momentum"), start=2)
  }
  claim = judge_momentum_extends_scaling(few).claim
  assert claim.verdict == "inconclusive"
  assert claim.ci_low < 1 < claim.ci_high


def test_momentum_needs_both_sweeps_and_a_bend(sgd):
  finding = judge_momentum_extends_scaling({"sgd": sgd})
  assert finding.claim.verdict == "inconclusive"
  assert "--optimizers=sgd,momentum" in finding.reading
  straight = judge_momentum_extends_scaling({"sgd": sgd, "nesterov": swept("nesterov", critical=1e5)})
  assert straight.claim.verdict == "inconclusive"
  assert "nesterov: the curve shows no clear bend" in straight.reading
  assert len(straight.series["ratio"]) == len(SIZES)


def test_sensitivity_holds_where_the_good_range_widens(sgd):
  finding = judge_lr_sensitivity({"sgd": swept("sgd", critical=64.0, narrowing=-0.1)})
  claim = finding.claim
  assert claim.verdict == "holds"
  assert claim.ci_low < 0.1 < claim.ci_high
  assert "in agreement with the square root rule" in finding.reading


def test_sensitivity_fails_where_the_good_range_narrows():
  claim = judge_lr_sensitivity({"sgd": swept("sgd", critical=64.0, narrowing=0.1)}).claim
  assert claim.verdict == "fails"
  assert claim.ci_high < LEAST_WIDTH_SLOPE


def test_sensitivity_is_open_where_few_trials_tell_little():
  claim = judge_lr_sensitivity({"sgd": swept("sgd", critical=64.0, num_trials=10, seed=5)}).claim
  assert claim.verdict == "inconclusive"
  assert claim.ci_low < 0
  assert claim.ci_high > LEAST_WIDTH_SLOPE


def test_all_optimizers_must_agree_on_sensitivity():
  widens, narrows = (swept("sgd", critical=64.0, narrowing=n) for n in (-0.1, 0.1))
  finding = judge_lr_sensitivity({"momentum": widens, "sgd": narrows})
  assert finding.claim.verdict == "fails"
  assert finding.claim.unit.endswith(", sgd")
  assert finding.claim.measured < 0


def test_the_width_is_twice_the_square_root_of_log_two_over_the_curvature():
  """Steps are within twice the fewest where 2 x^2 < log 2: a width of 2 sqrt(log(2) / 2) = 1.18, whatever the batch size."""
  finding = judge_lr_sensitivity({"sgd": swept("sgd", critical=64.0)})
  np.testing.assert_allclose(finding.series["width"], 2 * math.sqrt(math.log(2) / 2), rtol=0.25)
  np.testing.assert_allclose(finding.series["best"], 0.1 * np.array(SIZES) ** 0.5, rtol=0.3)


def test_sensitivity_without_enough_trials_is_open():
  finding = judge_lr_sensitivity({"sgd": swept("sgd", critical=64.0, num_trials=3)})
  assert finding.claim.verdict == "inconclusive"
  assert "no batch size has enough trials" in finding.reading
