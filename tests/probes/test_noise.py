"""Gradient noise against numpy loops, identities over finite populations, and draws from known distributions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import GradientMoments, gradient_moments, minibatch_statistics, noise_statistics

HESSIAN = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
WEIGHTS = np.array([1.0, -1.0, 2.0])


def quadratic_loss(weights, center):
  """(1/2) (w - c)' H (w - c), whose gradient is H (w - c)."""
  return 0.5 * (weights - center) @ HESSIAN @ (weights - center)


def quadratic_grads(centers):
  return (WEIGHTS - centers) @ HESSIAN


def draw_centers(num, seed=0):
  return np.random.default_rng(seed).normal(size=(num, 3))


def moments_of(grads):
  """The moments of given gradients, f64[N, P], in numpy."""
  mean = grads.mean(0)
  return GradientMoments(
    loss=0.0,
    mean_grad=mean,
    mean_grad_sq_norm=mean @ mean,
    sq_norms=(grads**2).sum(1),
    deviations=((grads - mean) ** 2).sum(1),
    projections=(grads - mean) @ mean,
  )


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 20])
def test_moments_of_a_quadratic(chunk_size):
  with jax.enable_x64(True):
    centers = draw_centers(7)
    run = jax.jit(functools.partial(gradient_moments, quadratic_loss, chunk_size=chunk_size))
    got = run(jnp.asarray(WEIGHTS), jnp.asarray(centers))
    want = moments_of(quadratic_grads(centers))
    loss = np.mean([quadratic_loss(WEIGHTS, c) for c in centers])
    # A dozen float64 operations of 1e-16 on numbers up to about 30, some of which cancel.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14), got, want._replace(loss=loss))


def test_small_noise_survives_float32():
  """Gradients 1 + 1e-3 e: the noise is a thousandth of the mean, and its square a millionth."""

  def linear_loss(weights, example):
    return weights @ example

  rng = np.random.default_rng(0)
  grads = (1 + 1e-3 * rng.normal(size=(500, 40))).astype(np.float32)
  got = gradient_moments(linear_loss, jnp.zeros(40), jnp.asarray(grads), chunk_size=64)
  want = moments_of(grads.astype(np.float64))
  # G is off by a few roundings of 6e-8, so a deviation |d| of about 1e-3 sqrt(40) by 2 |d| 2e-7 sqrt(40): relative 4e-4.
  np.testing.assert_allclose(got.deviations, want.deviations, rtol=4e-4)
  # Averaged over 500 examples the errors cancel, up to their square, (2e-4)^2.
  statistics, truth = noise_statistics(got), noise_statistics(want)
  assert statistics.grad_cov_trace == pytest.approx(truth.grad_cov_trace, rel=1e-5)
  assert statistics.noise_scale == pytest.approx(truth.noise_scale, rel=1e-5)
  assert statistics.noise_scale_ci_high == pytest.approx(truth.noise_scale_ci_high, rel=1e-3)
  uncentred = np.sum(np.mean(grads**2, 0) - np.mean(grads, 0) ** 2)
  assert abs(uncentred / truth.grad_cov_trace - 1) > 1e-2  # what centring is for


def test_estimates_equal_their_definitions():
  grads = np.random.default_rng(3).normal(size=(12, 5)) + 1
  got = noise_statistics(moments_of(grads))

  def estimate(grads):
    trace = np.trace(np.cov(grads.T))
    return trace, np.sum(grads.mean(0) ** 2) - trace / len(grads)

  trace, sq_norm = estimate(grads)
  # |G|^2 without its diagonal terms: the mean of g_i . g_j over i != j.
  products = grads @ grads.T
  assert sq_norm == pytest.approx((products.sum() - np.trace(products)) / (12 * 11), rel=1e-12)
  assert got.grad_cov_trace == pytest.approx(trace, rel=1e-12)
  assert got.grad_sq_norm == pytest.approx(sq_norm, rel=1e-12)
  assert got.noise_scale == pytest.approx(trace / sq_norm, rel=1e-12)
  assert got.dataset_grad_sq_norm == pytest.approx(np.sum(grads.mean(0) ** 2), rel=1e-12)
  assert got.dataset_noise_scale == pytest.approx(trace / np.sum(grads.mean(0) ** 2), rel=1e-12)

  # The jackknife, by leaving each example out and starting over.
  left_out = np.array([estimate(np.delete(grads, i, 0)) for i in range(12)])
  centred = left_out - left_out.mean(0)
  covariance = centred.T @ centred * 11 / 12
  half_width = 1.959964 * np.sqrt(covariance[1, 1])
  assert got.grad_sq_norm_ci_low == pytest.approx(sq_norm - half_width, rel=1e-6)
  assert got.grad_sq_norm_ci_high == pytest.approx(sq_norm + half_width, rel=1e-6)
  # Fieller's ends: where the distance of T - r Q from 0 is exactly 1.96 of its standard errors.
  for ratio in (got.noise_scale_ci_low, got.noise_scale_ci_high):
    direction = np.array([1.0, -ratio])
    distance = direction @ [trace, sq_norm] / np.sqrt(direction @ covariance @ direction)
    assert abs(distance) == pytest.approx(1.959964, rel=1e-6)
  assert got.noise_scale_ci_low < got.noise_scale < got.noise_scale_ci_high


@pytest.mark.parametrize("batch_size", [1, 2, 4, 6])
def test_finite_population_variance_is_exact(batch_size):
  """Over all batches without repeated examples, the mean of |g_B - G|^2 is T (1/B - 1/N)."""
  with jax.enable_x64(True):
    centers = jnp.asarray(draw_centers(6))
    weights = jnp.asarray(WEIGHTS)
    moments = gradient_moments(quadratic_loss, weights, centers, chunk_size=4)
    indices = jnp.array(list(itertools.combinations(range(6), batch_size)))
    sq_deviations, _ = minibatch_statistics(quadratic_loss, weights, centers, indices, moments.mean_grad)
    predicted = noise_statistics(moments).grad_cov_trace * (1 / batch_size - 1 / 6)
    # Sums of at most 20 batches in float64; zero for the batch of all.
    np.testing.assert_allclose(np.mean(sq_deviations), predicted, rtol=1e-12, atol=1e-28)


def test_minibatches_of_a_quadratic():
  centers = draw_centers(9)
  grads = quadratic_grads(centers)
  mean = grads.mean(0)
  indices = np.array([[0, 1, 2], [8, 8, 3], [5, 6, 7]])
  with jax.enable_x64(True):
    run = jax.jit(functools.partial(minibatch_statistics, quadratic_loss))
    sq_deviations, cosines = run(*map(jnp.asarray, (WEIGHTS, centers, indices, mean)))
  for i, batch in enumerate(indices):
    grad = (grads[batch[0]] + grads[batch[1]] + grads[batch[2]]) / 3
    assert sq_deviations[i] == pytest.approx(np.sum((grad - mean) ** 2), rel=1e-12)
    assert cosines[i] == pytest.approx(grad @ mean / np.linalg.norm(grad) / np.linalg.norm(mean), rel=1e-12)


def draw_grads(rng, mean, num):
  """Normal gradients with covariance trace 1 + 1/4 + 1/9 + 1/16 around a mean."""
  return mean + rng.normal(size=(num, 4)) / np.arange(1, 5)


TRACE = 1 + 1 / 4 + 1 / 9 + 1 / 16


def test_interval_covers_a_known_noise_scale():
  rng = np.random.default_rng(0)
  mean = np.array([0.1, 0.2, -0.1, 0.3])
  noise_scale = TRACE / np.sum(mean**2)  # 9.5 examples, of 200
  draws = [noise_statistics(moments_of(draw_grads(rng, mean, 200))) for _ in range(1000)]
  assert all(draw.verdict == "identified" for draw in draws)
  covered = np.mean([draw.noise_scale_ci_low <= noise_scale <= draw.noise_scale_ci_high for draw in draws])
  # Four standard errors of a proportion of 0.95 in 1000, sqrt(0.95 * 0.05 / 1000) = 0.007.
  assert abs(covered - 0.95) < 0.028
  traces = [draw.grad_cov_trace for draw in draws]
  sq_norms = [draw.grad_sq_norm for draw in draws]
  sem = np.std(sq_norms) / np.sqrt(1000)
  assert abs(np.mean(traces) - TRACE) < 4 * np.std(traces) / np.sqrt(1000)
  assert abs(np.mean(sq_norms) - np.sum(mean**2)) < 4 * sem
  assert 4 * sem < TRACE / 200  # so that an estimate without the correction would have failed


@pytest.mark.parametrize("num_examples", [20, 200])
def test_refuses_where_there_is_no_gradient(num_examples):
  rng = np.random.default_rng(0)
  draws = [noise_statistics(moments_of(draw_grads(rng, np.zeros(4), num_examples))) for _ in range(400)]
  identified = sum(draw.verdict == "identified" for draw in draws)
  # At level 2.5 % one would expect 10; the jackknife is conservative, so that no more than 10 is a mild demand.
  assert identified <= 10
  for draw in draws:
    finite = [draw.noise_scale, draw.noise_scale_ci_low, draw.noise_scale_ci_high]
    assert all(x is None for x in finite) == (draw.verdict == "unidentifiable")


def test_refuses_a_stationary_point_exactly():
  """Two copies of every gradient with opposite signs: G is 0 to the last bit."""
  half = np.random.default_rng(0).integers(-9, 9, size=(10, 4)).astype(float)
  got = noise_statistics(moments_of(np.concatenate([half, -half])))
  assert got.verdict == "unidentifiable"
  assert got.noise_scale is None
  assert got.dataset_noise_scale is None
  assert got.grad_sq_norm == pytest.approx(-got.grad_cov_trace / 20)


def test_no_noise_is_a_noise_scale_of_zero():
  got = noise_statistics(moments_of(np.ones((5, 3))))
  assert got.verdict == "identified"
  assert (got.noise_scale_ci_low, got.noise_scale, got.noise_scale_ci_high) == (0, 0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_refuses_gradients_that_are_not_finite(bad):
  """The last is finite and its square is not."""

  def loss_fn(weights, example):
    return weights @ example

  examples = np.ones((6, 3), np.float32)
  examples[2, 1] = bad
  got = noise_statistics(gradient_moments(loss_fn, jnp.zeros(3), jnp.asarray(examples), chunk_size=4))
  assert got.verdict == "unidentifiable"
  assert got.noise_scale is None
  assert got.dataset_noise_scale is None
  assert not np.isfinite(got.grad_cov_trace)


def test_needs_three_examples():
  with pytest.raises(ValueError, match="2 examples are too few to leave one out; give at least 3"):
    noise_statistics(moments_of(np.ones((2, 3))))
