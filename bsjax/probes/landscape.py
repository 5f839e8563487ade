"""Landscapes: metrics on lines, curves and planes through parameter space, and the directions that span them.

Every landscape is a set of combinations of a few trees, its *corners*: a point is `sum_k c_k corner_k`, and a landscape is the
coefficients `f32[M, K]` of its M points. Corners are whatever the metrics are a function of: parameters alone, or
`Variables(params, model_state)`, so that running batch-norm statistics are combined with the same coefficients. On a line and a
curve both corners are solutions and the statistics lie between theirs. On a plane the other corners are directions whose model state is
zero (`direction_corner`), and the statistics stay those of the centre. Both have their limits: beyond two solutions a combined variance
can be negative, and far from a centre its statistics are another network's. Metrics that estimate the statistics anew at every point
have neither.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsjax.probes.leaves import wide
from bsjax.types import Array, Key, Metrics, ModelState, Params, Variables

FEWEST_POINTS = 3
"""A plane needs three points."""


def landscape(metrics_fn: Callable[..., Metrics], corners: Any, coefficients: Array, *data: Any) -> Metrics:
  """Compute metrics at every combination of the corners, one point after the other.

      metrics(m) = metrics_fn(sum_k c_mk corner_k, *data)

  Args:
    metrics_fn: maps a tree like one corner, and the data, to a dict of scalars, such as averages over a whole data set.
    corners: a pytree with leading axis K on every leaf; `stack_corners` makes one.
    coefficients: f32[M, K], from `line_coefficients` and its like.
    data: passed on unchanged. Under `jit` they are arguments of the program; arrays that `metrics_fn` closes over are copied into it.

  Returns:
    A dict of f32[M]. The memory is that of one point whatever M is. A point where a metric does not exist is not finite: running
    variances that are extrapolated below zero make it NaN.

  Holds: a coefficient of 1 beside zeros gives the metrics of that corner exactly, as long as all corners are finite; a point's
    metrics do not depend on the other points.
  """
  return jax.lax.map(lambda weights: metrics_fn(combine(corners, weights), *data), coefficients)


def combine(corners: Any, weights: Array) -> Any:
  """Add up the corners times f32[K] weights, in float32 at least, in the dtype of each leaf."""

  def combined(leaf: Array) -> Array:
    total = jnp.tensordot(weights, wide(leaf), axes=1, precision=jax.lax.Precision.HIGHEST)
    return total.astype(leaf.dtype)

  return jax.tree.map(combined, corners)


def stack_corners(*trees: Any) -> Any:
  """Stack K trees of one structure on a new leading axis."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def direction_corner(direction: Params, model_state: ModelState) -> Variables:
  """Complete a direction to a corner: the model state of zero keeps that of the centre wherever the direction leads."""
  return Variables(direction, optax.tree.zeros_like(model_state))


def line_coefficients(alphas: Any) -> Array:
  """Return f32[M, 2] for the straight line (1 - alpha) x_0 + alpha x_1.

  Source: Keskar et al. (2017), section 2.2.1 and Fig. 3: alpha in [-1, 2]; 25 points in their code.
  """
  alphas = np.asarray(alphas, np.float64)
  return jnp.asarray(np.stack([1 - alphas, alphas], axis=1), jnp.float32)


def curve_coefficients(alphas: Any) -> Array:
  """Return f32[M, 2] for the curve cos(alpha pi/2) x_0 + sin(alpha pi/2) x_1.

  Holds: whole numbers alpha give zeros and ones exactly; computed in float64, pi/2 itself is rounded, by less than 1e-15.

  Source: Keskar et al. (2017), appendix D and Fig. 7.
  """
  angles = np.asarray(alphas, np.float64) * np.pi / 2
  return jnp.asarray(np.round(np.stack([np.cos(angles), np.sin(angles)], axis=1), 15), jnp.float32)


def plane_coefficients(a: Any, b: Any) -> Array:
  """Return f32[M, 3] for the points x_0 + a d_1 + b d_2 of a plane, from their coordinates f32[M].

  Source: Li et al. (2018), equation 1.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return jnp.asarray(np.stack([np.ones_like(a), a, b], axis=1), jnp.float32)


def lines_coefficients(x: Any, num_directions: int) -> Array:
  """Return f32[R M, 1 + R] for the points x_0 + x d_r of lines along R directions, one line after the other."""
  x = np.asarray(x, np.float64)
  along = np.kron(np.eye(num_directions), x[:, None])
  return jnp.asarray(np.concatenate([np.ones((len(along), 1)), along], axis=1), jnp.float32)


def filter_normalised(key: Key, params: Params) -> Params:
  """Draw a random direction whose every filter is as long as that filter of the parameters.

      d_f <- d_f |w_f| / |d_f|,        d normal

  A filter is all that feeds one output: of an array of two or more axes, everything at one index of the last axis. That is an output
  channel of a convolution `[k, k, in, out]` and an output unit of a dense layer `[in, out]`. Arrays of fewer axes (biases, scales of
  normalisation) stay where they are: their direction is zero.

  Returns:
    A direction like `params`. If a filter of the parameters is rescaled, so is the direction: pictures of networks that
    compute the same function with other scales can be compared (for ReLU networks, up to biases).

  Source: Li, Xu, Taylor, Studer and Goldstein (2018), "Visualizing the loss landscape of neural nets", section 4; arrays of
    one axis are left alone as in their code (`ignore="biasbn"`).
  """

  def normalised(direction: Array, weight: Array) -> Array:
    if weight.ndim < 2:
      return jnp.zeros_like(weight)
    axes = tuple(range(weight.ndim - 1))
    norm = functools.partial(jnp.linalg.vector_norm, axis=axes, keepdims=True)
    return (direction * (norm(wide(weight)) / norm(wide(direction)))).astype(weight.dtype)

  return jax.tree.map(normalised, optax.tree.random_like(key, params, sampler=jax.random.normal), params)


class TrajectoryPlane(NamedTuple):
  """The plane through the end of a trajectory that lies closest to it.

  `directions`: a pytree with leading axis 2, orthonormal. `coordinates`: f32[T, 2], of each point along them, the last at the origin.
  `explained`: f64[2], which part of the summed squared distance from the end lies along each direction.
  """

  directions: Any
  coordinates: np.ndarray
  explained: np.ndarray


def trajectory_plane(points: Any) -> TrajectoryPlane:
  """Find the two directions that explain most of a trajectory theta_1 ... theta_T, seen from its end.

      D_t = theta_t - theta_T,    D D' = U diag(s^2) U'  (T x T),    d_k = D' u_k / s_k,    explained_k = s_k^2 / sum_j s_j^2

  Args:
    points: parameters with leading axis T >= 3 on every leaf, the end last; memory is twice theirs.

  Raises:
    ValueError: fewer than three points, points that are not finite, or all of them on one line, to float32.

  Holds: each direction points so that the trajectory's first point has no negative coordinate. Called outside of `jit`: the small
    eigenproblem is solved in float64 on the host. Squares in the T x T matrix halve the digits: a second direction that explains less
    than 1e-6 of the trajectory is refused.

  Source: Li et al. (2018), section 7.2. Their code centres the differences by their mean first (sklearn's PCA); here the plane goes
    through the end itself, and so is the best plane through it.
  """
  differences = jax.tree.map(lambda leaf: wide(leaf) - wide(leaf[-1]), points)
  gram = np.asarray(_products(differences, differences), np.float64)
  if len(gram) < FEWEST_POINTS:
    raise ValueError(f"a trajectory of {len(gram)} points was given, wanted at least {FEWEST_POINTS} for a plane")
  if not np.all(np.isfinite(gram)):
    raise ValueError(
      "the trajectory has points that are not finite, wanted finite ones: leave out those of a diverged run"
    )
  squares, vectors = np.linalg.eigh(gram)
  squares, vectors = squares[::-1][:2], vectors[:, ::-1][:, :2]
  if not squares[1] > 1e-6 * squares[0]:
    raise ValueError("the points of the trajectory lie on one line, wanted some beside it: add checkpoints")
  explained = squares / np.trace(gram)
  vectors = vectors * np.where(vectors[0] < 0, -1, 1) / np.sqrt(squares)
  directions = _orthonormal(jnp.asarray(vectors.T, jnp.float32), differences)
  return TrajectoryPlane(directions, np.asarray(_products(differences, directions)), explained)


@jax.jit
def _products(x: Any, y: Any) -> Array:
  """Multiply every tree of one stack with every tree of another, f32[S, T]."""

  def of_leaves(x: Array, y: Array) -> Array:
    axes = tuple(range(1, x.ndim))
    return jnp.tensordot(x, y, axes=(axes, axes), precision=jax.lax.Precision.HIGHEST)

  return jax.tree.reduce(jnp.add, jax.tree.map(of_leaves, x, y))


@jax.jit
def _orthonormal(weights: Array, stack: Any) -> Any:
  """Combine a stack of T trees by f32[2, T] weights into two trees that are nearly orthonormal, and make them so to rounding."""
  directions = _combinations(weights, stack)
  triangle = jnp.linalg.cholesky(_products(directions, directions))
  return _combinations(jnp.linalg.inv(triangle), directions)


def _combinations(weights: Array, stack: Any) -> Any:
  return jax.vmap(combine, (None, 0))(stack, weights)
