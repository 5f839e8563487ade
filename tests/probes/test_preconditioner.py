"""The preconditioned Hessian against the dense P^-1 H, and its scales against the optimizers they describe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.optim import make_optimizer
from bsjax.probes import adam_preconditioner, eigenpairs, preconditioned, trust_ratio_preconditioner
from bsjax.types import Hparams


def test_top_eigenvalue_is_that_of_the_product_of_matrices():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    hessian = rng.normal(size=(12, 12))
    hessian += hessian.T
    second_moment, count, beta2, epsilon = rng.uniform(0.01, 4, size=12), 7, 0.99, 1e-3
    inverse = 1 / (np.sqrt(second_moment / (1 - beta2**count)) + epsilon)
    scale = adam_preconditioner(second_moment, count, beta2=beta2, epsilon=epsilon)
    got = eigenpairs(
      preconditioned(lambda v: hessian @ v, scale), rng.normal(size=12), num_bottom=1, max_matvecs=13, tolerance=1e-10
    )
    truth = np.sort(np.linalg.eigvals(np.diag(inverse) @ hessian).real)
    np.testing.assert_allclose(got.values, [truth[-1], truth[0]], rtol=1e-9)


def descend(name, hparams, params, grads, num_steps):
  """Steps of an optimizer under gradients that do not change, and its last state."""
  optimizer = make_optimizer(name, hparams, lambda step: 1.0)
  state = optimizer.init(params)
  for _ in range(num_steps):
    updates, state = optimizer.update(grads, state, params)
  return updates, state


def params_and_grads():
  rng = np.random.default_rng(1)
  params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4), "zero": np.zeros((2, 2))}
  return params, jax.tree.map(lambda w: rng.normal(size=w.shape), params)


def test_adam_scale_squared_times_the_gradient_is_the_step():
  with jax.enable_x64(True):
    params, grads = params_and_grads()
    updates, state = descend("adamw", Hparams(0.5, momentum=0.0, beta2=0.9), params, grads, 3)
    adam = state[0]
    scale = adam_preconditioner(adam.nu, adam.count, beta2=0.9, epsilon=1e-8)
    expected = jax.tree.map(lambda s, g: -0.5 * s**2 * g, scale, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), updates, expected)


def test_lars_scale_squared_times_the_gradient_is_the_step():
  with jax.enable_x64(True):
    params, grads = params_and_grads()
    updates, _ = descend("lars", Hparams(0.5, momentum=0.0), params, grads, 1)
    scale = trust_ratio_preconditioner(params, grads, coefficient=0.001)
    expected = jax.tree.map(lambda s, g: -0.5 * s**2 * g, scale, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), updates, expected)
    assert np.all(scale["bias"] == 1)
    assert np.all(scale["zero"] == 1)


def test_lamb_is_the_product_of_both():
  with jax.enable_x64(True):
    params, grads = params_and_grads()
    updates, state = descend("lamb", Hparams(0.5, momentum=0.0, beta2=0.9), params, grads, 3)
    adam = adam_preconditioner(state[0].nu, 3, beta2=0.9, epsilon=1e-6)
    direction = jax.tree.map(lambda s, g: s**2 * g, adam, grads)
    scale = optax.tree.mul(adam, trust_ratio_preconditioner(params, direction, coefficient=1.0))
    expected = jax.tree.map(lambda s, g: -0.5 * s**2 * g, scale, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), updates, expected)


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_threshold_of_adams_momentum(factor):
  """Preconditioned descent with exponential momentum on an eigenvalue just below and just above (2 + 2 b) / ((1 - b) eta)."""
  beta1, rate = 0.9, 0.1
  curvature = factor * (2 + 2 * beta1) / ((1 - beta1) * rate)
  position, momentum, start = 1.0, 0.0, 1.0
  for _ in range(1000):
    momentum = beta1 * momentum + (1 - beta1) * curvature * position
    position -= rate * momentum
  assert (abs(position) < start) == (factor < 1)


def test_no_second_moment_before_the_first_update():
  with pytest.raises(ValueError, match="count=0: the second moment is empty"):
    adam_preconditioner(jnp.zeros(2), 0, beta2=0.9, epsilon=1e-8)
