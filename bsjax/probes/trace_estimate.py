"""The trace of an operator that is known only by its products with vectors, with a standard error."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsjax.probes.spectrum import Eigenpairs, Matvec
from bsjax.types import Array, Key


class TraceEstimate(NamedTuple):
  """An unbiased estimate of a trace, with its standard error over probe vectors."""

  value: Array
  """f[]: with the control variate if eigenpairs were given, else `plain_value`."""
  sem: Array
  """f[]."""
  plain_value: Array
  """f[]: Hutchinson's estimate from the same products."""
  plain_sem: Array
  """f[]."""


def hutchinson_trace(
  matvec: Matvec, like: Any, key: Key, *, num_probes: int, deflate: Eigenpairs | None = None
) -> TraceEstimate:
  """Estimate the trace of a symmetric operator H from products with random signs.

      tr H = E z'Hz,        plain = (1/R) sum_r z_r'H z_r,        z uniform on {-1, 1}^P
      value = (1/R) sum_r [z_r'H z_r - sum_i theta_i ((v_i'z_r)^2 - |v_i|^2)]

  The bracket's second term has mean 0 for any theta and v, so `value` is unbiased whatever the accuracy of the pairs, and it takes
  no further product. Var z'Hz = 2 sum_(j != k) H_jk^2: it pays where a few eigenvalues hold most of |H|_F^2, by the
  share of it that they hold. On a flat spectrum it gains nothing and the pairs' products are better spent on more probes.

  Args:
    matvec: multiplies H with a pytree like `like`.
    like: a pytree with the shapes and dtypes of a vector, such as the parameters.
    key: of the probes.
    num_probes: R, at least 2; one product each, one after the other.
    deflate: pairs of H, already found for another reason.

  Returns:
    Both estimates with standard errors (n - 1 degrees of freedom). Choose which to use before looking at the values.

  Raises:
    ValueError: fewer than two probes, of which no standard error can be had.

  Source: Hutchinson (1990); Rademacher probes have the least variance among those of independent entries. The control variate is the
  part of Hutch++ (Meyer et al. 2021, algorithm 1) that survives when the low-rank part is given. matfree's estimators hold all
  probes at once and map the product over them (vmap), which is slower for a network on a CPU and larger anywhere; its integrand in
  a loop costs what this costs (docs/bench_curvature.md).
  """
  if num_probes < 2:
    raise ValueError(f"num_probes={num_probes} must be at least 2: the standard error comes from their scatter.")

  def of_probe(key):
    z = optax.tree.random_like(key, like, sampler=jax.random.rademacher)
    plain = _dot(z, matvec(z))
    if deflate is None:
      return plain, plain

    def excess(value, vector):
      return value * (_dot(vector, z) ** 2 - _dot(vector, vector))

    return plain, plain - jnp.sum(jax.vmap(excess)(deflate.values, deflate.vectors))

  plain, reduced = jax.lax.map(of_probe, jax.random.split(key, num_probes))

  def mean_and_sem(samples):
    return jnp.mean(samples), jnp.std(samples, ddof=1) / num_probes**0.5

  return TraceEstimate(*mean_and_sem(reduced), *mean_and_sem(plain))


def _dot(a: Any, b: Any) -> Array:
  parts = [jnp.vdot(x, y, precision="highest") for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
  return jnp.sum(jnp.stack(parts))
