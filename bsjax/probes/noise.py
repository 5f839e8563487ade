"""How much gradients differ between examples, and what that says about a useful batch size."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsjax.probes.estimate import NoiseStatistics, noise_statistics
from bsjax.probes.ghost import ghost_routes
from bsjax.probes.leaves import group_leaves, layer_of, sum_squares
from bsjax.probes.moments import GradientMoments, Route, gradient_moments
from bsjax.probes.per_example import LossFn, mean_gradient
from bsjax.types import Array, Batch, Params


class GradientNoise(NamedTuple):
  """The gradient noise of a data set, in total and by group of parameters."""

  total: NoiseStatistics
  groups: dict[str, NoiseStatistics]
  routes: dict[str, str]
  """How the norms of each leaf were taken, see `ghost_routes`; "exact" everywhere on that route."""
  nonfinite: tuple[int, ...]
  """Indices of the examples with a gradient that is not finite; they are left out of everything else."""


def gradient_noise(
  loss_fn: LossFn,
  params: Params,
  examples: Batch,
  *,
  chunk_size: int = 256,
  route: Route = "ghost",
  group_of: Callable[[str], str] = layer_of,
) -> GradientNoise:
  """Measure tr(Sigma), |G|^2 and the noise scale tr(Sigma)/|G|^2 of a data set, each with an interval or a refusal.

  The call that does everything: compiles `gradient_moments`, names examples whose gradient is not finite and goes on without them, and
  estimates in float64 on the host.

  Args:
    loss_fn: the loss of one example, in inference mode. Batch norm in training mode has no per-example gradients.
    params: where to evaluate.
    examples: a pytree with leading axis N, at least 3.
    chunk_size: examples per pass, at most N are taken; memory grows with it.
    route: "ghost" or "exact", see `gradient_moments`.
    group_of: from the name of a leaf ("Dense_0/kernel") to that of its group; the default is its layer ("Dense_0").

  Raises:
    ValueError: fewer than 3 examples with a finite gradient, or no parameters.

  Source: McCandlish et al. (2018), equations 2.1 to 2.3 and 2.9.
  """
  if not jax.tree.leaves(params):
    raise ValueError("params hold no arrays; give the parameters that the loss is differentiated by.")
  measure = jax.jit(
    lambda params, examples: gradient_moments(loss_fn, params, examples, chunk_size=chunk_size, route=route)
  )
  moments, nonfinite = finite_moments(measure, params, examples)
  routes = ghost_routes(loss_fn, params, examples) if route == "ghost" else dict.fromkeys(moments.sq_norms, "exact")
  return GradientNoise(noise_of(moments), noise_by_group(moments, group_of), routes, nonfinite)


def finite_moments(
  measure: Callable[[Params, Batch], GradientMoments], params: Params, examples: Batch
) -> tuple[GradientMoments, tuple[int, ...]]:
  """Measure the moments; if some examples have a gradient that is not finite, measure again without them.

  Args:
    measure: `(params, examples) -> GradientMoments`, compiled; it is compiled once more for the smaller number.

  Returns:
    The moments of the other examples, and the indices of those left out. If fewer than 3 are left, the moments of all.
  """
  moments: GradientMoments = jax.device_get(measure(params, examples))
  finite = np.isfinite(sum(np.asarray(norms, np.float64) for norms in moments.sq_norms.values()))
  bad = tuple(int(index) for index in np.flatnonzero(~finite))
  if bad and finite.sum() >= 3:
    kept = np.flatnonzero(finite)
    moments = jax.device_get(measure(params, jax.tree.map(lambda x: x[kept], examples)))
  return moments, bad


def noise_of(moments: GradientMoments, leaves: Sequence[str] | None = None) -> NoiseStatistics:
  """Estimate the noise of some leaves of the parameters, or of all.

  Args:
    moments: from `gradient_moments`.
    leaves: names of leaves; all by default.

  Raises:
    ValueError: no leaf is named, or one that does not exist; fewer than 3 examples.
  """
  names = list(moments.sq_norms) if leaves is None else list(leaves)
  unknown = [name for name in names if name not in moments.sq_norms]
  if not names or unknown:
    came = f"{unknown[0]!r} is not a parameter" if unknown else "the group of parameters is empty"
    raise ValueError(f"{came}; name some of {', '.join(moments.sq_norms)}")
  deviations, projections, mean_sq_norm = (
    np.sum([np.asarray(moment[name], np.float64) for name in names], axis=0)
    for moment in (moments.deviations, moments.projections, moments.mean_grad_sq_norm)
  )
  return noise_statistics(
    loss=float(moments.loss), mean_grad_sq_norm=float(mean_sq_norm), deviations=deviations, projections=projections
  )


def noise_by_group(moments: GradientMoments, group_of: Callable[[str], str] = layer_of) -> dict[str, NoiseStatistics]:
  """Estimate the noise of each group of leaves; tr(Sigma) and |G|^2 of the groups add up to the total's."""
  return {group: noise_of(moments, names) for group, names in group_leaves(moments.sq_norms, group_of).items()}


def minibatch_statistics(
  loss_fn: LossFn, params: Params, examples: Batch, indices: Array, mean_grad: Params, *, chunk_size: int = 1024
) -> tuple[Array, Array]:
  """Compare the gradients of given batches with the data set's.

  Args:
    loss_fn: the loss of one example.
    params: where to evaluate.
    examples: a pytree with leading axis N.
    indices: i32[R, B], which examples make up each of R batches.
    mean_grad: G, the gradient over all N examples, from `gradient_moments`.
    chunk_size: examples per pass.

  Returns:
    |g_B - G|^2 and the cosine of the angle between g_B and G, f32[R] each, for g_B the gradient of a batch's mean loss.
    The cosine is NaN where a gradient is 0.

  Holds: averaged over all batches without repeated examples, |g_B - G|^2 is exactly tr(Sigma) (1/B - 1/N) with the unbiased tr(Sigma).

  Source: McCandlish et al. (2018), equation 2.10 and footnote 6.
  """

  def compare(batch_indices: Array) -> tuple[Array, Array]:
    batch = jax.tree.map(lambda x: jnp.take(x, batch_indices, axis=0), examples)
    _, grad = mean_gradient(loss_fn, params, batch, chunk_size=chunk_size)
    cosine = optax.tree.vdot(grad, mean_grad) / (optax.tree.norm(grad) * optax.tree.norm(mean_grad))
    return sq_norm(optax.tree.sub(grad, mean_grad)), cosine

  return jax.lax.map(compare, indices)


def sq_norm(tree: Params) -> Array:
  """Sum the squares of all entries of a pytree."""
  return sum((sum_squares(leaf) for leaf in jax.tree.leaves(tree)), start=jnp.zeros(()))
