"""Eigenvalues of an operator that is known only by its products with vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bsjax.types import Array


class TopEigenvalue(NamedTuple):
  """An approximate eigenpair (lambda, v) of an operator A, and how far it is from one.

  Some eigenvalue of A lies within `residual` of `value`, whatever the rounding.
  """

  value: Array
  """lambda, f32[]."""
  vector: Any
  """v, of unit norm: a pytree like the start vector."""
  residual: Array
  """|A v - lambda v|, f32[], from one product of its own."""
  num_matvecs: Array
  """Products made, i32[], the one for the residual included."""


def top_eigenvalue(matvec: Callable[[Any], Any], v0: Any, *, max_matvecs: int, tolerance: float) -> TopEigenvalue:
  """Find the algebraically largest eigenvalue of a symmetric operator by Lanczos' method.

  Step k adds one product to an orthonormal basis Q_k of the Krylov space, in which A is the tridiagonal T_k. With
  (theta, s) the top eigenpair of T_k and beta_k the next off-diagonal entry, the Ritz pair (theta, Q_k s) has residual
  beta_k |s_k|; the loop ends when that falls to `tolerance * |theta|`. Each new vector is orthogonalised twice
  against the whole basis, without which rounding breeds copies of the top eigenvalue.

  Args:
    matvec: multiplies A with a pytree like `v0`.
    v0: where to start: a random vector (`optax.tree.random_like`), since a start orthogonal to the top eigenvector
      misses it.
    max_matvecs: most products to make, at least 2; one of them checks the residual. Memory: that many times `v0`.
    tolerance: relative residual that suffices; about 1e-5 is the least that float32 reaches. The eigenvalue itself
      is more accurate: its error falls with the square of the residual.

  Returns:
    The eigenpair with its true residual. It converged if `residual <= tolerance * |value|`; where the products ran out
    first, the residual says so and nothing else does.

  Raises:
    ValueError: fewer than two products allowed.

  Holds: one compiled program under `jit`, which makes only the products it needs; matfree's `tridiag_sym` takes their
  number beforehand. No more steps than A has rows. A non-finite product ends the loop and gives a NaN.

  Source: Lanczos (1950); Golub and Van Loan (2013), section 10.1, for the residual of a Ritz pair.
  """
  if max_matvecs < 2:
    raise ValueError(f"max_matvecs={max_matvecs} must be at least 2: one product to make, one to check.")
  start, unravel = ravel_pytree(v0)
  num_steps = min(max_matvecs - 1, start.size)

  def multiply(vector):
    return ravel_pytree(matvec(unravel(vector)))[0]

  def unfinished(state):
    step, _, _, _, value, _, residual = state
    return (step < num_steps) & (residual > tolerance * jnp.abs(value))

  def advance(state):
    step, basis, diagonal, off_diagonal, _, _, _ = state
    product = multiply(basis[step])
    diagonal = diagonal.at[step].set(dot(basis[step], product))
    for _ in range(2):
      product -= dot(dot(basis, product), basis)
    beta = jnp.linalg.norm(product)
    value, weights = top_ritz_pair(diagonal, off_diagonal, step + 1)
    basis = basis.at[step + 1].set(jnp.where(beta > 0, product / beta, 0))
    off_diagonal = off_diagonal.at[step].set(beta)
    return step + 1, basis, diagonal, off_diagonal, value, weights, beta * jnp.abs(weights[step])

  zeros = jnp.zeros(num_steps, start.dtype)
  basis = jnp.zeros((num_steps + 1, start.size), start.dtype).at[0].set(start / jnp.linalg.norm(start))
  unknown = jnp.array(jnp.inf, start.dtype)
  state = (jnp.array(0), basis, zeros, zeros, jnp.zeros_like(unknown), zeros, unknown)
  step, basis, _, _, value, weights, _ = jax.lax.while_loop(unfinished, advance, state)
  vector = dot(weights, basis[:-1])
  vector /= jnp.linalg.norm(vector)
  residual = jnp.linalg.norm(multiply(vector) - value * vector)
  return TopEigenvalue(value, unravel(vector), residual, step + 1)


def top_ritz_pair(diagonal: Array, off_diagonal: Array, size: Array) -> tuple[Array, Array]:
  """Find the top eigenpair of the leading block of a tridiagonal matrix.

  The rest of the matrix, f32[K, K], is decoupled and its diagonal put below the block's Gershgorin bound, so that it
  cannot hold the top eigenvalue and `size` may be traced.

  Returns:
    The value f32[] and the vector f32[K], zero beyond `size`.
  """
  used = jnp.arange(diagonal.size) < size
  coupling = jnp.where(used[1:], off_diagonal[:-1], 0)
  bound = jnp.min(diagonal, where=used, initial=jnp.inf) - 2 * jnp.max(jnp.abs(coupling), initial=0)
  below = bound - jnp.abs(bound) - 1
  matrix = jnp.diag(jnp.where(used, diagonal, below)) + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)
  values, vectors = jnp.linalg.eigh(matrix)
  return values[-1], vectors[:, -1]


def dot(a: Array, b: Array) -> Array:
  """Multiply in full precision on every device."""
  return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
