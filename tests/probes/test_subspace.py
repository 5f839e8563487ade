"""A random subspace against its dense matrix, in float64, with several blocks and a ragged last one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import subspace
from bsjax.probes.subspace import coordinates_of, draw_subspace, lift, pull

NUM_ROWS, DIM = 2 * subspace.ROWS_PER_BLOCK + 77, 5


@jax.jit
def run(key, z, v):
  drawn = draw_subspace(key, NUM_ROWS, DIM, z.dtype)
  columns = jax.vmap(lambda unit: lift(drawn, unit))(jnp.eye(DIM, dtype=z.dtype))
  return columns.T, lift(drawn, z), pull(drawn, v), coordinates_of(drawn, v)


def test_products_equal_those_of_the_dense_matrix():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    z, v = rng.normal(size=DIM), rng.normal(size=NUM_ROWS)
    matrix, lifted, pulled, coordinates = (np.asarray(x) for x in run(jax.random.key(0), z, v))
  # Sums of 2125 terms of size 1, in other orders: 1e-16 * 2125 at worst. The least-squares problem has condition 1.1.
  np.testing.assert_allclose(lifted, matrix @ z, rtol=0, atol=1e-12)
  np.testing.assert_allclose(pulled, matrix.T @ v, rtol=0, atol=1e-11)
  np.testing.assert_allclose(coordinates, np.linalg.pinv(matrix) @ v, rtol=0, atol=1e-13)
  # Standard normal: mean 0 and variance 1 of 10625 entries, within 4 standard errors; blocks differ.
  assert abs(matrix.mean()) < 4 / np.sqrt(matrix.size)
  assert abs(matrix.var() - 1) < 4 * np.sqrt(2 / matrix.size)
  assert abs(np.corrcoef(matrix[:1000].ravel(), matrix[1024:2024].ravel())[0, 1]) < 4 / np.sqrt(5000)


def test_kept_and_redrawn_are_the_same_numbers(monkeypatch):
  z, v = jnp.linspace(-1, 1, DIM), jnp.sin(jnp.arange(NUM_ROWS))
  assert draw_subspace(jax.random.key(3), NUM_ROWS, DIM, z.dtype).blocks is not None
  kept = run(jax.random.key(3), z, v)
  monkeypatch.setattr(subspace, "MAX_BYTES", NUM_ROWS * DIM * 4 - 1)
  assert draw_subspace(jax.random.key(3), NUM_ROWS, DIM, z.dtype).blocks is None
  redrawn = jax.jit(lambda *args: run.__wrapped__(*args))(jax.random.key(3), z, v)  # a new function: traced anew
  jax.tree.map(np.testing.assert_array_equal, kept, redrawn)


def test_the_whole_space_is_the_largest_subspace():
  """p = n: A is square, A+ its inverse; cond(A'A) is about n^2, here 1e4, and float32 leaves three digits."""
  drawn = draw_subspace(jax.random.key(0), 40, 40, jnp.float32)
  vector = jnp.cos(jnp.arange(40.0))
  np.testing.assert_allclose(lift(drawn, coordinates_of(drawn, vector)), vector, atol=1e-2)


@pytest.mark.parametrize("dim", [0, 41])
def test_a_dimension_that_does_not_exist(dim):
  with pytest.raises(ValueError, match=rf"subspace_dim={dim} must lie in 1..40, .* use None for the full space"):
    draw_subspace(jax.random.key(0), 40, dim, jnp.float32)
