"""A random subspace against its dense matrix, in float64, with several blocks and a ragged last one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import subspace
from bsjax.probes.subspace import coordinates_of, draw_subspace, lift, pull, signs_of

NUM_ROWS, DIM = 2 * 1024 + 77, 5
"""Two blocks of 32 words and a third that ends within a word."""


@jax.jit
def run(key, z, v):
  drawn = draw_subspace(key, NUM_ROWS, DIM, z.dtype)
  columns = jax.vmap(lambda unit: lift(drawn, unit))(jnp.eye(DIM, dtype=z.dtype))
  return columns.T, lift(drawn, z), pull(drawn, v), coordinates_of(drawn, v)


@pytest.fixture(scope="module")
def dense():
  """The matrix in float64, and the three products with random vectors z and v."""
  rng = np.random.default_rng(0)
  z, v = rng.normal(size=DIM), rng.normal(size=NUM_ROWS)
  with jax.enable_x64(True):
    return z, v, *(np.asarray(x) for x in run(jax.random.key(0), z, v))


def test_products_equal_those_of_the_dense_matrix(dense):
  z, v, matrix, lifted, pulled, coordinates = dense
  # Sums of 2125 terms of size 1, in other orders: 1e-16 * 2125 at worst. The least-squares problem has condition 1.1.
  np.testing.assert_allclose(lifted, matrix @ z, rtol=0, atol=1e-12)
  np.testing.assert_allclose(pulled, matrix.T @ v, rtol=0, atol=1e-11)
  np.testing.assert_allclose(coordinates, np.linalg.pinv(matrix) @ v, rtol=0, atol=1e-13)


def test_entries_are_independent_signs(dense):
  matrix = dense[2]
  assert set(np.unique(matrix)) == {-1.0, 1.0}
  # Means and mean products of independent signs have standard error 1/sqrt(number); all within 4 of them.
  assert abs(matrix.mean()) < 4 / np.sqrt(matrix.size)
  between_columns = (matrix.T @ matrix / NUM_ROWS)[np.triu_indices(DIM, 1)]
  assert np.all(np.abs(between_columns) < 4 / np.sqrt(NUM_ROWS))
  for lag in (1, 32, 1024):  # the next bit of a word, the next word, the next block
    product = matrix[lag:] * matrix[:-lag]
    assert abs(product.mean()) < 4 / np.sqrt(product.size), lag


def test_bits_are_read_from_the_lowest_of_the_first_word():
  words = jnp.array([[1, 0], [0, 2**31 + 4]], jnp.uint32)
  expected = np.ones((64, 2))
  expected[0, 0] = expected[34, 1] = expected[63, 1] = -1
  np.testing.assert_array_equal(signs_of(words, jnp.float32), expected)


def test_kept_and_redrawn_are_the_same_numbers(dense, monkeypatch):
  z, v, matrix = dense[:3]
  z, v = jnp.asarray(z, jnp.float32), jnp.asarray(v, jnp.float32)
  assert draw_subspace(jax.random.key(0), NUM_ROWS, DIM, z.dtype).blocks is not None
  kept = run(jax.random.key(0), z, v)
  monkeypatch.setattr(subspace, "MAX_BYTES", NUM_ROWS * DIM // 8 - 1)
  assert draw_subspace(jax.random.key(0), NUM_ROWS, DIM, z.dtype).blocks is None
  redrawn = jax.jit(lambda *args: run.__wrapped__(*args))(jax.random.key(0), z, v)  # a new function: traced anew
  jax.tree.map(np.testing.assert_array_equal, kept, redrawn)
  np.testing.assert_array_equal(kept[0], matrix)  # float32 and float64 have the same matrix


def test_the_whole_space_is_the_largest_subspace():
  """p = n: A is square, A+ its inverse; cond(A'A) is about n^2, here 1e4, and float32 leaves three digits."""
  drawn = draw_subspace(jax.random.key(0), 40, 40, jnp.float32)
  vector = jnp.cos(jnp.arange(40.0))
  np.testing.assert_allclose(lift(drawn, coordinates_of(drawn, vector)), vector, atol=1e-2)


def test_equal_columns_share_a_coordinate():
  """Few rows of signs may repeat a column. A+ is then the pseudo-inverse, to the rounding of A'A's eigenvectors: 1e-7 * p."""
  drawn = draw_subspace(jax.random.key(1), 12, 3, jnp.float32)
  repeated = dataclasses.replace(drawn, blocks=drawn.blocks[:, :, jnp.array([0, 1, 0])])
  matrix = np.stack([np.asarray(lift(repeated, unit)) for unit in jnp.eye(3)], axis=1)
  vector = np.cos(np.arange(12.0))
  got = coordinates_of(repeated, jnp.asarray(vector, jnp.float32))
  assert np.linalg.matrix_rank(matrix) == 2
  np.testing.assert_allclose(got, np.linalg.pinv(matrix) @ vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 41])
def test_a_dimension_that_does_not_exist(dim):
  with pytest.raises(ValueError, match=rf"subspace_dim={dim} must lie in 1..40, .* use None for the full space"):
    draw_subspace(jax.random.key(0), 40, dim, jnp.float32)
