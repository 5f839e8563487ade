"""Eigenpairs of an operator that is known only by its products with vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bsjax.probes.lanczos import ROUNDING, Tridiagonal, begin, eigensystem, extend, norm, subtract
from bsjax.types import Array

Matvec = Callable[[Any], Any]
"""Multiplies a symmetric operator with a pytree, linearly."""


class Eigenpairs(NamedTuple):
  """Approximate eigenpairs (theta_i, v_i) of an operator A, and how far each is from one.

  Some eigenvalue of A lies within `residuals[i]` of `values[i]`, whatever the rounding.
  """

  values: Array
  """theta, f[K]: the largest ones, descending, then the smallest ones, ascending."""
  vectors: Any
  """v, orthonormal to rounding: a pytree like the start vector with a leading axis K."""
  residuals: Array
  """|A v_i - theta_i v_i|, f[K], or a little more."""
  num_matvecs: Array
  """Products made, i32[], the one that measures the rounding included."""


def eigenpairs(
  matvec: Matvec, v0: Any, *, num_top: int = 1, num_bottom: int = 0, max_matvecs: int, tolerance: float | Array
) -> Eigenpairs:
  """Find the algebraically largest and smallest eigenvalues of a symmetric operator, with vectors, by Lanczos' method.

  Step m adds one product to an orthonormal basis Q_m of the Krylov space, in which A is the tridiagonal T_m. With
  (theta_i, s_i) an eigenpair of T_m and beta_m the next off-diagonal entry, the Ritz pair (theta_i, v_i = Q_m s_i) has residual
  beta_m |s_mi|. The loop ends when that falls to `tolerance * |theta_i|` for every pair that is wanted.

  One last product measures the rounding of all pairs together. With signs c_i drawn at random and y = sum_i c_i v_i / sqrt(K),

      r = A y - sum_i c_i (theta_i v_i + beta_m s_mi q_(m+1)) / sqrt(K) = sum_i c_i e_i / sqrt(K),
      E |r|^2 = mean_i |e_i|^2,        e_i = A v_i - theta_i v_i - beta_m s_mi q_(m+1)

  so |e_i| is at most sqrt(K) |r|, and the residual given is beta_m |s_mi| + sqrt(K) |r|. Exact if a pair is alone in its
  rounding, sqrt(K) times too much of it if all are alike.

  Args:
    matvec: multiplies A with a pytree like `v0`.
    v0: where to start: a random vector (`optax.tree.random_like`), since an eigenvector orthogonal to the start is missed.
    num_top, num_bottom: how many from each end.
    max_matvecs: most products to make, at least num_top + num_bottom + 1. Memory: that many times `v0`, allocated at once.
    tolerance: relative residual that suffices. Nothing below 20 machine epsilons of the largest |theta| is waited for: rounding
      lets float32 reach no further, so a pair a hundred times smaller than the largest has a relative residual of 2e-4 at best.
      The values are more accurate: their error falls with the square of the residual over the gap.

  Returns:
    The pairs with their residuals. A pair converged if `residuals <= tolerance * |values|`; where the products ran out first,
    the residual says so and nothing else does.

  Raises:
    ValueError: no pair wanted, more than A has, too few products for them, or a start that is zero or not finite (if it is
      concrete; a traced one gives NaNs).

  Holds: one compiled program under `jit`, with two copies of `matvec` in it, which makes only the products it needs; no more steps
  than A has rows. A product that is not finite ends the loop: values and residuals are NaN. A Krylov space holds one vector of
  each eigenspace, so an eigenvalue counts once, however often A has it, unless the space is exhausted (A of low rank, say, or the
  identity): then the search goes on from a random direction orthogonal to it, once for each pair wanted at either end, and
  multiplicities are found. Exhausted
  means beta_m below 20 machine epsilons of the largest |T_ij|: small beta before it amplify rounding and can hide it, so count on
  multiplicities only where distinct eigenvalues are few and well apart.

  Source: Lanczos (1950); Golub and Van Loan (2013), section 10.1, for the residual of a Ritz pair. matfree's `tridiag_sym` takes
  the number of products beforehand and orthogonalises twice against all rows, filled or not (docs/bench_curvature.md).
  """
  start, unravel = ravel_pytree(v0)
  num_pairs = num_top + num_bottom
  _check(start, num_top, num_bottom, max_matvecs)
  num_steps = min(max_matvecs - 1, start.size)
  signs = jax.random.rademacher(jax.random.key(0), (num_pairs,), start.dtype) / num_pairs**0.5

  def unfinished(search: _Search) -> Array:
    return ~search.done

  def advance(search: _Search) -> _Search:
    product = multiply(search.space.basis[search.space.size])
    space, exhausted = extend(search.space, product)
    num_exhausted = search.num_exhausted + exhausted
    values, vectors = eigensystem(space)
    wanted = jnp.concatenate([space.size - 1 - jnp.arange(num_top), jnp.arange(num_bottom)])
    wanted = jnp.clip(wanted, 0, space.size - 1)
    values, weights = values[wanted], vectors[:, wanted].T
    misfits = space.off_diagonal[space.size - 1] * weights[:, space.size - 1]
    largest = jnp.max(jnp.abs(space.diagonal)) + jnp.max(space.off_diagonal)
    floor = ROUNDING * jnp.finfo(start.dtype).eps * largest
    small = jnp.all(jnp.abs(misfits) <= jnp.maximum(tolerance * jnp.abs(values), floor))
    repeated = num_exhausted >= max(num_top, num_bottom)
    converged = (space.size >= num_pairs) & jnp.where(num_exhausted > 0, repeated, small)
    done = converged | (space.size >= num_steps) | ~jnp.isfinite(space.diagonal[space.size - 1])
    return _Search(space, num_exhausted, values, weights, misfits, done)

  def multiply(vector: Array) -> Array:
    return ravel_pytree(matvec(unravel(vector)))[0].astype(start.dtype)

  space = begin(start, num_steps)
  zeros = jnp.zeros(num_pairs, start.dtype)
  weights = jnp.zeros((num_pairs, space.diagonal.size), start.dtype)
  first = _Search(space, jnp.array(0, jnp.int32), zeros, weights, zeros, jnp.array(False))
  space, _, values, weights, misfits, _ = jax.lax.while_loop(unfinished, advance, first)
  product = multiply(subtract(space.basis, space.size, -signs @ weights, jnp.zeros_like(start)))
  explained = ((signs * values) @ weights).at[space.size].add(signs @ misfits)
  rounding = norm(subtract(space.basis, space.size + 1, explained, product))
  finite = jnp.isfinite(rounding)
  return Eigenpairs(
    values=jnp.where(finite, values, jnp.nan),
    vectors=jax.vmap(unravel)(jnp.dot(weights, space.basis, precision="highest")),
    residuals=jnp.where(finite, jnp.abs(misfits) + num_pairs**0.5 * rounding, jnp.nan),
    num_matvecs=space.size + 1,
  )


class _Search(NamedTuple):
  """Where a search stands."""

  space: Tridiagonal
  num_exhausted: Array
  values: Array
  weights: Array
  """s_i in rows, f[K, rows of the basis]."""
  misfits: Array
  """beta_m s_mi, f[K]."""
  done: Array


def _check(start: Array, num_top: int, num_bottom: int, max_matvecs: int) -> None:
  num_pairs = num_top + num_bottom
  if min(num_top, num_bottom) < 0 or num_pairs < 1:
    raise ValueError(
      f"num_top={num_top} and num_bottom={num_bottom} ask for no eigenpair; one of them must be positive."
    )
  if num_pairs > start.size:
    raise ValueError(
      f"num_top={num_top} and num_bottom={num_bottom} ask for {num_pairs} eigenpairs of an operator that has {start.size}; ask for fewer."
    )
  if max_matvecs < num_pairs + 1:
    raise ValueError(
      f"max_matvecs={max_matvecs} must be at least {num_pairs + 1}: one product for each pair, one that measures the rounding."
    )
  if not isinstance(start, jax.core.Tracer) and not (np.isfinite(size := float(norm(start))) and size > 0):
    raise ValueError(f"v0 has norm {size}; wanted a finite start that is not zero, such as a random vector.")
