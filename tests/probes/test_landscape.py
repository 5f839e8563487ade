"""Landscapes have known values on a quadratic, end points are exact, and directions scale with the filters they move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.probes.landscape import (
  curve_coefficients,
  direction_corner,
  filter_normalised,
  landscape,
  line_coefficients,
  lines_coefficients,
  plane_coefficients,
  stack_corners,
  trajectory_plane,
)
from bsjax.types import Variables

ALPHAS = np.linspace(-1, 2, 25)
KEY = jax.random.key(0)


def random_tree(seed):
  """Returns parameters of every shape: a dense kernel, a bias, a convolution and a scalar."""
  shapes = {"dense": (20, 6), "bias": (6,), "conv": (3, 3, 2, 4), "scale": ()}
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def flat(tree):
  return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def rough_metrics(variables):
  """Computes numbers in which no rounding would go unnoticed."""
  leaves = jax.tree.leaves(variables)
  return {"loss": sum(jnp.sum(jnp.sin(40 * leaf)) for leaf in leaves), "sum": sum(map(jnp.sum, leaves))}


@pytest.mark.parametrize("coefficients", [line_coefficients, curve_coefficients])
def test_the_ends_are_the_solutions_themselves(coefficients):
  """Exactly: 1 x + 0 y = x, so the compiled metrics at alpha 0 and 1 have the bits of the metrics of the corners."""
  corners = [Variables(random_tree(seed), {"mean": jnp.full(3, seed + 0.1)}) for seed in (0, 1)]
  ends = landscape(rough_metrics, stack_corners(*corners), coefficients([0, 0.3, 1]))
  for index, corner in ((0, corners[0]), (2, corners[1])):
    alone = landscape(rough_metrics, jax.tree.map(lambda leaf: leaf[None], corner), jnp.ones((1, 1)))
    for name, values in ends.items():
      assert values[index] == alone[name][0]
  assert ends["loss"][0] != ends["loss"][1] != ends["loss"][2]


def test_a_quadratic_has_its_values_at_every_point():
  """|(1-a) x + a y|^2 in float64, against float32: a few roundings of each of 199 entries, of relative size 2^-24."""
  x, y = random_tree(0), random_tree(1)

  def metrics_fn(params, scale):
    return {"loss": scale * optax.tree.norm(params, squared=True)}

  got = landscape(metrics_fn, stack_corners(x, y), line_coefficients(ALPHAS), jnp.float32(3))["loss"]
  want = [3 * np.sum(((1 - a) * flat(x) + a * flat(y)) ** 2) for a in ALPHAS]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  a, b = (grid.ravel() for grid in np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-2, 2, 3)))
  got = landscape(metrics_fn, stack_corners(x, y, random_tree(2)), plane_coefficients(a, b), jnp.float32(1))["loss"]
  want = [np.sum((flat(x) + s * flat(y) + t * flat(random_tree(2))) ** 2) for s, t in zip(a, b, strict=True)]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_coefficients():
  assert line_coefficients(ALPHAS).dtype == curve_coefficients(ALPHAS).dtype == jnp.float32
  np.testing.assert_allclose(line_coefficients(ALPHAS).sum(axis=1), 1, atol=2e-7)
  np.testing.assert_array_equal(line_coefficients(ALPHAS)[:, 1], ALPHAS.astype(np.float32))
  curve = np.asarray(curve_coefficients(ALPHAS), np.float64)
  np.testing.assert_allclose(np.sum(curve**2, axis=1), 1, atol=2e-7)  # two roundings to float32
  np.testing.assert_array_equal(curve_coefficients([-1, 0, 1, 2]), [[0, -1], [1, 0], [0, 1], [-1, 0]])
  np.testing.assert_allclose(curve_coefficients([1 / 3])[0], [np.sqrt(3) / 2, 1 / 2], rtol=2e-7)
  np.testing.assert_array_equal(plane_coefficients([2, 3], [4, 5]), [[1, 2, 4], [1, 3, 5]])
  np.testing.assert_array_equal(lines_coefficients([7, 8], 2), [[1, 7, 0], [1, 8, 0], [1, 0, 7], [1, 0, 8]])


def test_metrics_of_a_point_do_not_depend_on_its_neighbours():
  corners, coefficients = stack_corners(random_tree(0), random_tree(1)), line_coefficients(ALPHAS)
  run = jax.jit(functools.partial(landscape, rough_metrics))
  whole, turned = run(corners, coefficients), run(corners, coefficients[::-1])
  np.testing.assert_array_equal(whole["loss"], turned["loss"][::-1])


def test_a_direction_keeps_the_model_state():
  variables = Variables(random_tree(0), {"mean": jnp.arange(3.0), "var": jnp.ones(2)})
  corner = direction_corner(random_tree(1), variables.model_state)
  got = landscape(lambda v: v.model_state, stack_corners(variables, corner), jnp.array([[1, 0.7]]))
  jax.tree.map(lambda leaf, want: np.testing.assert_array_equal(leaf[0], want), got, variables.model_state)


def test_a_point_beyond_the_reals_is_nan_alone():
  """Variances 1 and 4 extrapolated to alpha = -1 are -2."""
  corners = stack_corners({"var": jnp.array(1.0)}, {"var": jnp.array(4.0)})
  got = landscape(lambda state: {"std": jnp.sqrt(state["var"])}, corners, line_coefficients([-1, 0, 1]))["std"]
  np.testing.assert_array_equal(got, [np.nan, 1, 2])


def _filter_norms(leaf):
  """Norms over everything but the output, in float64."""
  return np.linalg.norm(np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1]), axis=0)


def test_every_filter_is_as_long_as_the_parameters_filter():
  network = random_tree(0)
  direction = filter_normalised(KEY, network)
  assert jax.tree.structure(direction) == jax.tree.structure(network)
  kernels = 0
  for moved, weight in zip(jax.tree.leaves(direction), jax.tree.leaves(network), strict=True):
    if weight.ndim < 2:
      np.testing.assert_array_equal(moved, 0)
    else:
      kernels += 1
      assert moved.shape == weight.shape
      # float32: a sum of n squares, a root, a division and a product, each within 2^-24; n = 20
      np.testing.assert_allclose(_filter_norms(moved), _filter_norms(weight), rtol=1e-5)
      cosine = np.vdot(moved, weight) / np.vdot(weight, weight)
      assert abs(cosine) < 4 / np.sqrt(weight.size)  # random: a cosine of n entries has the standard error 1/sqrt(n)
  assert kernels == 2
  other = filter_normalised(jax.random.key(1), network)
  assert not np.allclose(flat(other), flat(direction))


def test_rescaled_layers_get_rescaled_directions():
  """Relative to its layer, a direction is the same: the loss of a rescaled ReLU network along it is too.

  Scaling one layer by 8 and the next by 1/8 (powers of two, exact) leaves a network with zero biases unchanged.
  """
  kernels = {"first": random_tree(0)["dense"][:4], "second": random_tree(1)["dense"][:6, :2]}
  scaled = {"first": 8 * kernels["first"], "second": kernels["second"] / 8}
  inputs = random_tree(2)["dense"][:, :4]

  def metrics_fn(params):
    return {"loss": jnp.mean((jax.nn.relu(inputs @ params["first"]) @ params["second"]) ** 2)}

  along = [
    landscape(metrics_fn, stack_corners(params, filter_normalised(KEY, params)), lines_coefficients(ALPHAS, 1))["loss"]
    for params in (kernels, scaled)
  ]
  np.testing.assert_array_equal(*along)
  assert np.ptp(along[0]) > 0.1
  plain = optax.tree.random_like(KEY, kernels, sampler=jax.random.normal)
  unnormalised = [
    landscape(metrics_fn, stack_corners(params, plain), lines_coefficients(ALPHAS, 1))["loss"]
    for params in (kernels, scaled)
  ]
  assert not np.allclose(*unnormalised, rtol=0.5)


def trajectory(coordinates, noise=0.0):
  """Returns points of known coordinates in a known plane, off the origin, and two orthonormal directions of the plane."""
  rng = np.random.default_rng(0)
  like = random_tree(0)
  size = len(flat(like))
  basis = np.linalg.qr(rng.normal(size=(size, 2)))[0].T
  points = flat(like) + np.asarray(coordinates) @ basis + noise * rng.normal(size=(len(coordinates), size))
  ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(like)])[:-1]
  parts = zip(jax.tree.leaves(like), np.split(points.astype(np.float32), ends, axis=1), strict=True)
  leaves = [part.reshape(len(points), *leaf.shape) for leaf, part in parts]
  return jax.tree.unflatten(jax.tree.structure(like), leaves), points, basis


def stacked_flat(tree):
  return np.concatenate(
    [np.reshape(np.asarray(leaf, np.float64), (len(leaf), -1)) for leaf in jax.tree.leaves(tree)], 1
  )


SPIRAL = [(np.exp(-t / 4) * 5 * np.cos(t), np.exp(-t / 4) * 2 * np.sin(t)) for t in range(12)]


def test_a_trajectory_in_a_plane_is_reproduced():
  points, exact, basis = trajectory(SPIRAL)
  plane = trajectory_plane(points)
  assert plane.explained.sum() == pytest.approx(1, abs=1e-5)
  assert plane.explained[0] > plane.explained[1] > 0.01
  directions = stacked_flat(plane.directions)
  # float32 parameters of size 1 round differences of size 1 by 2^-24 each, and 199 of them add up to less than 1e-5
  np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(directions @ basis.T, 2, axis=1), 1, atol=1e-4)
  np.testing.assert_allclose(plane.coordinates @ directions, exact - exact[-1], atol=1e-5)
  np.testing.assert_array_equal(plane.coordinates[-1], 0)
  assert (plane.coordinates[0] >= 0).all()


def test_the_directions_are_the_principal_ones():
  """Against the singular value decomposition of the whole matrix in float64."""
  points, *_ = trajectory(SPIRAL, noise=0.2)
  plane = trajectory_plane(points)
  matrix = stacked_flat(points)
  matrix -= matrix[-1]
  _, values, rows = np.linalg.svd(matrix, full_matrices=False)
  np.testing.assert_allclose(plane.explained, values[:2] ** 2 / np.sum(values**2), rtol=1e-5)
  assert plane.explained.sum() < 0.99
  overlap = np.abs(np.sum(stacked_flat(plane.directions) * rows[:2], axis=1))
  np.testing.assert_allclose(overlap, 1, atol=1e-6)
  np.testing.assert_allclose(np.abs(plane.coordinates), np.abs(matrix @ rows[:2].T), atol=1e-4)


def test_a_second_direction_far_below_the_first_is_still_orthonormal():
  """It explains 1e-5: squared singular values of float32 resolve 1e-7."""
  points, *_ = trajectory([(10 * t, 0.03 * t * (9 - t)) for t in range(10)])
  plane = trajectory_plane(points)
  directions = stacked_flat(plane.directions)
  np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-6)
  assert 1e-6 < plane.explained[1] < 1e-4


@pytest.mark.parametrize(
  ("coordinates", "words"),
  [
    ([(1, 0), (0, 0)], "trajectory of 2 points"),
    ([(t, 0) for t in range(5)], "lie on one line"),
    ([(0, 0)] * 4, "lie on one line"),
    ([(1, 0), (np.inf, 1), (0, 0)], "not finite"),
  ],
)
def test_no_plane_is_refused(coordinates, words):
  points, *_ = trajectory(coordinates)
  with pytest.raises(ValueError, match=words):
    trajectory_plane(points)
