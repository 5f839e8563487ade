"""The ascent on quadratics: as a tree and as one vector, corners and spheres, steps that are refused, and where it ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes.ascent import BALL, BOX, climb, highest

CONVEX = np.diag([3.0, 2.0, 1.0, 0.5, 0.1])
SADDLE = np.diag([3.0, 1.0, 0.5, -2.0, -4.0])


def split(point):
  """Five numbers as a tree of two arrays."""
  return {"a": point[:2], "b": point[2:].reshape(1, 3)}


def join(tree):
  return jnp.concatenate([tree["a"], tree["b"].reshape(-1)])


def flat_quadratic(hessian, slope, point):
  return point @ hessian @ point / 2 + slope @ point, hessian @ point + slope


def tree_quadratic(hessian, slope, tree):
  value, grad = flat_quadratic(hessian, slope, join(tree))
  return value, split(grad)


@functools.partial(jax.jit, static_argnames=("region", "num_steps"))
def climb_both(hessian, slope, start, region, num_steps):
  as_vector = climb(functools.partial(flat_quadratic, hessian, slope), start, region, num_steps=num_steps)
  as_tree = climb(functools.partial(tree_quadratic, hessian, slope), split(start), region, num_steps=num_steps)
  return as_vector, as_tree


@pytest.mark.parametrize("region", [BOX, BALL], ids=["box", "ball"])
@pytest.mark.parametrize("hessian", [CONVEX, SADDLE], ids=["convex", "saddle"])
def test_a_tree_is_a_vector(region, hessian):
  """The same steps, also refused ones and slides; only the order of five-term sums in float64 differs, over seven steps."""
  start, slope = np.array([0.05, -0.02, 0.08, -0.07, 0.03]), np.full(5, 1e-3)
  with jax.enable_x64(True):
    as_vector, as_tree = jax.device_get(climb_both(hessian, slope, start, region, num_steps=7))
  assert as_vector.value > as_vector.start_value
  assert as_tree.num_evaluations == as_vector.num_evaluations
  for ours, other in zip(as_tree, as_vector, strict=True):
    np.testing.assert_allclose(ours, other, rtol=1e-12, atol=1e-14)


def test_ends_at_a_corner_that_points_outwards():
  """The start, the corner its gradient points at, and nothing more: there the linear model promises nothing."""
  start = np.array([0.05, -0.02, 0.08, -0.07, 0.03])
  with jax.enable_x64(True):
    peak, _ = jax.device_get(climb_both(CONVEX, np.zeros(5), start, BOX, num_steps=7))
  assert peak.num_evaluations == 2
  np.testing.assert_allclose(peak.value, np.trace(CONVEX) / 2, rtol=1e-14)
  assert peak.gap == 0


def test_a_fall_is_refused_and_the_step_shortened():
  """-50 (u - 0.3)^2 from u = 0: the jump to 1 falls from -4.5 to -24.5. With s = 1, g = 30 and s'y = -100 the next step is
  t g for t = min(-s^2 / s'y, |s| / |g| / 4) = min(1/100, 1/120): u = 0.25, and a value of -0.125.
  """

  def parabola(point):
    return -50 * jnp.sum((point - 0.3) ** 2), -100 * (point - 0.3)

  with jax.enable_x64(True):
    values = [climb(parabola, jnp.zeros(1), BOX, num_steps=number).value for number in (1, 2, 3)]
  np.testing.assert_allclose(values, [-4.5, -4.5, -0.125], rtol=1e-13)


def test_the_highest_of_several_starts():
  """f(u) = u + 2 u^2 on the box falls to the left of -1/4: from -0.5 the climb ends at -1, f = 1, from 0 at 1, f = 3."""

  def tilted(tree):
    value_and_grad = jax.value_and_grad(lambda u: jnp.sum(u["x"] + 2 * u["x"] ** 2))
    return value_and_grad(tree)

  best, peaks = highest(tilted, {"x": jnp.array([[-0.5], [0.0], [jnp.nan]])}, BOX, num_steps=5)
  np.testing.assert_array_equal(peaks.value, [1.0, 3.0, jnp.nan])
  assert best.value == 3
