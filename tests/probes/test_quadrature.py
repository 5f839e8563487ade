"""Quadratures against the moments they must have exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import spectral_quadrature

SIZE, NUM_MATVECS, NUM_PROBES = 30, 6, 3


@functools.partial(jax.jit, static_argnames=("num_matvecs", "num_probes"))
def quadrature(matrix, key, **counts):
  return spectral_quadrature(lambda v: matrix @ v, jnp.zeros(len(matrix), matrix.dtype), key, **counts)


def test_moments_below_twice_the_products_are_exact():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(SIZE, SIZE)) / SIZE**0.5
    matrix = (matrix + matrix.T) / 2
    key = jax.random.key(5)
    nodes, weights = quadrature(matrix, key, num_probes=NUM_PROBES, num_matvecs=NUM_MATVECS)
    assert nodes.shape == weights.shape == (NUM_PROBES, NUM_MATVECS)
    np.testing.assert_allclose(np.sum(weights, 1), 1, rtol=1e-14)
    probes = np.stack([jax.random.rademacher(k, (SIZE,), float) for k in jax.random.split(key, NUM_PROBES)])
    power = probes
    for degree in range(2 * NUM_MATVECS):
      # The norm of the matrix is near 1: so are its moments, and 1e-12 is some thousand roundings.
      truth = np.sum(probes * power, 1) / SIZE
      np.testing.assert_allclose(np.sum(weights * nodes**degree, 1), truth, rtol=0, atol=1e-12)
      power = power @ matrix
    truth = np.sum(probes * power, 1) / SIZE
    assert np.all(np.abs(np.sum(weights * nodes ** (2 * NUM_MATVECS), 1) - truth) > 1e-6)


def test_all_products_give_the_spectrum_itself():
  with jax.enable_x64(True):
    matrix = np.diag([1.0, 1.0, 1.0, 4.0, -2.0])
    nodes, weights = quadrature(matrix, jax.random.key(0), num_probes=2, num_matvecs=5)
    # Rademacher probes see every axis of a diagonal matrix alike.
    for value, share in ((1.0, 0.6), (4.0, 0.2), (-2.0, 0.2)):
      mass = np.sum(np.where(np.abs(nodes - value) < 1e-10, weights, 0), 1)
      np.testing.assert_allclose(mass, share, rtol=0, atol=1e-12)


def test_a_product_that_is_not_finite_gives_nan():
  nodes, weights = quadrature(jnp.full((8, 8), jnp.inf), jax.random.key(0), num_probes=2, num_matvecs=3)
  assert np.all(np.isnan(nodes))
  assert np.all(np.isnan(weights))


@pytest.mark.parametrize(("num_probes", "num_matvecs"), [(0, 2), (1, 0), (1, 4)])
def test_refuses(num_probes, num_matvecs):
  with pytest.raises(
    ValueError, match=f"num_probes={num_probes} and num_matvecs={num_matvecs}: wanted at least one probe"
  ):
    spectral_quadrature(lambda v: v, jnp.ones(3), jax.random.key(0), num_probes=num_probes, num_matvecs=num_matvecs)
