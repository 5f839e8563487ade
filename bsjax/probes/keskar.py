"""Sharpness as Keskar et al. define it: how high the loss rises within a small box around a solution."""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.optimize import Bounds, minimize

from bsjax.probes.ascent import BOX, Peak, Point, highest
from bsjax.probes.leaves import wide
from bsjax.probes.per_example import LossFn, mean_gradient
from bsjax.probes.subspace import Subspace, coordinates_of, draw_subspace, lift, pull
from bsjax.types import Array, Batch, Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeskarSharpness:
  """A lower bound of Metric 2.1: no method proves that it found the highest point of the box."""

  value: Array
  """100 (max f - f) / (1 + f), f32[]."""
  loss: Array
  """f at the solution, f32[]."""
  grad_norm: Array
  """|grad f| at the solution over all parameters, f32[]. Where it is not 0, the value holds a slope as well."""
  gap: Array
  """How much the linear model at the highest point still rises within the box, in units of `value`, f32[]: 0 at a local maximum."""
  starts: Array
  """The value from each start, f32[R]: where they differ, the box has several local maxima and the highest may be missed."""
  num_evaluations: Array
  """Losses with gradients over all examples, i32[], the one at the solution included."""
  method: str = field(metadata={"static": True})
  """"corner ascent" or "L-BFGS-B"."""


def keskar_sharpness(
  loss_fn: LossFn,
  params: Params,
  examples: Batch,
  key: Key,
  *,
  eps: float | Array,
  chunk_size: int,
  subspace_dim: int | None = None,
  num_steps: int = 9,
  num_restarts: int = 0,
) -> KeskarSharpness:
  """Measure by how many percent the loss can rise in a box around the parameters, or around them within a random subspace.

      phi = 100 (max_z f(x + A z) - f(x)) / (1 + f(x)),        |z_i| <= eps (|(A+ x)_i| + 1)

  f is the mean loss over all examples, x the parameters as one vector of n. A is the identity, or n x p with independent
  entries -1 and 1 of equal probability (`subspace.Subspace`): the paper says "randomly generated" and no more. A+ x comes from the
  normal equations (`subspace.coordinates_of`) and enters the width of the box only.

  The maximum is sought by corner ascent (`ascent.climb`): z jumps to the corner that the gradient points at, the exact
  maximiser of the linear model over the box. The first climb starts from a point drawn in the inner tenth of the box, not from its
  centre: at a minimiser the gradient there is zero, and a search that starts there finds 0 whatever the curvature. The
  others start anywhere in the box: where x has a slope, all starts near it lead to the same corner.

  Args:
    key: draws A and the starts. One key for all solutions that are to be compared gives them the same A.
    eps: the box's size, 1e-3 or 5e-4 in the paper; an array may be traced, so that one program serves both.
    subspace_dim: p, 100 in the paper; None for A = I.
    num_steps: most gradients of all examples in one climb; with the one at the solution, ten in all.
    num_restarts: climbs after the first, each from a start of its own. Local maxima differ in subspaces above all: there a second climb
      raised 4 of 16 maxima of the bench, by 2 to 8 %; in the full space 3 of 16, by 0.1 % at most.

  Returns:
    The value from the best start, never negative: z = 0 lies in the box. Costs at most 1 + (1 + num_restarts) num_steps
    gradients. A takes n p / 8 bytes, or where that exceeds `subspace.MAX_BYTES` no more than a block of its rows: then it is
    drawn again for each product, with the same numbers.

  Raises:
    ValueError: `eps` (where it is concrete) is not positive and finite, p is not in 1..n, or no steps.

  Holds: on f = sum h_i x_i^2 / 2 at x = 0 with h >= 0 it is 50 eps^2 sum h. At a saddle the maximum may lie inside the box and
  is approached slowly; `gap` then stays above 0. Points where f is NaN are passed over. The value is NaN where f or its
  gradient at x is not finite, or a traced eps is no size; inf where f overflows in the box. The rounding of f in float32 gives
  the value an error of about 1e-5. f must exceed -1.
  Reparametrisations: not invariant. Scaling the layers of a ReLU net (W1 -> a W1, W2 -> W2 / a) keeps f and changes the value,
  in the full space and in a subspace: the 1 in the width does not scale with the parameters, and A does not either.

  Source: Keskar et al. (2017), "On large-batch training for deep learning", equations 3 and 4, Metric 2.1, with another search
  (`keskar_sharpness_lbfgsb` has the paper's); Dinh et al. (2017), "Sharp minima can generalize for deep nets", section 4.
  """
  if num_steps < 1 or num_restarts < 0:
    raise ValueError(f"num_steps={num_steps}, num_restarts={num_restarts}: wanted at least 1 and 0.")
  box = _draw_box(params, key, eps, subspace_dim)
  evaluate = functools.partial(_evaluate, loss_fn, params, examples, box, chunk_size=chunk_size)
  loss, grad_norm = _at_solution(loss_fn, params, examples, chunk_size=chunk_size)
  starts = _draw_starts(key, 1 + num_restarts, box)
  best, peaks = highest(evaluate, starts, BOX, num_steps=num_steps)
  return _result(loss, grad_norm, best, peaks, "corner ascent")


def keskar_sharpness_lbfgsb(
  loss_fn: LossFn,
  params: Params,
  examples: Batch,
  key: Key,
  *,
  eps: float,
  chunk_size: int,
  subspace_dim: int | None = None,
  num_iterations: int = 10,
) -> KeskarSharpness:
  """Measure Keskar's sharpness by SciPy's L-BFGS-B, as in the paper: the reference for `keskar_sharpness`.

  The same metric, A and box for the same key. The search runs on the host in float64; losses and gradients are computed in the
  precision of the parameters. It starts from the first of `keskar_sharpness`'s starts: the paper does not say where.

  Args:
    num_iterations: L-BFGS-B's `maxiter`, 10 in the paper; each makes one evaluation or a few. The rest as for `keskar_sharpness`.

  Returns:
    As `keskar_sharpness`, with one start and the method named. Not for use inside `jit`. Several times slower in the full space, where
    SciPy's own work on n bounded variables outweighs the gradients.

  Holds: NaN where f or its gradient at x is not finite. The rest as for `keskar_sharpness`.

  Source: Keskar et al. (2017), section 2.2.2; Byrd, Lu, Nocedal and Zhu (1995), "A limited memory algorithm for bound
  constrained optimization".
  """
  box = _compiled_box(params, key, eps=eps, subspace_dim=subspace_dim)
  widths, _ = ravel_pytree(box.widths)
  scale, as_array = np.asarray(widths, np.float64), functools.partial(jnp.asarray, dtype=widths.dtype)
  evaluate = functools.partial(_compiled_evaluate_flat, loss_fn, params, examples, box, chunk_size=chunk_size)

  def descend(z: np.ndarray) -> tuple[float, np.ndarray]:
    value, grad = evaluate(as_array(z / scale))
    return -float(value), -np.asarray(grad, np.float64) / scale

  loss, grad_norm = _compiled_at_solution(loss_fn, params, examples, chunk_size=chunk_size)
  if not (np.isfinite(loss) and np.isfinite(grad_norm)):
    nan = as_array(jnp.nan)
    unknown = Peak(nan, nan, nan, jnp.asarray(0))
    return _result(loss, grad_norm, unknown, jax.tree.map(lambda x: x[None], unknown), "L-BFGS-B")
  start = scale * np.asarray(ravel_pytree(_draw_starts(key, 1, box))[0], np.float64)
  start_value, _ = descend(start)
  options = {"maxiter": num_iterations}
  found = minimize(descend, start, jac=True, method="L-BFGS-B", bounds=Bounds(-scale, scale), options=options)
  gap = np.abs(found.jac) @ scale + found.jac @ found.x
  peak = Peak(as_array(-found.fun), as_array(-start_value), as_array(gap), jnp.asarray(found.nfev))
  return _result(loss, grad_norm, peak, jax.tree.map(lambda x: x[None], peak), "L-BFGS-B")


def check_positive(name: str, value: float | Array) -> None:
  """Refuse a size that is not positive and finite; a traced one cannot be seen."""
  if not isinstance(value, jax.core.Tracer) and not (math.isfinite(value) and value > 0):
    raise ValueError(f"{name}={value} must be positive and finite.")


class _Box(NamedTuple):
  """Where the search goes: the parameters x + A diag(widths) u for u in the unit box."""

  subspace: Subspace | None
  widths: Point
  """eps (|A+ x| + 1), f32[p], or for A = I like the parameters."""


def _draw_box(params: Params, key: Key, eps: float | Array, subspace_dim: int | None) -> _Box:
  check_positive("eps", eps)
  subspace, coordinates = None, jax.tree.map(wide, params)
  if subspace_dim is not None:
    centre, _ = ravel_pytree(coordinates)
    subspace = draw_subspace(jax.random.fold_in(key, 0), centre.size, subspace_dim, centre.dtype)
    coordinates = coordinates_of(subspace, centre)
  size = jnp.where((eps > 0) & jnp.isfinite(eps), eps, jnp.nan)
  return _Box(subspace, jax.tree.map(lambda x: (size * (jnp.abs(x) + 1)).astype(x.dtype), coordinates))


def _draw_starts(key: Key, num_starts: int, box: _Box) -> Point:
  """Draw starts on a leading axis R, the first in the inner tenth of the unit box, the others anywhere in it.

  The first ones are the same for every R. Each coordinate has one of 256 values, uniform and none of them 0, from one
  random byte: four times fewer words than `jax.random.uniform` draws.
  """
  flat, unravel = ravel_pytree(box.widths)

  def draw(index):
    words = jax.random.bits(jax.random.fold_in(key, index), (-(-flat.size // 4),), jnp.uint32)
    bytes_drawn = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: flat.size]
    reach = jnp.where(index == 1, 0.1, 1).astype(flat.dtype)
    return unravel(reach * (bytes_drawn.astype(flat.dtype) - 127.5) / 127.5)

  return jax.vmap(draw)(1 + jnp.arange(num_starts))


def _evaluate(
  loss_fn: LossFn, params: Params, examples: Batch, box: _Box, point: Point, *, chunk_size: int
) -> tuple[Array, Point]:
  """Compute the loss at a point of the unit box, and its gradient there."""
  shift = optax.tree.mul(box.widths, point)
  if box.subspace is not None:
    _, unravel = ravel_pytree(params)
    shift = unravel(lift(box.subspace, shift))
  shifted = jax.tree.map(lambda x, by: (x + by).astype(x.dtype), params, shift)
  loss, grads = mean_gradient(loss_fn, shifted, examples, chunk_size=chunk_size)
  if box.subspace is not None:
    grads = pull(box.subspace, ravel_pytree(grads)[0])
  return loss, optax.tree.mul(box.widths, grads)


def _evaluate_flat(
  loss_fn: LossFn, params: Params, examples: Batch, box: _Box, point: Array, *, chunk_size: int
) -> tuple[Array, Array]:
  """Do the same for a point and a gradient as one vector, f32[n] or f32[p]."""
  _, unravel = ravel_pytree(box.widths)
  loss, grad = _evaluate(loss_fn, params, examples, box, unravel(point), chunk_size=chunk_size)
  return loss, ravel_pytree(grad)[0]


def _at_solution(loss_fn: LossFn, params: Params, examples: Batch, *, chunk_size: int) -> tuple[Array, Array]:
  """Compute the loss and the norm of its gradient over all parameters."""
  loss, grads = mean_gradient(loss_fn, params, examples, chunk_size=chunk_size)
  return loss, optax.tree.norm(grads)


_compiled_evaluate_flat = jax.jit(_evaluate_flat, static_argnames=("loss_fn", "chunk_size"))
_compiled_at_solution = jax.jit(_at_solution, static_argnames=("loss_fn", "chunk_size"))
_compiled_box = jax.jit(_draw_box, static_argnames=("eps", "subspace_dim"))


def _result(loss: Array, grad_norm: Array, best: Peak, peaks: Peak, method: str) -> KeskarSharpness:
  def percent(rise: Array) -> Array:
    return jnp.where(jnp.isfinite(grad_norm), 100 * rise / (1 + loss), jnp.nan)

  return KeskarSharpness(
    value=percent(jnp.maximum(best.value - loss, 0)),
    loss=loss,
    grad_norm=grad_norm,
    gap=percent(best.gap),
    starts=percent(peaks.value - loss),
    num_evaluations=1 + jnp.sum(peaks.num_evaluations),
    method=method,
  )
