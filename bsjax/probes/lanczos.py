"""One step of Lanczos' method with full re-orthogonalisation, and the few sweeps over its basis that it takes.

Shape letters: P entries of a vector, K rows of a basis, which is filled from the top; rows in use are orthonormal.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bsjax.types import Array

ROUNDING = 20
"""Machine epsilons, relative to the operator, below which a number is taken for rounding."""
MOST_PASSES = 5
KEPT_SHARE = 0.7
"""A pass that leaves less of a vector than this has cancelled, and is repeated."""
ROWS, LANES, UNROLL = 4, 512, 8
"""The sweeps on the CPU: rows taken at a time (with more, more empty rows are read; with fewer, the vector more often), partial sums
per row, terms added to each at a time."""


class Tridiagonal(NamedTuple):
  """A basis of a Krylov space and the operator in it.

      A q_j = beta_(j-1) q_(j-1) + alpha_j q_j + beta_j q_(j+1),        j < size

  A beta of 0 means that the rows so far span an invariant subspace; the next row is a random direction.
  """

  basis: Array
  """Rows q_0 to q_size are in use, f[K, P]; K is a multiple of `ROWS`."""
  diagonal: Array
  """alpha, f[K], zero from `size` on."""
  off_diagonal: Array
  """beta, f[K], zero from `size` on."""
  size: Array
  """i32[]."""


def begin(start: Array, num_steps: int) -> Tridiagonal:
  """Put the normalised start vector f[P] into a basis that has room for `num_steps` steps."""
  num_rows = -(-(num_steps + 1) // ROWS) * ROWS
  basis = jnp.zeros((num_rows, start.size), start.dtype).at[0].set(start / norm(start))
  zeros = jnp.zeros(num_rows, start.dtype)
  return Tridiagonal(basis, zeros, zeros, jnp.array(0, jnp.int32))


def extend(space: Tridiagonal, product: Array) -> tuple[Tridiagonal, Array]:
  """Make one step, given A q_size f[P].

  The three-term recurrence removes the two large components, a classical Gram-Schmidt pass over all rows what rounding left
  of any; another pass follows where little remained (Daniel, Gragg, Kaufman and Stewart 1976). Where nothing but rounding
  remained, the space is exhausted: a random direction takes the vector's place, and is orthogonalised in the same loop.

  Returns:
    The longer basis, and whether the space was exhausted: beta is then 0. A product that is not finite shows in `diagonal[size]`.
  """
  basis, diagonal, off_diagonal, size = space
  count, previous = size + 1, jnp.maximum(size - 1, 0)
  beta_before = jnp.where(size > 0, off_diagonal[previous], 0)
  alpha = dot(basis[size], product)
  rest = product - alpha * basis[size] - beta_before * basis[previous]
  scale = jnp.maximum(jnp.max(jnp.abs(diagonal)), jnp.maximum(jnp.max(off_diagonal), jnp.abs(alpha)))
  draw = functools.partial(jax.random.normal, jax.random.fold_in(jax.random.key(0), size), rest.shape, rest.dtype)

  def unfinished(state: _Rest) -> Array:
    return state.again & (state.passes < MOST_PASSES)

  def sweep(state: _Rest) -> _Rest:
    found = project(basis, count, state.vector)
    vector = subtract(basis, count, found, state.vector)
    after = norm(vector)
    floor = ROUNDING * jnp.finfo(vector.dtype).eps * jnp.maximum(scale, after)
    ends = ~state.exhausted & ((after <= floor) | (count == vector.size))
    vector = jax.lax.cond(ends, draw, lambda: vector)
    return _Rest(
      vector=vector,
      before=jnp.where(ends, jnp.inf, after),
      exhausted=state.exhausted | ends,
      again=ends | (after < KEPT_SHARE * state.before),
      passes=state.passes + 1,
    )

  first = _Rest(rest, norm(rest), jnp.array(False), jnp.array(True), jnp.array(0, jnp.int32))
  found = jax.lax.while_loop(unfinished, sweep, first)
  length = norm(found.vector)  # 0 where the basis is complete
  longer = Tridiagonal(
    basis=basis.at[count].set(found.vector / jnp.where(length > 0, length, 1)),
    diagonal=diagonal.at[size].set(alpha),
    off_diagonal=off_diagonal.at[size].set(jnp.where(found.exhausted, 0, length)),
    size=count,
  )
  return longer, found.exhausted


class _Rest(NamedTuple):
  """What is left of a vector while the basis is removed from it."""

  vector: Array
  before: Array
  """Its norm before the next pass; infinite where it was just drawn."""
  exhausted: Array
  again: Array
  passes: Array


def project(basis: Array, count: Array, vector: Array) -> Array:
  """Multiply the first `count` rows with a vector: f[K], zero beyond them."""

  def dense(basis, count, vector):
    return jnp.where(jnp.arange(basis.shape[0]) < count, jnp.dot(basis, vector, precision="highest"), 0)

  return jax.lax.platform_dependent(basis, count, vector, cpu=_project_filled, default=dense)


def subtract(basis: Array, count: Array, coefficients: Array, vector: Array) -> Array:
  """Subtract from a vector a combination of the first `count` rows: v - sum_j c_j q_j, with c f[K] zero beyond them."""

  def dense(basis, count, coefficients, vector):
    del count
    return vector - jnp.dot(coefficients, basis, precision="highest")

  return jax.lax.platform_dependent(basis, count, coefficients, vector, cpu=_subtract_filled, default=dense)


def _project_filled(basis: Array, count: Array, vector: Array) -> Array:
  """Read the filled rows only, and in place.

  XLA copies `basis[:count]` before a product with it, which costs more than the product. Sliced inside an elementwise fusion, it
  is not copied; partial sums, LANES to a row, are also what makes long sums accurate in float32.
  """
  width = LANES * UNROLL
  num_full, remainder = divmod(vector.size, width)
  split = num_full * width

  def rows(index, found):
    row = index * ROWS

    def columns(index, sums):
      for term in range(UNROLL):
        start = (index * width + term * LANES).astype(row.dtype)
        part = jax.lax.dynamic_slice(vector, (start,), (LANES,))
        sums += jax.lax.dynamic_slice(basis, (row, start), (ROWS, LANES)) * part
      return sums

    sums = jnp.zeros((ROWS, LANES), basis.dtype)
    if num_full:
      sums = jax.lax.fori_loop(0, num_full, columns, sums)
    rest = jax.lax.dynamic_slice(basis, (row, jnp.asarray(split, row.dtype)), (ROWS, remainder)) * vector[split:]
    return jax.lax.dynamic_update_slice(found, jnp.sum(sums, 1) + jnp.sum(rest, 1), (row,))

  found = jax.lax.fori_loop(0, _blocks(count), rows, jnp.zeros(basis.shape[0], basis.dtype))
  return jnp.where(jnp.arange(basis.shape[0]) < count, found, 0)


def _subtract_filled(basis: Array, count: Array, coefficients: Array, vector: Array) -> Array:
  """Read the filled rows only, and in place."""

  def rows(index, rest):
    for term in range(ROWS):
      row = index * ROWS + term
      rest -= coefficients[row] * jax.lax.dynamic_index_in_dim(basis, row, keepdims=False)
    return rest

  return jax.lax.fori_loop(0, _blocks(count), rows, vector)


def _blocks(count: Array) -> Array:
  return (count + ROWS - 1) // ROWS


def dot(a: Array, b: Array) -> Array:
  """Multiply two long vectors, in full precision on every device."""
  return jnp.dot(a, b, precision="highest")


def norm(vector: Array) -> Array:
  """Measure the Euclidean length of a long vector."""
  return jnp.sqrt(dot(vector, vector))


def eigensystem(space: Tridiagonal) -> tuple[Array, Array]:
  """Decompose the tridiagonal matrix of a space.

  What lies beyond `size` is decoupled and put above the Gershgorin bound, so `size` may be traced.

  Returns:
    Eigenvalues f[K], ascending, those of the space first; eigenvectors in columns, f[K, K].
  """
  used = jnp.arange(space.diagonal.size) < space.size
  coupling = jnp.where(used[1:], space.off_diagonal[:-1], 0)
  bound = jnp.max(jnp.abs(space.diagonal)) + 2 * jnp.max(coupling)
  above = jnp.where(bound > 0, 2 * bound, 1)
  matrix = jnp.diag(jnp.where(used, space.diagonal, above)) + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)
  return jnp.linalg.eigh(matrix)
