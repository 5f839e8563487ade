"""The highest point of a function on a unit box or ball, from few gradients: what the sharpness measures ask for."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bsjax.types import Array

EXTRAPOLATION = 0.5
"""How far beyond the latest gradient the next one is looked for, in units of the latest change."""


class Region(NamedTuple):
  """A convex set around the origin, f32[n], by the three operations that the ascent needs."""

  extreme: Callable[[Array, Array], Array]
  """(direction, point) -> the point of the set farthest along the direction; where that is any, the point given."""
  project: Callable[[Array], Array]
  """The nearest point of the set."""
  support: Callable[[Array], Array]
  """How far the set reaches along a direction d: max d'u, f32[]."""


class Peak(NamedTuple):
  """The highest point found from one start."""

  value: Array
  """f32[]; NaN where the start already is."""
  start_value: Array
  """The value at the start, f32[]."""
  gap: Array
  """max over u in the set of grad'(u - point), f32[]: what a linear model still promises. 0 at a first-order maximum."""
  num_evaluations: Array
  """Values with gradients, i32[], the start's included."""


BOX = Region(
  extreme=lambda direction, point: jnp.where(direction == 0, point, jnp.sign(direction)),
  project=lambda point: jnp.clip(point, -1, 1),
  support=lambda direction: jnp.sum(jnp.abs(direction)),
)
"""-1 <= u_i <= 1: its extreme points are the corners."""


def _on_sphere(direction: Array, point: Array) -> Array:
  norm = jnp.linalg.norm(direction)
  return jnp.where(norm == 0, point, direction / jnp.where(norm == 0, 1, norm))


BALL = Region(
  extreme=_on_sphere,
  project=lambda point: point / jnp.maximum(1, jnp.linalg.norm(point)),
  support=jnp.linalg.norm,
)
"""|u| <= 1: its extreme points are the sphere."""


def climb(
  value_and_grad: Callable[[Array], tuple[Array, Array]], start: Array, region: Region, *, num_steps: int
) -> Peak:
  """Climb from `start` to a maximum over the region, by the longest step that the curvature met so far allows.

      u+ = extreme(g + (g - g_before) / 2)     where the last step met convex curvature: there no inner point is best
      u+ = project(u + t g),   t = -|s|^2/s'y  where it met concave curvature; s and y are the changes of u and g

  A point that is not higher is refused, and the next step is at most a quarter as long. Over a box the first line jumps from
  corner to corner: each is the exact maximum of the linear model. Over a ball it is the power method. The extrapolated
  gradient does what momentum does for that method: with the second eigenvalue 0.9 of the first, the error falls to 0.75 a step instead of
  0.9. The second line (Barzilai and Borwein's step length) is for saddles, where jumping alone would swing between corners for ever.

  Args:
    value_and_grad: f32[n] -> (f32[], f32[n]).
    start: f32[n], in the region, where the gradient is not zero.
    num_steps: most evaluations, the start's included.

  Returns:
    The highest point visited: its value never lies below the start's.

  Holds: ends early where the step stays in place. A value that is not a number counts as not higher; an infinite one is the highest.
  """

  def next_trial(point, grad, grad_before, length):
    jump = region.extreme(grad + EXTRAPOLATION * (grad - grad_before), point)
    slide = region.project(point + jnp.where(jnp.isinf(length), 0, length) * grad)
    return jnp.where(jnp.isinf(length), jump, slide)

  def unfinished(state):
    step, point, _, _, _, trial = state
    return (step < num_steps) & jnp.any(trial != point)

  def advance(state):
    step, point, value, grad, length, trial = state
    trial_value, trial_grad = value_and_grad(trial)
    change = trial - point
    curvature = jnp.vdot(change, trial_grad - grad)
    fitting = jnp.where(curvature < 0, -jnp.vdot(change, change) / curvature, jnp.inf)
    shorter = jnp.minimum(fitting, jnp.minimum(length, jnp.linalg.norm(change) / jnp.linalg.norm(grad)) / 4)
    risen = (trial, trial_value, trial_grad, grad, fitting)
    refused = (point, value, grad, grad, shorter)
    higher = trial_value > value
    point, value, grad, grad_before, length = jax.tree.map(lambda a, b: jnp.where(higher, a, b), risen, refused)
    return step + 1, point, value, grad, length, next_trial(point, grad, grad_before, length)

  start_value, grad = value_and_grad(start)
  forever = jnp.full_like(start_value, jnp.inf)
  state = (jnp.array(1), start, start_value, grad, forever, next_trial(start, grad, grad, forever))
  step, point, value, grad, _, _ = jax.lax.while_loop(unfinished, advance, state)
  return Peak(value, start_value, region.support(grad) - jnp.vdot(grad, point), step)


def highest(
  value_and_grad: Callable[[Array], tuple[Array, Array]], starts: Array, region: Region, *, num_steps: int
) -> tuple[Peak, Peak]:
  """Climb from each of the starts f32[R, n], one after the other.

  Returns:
    The highest peak, and all of them with a leading axis R.
  """
  peaks = jax.lax.map(lambda start: climb(value_and_grad, start, region, num_steps=num_steps), starts)
  best = jnp.argmax(jnp.where(jnp.isnan(peaks.value), -jnp.inf, peaks.value))
  return jax.tree.map(lambda x: x[best], peaks), peaks
