"""Estimates against their definitions, against draws whose truth is known, and at the edges where they must refuse."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from bsjax.probes.estimate import (
  LEAST_TAIL,
  Estimate,
  expected_sq_norm,
  fieller_interval,
  flat_row,
  noise_statistics,
  ratio_of_means,
)


def statistics_of(grads, **options):
  """The statistics of given gradients, f64[N, P]."""
  mean = grads.mean(0)
  deviations = ((grads - mean) ** 2).sum(1)
  return noise_statistics(
    loss=0.5, mean_grad_sq_norm=mean @ mean, deviations=deviations, projections=(grads - mean) @ mean, **options
  )


def draw(rng, num_examples, num_params, noise_scale):
  """Normal gradients with tr(Sigma) = 1, spread evenly, and |G|^2 = 1 / noise scale."""
  mean = np.zeros(num_params)
  mean[0] = math.sqrt(1 / noise_scale)
  return mean + rng.normal(size=(num_examples, num_params)) / math.sqrt(num_params)


def share_within(estimates, truth):
  return np.mean([e.ci_low <= truth <= e.ci_high for e in estimates])


def standard_error(estimate):
  return (estimate.ci_high - estimate.value) / stats.t.isf(0.025, estimate.n_examples - 1)


REFUSED = (None, None, None)


def test_estimates_equal_their_definitions():
  grads = np.random.default_rng(3).normal(size=(12, 5)) + 3
  got = statistics_of(grads)

  def estimate(grads):
    trace = np.trace(np.cov(grads.T))
    return trace, np.sum(grads.mean(0) ** 2) - trace / len(grads)

  trace, sq_norm = estimate(grads)
  # |G|^2 without its diagonal terms: the mean of g_i . g_j over i != j.
  products = grads @ grads.T
  assert sq_norm == pytest.approx((products.sum() - np.trace(products)) / (12 * 11), rel=1e-12)
  assert got.grad_cov_trace.value == pytest.approx(trace, rel=1e-12)
  assert got.grad_sq_norm.value == pytest.approx(sq_norm, rel=1e-12)
  assert got.noise_scale.value == pytest.approx(trace / sq_norm, rel=1e-12)
  assert got.signal_to_noise.value == pytest.approx(sq_norm / trace, rel=1e-12)
  assert got.dataset_grad_sq_norm == pytest.approx(np.sum(grads.mean(0) ** 2), rel=1e-12)
  assert got.dataset_noise_scale == pytest.approx(trace / np.sum(grads.mean(0) ** 2), rel=1e-12)
  assert got.loss == 0.5

  # The jackknife, by leaving each example out and starting over.
  left_out = np.array([estimate(np.delete(grads, i, 0)) for i in range(12)])
  centred = left_out - left_out.mean(0)
  covariance = centred.T @ centred * 11 / 12
  assert standard_error(got.grad_cov_trace) == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)
  # Its variance of |G|^2 is cut as the docstring says: with x = N |G|^2 / tr(Sigma), by (1 + 2 x) / (2 + 2 x).
  x = 12 * sq_norm / trace
  share = (1 + 2 * x) / (2 + 2 * x)
  assert standard_error(got.grad_sq_norm) == pytest.approx(math.sqrt(share * covariance[1, 1]), rel=1e-9)
  # Fieller's ends: where the distance of T - r Q from 0 is exactly Student's quantile of its standard errors.
  covariance *= [[1, math.sqrt(share)], [math.sqrt(share), share]]
  for ratio in (got.noise_scale.ci_low, got.noise_scale.ci_high):
    direction = np.array([1.0, -ratio])
    distance = direction @ [trace, sq_norm] / np.sqrt(direction @ covariance @ direction)
    assert abs(distance) == pytest.approx(stats.t.isf(0.025, 11), rel=1e-6)
  assert got.noise_scale.ci_low < got.noise_scale.value < got.noise_scale.ci_high
  # The same set of ratios, upside down.
  assert got.signal_to_noise.ci_low == pytest.approx(1 / got.noise_scale.ci_high, rel=1e-9)
  assert got.signal_to_noise.ci_high == pytest.approx(1 / got.noise_scale.ci_low, rel=1e-9)


def test_counts_are_repetitions():
  rng = np.random.default_rng(0)
  grads, counts = rng.normal(size=(6, 3)) + 4, np.array([1, 4, 0, 2, 7, 1])
  repeated = np.repeat(grads, counts, axis=0)
  mean = repeated.mean(0)
  got = noise_statistics(
    loss=0.5,
    mean_grad_sq_norm=mean @ mean,
    deviations=((grads - mean) ** 2).sum(1),
    projections=(grads - mean) @ mean,
    counts=counts,
  )
  np.testing.assert_allclose(
    [x for estimate in got[1:5] for x in estimate[:4]],
    [x for estimate in statistics_of(repeated)[1:5] for x in estimate[:4]],
    rtol=1e-12,  # sums of 15 numbers in another order
  )


def test_interval_covers_a_known_noise_scale():
  """Noise in 500 directions and as many examples as the noise scale, where the jackknife's variance is a third too large."""
  rng = np.random.default_rng(0)
  draws = [statistics_of(draw(rng, 60, 500, noise_scale=60)) for _ in range(2000)]
  assert all(draw.noise_scale.verdict == "identified" for draw in draws)
  # Four standard errors of a proportion of 0.95 in 2000, sqrt(0.95 * 0.05 / 2000) = 0.0049; the jackknife's
  # interval is sqrt(4/3) times as wide and has 0.976.
  assert abs(share_within([draw.noise_scale for draw in draws], 60) - 0.95) < 0.0196
  assert abs(share_within([draw.signal_to_noise for draw in draws], 1 / 60) - 0.95) < 0.0196
  assert abs(share_within([draw.grad_sq_norm for draw in draws], 1 / 60) - 0.95) < 0.0196
  for name, truth in (("grad_cov_trace", 1.0), ("grad_sq_norm", 1 / 60)):
    values = [getattr(draw, name).value for draw in draws]
    sem = np.std(values) / math.sqrt(2000)
    assert abs(np.mean(values) - truth) < 4 * sem  # unbiased
    assert 4 * sem < 1 / 60  # so that |G|^2 without its correction would have failed


def test_interval_covers_with_few_examples():
  """Seven examples, and noise that is mostly along the gradient: Student's quantile is 2.45 here, not 1.96."""
  rng = np.random.default_rng(0)
  draws = [statistics_of(draw(rng, 7, 2, noise_scale=0.05)) for _ in range(2000)]
  # Normal quantiles would cover 0.90. Student's is itself an approximation: another 0.01 for |G|^2 is a square, see the border test.
  assert abs(share_within([draw.grad_sq_norm for draw in draws], 20) - 0.95) < 0.0196 + 0.01


def test_verdict_is_a_tail_probability():
  rng = np.random.default_rng(1)
  verdicts = []
  for n, noise_scale in ((5, 0.008), (20, 0.9), (200, 18.0)):
    for _ in range(100):
      got = statistics_of(draw(rng, n, 10, noise_scale))
      distance = got.grad_sq_norm.value / standard_error(got.grad_sq_norm)
      identified = stats.t.sf(distance, n - 1) < LEAST_TAIL
      assert (got.noise_scale.verdict == "identified") == identified
      assert (got.noise_scale[:3] == REFUSED) == (not identified)
      verdicts.append((n, identified))
  assert stats.norm.sf(5) == pytest.approx(LEAST_TAIL, rel=1e-12)
  assert len(set(verdicts)) == 6  # at every n both verdicts occur


@pytest.mark.parametrize(("num_examples", "num_params"), [(3, 20), (10, 20), (50, 400), (300, 2)])
def test_refuses_where_there_is_no_gradient(num_examples, num_params):
  rng = np.random.default_rng(0)
  for _ in range(1000):
    got = statistics_of(draw(rng, num_examples, num_params, math.inf))
    assert got.noise_scale.verdict == "unidentifiable"
    assert got.noise_scale[:3] == REFUSED
    assert got.noise_scale.n_needed is None or got.noise_scale.n_needed > num_examples


@pytest.mark.parametrize(
  ("num_examples", "num_params", "noise_scale"), [(30, 100, 200.0), (100, 5, 200.0), (8, 50, 20.0)]
)
def test_so_many_examples_as_needed_decide_half_of_the_time(num_examples, num_params, noise_scale):
  """Draws data sets of the size asked for, from normal gradients with |G|^2 at the upper end of its interval."""
  rng = np.random.default_rng(2)
  identified = []
  for _ in range(40):
    got = statistics_of(draw(rng, num_examples, num_params, noise_scale))
    if got.noise_scale.n_needed is not None:
      favourable = got.grad_cov_trace.value / got.grad_sq_norm.ci_high
      for _ in range(20):
        again = statistics_of(draw(rng, got.noise_scale.n_needed, num_params, favourable))
        identified.append(again.noise_scale.verdict == "identified")
  assert len(identified) >= 600
  # Some hundred independent verdicts, +- 0.08, and as much again because the first data set knows the spread of the noise roughly only.
  assert abs(np.mean(identified) - 0.5) < 0.16


def test_how_many_are_needed_in_closed_form():
  """Moments for which everything can be written down: deviations of 1, and projections of +- p."""
  n, p, sq_norm = 1000, 0.02, 0.0005
  trace = n / (n - 1)
  got = noise_statistics(
    loss=0.0,
    mean_grad_sq_norm=sq_norm + trace / n,
    deviations=np.ones(n),
    projections=p * (-1.0) ** np.arange(n),
  )
  jackknife = 4 * p**2 / (n - 1)
  along = jackknife * n / 4 / (sq_norm + trace / n)  # tr(Sigma^2) / tr(Sigma)
  x = n * sq_norm / trace
  high = sq_norm + stats.t.isf(0.025, n - 1) * math.sqrt(jackknife * (1 + 2 * x) / (2 + 2 * x))
  assert got.grad_sq_norm.ci_high == pytest.approx(high, rel=1e-9)
  assert got.noise_scale.verdict == "unidentifiable"
  # high^2 = 5^2 along (4 high / N + 2 tr(Sigma) / N^2), solved for N; Student's quantile is 0.5 % above 4 here, and N so 1 % larger.
  k = 25 * along / trace
  needed = (2 * k + math.sqrt(4 * k**2 + 2 * k)) * trace / high
  assert got.noise_scale.n_needed == pytest.approx(needed, rel=0.012)
  assert got.noise_scale.n_needed > needed


def test_no_noise_is_a_noise_scale_of_zero():
  got = statistics_of(np.ones((5, 3)))
  assert got.noise_scale == Estimate(0.0, 0.0, 0.0, 5, "identified", None)
  assert got.signal_to_noise[:3] == REFUSED
  assert got.grad_sq_norm[:3] == (3, 3, 3)


def test_an_empty_group_has_no_noise_scale():
  got = statistics_of(np.zeros((5, 3)))
  assert got.grad_cov_trace[:3] == (0, 0, 0)
  assert got.grad_sq_norm[:3] == (0, 0, 0)
  for estimate in (got.noise_scale, got.signal_to_noise):
    assert estimate == Estimate(None, None, None, 5, "unidentifiable", None)
  assert got.dataset_noise_scale is None


def test_refuses_a_stationary_point_exactly():
  """Two copies of every gradient with opposite signs: G is 0 to the last bit."""
  half = np.random.default_rng(0).integers(-9, 9, size=(10, 4)).astype(float)
  got = statistics_of(np.concatenate([half, -half]))
  assert got.noise_scale == Estimate(None, None, None, 20, "unidentifiable", None)
  assert got.dataset_noise_scale is None
  assert got.grad_sq_norm.value == pytest.approx(-got.grad_cov_trace.value / 20)
  assert got.signal_to_noise.value == pytest.approx(-1 / 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_refuses_what_is_not_finite(bad):
  """The last is finite and its square is not."""
  deviations = np.array([1.0, 2.0, bad, 1.0])
  got = noise_statistics(loss=0.5, mean_grad_sq_norm=2.0, deviations=deviations, projections=np.zeros(4))
  for estimate in got[1:5]:
    assert estimate == Estimate(None, None, None, 4, "unidentifiable", None)
  assert got.dataset_noise_scale is None or got.dataset_noise_scale == pytest.approx(1e200 / 3 / 2)


def test_float32_is_taken_in_float64():
  """The mean of 1 + 1e-9 and 1 - 1e-9 is lost in float32, and so would be sums of 10^5 deviations."""
  rng = np.random.default_rng(0)
  deviations = rng.uniform(size=100_000).astype(np.float32)
  got = noise_statistics(
    loss=0.0, mean_grad_sq_norm=np.float32(1), deviations=deviations, projections=np.zeros(100_000, np.float32)
  )
  assert got.grad_cov_trace.value == pytest.approx(math.fsum(deviations.astype(float)) / 99_999, rel=1e-12)


@pytest.mark.parametrize("num_examples", [0, 1, 2])
def test_needs_three_examples(num_examples):
  with pytest.raises(ValueError, match=f"{num_examples} examples are too few to leave one out; give at least 3"):
    noise_statistics(
      loss=0.0, mean_grad_sq_norm=1.0, deviations=np.ones(num_examples), projections=np.zeros(num_examples)
    )


def test_ratio_of_means_covers():
  """Correlated pairs with means 3 and 1: the mean of their ratios has no expectation, as a denominator may be 0."""
  rng = np.random.default_rng(0)
  estimates = []
  for _ in range(2000):
    common = rng.normal(size=30)
    estimates.append(ratio_of_means(3 + 2 * common + rng.normal(size=30), 1 + 0.5 * common))
  given = [estimate for estimate in estimates if estimate.verdict == "identified"]
  assert len(given) == len(estimates)
  assert given[0].n_examples == 30
  # Four standard errors of a proportion of 0.95 in 2000; ignoring the correlation would cover more than 0.99.
  assert abs(share_within(given, 3) - 0.95) < 0.0196


def test_ratio_of_means_refuses():
  rng = np.random.default_rng(0)
  estimates = [ratio_of_means(1 + rng.normal(size=10), rng.normal(size=10)) for _ in range(1000)]
  assert {estimate.verdict for estimate in estimates} == {"unidentifiable"}
  assert estimates[0] == Estimate(None, None, None, 10, "unidentifiable", None)
  assert ratio_of_means(np.ones(1), np.ones(1)).verdict == "unidentifiable"
  assert ratio_of_means(np.array([1.0, math.nan, 1.0]), np.ones(3)).verdict == "unidentifiable"
  assert ratio_of_means(np.ones(3), -np.ones(3)).verdict == "unidentifiable"
  assert ratio_of_means(2 * np.ones(3), np.ones(3))[:3] == (2, 2, 2)


def test_fieller_with_a_known_denominator():
  low, high = fieller_interval(6.0, 2.0, 0.25, 0.0, 0.0)
  assert (low, high) == pytest.approx((3 - 1.959964 * 0.25, 3 + 1.959964 * 0.25), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_expected_sq_norm_of_all_batches(batch_size):
  """Means over all batches, with and without repeated examples, of the exact squared norm."""
  grads = np.random.default_rng(0).normal(size=(5, 3)) + 0.3
  got = statistics_of(grads)

  def mean_sq_norm(batches):
    return np.mean([np.sum(grads[list(batch)].mean(0) ** 2) for batch in batches])

  without = mean_sq_norm(itertools.combinations(range(5), batch_size))
  args = got.dataset_grad_sq_norm, got.grad_cov_trace.value
  assert expected_sq_norm(*args, batch_size, population=5) == pytest.approx(without, rel=1e-12)
  # Drawn with replacement, the five are a distribution whose covariance divides by 5.
  repeated = mean_sq_norm(itertools.product(range(5), repeat=batch_size))
  assert expected_sq_norm(args[0], args[1] * 4 / 5, batch_size) == pytest.approx(repeated, rel=1e-12)


def test_flat_row_is_a_record():
  rng = np.random.default_rng(0)
  rows = [flat_row(statistics_of(draw(rng, 50, 10, noise_scale))) for noise_scale in (1, math.inf)]
  names = ["grad_cov_trace", "grad_sq_norm", "noise_scale", "signal_to_noise"]
  estimates = [name + end for name in names for end in ("", "_ci_low", "_ci_high")]
  for row in rows:
    assert list(row) == [
      "num_examples", "loss", *estimates, "verdict", "examples_needed", "dataset_grad_sq_norm", "dataset_noise_scale",
    ]  # fmt: skip
    assert json.loads(json.dumps(row, allow_nan=False)) == row
  assert rows[0]["verdict"] == "identified"
  assert rows[0]["noise_scale_ci_low"] < rows[0]["noise_scale"] < rows[0]["noise_scale_ci_high"]
  assert rows[0]["examples_needed"] is None
  assert rows[1]["verdict"] == "unidentifiable"
  assert [rows[1][name] for name in estimates[6:9]] == [None] * 3
  assert rows[1]["examples_needed"] > 50
