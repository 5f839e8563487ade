"""The density of an operator's eigenvalues, by stochastic Lanczos quadrature."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bsjax.probes.lanczos import begin, eigensystem, extend
from bsjax.probes.spectrum import Matvec
from bsjax.types import Array, Key


def spectral_quadrature(
  matvec: Matvec, like: Any, key: Key, *, num_probes: int, num_matvecs: int
) -> tuple[Array, Array]:
  """Approximate the distribution of a symmetric operator's eigenvalues.

  With z uniform on {-1, 1}^P and T the tridiagonal matrix of M Lanczos steps from z / sqrt(P), with eigenpairs (t_j, s_j):

      (1/P) tr f(H) = E z'f(H) z / P,        z'f(H) z / P = sum_j w_j f(t_j),  w_j = s_1j^2

  the second exactly for polynomials of degree below 2M: (t, w) is a Gauss quadrature of the probe's spectral measure.

  Args:
    matvec: multiplies H with a pytree like `like`.
    like: a pytree with the shapes and dtypes of a vector, such as the parameters.
    key: of the probes.
    num_probes: R, one after the other; their scatter is the error (`bsjax.analysis.density` draws its band).
    num_matvecs: M, products per probe and nodes. Memory: that many vectors. About 80 show a bulk of eigenvalues and its outliers.

  Returns:
    Nodes t f[R, M], ascending, and weights w f[R, M] whose rows sum to 1.

  Raises:
    ValueError: no probe, no product, or more products than H has rows.

  Holds: a probe whose Krylov space is exhausted early has weights of zero for the nodes beyond it. A product that is not finite gives
  NaNs for its probe.

  Source: Golub and Welsch (1969) for the weights; Ubaru, Chen and Saad (2017), algorithm 1; Ghorbani, Krishnan and Xiao (2019) for
  networks. The steps are those of `eigenpairs`, which are cheaper than matfree's `tridiag_sym` (measured: docs/bench_curvature.md).
  """
  flat, unravel = ravel_pytree(like)
  if num_probes < 1 or not 1 <= num_matvecs <= flat.size:
    raise ValueError(
      f"num_probes={num_probes} and num_matvecs={num_matvecs}: wanted at least one probe, and from 1 to {flat.size} products, "
      "the rows of the operator."
    )

  def of_probe(key):
    def step(_, space):
      product = ravel_pytree(matvec(unravel(space.basis[space.size])))[0].astype(flat.dtype)
      return extend(space, product)[0]

    space = begin(jax.random.rademacher(key, flat.shape, flat.dtype), num_matvecs)
    values, vectors = eigensystem(jax.lax.fori_loop(0, num_matvecs, step, space))
    weights = vectors[0, :num_matvecs] ** 2
    return values[:num_matvecs], weights / jnp.sum(weights)

  return jax.lax.map(of_probe, jax.random.split(key, num_probes))
