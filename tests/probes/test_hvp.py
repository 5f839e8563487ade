"""Hessian products against closed forms and the dense Hessian, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bsjax.probes import hessian_vector_product

N = 11


@pytest.mark.parametrize("chunk_size", [1, 4, N])
def test_logistic_regression(chunk_size):
  """H = X' diag(s (1 - s)) X / N, with s the logistic function of X w: every example has its own Hessian."""

  def loss_fn(weights, example):
    return jnp.logaddexp(0.0, example @ weights)

  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, weights, vector = rng.normal(size=(N, 6)), rng.normal(size=6), rng.normal(size=6)
    run = jax.jit(functools.partial(hessian_vector_product, loss_fn, chunk_size=chunk_size))
    s = 1 / (1 + np.exp(-x @ weights))
    expected = x.T @ (s * (1 - s) * (x @ vector)) / N
    # Sums of 11 in another order and a few operations: tens of roundings of 1e-16.
    np.testing.assert_allclose(run(weights, x, vector), expected, rtol=0, atol=1e-14 * np.abs(expected).max())


def test_columns_equal_the_dense_hessian_of_a_net():
  def loss_fn(params, example):
    hidden = jnp.tanh(example["x"] @ params["in"] + params["bias"])
    return (hidden @ params["out"] - example["y"]) ** 2

  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    params = {"in": rng.normal(size=(4, 5)), "bias": rng.normal(size=5), "out": rng.normal(size=5)}
    examples = {"x": rng.normal(size=(N, 4)), "y": rng.normal(size=N)}
    flat, unravel = ravel_pytree(params)

    def mean_loss(flat):
      return jnp.mean(jax.vmap(loss_fn, (None, 0))(unravel(flat), examples))

    @jax.jit
    @jax.vmap
    def columns(vector):
      product = hessian_vector_product(loss_fn, params, examples, unravel(vector), chunk_size=4)
      return ravel_pytree(product)[0]

    want = jax.jit(jax.hessian(mean_loss))(flat)
    # The same derivatives by two routes: some 30 sums and products of 1e-16 each.
    np.testing.assert_allclose(columns(jnp.eye(flat.size)), want, rtol=0, atol=1e-13 * np.abs(want).max())
