"""Sharpness in a ball, on average, and along gradients: closed forms, least squares by hand, and what a rescaled net leaves alone."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bsjax.probes.keskar import keskar_sharpness
from bsjax.probes.sharpness import average_sharpness, batch_sharpness, gradient_curvature, sam_sharpness

KEY = jax.random.key(0)
STATIC = {"loss_fn", "chunk_size", "adaptive", "num_steps", "num_restarts", "num_draws"}


def compiled(function):
  run = jax.jit(function, static_argnames=STATIC & inspect.signature(function).parameters.keys())

  def measure(*args, chunk_size=100, **options):
    with jax.enable_x64(True):
      return jax.device_get(run(*args, chunk_size=chunk_size, **options))

  return measure


sam, average, batch, along = map(compiled, (sam_sharpness, average_sharpness, batch_sharpness, gradient_curvature))


def quadratic(x, example):
  """Mean over examples: x'Hx / 2 + c'x with H and c the means."""
  return x @ example["h"] @ x / 2 + example["c"] @ x


def with_curvature(h, c=0.0):
  """Three examples with the mean Hessian Q diag(h) Q', none of which has it, and the mean slope c."""
  rng = np.random.default_rng(3)
  q = np.linalg.qr(rng.normal(size=(len(h), len(h))))[0]
  weights = np.array([0.5, 1.5, 1.0])
  return {
    "h": weights[:, None, None] * (q @ np.diag(h) @ q.T),
    "c": weights[:, None] * np.broadcast_to(c, len(h)),
  }


# The ball.


def test_ball_around_a_minimum_is_half_radius_squared_times_the_top_eigenvalue():
  """SAM's own step is zero here and finds nothing; a random start finds the top eigenvector. The second eigenvalue is 0.6 of
  the first: the relative error falls by 0.36 a step, below 1e-11 in 25 steps times a start's ratio of components, some 100."""
  h = [2.0, 1.2, 0.5, 0.1, 0.0]
  got = sam(quadratic, np.zeros(5), with_curvature(h), KEY, radius=0.05, num_steps=40)
  np.testing.assert_allclose(got.value, 0.05**2 / 2 * 2.0, rtol=1e-9)
  assert got.grad_norm == got.one_step == got.starts[0] == 0
  np.testing.assert_allclose(got.starts[1], got.value, rtol=1e-12)
  np.testing.assert_allclose(got.gap, 0, atol=1e-6 * got.value)


def test_ball_at_a_saddle_turns_to_the_rising_side():
  """The steepest direction falls: jumps along the gradient alone would end there, at the largest |h|, and find nothing."""
  got = sam(quadratic, np.zeros(4), with_curvature([1.0, 0.2, -2.0, -5.0]), KEY, radius=0.1, num_steps=60)
  assert 0.99 * 0.1**2 / 2 < got.value <= 0.1**2 / 2 * (1 + 1e-12)


def test_ball_on_a_slope():
  """A linear loss rises by radius |c|, elementwise adaptive by radius |w c|: SAM's step is the maximum."""
  c, w = np.array([1.0, -2.0, 0.5]), np.array([3.0, 0.0, -4.0])
  plain, adaptive = (
    sam(quadratic, w, with_curvature(np.zeros(3), c), KEY, radius=0.2, adaptive=flag) for flag in (False, True)
  )
  for got, truth in ((plain, 0.2 * np.linalg.norm(c)), (adaptive, 0.2 * np.linalg.norm(w * c))):
    np.testing.assert_allclose([got.value, got.one_step, *got.starts], truth, rtol=1e-12)
    np.testing.assert_allclose(got.gap, 0, atol=1e-12)
  np.testing.assert_allclose(plain.grad_norm, np.linalg.norm(c), rtol=1e-12)


def test_adaptive_ball_at_a_minimum():
  """(a'w)^2 / 2 at a'w = 0 has the Hessian aa', whose diag(|w|) aa' diag(|w|) has the one eigenvalue |a w|^2."""
  a, w = np.array([1.0, 2.0, -1.0, 3.0]), np.array([1.0, 1.0, 3.0, 0.0])
  example = {"h": np.outer(a, a)[None], "c": np.zeros((1, 4))}
  got = sam(quadratic, w, example, KEY, radius=0.1, adaptive=True)
  np.testing.assert_allclose(got.value, 0.1**2 / 2 * np.sum((a * w) ** 2), rtol=1e-12)


# Noise.


def test_average_is_half_variance_times_the_trace():
  h, s = np.array([2.0, 1.2, 0.5, 0.1, -0.7]), 0.3
  got = average(quadratic, np.zeros(5), with_curvature(h), KEY, radius=s, num_draws=400)
  # The rise s^2/2 sum h_i n_i^2 has the standard deviation s^2/2 sqrt(2 sum h^2), which 400 draws show to 5 % or so.
  np.testing.assert_allclose(got.sem, s**2 / 2 * np.sqrt(2 * np.sum(h**2) / 400), rtol=0.25)
  assert abs(got.value - s**2 / 2 * h.sum()) < 4 * got.sem


def test_adaptive_average_weighs_the_diagonal_by_the_parameters():
  w, examples, s = np.array([1.0, 0.0, -2.0]), with_curvature([1.0, 3.0, 2.0], 0.5), 0.1
  diagonal = np.diag(examples["h"].mean(0))
  got = average(quadratic, w, examples, KEY, radius=s, num_draws=400, adaptive=True)
  assert abs(got.value - s**2 / 2 * np.sum(w**2 * diagonal)) < 4 * got.sem
  assert got.sem < 0.1 * got.value


def test_pairs_cancel_the_slope():
  """Of a linear loss nothing remains but rounding, 1e-16 of a loss of 10; single draws would scatter by radius |c| = 2."""
  got = average(quadratic, np.ones(3), with_curvature(np.zeros(3), 3.0), KEY, radius=0.4, num_draws=10)
  assert abs(got.value) < 1e-14
  assert got.sem < 1e-14
  np.testing.assert_allclose(got.grad_norm, np.sqrt(27), rtol=1e-12)


# Along gradients.


def least_squares(w, example):
  return (example["x"] @ w - example["y"]) ** 2 / 2


@pytest.fixture(scope="module")
def regression():
  rng = np.random.default_rng(4)
  return {"x": rng.normal(size=(20, 4)), "y": rng.normal(size=20)}, rng.normal(size=4)


def forms_by_hand(examples, w, rows):
  """g = X'(Xw - y) / B and H = X'X / B of the rows: g'Hg and |g|^2."""
  x, y = examples["x"][rows], examples["y"][rows]
  g = x.T @ (x @ w - y) / len(rows)
  return np.sum((x @ g) ** 2) / len(rows), g @ g


def test_batch_sharpness_of_least_squares(regression):
  examples, w = regression
  indices = np.random.default_rng(5).integers(0, 20, size=(7, 3))
  got = batch(least_squares, w, examples, indices, chunk_size=2)
  forms, squares = np.array([forms_by_hand(examples, w, rows) for rows in indices]).T
  ratios = forms / squares
  np.testing.assert_allclose(got.value, ratios.mean(), rtol=1e-12)
  np.testing.assert_allclose(got.sem, ratios.std(ddof=1) / np.sqrt(7), rtol=1e-12)
  np.testing.assert_allclose(got.ratio_of_means, forms.sum() / squares.sum(), rtol=1e-12)
  assert abs(got.ratio_of_means - got.value) > 0.05 * got.value
  assert got.num_batches == 7
  np.testing.assert_allclose(got.grad_norm**2, forms_by_hand(examples, w, range(20))[1], rtol=1e-12)


def test_standard_errors_of_batch_sharpness(regression):
  """Repeated 300 times with fresh batches, both values scatter by their standard errors: known to 1/sqrt(600) = 4 %, and the
  error of a ratio to first order only."""
  examples, w = regression
  indices = np.random.default_rng(6).integers(0, 20, size=(300, 60, 3))
  with jax.enable_x64(True):
    run = functools.partial(batch_sharpness, least_squares, w, examples, chunk_size=100)
    got = jax.device_get(jax.jit(lambda indices: jax.lax.map(run, indices))(indices))
  np.testing.assert_allclose(np.sqrt(np.mean(got.sem**2)), got.value.std(ddof=1), rtol=0.16)
  np.testing.assert_allclose(np.sqrt(np.mean(got.ratio_of_means_sem**2)), got.ratio_of_means.std(ddof=1), rtol=0.2)


def test_batch_without_a_gradient_has_no_ratio(regression):
  """Examples that are fitted exactly give g = 0 exactly: with y = 0 at w = 0."""
  examples, _ = regression
  fitted = examples | {"y": np.where(np.arange(20) < 10, 0.0, examples["y"])}
  indices = np.array([[0, 1], [2, 3], [11, 12], [13, 14]])
  got = batch(least_squares, np.zeros(4), fitted, indices)
  forms, squares = np.array([forms_by_hand(fitted, np.zeros(4), rows) for rows in indices[2:]]).T
  np.testing.assert_allclose(got.value, np.mean(forms / squares), rtol=1e-12)
  np.testing.assert_allclose(got.ratio_of_means, forms.sum() / squares.sum(), rtol=1e-12)
  assert got.num_batches == 2
  none = batch(least_squares, np.zeros(4), fitted, indices[:2])
  assert np.isnan(none.value)
  assert np.isnan(none.ratio_of_means)


def test_curvature_along_the_gradient(regression):
  examples, w = regression
  got = along(least_squares, w, examples, chunk_size=3)
  form, square = forms_by_hand(examples, w, range(20))
  hessian = examples["x"].T @ examples["x"] / 20
  g = examples["x"].T @ (examples["x"] @ w - examples["y"]) / 20
  np.testing.assert_allclose(got.value, form / square, rtol=1e-12)
  np.testing.assert_allclose(got.residual, np.linalg.norm(hessian @ g - got.value * g) / np.sqrt(square), rtol=1e-12)
  assert np.min(np.abs(np.linalg.eigvalsh(hessian) - got.value)) <= got.residual
  # With all examples as the one batch, batch sharpness is the same number, and has no standard error.
  whole = batch(least_squares, w, examples, np.arange(20)[None])
  np.testing.assert_allclose([whole.value, whole.ratio_of_means], got.value, rtol=1e-12)
  assert np.isnan(whole.sem)


def test_no_gradient_no_direction():
  got = along(quadratic, np.zeros(3), with_curvature([1.0, 2.0, 3.0]))
  assert got.grad_norm == 0
  assert np.isnan(got.value)


# Reparametrisations (Dinh et al. 2017).


def relu_net(params, example):
  hidden = jax.nn.relu(example["x"] @ params["w1"] + params["b1"])
  return jnp.sum((hidden @ params["w2"] + params["b2"] - example["y"]) ** 2)


def rescaled(params, alpha):
  return params | {"w1": alpha * params["w1"], "b1": alpha * params["b1"], "w2": params["w2"] / alpha}


def dense_hessian(params, examples):
  flat, unravel = ravel_pytree(params)
  return jax.hessian(lambda flat: jnp.mean(jax.vmap(relu_net, (None, 0))(unravel(flat), examples)))(flat)


@jax.jit
def every_measure(params, examples):
  """All at radii small enough that no ReLU of the ten examples changes sides."""
  args, options = (relu_net, params, examples), {"chunk_size": 10}
  hessian = dense_hessian(params, examples)
  indices = jnp.arange(10).reshape(5, 2)
  of_batches = batch_sharpness(*args, indices, **options)
  return {
    "loss": jnp.mean(jax.vmap(relu_net, (None, 0))(params, examples)),
    "top_eigenvalue": jnp.linalg.eigvalsh(hessian)[-1],
    "trace": jnp.trace(hessian),
    "keskar": keskar_sharpness(*args, KEY, eps=1e-3, **options).value,
    "keskar_subspace": keskar_sharpness(*args, KEY, eps=1e-3, subspace_dim=5, **options).value,
    "sam": sam_sharpness(*args, KEY, radius=1e-3, **options).value,
    "adaptive_sam": sam_sharpness(*args, KEY, radius=1e-3, adaptive=True, **options).value,
    "average": average_sharpness(*args, KEY, radius=1e-3, num_draws=4, **options).value,
    "adaptive_average": average_sharpness(*args, KEY, radius=1e-3, num_draws=4, adaptive=True, **options).value,
    "batch_sharpness": of_batches.value,
    "ratio_of_means": of_batches.ratio_of_means,
    "gradient_curvature": gradient_curvature(*args, **options).value,
  }


@pytest.mark.parametrize("alpha", [4.0, 0.25])
def test_scaling_relu_layers_changes_all_measures_but_the_adaptive_ones(alpha):
  rng = np.random.default_rng(7)
  params = {
    "w1": rng.normal(size=(3, 4)),
    "b1": rng.normal(size=4),
    "w2": rng.normal(size=(4, 2)),
    "b2": rng.normal(size=2),
  }
  examples = {"x": rng.normal(size=(10, 3)), "y": rng.normal(size=(10, 2))}
  with jax.enable_x64(True):
    before, after = (jax.device_get(every_measure(p, examples)) for p in (params, rescaled(params, alpha)))
  # Scaling by a power of two rounds nothing. The average is a difference of losses of 10, 1e-6 of them or less: 1e-16 / 1e-6.
  unchanged = {name for name in before if abs(after[name] / before[name] - 1) < 1e-8}
  changed = {name for name in before if abs(after[name] / before[name] - 1) > 0.01}
  assert unchanged == {"loss", "adaptive_sam", "adaptive_average"}
  assert unchanged | changed == before.keys()
  assert before["loss"] == after["loss"]


# What holds for all.


@pytest.fixture(scope="module")
def of_net():
  rng = np.random.default_rng(8)
  params = {
    "w1": rng.normal(size=(3, 4)),
    "b1": rng.normal(size=4),
    "w2": rng.normal(size=(4, 2)),
    "b2": rng.normal(size=2),
  }
  return relu_net, params, {"x": rng.normal(size=(10, 3)), "y": rng.normal(size=(10, 2))}


CASES = {
  "sam": lambda net, key=KEY, **o: sam(*net, key, radius=0.05, **o),
  "average": lambda net, key=KEY, **o: average(*net, key, radius=0.05, num_draws=3, **o),
  "batch": lambda net, key=KEY, **o: batch(*net, np.arange(18).reshape(3, 6) % 10, **o),
  "along": lambda net, key=KEY, **o: along(*net, **o),
}
ALL = pytest.mark.parametrize("measure", CASES.values(), ids=CASES)


@ALL
def test_chunks_change_nothing(measure, of_net):
  """Float64 sums in another order: 1e-16 of losses of 10, in rises of 1e-2 and more."""
  whole, chunked = (measure(of_net, chunk_size=size)._asdict() for size in (100, 4))
  for result in (whole, chunked):
    result.pop("num_evaluations", None)  # the last steps of a climb are steps within rounding
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), chunked, whole)


@pytest.mark.parametrize(("name", "options"), [("sam", {"num_steps": 1}), ("average", {})])
def test_is_a_function_of_the_key(name, options, of_net):
  """With a single step a climb ends where it starts, and the random start shows."""
  first, again, other = (CASES[name](of_net, jax.random.key(k), **options) for k in (1, 1, 2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), first, other)))


def test_larger_ball_rises_higher(of_net):
  values = [sam(*of_net, KEY, radius=r).value for r in (1e-3, 1e-2, 1e-1, 1.0)]
  assert np.all(np.diff(values) > 0)
  assert values[0] > 0


def test_is_never_negative():
  """At a maximum nothing rises; beside one, SAM's step overshoots and falls, and with no step left e = 0 is the best known."""
  examples = with_curvature([-1.0, -2.0, -3.0])
  at, beside = (sam(quadratic, x, examples, KEY, radius=0.1, num_steps=1) for x in (np.zeros(3), np.full(3, 1e-3)))
  assert at.value == beside.value == 0
  assert beside.one_step < 0
  assert np.all(beside.starts < 0)


@ALL
def test_parameters_that_are_not_finite(measure, of_net):
  loss_fn, params, examples = of_net
  bad = params | {"b2": np.array([0.0, np.nan])}
  assert np.isnan(measure((loss_fn, bad, examples)).value)


@pytest.mark.parametrize("radius", [0.0, -0.1, np.nan, np.inf])
def test_a_ball_without_a_size(radius, of_net):
  with pytest.raises(ValueError, match=f"radius={radius} must be positive and finite"):
    sam_sharpness(*of_net, KEY, radius=radius, chunk_size=10)
  with pytest.raises(ValueError, match=f"radius={radius} must be positive and finite"):
    average_sharpness(*of_net, KEY, radius=radius, num_draws=2, chunk_size=10)


def test_too_few_draws_or_steps(of_net):
  with pytest.raises(ValueError, match="num_draws=1 must be at least 2"):
    average(*of_net, KEY, radius=0.1, num_draws=1)
  with pytest.raises(ValueError, match="num_steps=0, num_restarts=1: wanted at least 1 and 0"):
    sam(*of_net, KEY, radius=0.1, num_steps=0)
