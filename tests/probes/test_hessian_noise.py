"""The Hessian's noise scale against closed forms on a quadratic, and its two routes against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import (
  hessian_moments,
  hessian_noise,
  optimal_learning_rate,
  optimal_loss_decrease,
  randomised_hessian_moments,
)

HESSIAN = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
WEIGHTS = np.array([1.0, -1.0, 2.0])


def quadratic_loss(weights, center):
  """(1/2) (w - c)' H (w - c), whose gradient is H (w - c)."""
  return 0.5 * (weights - center) @ jnp.asarray(HESSIAN, weights.dtype) @ (weights - center)


def draw_centers(num, seed=0):
  return np.random.default_rng(seed).normal(size=(num, 3))


def truth(centers):
  """tr(H Sigma), G'HG and |G|^2 of these examples, by numpy."""
  grads = (WEIGHTS - centers) @ HESSIAN
  mean = grads.mean(0)
  return np.trace(HESSIAN @ np.cov(grads.T)), mean @ HESSIAN @ mean, mean @ mean


def measure(centers, loss_fn=quadratic_loss):
  run = jax.jit(functools.partial(hessian_moments, loss_fn, chunk_size=16))
  return hessian_noise(run(jnp.asarray(WEIGHTS), jnp.asarray(centers)))


def test_exact_form_of_a_quadratic():
  with jax.enable_x64(True):
    centers = draw_centers(300)
    got = measure(centers)
  trace, curvature, sq_norm = truth(centers)
  assert got.cov_trace.value == pytest.approx(trace, rel=1e-12)
  assert got.curvature == pytest.approx(curvature, rel=1e-12)
  assert got.dataset_noise_scale == pytest.approx(trace / curvature, rel=1e-12)
  assert got.noise_scale.value == pytest.approx(trace / (curvature - trace / 300), rel=1e-12)
  assert got.noise_scale.ci_low < got.noise_scale.value < got.noise_scale.ci_high
  assert got.max_learning_rate == pytest.approx(sq_norm / curvature, rel=1e-12)


def test_predicted_rate_and_decrease_are_those_of_the_best_step():
  """The expected loss after a step is a parabola in the rate (equation 2.5): its minimum, found from three points of it."""
  batch_size = 5
  trace, curvature, sq_norm = truth(draw_centers(40))
  rates = np.array([0.0, 0.1, 0.2])
  change = -rates * sq_norm + rates**2 / 2 * (curvature + trace / batch_size)
  a, b, _ = np.polyfit(rates, change, 2)
  rate = optimal_learning_rate(sq_norm / curvature, trace / curvature, batch_size)
  assert rate == pytest.approx(-b / (2 * a), rel=1e-9)
  decrease = optimal_loss_decrease(sq_norm, sq_norm / curvature, trace / curvature, batch_size)
  assert decrease == pytest.approx(b * b / (4 * a), rel=1e-9)


def test_the_best_rate_of_sampled_steps():
  """Steps with sampled batches of a quadratic: the measured mean loss is lowest near the predicted rate."""
  centers, batch_size = draw_centers(400, seed=3), 4
  trace, curvature, sq_norm = truth(centers)
  draw = np.random.default_rng(0)
  batches = centers[draw.integers(0, 400, (20_000, batch_size))]
  grads = ((WEIGHTS - batches) @ HESSIAN).mean(1)
  mean = centers.mean(0)

  def loss(rate):
    moved = WEIGHTS - rate * grads - mean
    return np.mean(np.einsum("ni,ij,nj->n", moved, HESSIAN, moved)) / 2

  rates = np.linspace(0.2, 1.0, 81)
  best = rates[np.argmin([loss(rate) for rate in rates])]
  predicted = optimal_learning_rate(sq_norm / curvature, trace / curvature, batch_size)
  # The grid is 0.01 wide, and the parabola from 20,000 steps of 1 % noise turns within 2 % of its true place.
  assert abs(best - predicted) < 0.02 + 0.01


def test_randomised_form_is_unbiased():
  with jax.enable_x64(True):
    centers = draw_centers(64)
    run = jax.jit(functools.partial(randomised_hessian_moments, quadratic_loss, num_probes=16, chunk_size=7))
    draws = [hessian_noise(run(jnp.asarray(WEIGHTS), jnp.asarray(centers), jax.random.key(seed))) for seed in range(60)]
    exact = measure(centers)
  traces = np.array([draw.cov_trace.value for draw in draws])
  # 4 standard errors of the mean of 60.
  assert abs(traces.mean() - exact.cov_trace.value) < 4 * traces.std(ddof=1) / np.sqrt(60)
  # The stated standard error is that of the scatter over probes; that of 60 x 16 draws is known to about 10 %.
  widths = np.array([draw.cov_trace.ci_high - draw.cov_trace.ci_low for draw in draws])
  stated = np.sqrt(np.mean(widths**2)) / (2 * 2.131)  # Student's quantile for 15 degrees of freedom
  assert 0.7 < stated / traces.std(ddof=1) < 1.5
  for draw in draws:
    assert draw.curvature == pytest.approx(exact.curvature, rel=1e-12)
    assert draw.max_learning_rate == pytest.approx(exact.max_learning_rate, rel=1e-12)
    if draw.noise_scale.value is not None:
      assert draw.noise_scale.value == pytest.approx(
        draw.cov_trace.value / (draw.curvature - draw.cov_trace.value / 64), rel=1e-12
      )


def test_random_sums_have_the_right_size():
  """Six examples, where (1 - 1/N) is a sixth: 4,000 keys find tr(H Sigma) to a percent."""
  centers = jnp.asarray(draw_centers(6), jnp.float32)

  @jax.vmap
  def forms(key):
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    moments = randomised_hessian_moments(quadratic_loss, weights, centers, key, num_probes=3, chunk_size=2)
    return moments.quadratic_forms

  found = np.asarray(jax.jit(forms)(jax.random.split(jax.random.key(0), 4000)), np.float64).mean(axis=1)
  trace, *_ = truth(draw_centers(6))
  sem = found.std(ddof=1) / np.sqrt(4000)
  assert sem < 0.02 * trace
  assert abs(found.mean() - trace) < 4 * sem


def test_intervals_of_both_routes_hold_the_true_noise_scale():
  """600 examples drawn anew 200 times; truth from the distribution: centres are standard normal, so Sigma = H^2, G = H w."""
  noise_scale = np.trace(HESSIAN @ HESSIAN @ HESSIAN) / (WEIGHTS @ HESSIAN @ HESSIAN @ HESSIAN @ WEIGHTS)
  exact = jax.jit(functools.partial(hessian_moments, quadratic_loss, chunk_size=600))
  randomised = jax.jit(functools.partial(randomised_hessian_moments, quadratic_loss, num_probes=50, chunk_size=600))
  covered = np.zeros(2)
  for seed in range(200):
    data = jnp.asarray(WEIGHTS, jnp.float32), jnp.asarray(draw_centers(600, seed=seed), jnp.float32)
    for at, moments in enumerate((exact(*data), randomised(*data, jax.random.key(seed)))):
      found = hessian_noise(moments).noise_scale
      assert found.ci_low is not None
      assert found.ci_high is not None
      covered[at] += found.ci_low <= noise_scale <= found.ci_high
  # 3 standard errors of a proportion of 0.95 in 200, 0.015 each.
  assert covered[0] / 200 > 0.95 - 0.046
  assert covered[1] / 200 > 0.95 - 0.046


def test_refuses_negative_curvature():
  """A saddle: along the gradient the loss curves down."""

  def saddle(weights, center):
    return -quadratic_loss(weights, center)

  got = measure(draw_centers(40).astype(np.float32), saddle)
  assert got.curvature < 0
  assert got.noise_scale.verdict == "unidentifiable"
  assert got.noise_scale.value is None
  assert got.dataset_noise_scale is None
  assert got.max_learning_rate is None


def test_refuses_a_covariance_trace_that_may_be_negative():
  """Curvature up along the gradient and down along the noise."""

  def loss_fn(weights, shift):
    return weights[0] ** 2 + weights[0] - weights[1] ** 2 + weights[1] * shift

  got = hessian_noise(
    hessian_moments(loss_fn, jnp.zeros(2), jnp.asarray(draw_centers(30)[:, 0], jnp.float32), chunk_size=8)
  )
  assert got.curvature > 0
  assert got.cov_trace.value < 0
  assert got.noise_scale.verdict == "unidentifiable"
  assert got.noise_scale.value is None


@pytest.mark.parametrize("num_probes", [1, 21])
def test_number_of_probes_is_checked(num_probes):
  with pytest.raises(ValueError, match=rf"num_probes={num_probes}, wanted 2 to 20, half"):
    randomised_hessian_moments(
      quadratic_loss, jnp.zeros(3), jnp.zeros((40, 3)), jax.random.key(0), num_probes=num_probes, chunk_size=8
    )


def test_a_bad_example_leaves_no_number():
  centers = draw_centers(40)
  centers[3, 1] = np.nan
  got = measure(centers.astype(np.float32))
  assert got.cov_trace.verdict == got.noise_scale.verdict == "unidentifiable"
  assert got.cov_trace.value is None
  assert got.dataset_noise_scale is None
  assert got.max_learning_rate is None
