"""Gradient moments by both routes, against numpy and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.models import mlp
from bsjax.probes import GradientMoments, gradient_moments, noise_of

HESSIAN = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
WEIGHTS = np.array([1.0, -1.0, 2.0])


def quadratic_loss(weights, center):
  """(1/2) (w - c)' H (w - c), whose gradient is H (w - c)."""
  return 0.5 * (weights - center) @ HESSIAN @ (weights - center)


def moments_of(grads, loss=0.0):
  """The moments of given gradients, f64[N, P], in numpy; the parameters are one array."""
  mean = grads.mean(0)
  return GradientMoments(
    loss=loss,
    mean_grad=mean,
    mean_grad_sq_norm={"params": mean @ mean},
    sq_norms={"params": (grads**2).sum(1)},
    deviations={"params": ((grads - mean) ** 2).sum(1)},
    projections={"params": (grads - mean) @ mean},
  )


@pytest.mark.parametrize("route", ["exact", "ghost"])
@pytest.mark.parametrize("chunk_size", [1, 4, 20])
def test_moments_of_a_quadratic(chunk_size, route):
  with jax.enable_x64(True):
    centers = np.random.default_rng(0).normal(size=(7, 3))
    run = jax.jit(functools.partial(gradient_moments, quadratic_loss, chunk_size=chunk_size, route=route))
    got = run(jnp.asarray(WEIGHTS), jnp.asarray(centers))
    want = moments_of((WEIGHTS - centers) @ HESSIAN, loss=np.mean([quadratic_loss(WEIGHTS, c) for c in centers]))
    # A dozen float64 operations of 1e-16 on numbers up to about 30, some of which cancel.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), got, want)


def linear_loss(weights, example):
  return weights @ example


def test_small_noise_survives_float32_on_the_exact_route():
  """Gradients 1 + 1e-3 e: the noise is a thousandth of the mean, and its square a millionth."""
  rng = np.random.default_rng(0)
  grads = (1 + 1e-3 * rng.normal(size=(500, 40))).astype(np.float32)
  got = gradient_moments(linear_loss, jnp.zeros(40), jnp.asarray(grads), chunk_size=64, route="exact")
  want = moments_of(grads.astype(np.float64))
  # G is off by a few roundings of 6e-8, so a deviation |d| of about 1e-3 sqrt(40) by 2 |d| 2e-7 sqrt(40): relative 4e-4.
  np.testing.assert_allclose(got.deviations["params"], want.deviations["params"], rtol=4e-4)
  # Averaged over 500 examples the errors cancel, up to their square, (2e-4)^2.
  statistics, truth = noise_of(got), noise_of(want)
  assert statistics.grad_cov_trace.value == pytest.approx(truth.grad_cov_trace.value, rel=1e-5)
  assert statistics.noise_scale.value == pytest.approx(truth.noise_scale.value, rel=1e-5)
  assert statistics.noise_scale.ci_high == pytest.approx(truth.noise_scale.ci_high, rel=1e-3)
  uncentred = np.sum(np.mean(grads**2, 0) - np.mean(grads, 0) ** 2)
  assert abs(uncentred / truth.grad_cov_trace.value - 1) > 1e-2  # what centring is for


def test_the_ghost_route_is_good_to_a_thirtieth():
  """What its docstring promises: noise of |G|/30 to 1e-3 in each deviation, and better on average."""
  rng = np.random.default_rng(0)
  grads = (1 + rng.normal(size=(500, 40)) / 30).astype(np.float32)
  got = gradient_moments(linear_loss, jnp.zeros(40), jnp.asarray(grads), chunk_size=64)
  want = moments_of(grads.astype(np.float64))
  np.testing.assert_allclose(got.deviations["params"], want.deviations["params"], rtol=1e-3)
  # 900 |d|^2 is lost or won in |g|^2, which is off by a few roundings of 6e-8: 3e-4 at most, if they all go one way.
  assert noise_of(got).noise_scale.value == pytest.approx(noise_of(want).noise_scale.value, rel=3e-4)


def test_routes_agree_on_a_network():
  model = mlp((4, 4, 1), (6,), 3)
  params = model.init(jax.random.key(0)).params
  rng = np.random.default_rng(0)
  examples = {"image": jnp.asarray(rng.normal(size=(30, 4, 4, 1)), jnp.float32), "label": jnp.arange(30) % 3}

  def loss_fn(params, example):
    logits, _ = model.apply(params, {}, example["image"][None], train=False)
    return -jax.nn.log_softmax(logits[0])[example["label"]]

  exact, ghost = (
    jax.jit(functools.partial(gradient_moments, loss_fn, chunk_size=15, route=route))(params, examples)
    for route in ("exact", "ghost")
  )
  assert list(exact.sq_norms) == ["Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel"]
  # Both are float32; noise and gradient are of one size here.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), exact, ghost)


def test_half_precision_parameters():
  """Gradients are float16, sums are float32: a relative 1e-3 is left, the rounding of the gradients themselves."""
  rng = np.random.default_rng(0)
  grads = (20 * rng.normal(size=(300, 8)) + 100).astype(np.float16)
  want = noise_of(moments_of(grads.astype(np.float64)))
  for route in ("exact", "ghost"):
    moments = gradient_moments(linear_loss, jnp.zeros(8, jnp.float16), jnp.asarray(grads), chunk_size=100, route=route)
    # |g|^2 is about 80,000, more than float16 holds.
    np.testing.assert_allclose(moments.sq_norms["params"], np.sum(grads.astype(np.float64) ** 2, axis=1), rtol=1e-5)
    got = noise_of(moments)
    assert got.grad_cov_trace.value == pytest.approx(want.grad_cov_trace.value, rel=2e-3)
    assert got.noise_scale.value == pytest.approx(want.noise_scale.value, rel=2e-3)


def test_unknown_route():
  with pytest.raises(ValueError, match="route='ghosts' is unknown: use one of exact, ghost"):
    gradient_moments(linear_loss, jnp.zeros(3), jnp.zeros((4, 3)), chunk_size=2, route="ghosts")
