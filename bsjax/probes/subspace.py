"""A random subspace of parameter space that need not fit in memory: a tall normal matrix as a function of a key."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from bsjax.types import Array, Key

ROWS_PER_BLOCK = 1024
"""Rows that are drawn together: part of what a key means, so that changing it changes the matrix."""
MAX_BYTES = 2**30
"""The largest matrix that is kept in memory; of a larger one, blocks of rows are drawn anew whenever they are needed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Subspace:
  """The span of the columns of A, n x p with independent standard normal entries."""

  key: Key
  blocks: Array | None
  """All rows, f32[n / rows, rows, p] with zeros beyond n; None where they exceed `MAX_BYTES`."""
  num_rows: int = field(metadata={"static": True})
  dim: int = field(metadata={"static": True})
  dtype: Any = field(metadata={"static": True})


def draw_subspace(key: Key, num_rows: int, dim: int, dtype: Any) -> Subspace:
  """Draw A, or only take note of its key where it would not fit.

  Raises:
    ValueError: p is not in 1..n.
  """
  if not 1 <= dim <= num_rows:
    raise ValueError(
      f"subspace_dim={dim} must lie in 1..{num_rows}, the number of parameters; use None for the full space."
    )
  subspace = Subspace(key, None, num_rows, dim, jnp.dtype(dtype))
  if num_rows * dim * subspace.dtype.itemsize > MAX_BYTES:
    return subspace
  indices = jnp.arange(_num_blocks(subspace))
  return Subspace(key, jax.lax.map(lambda index: _block(subspace, index), indices), num_rows, dim, subspace.dtype)


def lift(subspace: Subspace, coordinates: Array) -> Array:
  """Compute A z, f32[n], from z, f32[p]."""

  def rows(index):
    return _dot(_block(subspace, index), coordinates)

  return jax.lax.map(rows, jnp.arange(_num_blocks(subspace))).reshape(-1)[: subspace.num_rows]


def pull(subspace: Subspace, vector: Array) -> Array:
  """Compute A'v, f32[p], from v, f32[n]."""
  padded = jnp.pad(vector, (0, _num_blocks(subspace) * ROWS_PER_BLOCK - vector.size)).reshape(-1, ROWS_PER_BLOCK)
  return _sum_over_blocks(subspace, lambda block, index: _dot(padded[index], block), (subspace.dim,))


def coordinates_of(subspace: Subspace, vector: Array) -> Array:
  """Compute A+ v, f32[p]: the coordinates of the point of the subspace nearest to v, f32[n].

  Solves A'A z = A'v in the precision of A, to about 1e-7 cond(A'A) in float32. For p far below n the condition number is near 1 (1.8 for
  p/n = 1/48); as p nears n it grows without bound.
  """
  gram = _sum_over_blocks(subspace, lambda block, index: _dot(block.T, block), (subspace.dim, subspace.dim))
  return jnp.linalg.solve(gram, pull(subspace, vector))


def _sum_over_blocks(subspace: Subspace, term: Callable[[Array, Array], Array], shape: tuple[int, ...]) -> Array:
  def add(total, index):
    return total + term(_block(subspace, index), index), None

  return jax.lax.scan(add, jnp.zeros(shape, subspace.dtype), jnp.arange(_num_blocks(subspace)))[0]


def _num_blocks(subspace: Subspace) -> int:
  return -(-subspace.num_rows // ROWS_PER_BLOCK)


def _block(subspace: Subspace, index: Array) -> Array:
  if subspace.blocks is not None:
    return subspace.blocks[index]
  shape = (ROWS_PER_BLOCK, subspace.dim)
  block = jax.random.normal(jax.random.fold_in(subspace.key, index), shape, subspace.dtype)
  used = index * ROWS_PER_BLOCK + jnp.arange(ROWS_PER_BLOCK) < subspace.num_rows
  return jnp.where(used[:, None], block, 0)


def _dot(a: Array, b: Array) -> Array:
  return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
