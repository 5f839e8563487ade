"""The noise of a data set by group, with bad examples left out; minibatches as finite populations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import (
  GradientMoments,
  gradient_moments,
  gradient_noise,
  minibatch_statistics,
  noise_by_group,
  noise_of,
)

HESSIAN = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
WEIGHTS = np.array([1.0, -1.0, 2.0])


def quadratic_loss(weights, center):
  """(1/2) (w - c)' H (w - c), whose gradient is H (w - c)."""
  return 0.5 * (weights - center) @ HESSIAN @ (weights - center)


def quadratic_grads(centers):
  return (WEIGHTS - centers) @ HESSIAN


def draw_centers(num, seed=0):
  return np.random.default_rng(seed).normal(size=(num, 3))


def two_layer_loss(params, example):
  """Linear in each of two groups, so that gradients are the examples themselves."""
  return (
    params["first"]["w"] @ example["a"] + params["first"]["b"] * example["a"][0] + params["second"]["w"] @ example["b"]
  )


PARAMS = {"first": {"w": jnp.zeros(3), "b": jnp.zeros(())}, "second": {"w": jnp.zeros(2)}}


def two_layer_examples(num=50, seed=0):
  draw = np.random.default_rng(seed)
  return {"a": draw.normal(size=(num, 3)) + 1, "b": draw.normal(size=(num, 2)) * 2 + 3}


def as_jax(examples):
  return {name: jnp.asarray(array, jnp.float32) for name, array in examples.items()}


@pytest.mark.parametrize("route", ["ghost", "exact"])
def test_groups_add_up_and_equal_numpy(route):
  examples = two_layer_examples()
  found = gradient_noise(two_layer_loss, PARAMS, as_jax(examples), chunk_size=16, route=route)
  assert list(found.groups) == ["first", "second"]
  grads = {"first": np.column_stack([examples["a"], examples["a"][:, 0]]), "second": examples["b"]}
  for group, grad in grads.items():
    got = found.groups[group]
    trace = np.trace(np.cov(grad.T))
    assert got.grad_cov_trace.value == pytest.approx(trace, rel=1e-5)
    assert got.grad_sq_norm.value == pytest.approx(np.sum(grad.mean(0) ** 2) - trace / 50, rel=1e-5)
    assert got.noise_scale.n_examples == 50
  for name in ("grad_cov_trace", "grad_sq_norm"):
    total = sum(getattr(statistics, name).value for statistics in found.groups.values())
    assert getattr(found.total, name).value == pytest.approx(total, rel=1e-6)
  assert found.nonfinite == ()
  routes = {"ghost": ("sum", "sum", "rank one"), "exact": ("exact",) * 3}[route]
  assert tuple(sorted(found.routes)) == ("first/b", "first/w", "second/w")
  assert set(found.routes.values()) <= {*routes, "direct"}


def test_groups_can_be_chosen():
  found = gradient_noise(
    two_layer_loss, PARAMS, as_jax(two_layer_examples()), group_of=lambda leaf: leaf.rpartition("/")[2]
  )
  assert sorted(found.groups) == ["b", "w"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_example_is_named_and_left_out(bad):
  """The last is finite, and its square is not."""
  examples = two_layer_examples()
  clean = {name: np.delete(array, 17, axis=0) for name, array in examples.items()}
  examples["b"][17, 1] = bad
  found = gradient_noise(two_layer_loss, PARAMS, as_jax(examples), chunk_size=16)
  want = gradient_noise(two_layer_loss, PARAMS, as_jax(clean), chunk_size=16)
  assert found.nonfinite == (17,)
  assert found.total == want.total
  assert found.groups == want.groups


def test_parameters_that_are_not_finite_leave_nothing():
  params = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
  found = gradient_noise(lambda p, e: two_layer_loss(p, e) ** 2, params, as_jax(two_layer_examples(5)))
  assert found.nonfinite == (0, 1, 2, 3, 4)
  assert found.total.noise_scale.verdict == "unidentifiable"
  assert found.total.noise_scale.value is None
  assert found.total.dataset_noise_scale is None


def test_a_data_set_smaller_than_the_chunk():
  examples = as_jax(two_layer_examples(5))
  small, whole = (gradient_noise(two_layer_loss, PARAMS, examples, chunk_size=size) for size in (1000, 5))
  assert small == whole


@pytest.mark.parametrize("num", [1, 2])
def test_too_few_examples(num):
  with pytest.raises(ValueError, match=rf"{num} examples are too few to leave one out; give at least 3"):
    gradient_noise(two_layer_loss, PARAMS, as_jax(two_layer_examples(num)))


def test_a_zero_gradient_is_refused():
  """Two copies of every example with opposite signs: G is 0 to the last bit."""
  half = np.random.default_rng(0).integers(-9, 9, size=(10, 2)).astype(np.float32)
  examples = {"a": jnp.ones((20, 3)), "b": jnp.concatenate([half, -half])}
  found = gradient_noise(two_layer_loss, PARAMS, examples)
  assert found.groups["second"].noise_scale.verdict == "unidentifiable"
  assert found.groups["second"].dataset_noise_scale is None
  assert found.groups["second"].grad_sq_norm.value < 0


def test_no_parameters_and_empty_groups():
  examples = as_jax(two_layer_examples(5))
  with pytest.raises(ValueError, match="params hold no arrays"):
    gradient_noise(lambda params, example: example["a"][0], {}, examples)
  moments = gradient_moments(two_layer_loss, PARAMS, examples, chunk_size=5)
  with pytest.raises(ValueError, match="the group of parameters is empty; name some of first/b, first/w, second/w"):
    noise_of(moments, [])
  with pytest.raises(ValueError, match="'third' is not a parameter"):
    noise_of(moments, ["first/w", "third"])


def test_an_array_without_entries_has_no_noise():
  params = {**PARAMS, "empty": {"w": jnp.zeros((0, 3))}}
  found = gradient_noise(two_layer_loss, params, as_jax(two_layer_examples()))
  assert found.routes["empty/w"] == "unused"
  assert found.groups["empty"].noise_scale.verdict == "unidentifiable"
  assert found.total.grad_cov_trace.value > 0


def test_groups_of_given_moments():
  moments = GradientMoments(
    loss=1.0,
    mean_grad=None,
    mean_grad_sq_norm={"x/a": 1.0, "x/b": 2.0, "y": 3.0},
    sq_norms=dict.fromkeys(("x/a", "x/b", "y"), np.ones(4)),
    deviations={"x/a": np.arange(4.0), "x/b": np.ones(4), "y": np.ones(4)},
    projections=dict.fromkeys(("x/a", "x/b", "y"), np.zeros(4)),
  )
  groups = noise_by_group(moments)
  assert list(groups) == ["x", "y"]
  assert groups["x"].grad_cov_trace.value == pytest.approx((6 + 4) / 3)
  assert groups["x"].dataset_grad_sq_norm == 3.0


@pytest.mark.parametrize("batch_size", [1, 2, 4, 6])
def test_finite_population_variance_is_exact(batch_size):
  """Over all batches without repeated examples, the mean of |g_B - G|^2 is T (1/B - 1/N)."""
  with jax.enable_x64(True):
    centers = jnp.asarray(draw_centers(6))
    weights = jnp.asarray(WEIGHTS)
    moments = gradient_moments(quadratic_loss, weights, centers, chunk_size=4, route="exact")
    indices = jnp.array(list(itertools.combinations(range(6), batch_size)))
    sq_deviations, _ = minibatch_statistics(quadratic_loss, weights, centers, indices, moments.mean_grad)
    predicted = noise_of(moments).grad_cov_trace.value * (1 / batch_size - 1 / 6)
    # Sums of at most 20 batches in float64; zero for the batch of all.
    np.testing.assert_allclose(np.mean(sq_deviations), predicted, rtol=1e-12, atol=1e-28)


def test_minibatches_of_a_quadratic():
  centers = draw_centers(9)
  grads = quadratic_grads(centers)
  mean = grads.mean(0)
  indices = np.array([[0, 1, 2], [8, 8, 3], [5, 6, 7]])
  with jax.enable_x64(True):
    run = jax.jit(functools.partial(minibatch_statistics, quadratic_loss, chunk_size=2))
    sq_deviations, cosines = run(*map(jnp.asarray, (WEIGHTS, centers, indices, mean)))
  for i, batch in enumerate(indices):
    grad = (grads[batch[0]] + grads[batch[1]] + grads[batch[2]]) / 3
    assert sq_deviations[i] == pytest.approx(np.sum((grad - mean) ** 2), rel=1e-12)
    assert cosines[i] == pytest.approx(grad @ mean / np.linalg.norm(grad) / np.linalg.norm(mean), rel=1e-12)
