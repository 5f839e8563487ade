"""Kendall's tau against SciPy's and against pairs counted by hand, and whether its intervals hold the truth as often as they say."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bsjax.analysis.ranks import MIN_CLUSTERS, cluster_weights, kendall_tau, partial_tau, tau_interval

ONE = np.ones((1, 12))


def _tied(seed):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 5, 12).astype(float), rng.integers(0, 4, 12).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_scipy_s_with_ties(seed):
  x, y = _tied(seed)
  # Sums of at most 132 signs are exact in float64: only the root and the division round.
  assert kendall_tau(x, y, weights=ONE)[0] == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-14)


def test_a_resample_is_the_sample_with_points_repeated():
  x, y = _tied(0)
  counts = np.random.default_rng(1).integers(0, 4, size=(6, 12))
  expected = [stats.kendalltau(np.repeat(x, row), np.repeat(y, row)).statistic for row in counts]
  np.testing.assert_allclose(kendall_tau(x, y, weights=counts.astype(float)), expected, rtol=0, atol=1e-14)


def test_granulated_tau_is_the_mean_of_tau_over_groups_of_equal_size():
  rng = np.random.default_rng(2)
  x, y, groups = rng.normal(size=12), rng.normal(size=12), ["a", "b", "c"] * 4
  taus = [stats.kendalltau(x[start::3], y[start::3]).statistic for start in range(3)]
  assert kendall_tau(x, y, weights=ONE, groups=groups)[0] == pytest.approx(np.mean(taus), abs=1e-14)
  # A rise between groups that is none within them: the whole sample is ranked, the groups are not.
  shift = np.repeat([0.0, 100.0, 200.0], 4)
  steps, back = np.tile([0.0, 1, 2, 3], 3), np.tile([3.0, 2, 1, 0], 3)
  labels = shift.tolist()
  assert kendall_tau(shift + steps, shift + back, weights=ONE, groups=labels)[0] == -1
  assert kendall_tau(shift + steps, shift + back, weights=ONE)[0] > 0.4


def test_no_tau_where_all_tie():
  x = np.arange(12.0)
  assert math.isnan(kendall_tau(x, np.zeros(12), weights=ONE)[0])
  assert math.isnan(kendall_tau(x, x, weights=ONE, groups=range(12))[0])


def test_partial_tau_is_the_correlation_of_the_pairs_signs_given_those_of_z():
  # Without ties tau is the plain correlation of the signs of pairs, so the partial one is that of least-squares residuals.
  x, y, z = np.random.default_rng(3).normal(size=(3, 12)) + np.linspace(0, 2, 12)
  pairs = list(itertools.permutations(range(12), 2))
  s, t, u = (np.array([np.sign(v[i] - v[j]) for i, j in pairs]) for v in (x, y, z))
  left, right = (a - (a @ u) / (u @ u) * u for a in (s, t))
  expected = left @ right / np.sqrt((left @ left) * (right @ right))
  found = partial_tau(*(kendall_tau(a, b, weights=ONE) for a, b in ((x, y), (x, z), (y, z))))
  assert found[0] == pytest.approx(expected, abs=1e-13)
  assert math.isnan(partial_tau(np.array([0.5]), np.array([1.0]), np.array([0.5]))[0])


def test_resamples_take_whole_clusters():
  clusters = ["a"] * 3 + ["b"] + ["c"] * 2
  weights = cluster_weights(clusters)
  assert (weights[0] == 1).all()
  assert (weights[:, 0] == weights[:, 1]).all()
  assert (weights[:, 4] == weights[:, 5]).all()
  assert (weights[:, [0, 3, 4]].sum(axis=1) == 3).all()
  assert (weights == cluster_weights(clusters)).all()


def _draw_clusters(rng, num_clusters, num_points, between):
  """Returns two unrelated variables, f64[clusters * points], of variance 1, `between` of it between clusters."""
  shared, own = rng.normal(size=(2, num_clusters)), rng.normal(size=(2, num_clusters * num_points))
  return math.sqrt(between) * np.repeat(shared, num_points, axis=1) + math.sqrt(1 - between) * own


def _coverage(num_clusters, between, level, trials=200):
  rng = np.random.default_rng(num_clusters)
  labels = np.repeat(np.arange(num_clusters), 5)
  weights, held = cluster_weights(labels.tolist()), 0
  for _ in range(trials):
    x, y = _draw_clusters(rng, num_clusters, 5, between)
    interval = tau_interval(kendall_tau(x, y, weights=weights), num_clusters=num_clusters, level=level)
    held += interval.low <= 0 <= interval.high
  return held / trials


@pytest.mark.parametrize("between", [0.9, 0.1])
def test_intervals_of_clusters_hold_a_tau_of_zero(between):
  # 4 binomial standard errors of 200 draws at 90 %: 4 sqrt(0.9 0.1 / 200) = 8.5 %.
  assert 0.9 - 0.085 <= _coverage(8, between, 0.9) <= 0.9 + 0.085


def test_resampling_single_points_would_not():
  rng, held = np.random.default_rng(0), 0
  weights = cluster_weights(range(40))
  for _ in range(200):
    x, y = _draw_clusters(rng, 8, 5, 0.9)
    interval = tau_interval(kendall_tau(x, y, weights=weights), num_clusters=40, level=0.95)
    held += interval.low <= 0 <= interval.high
  assert held / 200 < 0.8


def test_a_perfect_order_has_a_narrow_interval_and_few_clusters_have_none():
  x = np.arange(12.0)
  weights = cluster_weights(np.repeat(np.arange(6), 2).tolist())
  perfect = tau_interval(kendall_tau(x, x, weights=weights), num_clusters=6, level=0.95)
  # Half a pair of clusters below 1: 1 - 1/15.
  assert perfect == (1, pytest.approx(1 - 1 / 15), 1)
  few = tau_interval(kendall_tau(x, x, weights=weights), num_clusters=MIN_CLUSTERS - 1, level=0.95)
  assert few.value == 1
  assert math.isnan(few.low)
  assert math.isnan(tau_interval(np.full(1001, np.nan), num_clusters=6, level=0.95).value)
