import math

import numpy as np
import pytest

from bsjax.analysis import sweep_rates
from bsjax.analysis.sweep_rates import effective_rate, fit_rates, good_rate_width, rate_curve
from tests.analysis import simulate_sweep
from tests.analysis.simulate_sweep import covered

SIZES = tuple(2**k for k in range(11))


def bowls(rng, *, power, narrowing=0.0, num_trials=64, noise=0.05, num_tuned=2, sizes=SIZES):
  """Trials about a best rate 0.1 B^power; the width of the good rates falls as B^-narrowing."""
  rates, steps = {}, {}
  for size in sizes:
    x = rng.uniform(-3, 3, size=num_trials)
    others = rng.uniform(-1, 1, size=(num_trials, num_tuned - 1))
    excess = 4 * size ** (2 * narrowing) * x**2 + (others**2).sum(1) + noise * rng.normal(size=num_trials)
    rates[size] = 0.1 * size**power * np.exp(x)
    steps[size] = 1000 * np.where(excess < math.log(50), np.exp(excess), np.nan)
  return rates, steps


def test_the_effective_rate_divides_by_one_minus_momentum_where_there_is_momentum():
  hparams = {"learning_rate": 0.1, "momentum": 0.9}
  assert effective_rate("momentum", hparams) == effective_rate("nesterov", hparams) == pytest.approx(1.0)
  assert effective_rate("sgd", hparams) == effective_rate("adam", hparams) == 0.1


def test_the_width_of_a_bowl_is_exact_to_a_cell():
  """steps = exp(4 x^2) on an even grid of log rates: within a factor f of the fewest for |x| <= sqrt(log f / 4)."""
  x, spacing = np.linspace(-3, 3, 601, retstep=True)
  for factor in (1.5, 2.0, 4.0):
    width, truncated = good_rate_width(np.exp(x), np.exp(4 * x**2), factor=factor)
    assert width.value == pytest.approx(2 * math.sqrt(math.log(factor) / 4), abs=spacing)
    assert covered(width, 2 * math.sqrt(math.log(factor) / 4))
    assert not truncated


def test_trials_that_did_not_reach_the_goal_are_not_good():
  rates = np.exp(np.arange(7.0))
  steps = np.array([np.nan, 150, 100, np.inf, 120, 300, np.nan])
  width, truncated = good_rate_width(rates, steps)
  assert width.value == pytest.approx(3.0)  # three cells of length 1
  assert not truncated
  assert good_rate_width(rates, np.where(rates == rates[-1], 100.0, steps))[1]


def test_the_width_does_not_depend_on_where_rates_were_drawn():
  """Three times as many rates above the best point, some of them twice: the cells make up for it."""
  x = np.unique(np.concatenate([np.linspace(-2, 0, 101), np.linspace(0, 2, 301)]))
  x = np.concatenate([x, x[80:140]])
  width, _ = good_rate_width(np.exp(x), np.exp(4 * x**2))
  assert width.value == pytest.approx(2 * math.sqrt(math.log(2) / 4), abs=0.02)  # the wider spacing


def test_the_interval_of_a_width_covers_the_truth():
  """Rates drawn at random, one other hyperparameter: P(good) times the range, by a fine sum."""
  rng = np.random.default_rng(0)
  truth = 6 * np.mean(4 * rng.uniform(-3, 3, 10**6) ** 2 + rng.uniform(-1, 1, 10**6) ** 2 <= math.log(2))
  held = 0
  for _ in range(200):
    x, y = rng.uniform(-3, 3, 64), rng.uniform(-1, 1, 64)
    steps = np.exp(4 * x**2 + y**2)
    held += covered(
      good_rate_width(np.exp(x), steps, factor=2 / steps.min())[0], truth
    )  # at most 2 steps: no doubt about the limit
  low, high = simulate_sweep.binomial_bounds(200)
  assert low <= held <= high


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_slope_of_the_best_rate_covers_its_exponent(power):
  rng = np.random.default_rng(1)
  repetitions = 100
  curves = [fit_rates(*bowls(rng, power=power), on_edge=set()) for _ in range(repetitions)]
  low, high = simulate_sweep.binomial_bounds(repetitions)
  assert low <= sum(covered(c.best_slope, power) for c in curves) <= high
  assert all(p.reason == "" for c in curves for p in c.points)
  name = {0.0: "constant", 0.5: "square root", 1.0: "linear"}[power]
  assert all((name in c.agrees) == covered(c.best_slope, power) for c in curves)
  assert sum(c.agrees == (name,) for c in curves) > 0.8 * repetitions  # the rules can be told apart


def test_the_slope_of_the_width_covers_its_exponent():
  rng = np.random.default_rng(2)
  repetitions = 100
  curves = [
    fit_rates(*bowls(rng, power=0.5, narrowing=0.1, num_trials=128, num_tuned=1, noise=0.0), on_edge=set())
    for _ in range(repetitions)
  ]
  low, high = simulate_sweep.binomial_bounds(repetitions)
  assert low <= sum(covered(c.width_slope, -0.1) for c in curves) <= high
  assert np.mean([c.width_slope.high < 0 for c in curves]) > 0.8


def test_the_best_rate_of_a_batch_size_lies_within_its_interval():
  rng = np.random.default_rng(3)
  points = [p for _ in range(20) for p in fit_rates(*bowls(rng, power=1.0), on_edge=set()).points]
  held = sum(covered(p.best, 0.1 * p.batch_size) for p in points)
  assert held >= simulate_sweep.binomial_bounds(len(points), 0.8)[0]
  assert all(p.best.low <= p.best.value <= p.best.high for p in points)


def test_points_on_an_edge_or_truncated_are_left_out_of_the_slopes():
  rng = np.random.default_rng(4)
  rates, steps = bowls(rng, power=1.0)
  rates[4] = rates[4] * 1e6  # would ruin the slope
  curve = fit_rates(rates, steps, on_edge={4})
  assert covered(curve.best_slope, 1.0)
  assert curve.best_slope.high - curve.best_slope.low < 0.5  # far wider with the outlier
  assert [p.batch_size for p in curve.points if p.on_edge] == [4]
  steps[8][np.argmin(rates[8])] = np.nanmin(steps[8])
  assert [p.batch_size for p in fit_rates(rates, steps, on_edge={4}).points if p.truncated] == [8]


def test_too_few_batch_sizes_have_no_slope_and_say_why():
  rates, steps = bowls(np.random.default_rng(5), power=1.0, sizes=(1, 2, 4, 8))
  steps[1][:] = np.nan
  curve = fit_rates(rates, steps, on_edge={2})
  assert curve.points[0].reason == "0 of 64 trials reached the goal, and 4 are needed"
  assert np.isnan(curve.points[0].best).all()
  assert curve.best_reason == "2 batch sizes have their best rate inside the search, and 3 are needed"
  assert np.isnan(curve.best_slope).all()
  assert curve.agrees == ()
  assert curve.width_reason == ""
  assert "0 batch sizes show both ends" in fit_rates({}, {}, on_edge=set()).width_reason


def test_rates_from_records():
  """The effective rate decides here, and grows as B; the best learning rate alone depends on the momentum it was drawn with."""
  sizes = (1, 4, 16, 64)
  rng = np.random.default_rng(6)
  study = simulate_sweep.make_study(
    sizes, num_steps=lambda _: 5000, every=lambda _: 10, num_trials=40, edges={16: {"momentum": "high"}}
  )
  records = []
  for size in sizes:
    for point in range(40):
      momentum, x = 1 - 10 ** rng.uniform(-1.5, 0), rng.uniform(-2, 2)
      records.append(
        simulate_sweep.trial_record(
          study, size, point, 500 * math.exp(x**2), rate=0.1 * size * math.exp(x) * (1 - momentum), momentum=momentum
        )
      )
  curve = rate_curve(study, records, effective=True)
  assert covered(curve.best_slope, 1.0)
  assert [p.on_edge for p in curve.points] == [False, False, True, False]
  for point in curve.points:
    # Three spacings of 40 trials on [-2, 2].
    assert abs(math.log(point.best.value / (0.1 * point.batch_size))) < 0.3
    assert point.width.value == pytest.approx(2 * math.sqrt(math.log(2)), abs=4 * 4 / 40)  # four cells
  plain = rate_curve(study, records)
  assert [p.on_edge for p in plain.points] == [False] * 4
  assert plain.points[0].best.value < 0.1  # the rate is the effective rate times 1 - momentum
  assert sweep_rates.GOOD_FACTOR == 2
