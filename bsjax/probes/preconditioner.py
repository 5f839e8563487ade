"""The Hessian as an adaptive optimizer sees it: in the metric of its step sizes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bsjax.probes.spectrum import Matvec
from bsjax.types import Array, Params


def preconditioned(matvec: Matvec, scale: Params) -> Callable[[Params], Params]:
  """Put an operator into the metric of a diagonal preconditioner: v -> s * H (s * v).

  With P^-1 = diag(s^2) it is symmetric and has the eigenvalues of P^-1 H, which decide the stability of w <- w - eta P^-1 g: on a
  quadratic, steps without momentum diverge where the largest exceeds 2 / eta. Adam averages its gradients (momentum
  beta1, in exponential form) and diverges beyond

      (2 + 2 beta1) / ((1 - beta1) eta)        (38 / eta for beta1 = 0.9)

  Args:
    matvec: multiplies H with a pytree like the parameters.
    scale: s, positive, like the parameters: from `adam_preconditioner` or `trust_ratio_preconditioner`, or the product of both
      for LAMB (`optax.tree.mul`).

  Source: Cohen et al. (2022), "Adaptive gradient methods at the edge of stability", section 3 and equation 3 for the threshold.
  """
  return lambda vector: optax.tree.mul(scale, matvec(optax.tree.mul(scale, vector)))


def adam_preconditioner(
  second_moment: Params, count: Array | int, *, beta2: float | Array, epsilon: float | Array
) -> Params:
  """Read the scale s of Adam's preconditioner off its state.

      s = (sqrt(q / (1 - beta2^t)) + epsilon)^(-1/2)

  Args:
    second_moment: q, the running mean of squared gradients (`nu` in Optax), like the parameters.
    count: t, updates made, at least 1.
    beta2, epsilon: as in training.

  Returns:
    s like the parameters, so that Adam's direction is s^2 times its mean gradient.

  Raises:
    ValueError: no update was made yet (if `count` is concrete): there is no preconditioner.
  """
  if not isinstance(count, jax.core.Tracer) and int(count) < 1:
    raise ValueError(f"count={int(count)}: the second moment is empty before the first update; make one.")
  correction = 1 - jnp.asarray(beta2) ** count
  return jax.tree.map(lambda q: (jnp.sqrt(q / correction) + epsilon) ** -0.5, second_moment)


def trust_ratio_preconditioner(params: Params, updates: Params, *, coefficient: float) -> Params:
  """Read the scale s of a layer-wise trust ratio (LARS, LAMB) off parameters and updates.

      s = sqrt(coefficient |w| / |d|)        one number for each array of two axes or more; 1 for the others

  Args:
    params: w.
    updates: d, what the ratio divides by: for LARS the gradient plus weight decay, for LAMB Adam's direction plus weight decay.
    coefficient: 0.001 for LARS, 1 for LAMB.

  Returns:
    s like the parameters. The ratio is held fixed, as if it did not depend on the parameters.

  Holds: where either norm is 0 the ratio is 1, as in `bsjax.optim.make_optimizer`.
  """

  def of_array(w, d):
    if w.ndim < 2:
      return jnp.ones_like(w)
    w_norm, d_norm = jnp.linalg.norm(w.ravel()), jnp.linalg.norm(d.ravel())
    defined = (w_norm > 0) & (d_norm > 0)
    return jnp.full_like(w, jnp.where(defined, jnp.sqrt(coefficient * w_norm / jnp.where(defined, d_norm, 1)), 1))

  return jax.tree.map(of_array, params, updates)
