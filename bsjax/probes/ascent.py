"""The highest point of a function on a unit box or ball, from few gradients: what the sharpness measures ask for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsjax.types import Array

Point = Any
"""A vector of n numbers: a pytree of float arrays, an array alone among them."""
EXTRAPOLATION = 0.5
"""How far beyond the latest gradient the next one is looked for, in units of the latest change."""


class Region(NamedTuple):
  """A convex set around the origin by the three operations that the ascent needs."""

  extreme: Callable[[Point, Point], Point]
  """(direction, point) -> the point of the set farthest along the direction; where that is any, the point given."""
  project: Callable[[Point], Point]
  """The nearest point of the set."""
  support: Callable[[Point], Array]
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


def _corner(direction: Point, point: Point) -> Point:
  return jax.tree.map(lambda d, u: jnp.where(d == 0, u, jnp.sign(d)), direction, point)


BOX = Region(
  extreme=_corner,
  project=lambda point: optax.tree.clip(point, -1, 1),
  support=lambda direction: optax.tree.norm(direction, ord=1),
)
"""-1 <= u_i <= 1: its extreme points are the corners."""


def _on_sphere(direction: Point, point: Point) -> Point:
  norm = optax.tree.norm(direction)
  return jax.tree.map(lambda d, u: jnp.where(norm == 0, u, d / jnp.where(norm == 0, 1, norm)), direction, point)


BALL = Region(
  extreme=_on_sphere,
  project=lambda point: optax.tree.scale(1 / jnp.maximum(1, optax.tree.norm(point)), point),
  support=optax.tree.norm,
)
"""|u| <= 1: its extreme points are the sphere."""


def climb(
  value_and_grad: Callable[[Point], tuple[Array, Point]], start: Point, region: Region, *, num_steps: int
) -> Peak:
  """Climb from `start` to a maximum over the region, by the longest step that the curvature met so far allows.

      u+ = extreme(g + (g - g_before) / 2)     where the last step met convex curvature: there no inner point is best
      u+ = project(u + t g),   t = -|s|^2/s'y  where it met concave curvature; s and y are the changes of u and g

  A point that is not higher is refused, and the next step is at most a quarter as long. Over a box the first line jumps from
  corner to corner: each is the exact maximum of the linear model. Over a ball it is the power method. The extrapolated
  gradient does what momentum does for that method: with the second eigenvalue 0.9 of the first, the error falls to 0.75 a step instead of
  0.9. The second line (Barzilai and Borwein's step length) is for saddles, where jumping alone would swing between corners for ever.

  Args:
    value_and_grad: u -> (f32[], the gradient, like u).
    start: in the region, where the gradient is not zero.
    num_steps: most evaluations, the start's included.

  Returns:
    The highest point visited: its value never lies below the start's.

  Holds: ends early where the step stays in place. A value that is not a number counts as not higher; an infinite one is the highest.
  """

  def next_trial(point, grad, grad_before, length):
    ahead = jax.tree.map(lambda g, before: g + EXTRAPOLATION * (g - before), grad, grad_before)
    jump = region.extreme(ahead, point)
    slide = region.project(optax.tree.add_scale(point, jnp.where(jnp.isinf(length), 0, length), grad))
    trial = optax.tree.where(jnp.isinf(length), jump, slide)
    return trial, optax.tree.norm(optax.tree.sub(trial, point), squared=True)

  def unfinished(state):
    step, *_, sq_distance = state
    return (step < num_steps) & (sq_distance > 0)

  def advance(state):
    step, point, value, grad, length, trial, sq_distance = state
    trial_value, trial_grad = value_and_grad(trial)
    curvature = optax.tree.vdot(optax.tree.sub(trial, point), optax.tree.sub(trial_grad, grad))
    fitting = jnp.where(curvature < 0, -sq_distance / curvature, jnp.inf)

    def rise():
      return trial, trial_value, trial_grad, fitting, *next_trial(trial, trial_grad, grad, fitting)

    def refuse():
      shorter = jnp.minimum(fitting, jnp.minimum(length, jnp.sqrt(sq_distance) / optax.tree.norm(grad)) / 4)
      return point, value, grad, shorter, *next_trial(point, grad, grad, shorter)

    return step + 1, *jax.lax.cond(trial_value > value, rise, refuse)

  start_value, grad = value_and_grad(start)
  forever = jnp.full_like(start_value, jnp.inf)
  state = (jnp.array(1), start, start_value, grad, forever, *next_trial(start, grad, grad, forever))
  step, point, value, grad, *_ = jax.lax.while_loop(unfinished, advance, state)
  return Peak(value, start_value, region.support(grad) - optax.tree.vdot(grad, point), step)


def highest(
  value_and_grad: Callable[[Point], tuple[Array, Point]], starts: Point, region: Region, *, num_steps: int
) -> tuple[Peak, Peak]:
  """Climb from each of the starts, a point with a leading axis R, one after the other.

  Returns:
    The highest peak, and all of them with a leading axis R.
  """
  peaks = jax.lax.map(lambda start: climb(value_and_grad, start, region, num_steps=num_steps), starts)
  best = jnp.argmax(jnp.where(jnp.isnan(peaks.value), -jnp.inf, peaks.value))
  return jax.tree.map(lambda x: x[best], peaks), peaks
