import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bsjax.analysis.finite_trials import (
  check_final_seeds,
  draw_minima,
  expected_minimum,
  mean_interval,
  resample_minimum,
  tuning_bias,
)
from bsjax.analysis.steps_to_result import steps_to_result
from tests.analysis import simulate_sweep

VALUES = np.array([3.0, 1.0, np.nan, 4.0, 1.5, 9.0, np.inf])


def minima_of_subsets(size):
  """The smallest value of every subset in which a trial succeeded, by enumeration."""
  subsets = itertools.combinations(VALUES.tolist(), size)
  return [min(finite) for subset in subsets if (finite := [x for x in subset if math.isfinite(x)])]


@pytest.mark.parametrize("size", range(1, len(VALUES) + 1))
def test_the_expected_minimum_is_the_mean_over_all_subsets(size):
  assert expected_minimum(VALUES, size) == pytest.approx(
    np.mean(minima_of_subsets(size)), rel=1e-12
  )  # rounding of log gamma


def test_the_expected_minimum_at_its_ends():
  assert expected_minimum(VALUES, len(VALUES)) == 1.0
  assert expected_minimum(VALUES, 1) == pytest.approx(np.mean([3, 1, 4, 1.5, 9]))
  assert math.isnan(expected_minimum(np.array([np.nan, np.nan]), 1))
  with pytest.raises(ValueError, match="num_trials=8 of 7 values cannot be drawn; use 1 to 7"):
    expected_minimum(VALUES, 8)
  with pytest.raises(ValueError, match="num_trials=0"):
    expected_minimum(VALUES, 0)


def test_drawn_halves_have_the_minima_of_all_halves():
  draws = 20000
  drawn = VALUES[draw_minima(VALUES, draws, np.random.default_rng(0))]
  exact = minima_of_subsets(4)  # half of 7, rounded up
  for value in np.unique(exact):
    share = np.mean(np.array(exact) == value)
    # Four standard errors of a binomial share.
    assert np.mean(drawn == value) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / draws) + 1e-12)


def test_a_resampled_minimum_is_centred_and_spreads_as_sweeps_of_half_the_size_do():
  """With gaps that are exponential the variance within halves is two thirds of that between fresh halves; the stretch restores it."""
  rng = np.random.default_rng(1)
  fresh, spread = [], []
  for _ in range(400):
    values = rng.exponential(size=64)
    drawn = resample_minimum(values, 400, rng)
    spread.append(np.mean((drawn - values.min()) ** 2))
    fresh.append(rng.exponential(size=32).min())
    # Mean zero, to four standard errors of 400 draws about a spread of 1/32.
    assert abs(drawn.mean() - values.min()) < 4 * drawn.std() / math.sqrt(400) + 1e-12
  exact = 1 / 32**2  # variance of the minimum of 32 exponentials
  # Relative standard error of the mean of 400 heavy-tailed squares: their own spread.
  assert np.mean(spread) == pytest.approx(exact, abs=4 * np.std(spread) / math.sqrt(400))
  assert np.var(fresh) == pytest.approx(
    exact, rel=4 * math.sqrt(8 / 400)
  )  # kurtosis 9: Var of a variance is 8 exact^2 / n
  assert resample_minimum(np.array([2.0, 2.0, 2.0, np.nan]), 10, rng) == pytest.approx(2.0)


def disc_sweep(rng, num_sizes, *, num_trials=64):
  """Two hyperparameters in a disc about the best point: the share of trials within t of the lowest log steps is exactly t / 2."""
  return {b: np.exp(rng.uniform(0, 2, size=num_trials)) for b in range(1, num_sizes + 1)}


def test_the_bias_of_a_finite_sweep_is_measured_and_bounded_where_the_answer_is_known():
  """Uniform log steps on [0, 2]: the expected minimum of n is 2 / (n + 1), so half of 64 give 2/33 - 2/65 and all further trials 2/65."""
  bias = tuning_bias(disc_sweep(np.random.default_rng(2), 2000), num_tuned=2)
  gain, remaining = 2 / 33 - 2 / 65, 2 / 65
  assert np.log(bias.gain.low) < gain < np.log(bias.gain.high)
  # 1 / n is the law for large n; here it is 1 / (n + 1), which makes the last doubling 32/33 of all that remains.
  spread = np.log(bias.remaining.high / bias.remaining.value)
  assert np.log(bias.remaining.value) == pytest.approx(remaining, abs=remaining / 33 + spread)
  # 2000 batch sizes fix the mean to about 1 / sqrt(2000) of a spread that is as large as the mean: the interval says something.
  assert np.log(bias.gain.high) - np.log(bias.gain.low) < 0.2 * gain
  assert bias.trend.low < 0 < bias.trend.high
  four = tuning_bias(disc_sweep(np.random.default_rng(2), 50), num_tuned=4)
  two = tuning_bias(disc_sweep(np.random.default_rng(2), 50), num_tuned=2)
  assert np.log(four.remaining.value) == pytest.approx(np.log(two.gain.value) / (math.sqrt(2) - 1))


def test_uneven_tuning_shows_as_a_trend():
  rng = np.random.default_rng(3)
  steps = {2**k: np.exp((1 + 2 * k) * rng.uniform(0, 1, size=64)) for k in range(20)}
  assert tuning_bias(steps, num_tuned=2).trend.low > 0


def test_batch_sizes_that_hardly_reached_the_goal_tell_nothing_about_bias():
  steps = disc_sweep(np.random.default_rng(4), 3) | {4: np.array([1.0, 2.0, 3.0, *[np.nan] * 20])}
  bias = tuning_bias(steps, num_tuned=1)
  assert bias.batch_sizes.tolist() == [1, 2, 3]
  none = tuning_bias({4: steps[4]}, num_tuned=1)
  assert len(none.gains) == 0
  assert np.isnan([*none.gain, *none.remaining, *none.trend]).all()


def test_the_mean_has_students_interval():
  values = np.random.default_rng(5).normal(size=6)
  expected = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
  assert mean_interval(values) == pytest.approx((values.mean(), *expected))
  assert mean_interval([2.0]) == pytest.approx((2, np.nan, np.nan), nan_ok=True)


def test_fresh_seeds_tell_what_the_minimum_owes_to_luck():
  study = simulate_sweep.make_study((8, 16, 32, 64), num_steps=lambda _: 400, every=lambda _: 10, num_trials=2)
  sweep = simulate_sweep.sweep_of(study, {8: [100, 200], 16: [100, 200], 32: [100], 64: [900]})
  finals = [
    *[simulate_sweep.trial_record(study, 8, seed, 200, kind="final") for seed in simulate_sweep.FINAL_SEEDS[:2]],
    simulate_sweep.trial_record(study, 8, simulate_sweep.FINAL_SEEDS[2], 50, kind="final"),
    simulate_sweep.trial_record(study, 8, simulate_sweep.FINAL_SEEDS[3], 10, kind="final", rate=0.5),  # another point
    simulate_sweep.trial_record(study, 8, 77, 10, kind="final"),  # no final seed
    simulate_sweep.trial_record(study, 16, 1000, 100, kind="final"),
    simulate_sweep.trial_record(study, 16, 1001, 100, kind="final", state="diverged"),
    simulate_sweep.trial_record(study, 32, 1000, 100, kind="final"),
  ]
  eight, sixteen, thirty_two = check_final_seeds(study, [*sweep, *finals], steps_to_result(study, sweep))
  logs = np.log([2.0, 2.0, 0.5])
  half = stats.t.ppf(0.975, 2) * stats.sem(logs)
  assert eight.ratio == pytest.approx(np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]))
  assert (eight.num_seeds, eight.num_reached, eight.reason) == (3, 3, "")
  assert sixteen.reason == "1 of 2 fresh seeds never reached the goal"
  assert thirty_two.reason == "only 1 fresh seeds were trained, and 2 are needed"
  assert np.isnan([*sixteen.ratio, *thirty_two.ratio]).all()
