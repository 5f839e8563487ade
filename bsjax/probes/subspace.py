"""A random subspace of parameter space that takes little memory: a tall matrix of random signs, kept as bits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from bsjax.types import Array, Key

BITS = 32
WORDS_PER_BLOCK = 32
"""Words of a column that are drawn and multiplied together: part of what a key means, so that changing it changes the matrix."""
MAX_BYTES = 2**30
"""The most bits that are kept in memory, in bytes; of a larger matrix, blocks of rows are drawn anew whenever they are needed."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Subspace:
  """The span of the columns of A, n x p with independent entries -1 and 1, each with probability 1/2.

  Like standard normal entries they have mean 0 and variance 1, so that A'A/n is close to I for p far below n, and a shift A z of
  a single parameter is close to normal for p of some 10 or more. Unlike them they need one random bit each: 32 times fewer to draw,
  and 32 times less memory than numbers in float32. For n of some 20 or fewer two columns may coincide.
  """

  key: Key
  blocks: Array | None
  """All words, u32[n / rows, rows / 32, p], 0 beyond n; None where they exceed `MAX_BYTES`. A bit of 1 is the entry -1: bit b of
  a column's word w belongs to row 32 w + b."""
  num_rows: int = field(metadata={"static": True})
  dim: int = field(metadata={"static": True})
  dtype: Any = field(metadata={"static": True})


def draw_subspace(key: Key, num_rows: int, dim: int, dtype: Any) -> Subspace:
  """Draw A, or only take note of its key where its bits would not fit.

  Args:
    dtype: of the products. The matrix is the same in each.

  Raises:
    ValueError: p is not in 1..n.
  """
  if not 1 <= dim <= num_rows:
    raise ValueError(
      f"subspace_dim={dim} must lie in 1..{num_rows}, the number of parameters; use None for the full space."
    )
  subspace = Subspace(key, None, num_rows, dim, jnp.dtype(dtype))
  if num_rows * dim // 8 > MAX_BYTES:
    return subspace
  indices = jnp.arange(_num_blocks(subspace))
  return Subspace(key, jax.lax.map(lambda index: _words(subspace, index), indices), num_rows, dim, subspace.dtype)


def lift(subspace: Subspace, coordinates: Array) -> Array:
  """Compute A z, f32[n], from z, f32[p]."""

  def rows(index):
    return _dot(_signs(subspace, index), coordinates)

  return jax.lax.map(rows, jnp.arange(_num_blocks(subspace))).reshape(-1)[: subspace.num_rows]


def pull(subspace: Subspace, vector: Array) -> Array:
  """Compute A'v, f32[p], from v, f32[n]."""
  rows = BITS * WORDS_PER_BLOCK
  padded = jnp.pad(vector, (0, _num_blocks(subspace) * rows - vector.size)).reshape(-1, rows)

  def term(index):
    return _dot(padded[index], _signs(subspace, index))

  return _sum_over_blocks(subspace, term, jnp.zeros(subspace.dim, subspace.dtype))


def coordinates_of(subspace: Subspace, vector: Array) -> Array:
  """Compute A+ v, f32[p]: the coordinates of the point of the subspace nearest to v, f32[n].

  Solves A'A z = A'v in the precision of `dtype`, to about 1e-7 cond(A'A) in float32. For p far below n the condition number is near
  1 (1.8 for p/n = 1/48); as p nears n it grows without bound. Eigenvalues of A'A below p epsilon of the largest count as
  zero: where columns depend on each other, the shortest of all solutions is returned.
  """
  inverse = jnp.linalg.pinv(_gram(subspace), rtol=subspace.dim * jnp.finfo(subspace.dtype).eps, hermitian=True)
  return _dot(inverse, pull(subspace, vector))


def signs_of(words: Array, dtype: Any) -> Array:
  """Turn words, u32[W, ...], into numbers 1 (bit 0) and -1 (bit 1), f32[32 W, ...]: the lowest bit of the first word comes first."""
  places = jnp.arange(BITS, dtype=words.dtype).reshape(BITS, *(1,) * (words.ndim - 1))
  negative = (words[:, None] >> places[None]) & 1 == 1
  return jnp.where(negative, jnp.array(-1, dtype), jnp.array(1, dtype)).reshape(-1, *words.shape[1:])


def _gram(subspace: Subspace) -> Array:
  """Compute A'A, f32[p, p], by counting: two columns of signs have the inner product n - 2 (places where they differ)."""

  def differences(index):
    def add(total, words):
      return total + jax.lax.population_count(words[:, None] ^ words[None, :]).astype(jnp.int32), None

    # A few words at a time: XLA on the CPU makes vector code of that, but not of all 32.
    return jax.lax.scan(add, zeros, _words(subspace, index), unroll=8)[0]

  zeros = jnp.zeros((subspace.dim, subspace.dim), jnp.int32)
  return (subspace.num_rows - 2 * _sum_over_blocks(subspace, differences, zeros)).astype(subspace.dtype)


def _sum_over_blocks(subspace: Subspace, term: Callable[[Array], Array], zero: Array) -> Array:
  def add(total, index):
    return total + term(index), None

  return jax.lax.scan(add, zero, jnp.arange(_num_blocks(subspace)))[0]


def _num_blocks(subspace: Subspace) -> int:
  return -(-subspace.num_rows // (BITS * WORDS_PER_BLOCK))


def _signs(subspace: Subspace, index: Array) -> Array:
  return signs_of(_words(subspace, index), subspace.dtype)


def _words(subspace: Subspace, index: Array) -> Array:
  if subspace.blocks is not None:
    return subspace.blocks[index]
  words = jax.random.bits(jax.random.fold_in(subspace.key, index), (WORDS_PER_BLOCK, subspace.dim), jnp.uint32)
  rows = (index * WORDS_PER_BLOCK + jnp.arange(WORDS_PER_BLOCK)[:, None]) * BITS + jnp.arange(BITS)
  used = jnp.sum((rows < subspace.num_rows).astype(jnp.uint32) << jnp.arange(BITS, dtype=jnp.uint32), axis=1)
  return words & used.astype(jnp.uint32)[:, None]


def _dot(a: Array, b: Array) -> Array:
  return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
