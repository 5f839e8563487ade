"""Batch norm in its modes against the definition in float64, and against flax's layer in value and in every derivative."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.models import BatchNorm, mlp

KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
VARIABLES = {
  "params": {"scale": GENERATOR.uniform(0.5, 1.5, 3), "bias": GENERATOR.normal(size=3)},
  "batch_stats": {"mean": GENERATOR.normal(size=3), "var": GENERATOR.uniform(0.5, 1.5, 3)},
}


def activations(shape):
  """Examples whose means and deviations differ."""
  size = (len(VARIABLES["params"]["scale"]), *(1,) * (len(shape) - 1))
  example = np.arange(shape[0]).reshape(-1, *size[1:])
  return np.random.default_rng(1).normal(size=shape) * (1 + example) + example


def applied(layer, variables, x, *, train):
  return jax.jit(functools.partial(layer.apply, train=train, mutable=["batch_stats"]))(variables, x)


def by_hand(x, groups):
  """Normalises each of so many groups of consecutive examples by itself; returns the means over groups of their moments, too."""
  scale, bias = VARIABLES["params"]["scale"], VARIABLES["params"]["bias"]
  parts = [part.reshape(-1, 3) for part in np.split(x, groups)]
  moments = [(part.mean(0), part.var(0)) for part in parts]
  y = [(p - mean) / np.sqrt(var + 1e-5) * scale + bias for p, (mean, var) in zip(parts, moments, strict=True)]
  return np.concatenate(y).reshape(x.shape), np.mean([m for m, _ in moments], 0), np.mean([v for _, v in moments], 0)


@pytest.mark.parametrize("shape", [(12, 3), (12, 5, 3), (12, 2, 4, 3)], ids=str)
@pytest.mark.parametrize(
  ("mode", "ghost_size", "groups"), [("running", 0, 1), ("running", 4, 3), ("running", 99, 1), ("batch", 0, 1)]
)
def test_training_normalises_each_group_by_its_moments(shape, mode, ghost_size, groups):
  with jax.enable_x64(True):
    x = activations(shape)
    y, updated = applied(BatchNorm(mode, ghost_size), VARIABLES, x, train=True)
    expected, mean, var = by_hand(x, groups)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    for name, moment in (("mean", mean), ("var", var)):
      moved = 0.9 * VARIABLES["batch_stats"][name] + 0.1 * moment
      np.testing.assert_allclose(updated["batch_stats"][name], moved, rtol=1e-12)


@pytest.mark.parametrize("ghost_size", [0, 4])
def test_inference_in_running_mode_uses_the_averages(ghost_size):
  with jax.enable_x64(True):
    x = activations((5, 2, 4, 3))  # no multiple of 4: nothing is cut in inference
    y, updated = applied(BatchNorm("running", ghost_size), VARIABLES, x, train=False)
    mean, var = (VARIABLES["batch_stats"][name] for name in ("mean", "var"))
    expected = (x - mean) / np.sqrt(var + 1e-5) * VARIABLES["params"]["scale"] + VARIABLES["params"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert all((updated["batch_stats"][name] == VARIABLES["batch_stats"][name]).all() for name in ("mean", "var"))


def test_inference_in_batch_mode_uses_the_batch_and_keeps_the_averages():
  with jax.enable_x64(True):
    x = activations((5, 2, 4, 3))
    y, updated = applied(BatchNorm("batch"), VARIABLES, x, train=False)
    np.testing.assert_allclose(y, by_hand(x, 1)[0], rtol=1e-12, atol=1e-12)
    assert all((updated["batch_stats"][name] == VARIABLES["batch_stats"][name]).all() for name in ("mean", "var"))


def test_no_norm_is_the_identity_without_parameters():
  x = jnp.ones((4, 3))
  assert BatchNorm("none").init(KEY, x, True) == {}
  assert BatchNorm("none").apply({}, x, True) is x


OPTIONS = {"momentum": 0.9, "epsilon": 1e-5, "use_fast_variance": False}


def both_layers(train):
  """Ours and flax's, as functions of the variables and the examples."""
  return (
    lambda variables, x: BatchNorm("running").apply(variables, x, train, mutable=["batch_stats"]),
    lambda variables, x: nn.BatchNorm(not train, **OPTIONS).apply(variables, x, mutable=["batch_stats"]),
  )


@pytest.mark.parametrize("shape", [(8, 3), (8, 2, 4, 3)], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_values_are_those_of_flax_bit_for_bit(shape, train):
  x = jnp.asarray(activations(shape), jnp.float32)
  variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), VARIABLES)
  ours, theirs = (jax.jit(apply)(variables, x) for apply in both_layers(train))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("train", [True, False])
def test_derivatives_of_three_orders_are_those_of_flax(train):
  """Of a curved loss, by the examples, scale and bias, in the ways the trainer and the probes use; the running averages' as well."""

  def derivatives(apply, inputs, tangents):
    def loss(inputs):
      y, updated = apply({"params": inputs[0], "batch_stats": VARIABLES["batch_stats"]}, inputs[1])
      return jnp.mean(jnp.cos(y) * jnp.sin(inputs[1])) + sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(updated))

    def hvp(inputs):
      return jax.jvp(jax.grad(loss), (inputs,), (tangents,))[1]

    reverse_over_forward = jax.grad(lambda inputs: jax.jvp(loss, (inputs,), (tangents,))[1])
    return jax.grad(loss)(inputs), hvp(inputs), reverse_over_forward(inputs), jax.jvp(hvp, (inputs,), (tangents,))[1]

  with jax.enable_x64(True):
    inputs = (VARIABLES["params"], activations((8, 2, 4, 3)))
    tangents = jax.tree.map(lambda a: np.random.default_rng(5).normal(size=a.shape), inputs)
    ours, theirs = (jax.jit(functools.partial(derivatives, apply))(inputs, tangents) for apply in both_layers(train))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    largest = np.max(np.abs(b))
    assert largest > 1e-4  # none of them is trivially zero
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12 * largest)


def test_float32_gradients_are_as_near_to_float64_as_those_of_flax():
  """With means of 100 and deviations of 1, where a form that does not centre would lose most of its digits."""
  weight = np.random.default_rng(6).normal(size=(64, 5, 3))

  def gradient(apply, x):
    def loss(x):
      y, _ = apply(jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype), VARIABLES), x)
      return jnp.sum(jnp.sin(y) * weight)

    return jax.jit(jax.grad(loss))(x)

  ours, theirs = both_layers(True)
  with jax.enable_x64(True):
    x = (100 + np.random.default_rng(7).normal(size=weight.shape)).astype(np.float32)
    exact = np.asarray(gradient(theirs, x.astype(np.float64)))
  errors = [np.sqrt(np.mean((np.asarray(gradient(apply, x), np.float64) - exact) ** 2)) for apply in (ours, theirs)]
  assert errors[0] <= 1.1 * errors[1]
  assert errors[0] <= 1e-4 * np.sqrt(np.mean(exact**2))


def test_names_shapes_and_initial_values_are_those_of_flax():
  x = jnp.ones((4, 2, 2, 3))
  ours, theirs = BatchNorm("running").init(KEY, x, False), nn.BatchNorm(True).init(KEY, x)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype == jnp.float32
    assert a.tobytes() == b.tobytes()


def test_bfloat16_activations_have_float32_moments():
  """With a mean of 100 and a deviation of 1, a mean in bfloat16 is off by up to 0.25, and the variance with it."""
  x = jnp.asarray(100 + np.random.default_rng(2).normal(size=(512, 3)), jnp.bfloat16)
  variables = {
    "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
    "batch_stats": {"mean": jnp.zeros(3), "var": jnp.zeros(3)},
  }
  y, updated = applied(BatchNorm("running", dtype=jnp.bfloat16), variables, x, train=True)
  wide = np.asarray(x, np.float64)
  assert y.dtype == jnp.bfloat16
  expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
  # Float32 sums of 512 terms of 100, then one rounding to bfloat16 (2^-8 relative).
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-4)
  for name, moment in (("mean", wide.mean(0)), ("var", wide.var(0))):
    assert updated["batch_stats"][name].dtype == jnp.float32
    np.testing.assert_allclose(updated["batch_stats"][name] / 0.1, moment, rtol=1e-5)


def test_scale_may_start_at_zero():
  layer = BatchNorm("running", scale_init=nn.initializers.zeros)
  y, variables = layer.init_with_output(KEY, jnp.asarray(activations((4, 3)), jnp.float32), True)
  assert not y.any()
  assert not variables["params"]["scale"].any()


def test_unknown_modes_are_refused():
  with pytest.raises(ValueError, match="batch_norm='group'; wanted one of none, running, batch"):
    mlp((6,), (7,), 3, batch_norm="group")
