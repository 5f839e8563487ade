import numpy as np
import pytest
from scipy import optimize, stats

from bsjax.analysis import bootstrap_critical_batch_size, bootstrap_slope, fit_steps, fits, knee, loglog_slope
from bsjax.analysis.fits import percentiles, vertex, welch

SIZES = 2.0 ** np.arange(0, 11)


def test_fit_steps_recovers_the_hyperbola_it_was_drawn_from():
  # S_min 1000 and E_min 1e5 give B_crit 100 (papers.md, J7): B = 10, 100, 1000 take 11 000, 2 000, 1 100 steps.
  fit = fit_steps(np.array([10, 100, 1000]), np.array([11000, 2000, 1100]))
  assert fit == pytest.approx((1000, 100), rel=1e-5)  # the search ends at a spacing of 1e-6 in log B_crit


def test_fit_steps_is_the_least_squares_solution_in_log_space():
  steps = 300 * (1 + 40 / SIZES) * np.exp(0.2 * np.random.default_rng(0).normal(size=len(SIZES)))

  def residuals(theta):
    return np.log(steps) - theta[0] - np.log1p(np.exp(theta[1]) / SIZES)

  other = np.exp(optimize.least_squares(residuals, [np.log(200), np.log(10)], xtol=1e-12, ftol=1e-12, gtol=1e-12).x)
  assert fit_steps(SIZES, steps) == pytest.approx(tuple(other), rel=1e-5)


def simulated_steps(rng, *, num_seeds=5, spread=0.15, misfit=0.0):
  sizes = np.repeat(SIZES, num_seeds)
  shared = np.repeat(misfit * rng.normal(size=len(SIZES)), num_seeds)
  return sizes, 500 * (1 + 64 / sizes) * np.exp(shared + spread * rng.normal(size=len(sizes)))


@pytest.mark.parametrize("misfit", [0.0, 0.15])
def test_the_bootstrap_interval_covers_the_true_critical_batch_size(monkeypatch, misfit):
  """Also where all seeds of a batch size share an error, as they share an imperfectly tuned rate."""
  monkeypatch.setattr(fits, "NUM_RESAMPLES", 200)  # for speed
  repetitions = 200
  rng = np.random.default_rng(1)
  found = [bootstrap_critical_batch_size(*simulated_steps(rng, misfit=misfit)) for _ in range(repetitions)]
  assert not any(fit.reason for fit in found)
  for truth, intervals in ((64, [f.critical for f in found]), (500, [f.s_min for f in found])):
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    # If coverage were 95 %, a count outside these bounds would be seen once in 1000.
    low, high = stats.binom.ppf([0.0005, 0.9995], repetitions, 0.95)
    assert low <= covered <= high


def test_the_bootstrap_is_deterministic():
  sizes, steps = simulated_steps(np.random.default_rng(2))
  first, second = (bootstrap_critical_batch_size(sizes, steps) for _ in range(2))
  assert first.critical == second.critical
  np.testing.assert_array_equal(first.samples, second.samples)


def test_the_misfit_measures_what_seeds_do_not_show():
  sizes = np.repeat(SIZES, 3)
  wave = np.where(np.log2(sizes) % 2 == 0, 1, -1)
  seeds_agree = bootstrap_critical_batch_size(sizes, 500 * (1 + 64 / sizes) * np.exp(0.1 * wave))
  assert seeds_agree.misfit == pytest.approx(0.1, rel=0.1)  # two of eleven degrees of freedom go into the fit
  assert bootstrap_critical_batch_size(sizes, 500 * (1 + 64 / sizes)).misfit < 1e-5


def test_a_batch_size_with_a_seed_that_never_reached_the_target_is_excluded_and_reported():
  sizes, steps = simulated_steps(np.random.default_rng(3))
  steps[sizes == 1] *= 100  # would ruin the fit if the other seeds entered
  steps[np.flatnonzero(sizes == 1)[0]] = np.nan
  fit = bootstrap_critical_batch_size(sizes, steps)
  assert fit.excluded == (1,)
  assert fit.used == tuple(int(b) for b in SIZES[1:])
  assert fit.critical.low < 64 < fit.critical.high


def test_a_batch_size_with_a_single_seed_is_excluded():
  sizes, steps = simulated_steps(np.random.default_rng(3))
  keep = np.ones(len(sizes), bool)
  keep[np.flatnonzero(sizes == 4)[1:]] = False
  assert bootstrap_critical_batch_size(sizes[keep], steps[keep]).excluded == (4,)


@pytest.mark.parametrize(
  ("curve", "reason"),
  [
    (lambda b: 1e5 / b, "no clear bend"),  # perfect scaling to the end
    (lambda b: 700 + 0 * b, "do not fall"),  # no scaling at all
    (lambda b: 700 * b**0.5, "do not fall"),  # larger batches are worse
  ],
)
def test_a_curve_without_a_bend_has_no_critical_batch_size(curve, reason):
  sizes = np.repeat(SIZES, 5)
  steps = curve(sizes) * np.exp(0.05 * np.random.default_rng(4).normal(size=len(sizes)))
  fit = bootstrap_critical_batch_size(sizes, steps)
  assert reason in fit.reason
  assert np.isnan([*fit.critical, *fit.s_min]).all()


def test_too_few_batch_sizes_have_no_critical_batch_size():
  sizes = np.repeat([1.0, 16.0, 256.0], 5)
  assert "only 3 batch sizes" in bootstrap_critical_batch_size(sizes, 500 * (1 + 64 / sizes)).reason
  assert "only 0 batch sizes" in bootstrap_critical_batch_size(np.empty(0), np.empty(0)).reason


def test_loglog_slope_agrees_with_the_textbook_interval():
  rng = np.random.default_rng(5)
  y = 3 * SIZES**-0.7 * np.exp(0.3 * rng.normal(size=len(SIZES)))
  expected = stats.linregress(np.log(SIZES), np.log(y))
  half = stats.t.ppf(0.975, len(SIZES) - 2) * expected.stderr
  assert loglog_slope(SIZES, y) == pytest.approx((expected.slope, expected.slope - half, expected.slope + half))


def test_loglog_slope_carries_given_errors_through():
  # Two points an octave apart: slope error = sqrt(e1^2 + e2^2) / log 2, times the normal quantile.
  slope = loglog_slope(np.array([1, 2]), np.array([8.0, 4.0]), relative_sem=np.array([0.03, 0.04]))
  half = stats.norm.ppf(0.975) * 0.05 / np.log(2)
  assert slope == pytest.approx((-1, -1 - half, -1 + half))


def test_slopes_without_enough_points_are_unknown():
  assert np.isnan(loglog_slope(np.array([4, 4]), np.array([1.0, 2.0]))).all()
  assert np.isnan(loglog_slope(np.array([1, 4]), np.array([np.nan, 2.0]))).all()
  assert loglog_slope(np.array([1, 4]), np.array([1.0, 2.0])) == pytest.approx((0.5, np.nan, np.nan), nan_ok=True)
  assert np.isnan(bootstrap_slope(np.array([1, 1]), np.array([1.0, 2.0]))).all()
  assert bootstrap_slope(np.array([1, 1, 4]), np.array([1.0, 1.0, 2.0])) == pytest.approx(
    (0.5, np.nan, np.nan), nan_ok=True
  )


def test_the_bootstrapped_slope_covers_the_truth():
  repetitions = 200
  rng = np.random.default_rng(6)
  sizes = np.repeat(SIZES, 5)
  slopes = [bootstrap_slope(sizes, sizes**-0.5 * np.exp(0.3 * rng.normal(size=len(sizes)))) for _ in range(repetitions)]
  covered = sum(slope.low <= -0.5 <= slope.high for slope in slopes)
  low, high = stats.binom.ppf([0.0005, 0.9995], repetitions, 0.95)
  assert low <= covered <= high


def test_the_knee_is_where_throughput_saturates():
  assert knee(SIZES, np.minimum(SIZES, 64)) == 64
  assert knee(SIZES, SIZES) is None
  assert knee(SIZES, np.ones_like(SIZES)) == 1
  assert (
    knee(SIZES, SIZES / (1 + SIZES / 32)) == 128
  )  # half of the limit at 32, four fifths at 128, where 1024 has 32/33
  assert knee(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.9, 1.4])) == 2  # falling again
  assert knee(np.array([8.0]), np.array([5.0])) is None


def test_the_vertex_of_a_parabola():
  x = [-1.0, 0.5, 2.0]
  assert vertex(x, [(t - 0.3) ** 2 for t in x]) == pytest.approx(0.3)
  assert vertex(x, [-((t - 0.3) ** 2) for t in x]) is None
  assert vertex(x, [(t - 9) ** 2 for t in x]) is None


def test_welch_agrees_with_the_two_sample_test():
  rng = np.random.default_rng(7)
  small, large = rng.normal(size=5), 1 + 2 * rng.normal(size=7)
  expected = stats.ttest_ind(small, large, equal_var=False).confidence_interval(0.95)
  interval = welch([small], [large])
  assert interval == pytest.approx((small.mean() - large.mean(), expected.low, expected.high))
  assert np.isnan(welch([small[:1]], [large])).all()


def test_percentiles_count_infinite_samples_as_large():
  samples = np.arange(1.0, 101.0)
  assert percentiles(50, samples) == pytest.approx((50, *np.quantile(samples, [0.025, 0.975])))
  samples[-5:] = np.inf
  assert percentiles(50, samples) == (50, 3, np.inf)  # the third of 100 is the first at 2.5 % or more
  assert percentiles(np.inf, np.full(10, np.inf)) == (np.inf,) * 3
