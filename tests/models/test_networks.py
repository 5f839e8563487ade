"""The networks against their definition in numpy, and what each kind of batch norm promises."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import assert_is, convolved, layers_of, mapped, num_parameters, pooled

from bsjax.models import Conv, cnn, lenet, mlp, simple_cnn

KEY = jax.random.key(3)


def images_of(shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def variables_of(model):
  """Fills parameters and statistics with uniform values in [-0.5, 0.5), variances in [0.1, 1.1), so that none is 0 or 1."""
  generator = np.random.default_rng(1)

  def fill(path, leaf):
    low = 0.1 if "var" in jax.tree_util.keystr(path) else -0.5
    return generator.uniform(low, low + 1, leaf.shape).astype(np.float32)

  return jax.tree.map_with_path(fill, jax.eval_shape(model.init, KEY))


def applied(model, variables, images, *, train):
  return jax.jit(functools.partial(model.apply, train=train))(*variables, images)


def mlp_by_hand(params, statistics, images, num_layers):
  """Float64 forward pass; `statistics(layer, activations)` gives the mean and variance to normalise with, or None."""
  x = np.asarray(images, np.float64).reshape(len(images), -1)
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  for layer in range(num_layers):
    x = x @ params[f"Dense_{layer}"]["kernel"] + params[f"Dense_{layer}"]["bias"]
    if (moments := statistics(layer, x)) is not None:
      norm = params[f"BatchNorm_{layer}"]
      x = (x - moments[0]) / np.sqrt(moments[1] + 1e-5) * norm["scale"] + norm["bias"]
    x = np.maximum(x, 0)
  return x @ params[f"Dense_{num_layers}"]["kernel"] + params[f"Dense_{num_layers}"]["bias"]


def of_batch(layer, activations):
  del layer
  return activations.mean(0), activations.var(0)


def test_f1_has_the_parameters_of_the_paper():
  variables = jax.eval_shape(mlp((28, 28, 1), (512,) * 5, 10, batch_norm="batch").init, KEY)
  dense = (784 * 512 + 512) + 4 * (512 * 512 + 512) + (512 * 10 + 10)
  scale_and_bias = 5 * 2 * 512
  assert sum(leaf.size for leaf in jax.tree.leaves(variables.params)) == dense + scale_and_bias == 1_462_794
  assert (
    sum(leaf.size for leaf in jax.tree.leaves(variables.model_state)) == 5 * 2 * 512
  )  # a mean and a variance per normalised feature


@pytest.mark.parametrize("train", [False, True])
def test_mlp_without_batch_norm_is_dense_and_relu(train):
  model = mlp((4, 3, 2), (7, 5), 3)
  variables = variables_of(model)
  images = images_of((6, 4, 3, 2))
  logits, state = applied(model, variables, images, train=train)
  expected = mlp_by_hand(variables.params, lambda layer, x: None, images, 2)
  # float32 sums of 24, 7 and 5 terms: some 40 roundings of 6e-8
  np.testing.assert_allclose(logits, expected, rtol=4e-6, atol=4e-6)
  assert variables.model_state == {}
  assert state == {}


@pytest.mark.parametrize("mode", ["running", "batch"])
@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_uses_the_statistics_that_its_mode_names(mode, train):
  model = mlp((4, 3, 2), (7, 5), 3, batch_norm=mode)
  variables = variables_of(model)
  images = images_of((16, 4, 3, 2))
  logits, state = applied(model, variables, images, train=train)

  def running(layer, activations):
    del activations
    statistics = variables.model_state[f"BatchNorm_{layer}"]
    return np.asarray(statistics["mean"], np.float64), np.asarray(statistics["var"], np.float64)

  statistics = running if mode == "running" and not train else of_batch
  expected = mlp_by_hand(variables.params, statistics, images, 2)
  # As above, and each normalisation magnifies what precedes it by 1 / deviation, here below 5 (var >= 0.04).
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  other = mlp_by_hand(variables.params, of_batch if statistics is running else running, images, 2)
  assert np.max(np.abs(logits - other)) > 0.1  # the two kinds of statistics are far apart here
  if not train:
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state, variables.model_state))


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_running_averages_move_a_tenth_of_the_way(mode):
  model = mlp((6,), (5,), 3, batch_norm=mode)
  params, state = variables_of(model)
  images = images_of((8, 6))
  _, new_state = applied(model, (params, state), images, train=True)
  dense = params["Dense_0"]
  activations = np.asarray(images, np.float64) @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])
  for name, moment in (("mean", activations.mean(0)), ("var", activations.var(0))):
    expected = 0.9 * np.asarray(state["BatchNorm_0"][name], np.float64) + 0.1 * moment
    # float32, some 15 roundings of entries below 10
    np.testing.assert_allclose(new_state["BatchNorm_0"][name], expected, rtol=1e-5, atol=1e-5)


def test_variance_is_centred():
  """With a mean of 1,000 and a deviation of 1, E[x^2] - E[x]^2 in float32 loses 1e6 x 6e-8 = 6 % of the variance."""
  model = mlp((4,), (4,), 2, batch_norm="batch")
  params, state = variables_of(model)
  params = {**params, "Dense_0": {"kernel": jnp.eye(4), "bias": jnp.full(4, 1000.0)}}
  images = images_of((64, 4))
  _, new_state = applied(model, (params, state), images, train=True)
  variance = (np.asarray(new_state["BatchNorm_0"]["var"]) - 0.9 * state["BatchNorm_0"]["var"]) / 0.1
  # The sum 1000 + x is stored to 3e-5, which moves a deviation near 1, and its square, by no more than twice that.
  np.testing.assert_allclose(variance, images.var(0), rtol=1e-4)


def test_inference_with_running_averages_treats_each_example_alone():
  images = images_of((6, 8))
  for mode, alone in (("running", True), ("batch", False)):
    model = mlp((8,), (5,), 3, batch_norm=mode)
    variables = variables_of(model)
    together = applied(model, variables, images, train=False)[0]
    single = jnp.concatenate([applied(model, variables, image[None], train=False)[0] for image in images])
    difference = float(jnp.max(jnp.abs(together - single)))
    assert (difference < 1e-5) is alone  # rounding of sums of 8 terms, or another normalisation altogether


def test_both_kinds_of_batch_norm_share_parameters_and_state():
  running, batch = (jax.eval_shape(mlp((8,), (5,), 3, batch_norm=mode).init, KEY) for mode in ("running", "batch"))
  assert running == batch


@pytest.mark.parametrize(("batch_size", "groups"), [(12, 3), (4, 1), (3, 1)])
def test_ghost_batches_are_normalised_by_themselves(batch_size, groups):
  """Groups of 4 in order; a batch of 4 or fewer is one ghost batch."""
  model = mlp((6,), (7, 5), 3, batch_norm="running", ghost_size=4)
  variables = variables_of(model)
  images = images_of((batch_size, 6))
  logits, state = applied(model, variables, images, train=True)
  parts = np.split(images, groups)
  expected = np.concatenate([mlp_by_hand(variables.params, of_batch, part, 2) for part in parts])
  # As for batch norm; the smallest of these variances is 0.02, so each normalisation magnifies rounding by up to 7.
  np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)
  dense = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables.params["Dense_0"])
  activations = [part @ dense["kernel"] + dense["bias"] for part in parts]
  for name, moments in (("mean", [a.mean(0) for a in activations]), ("var", [a.var(0) for a in activations])):
    moved = 0.9 * variables.model_state["BatchNorm_0"][name] + 0.1 * np.mean(moments, axis=0)
    np.testing.assert_allclose(state["BatchNorm_0"][name], moved, rtol=1e-5, atol=1e-5)


def test_ghost_norm_infers_with_the_running_averages_of_batch_norm():
  plain, ghost = (mlp((6,), (7,), 3, batch_norm="running", ghost_size=size) for size in (0, 4))
  variables = variables_of(plain)
  assert jax.eval_shape(plain.init, KEY) == jax.eval_shape(ghost.init, KEY)
  images = images_of((6, 6))  # not a multiple of 4: nothing is cut in inference
  np.testing.assert_allclose(
    applied(ghost, variables, images, train=False)[0],
    applied(plain, variables, images, train=False)[0],
    rtol=1e-5,
    atol=1e-5,
  )
  (_, state) = applied(ghost, variables, images, train=False)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state, variables.model_state))
  fresh = ghost.init(KEY).model_state["BatchNorm_0"]
  assert (fresh["mean"] == 0).all()
  assert (fresh["var"] == 1).all()


def test_ghost_batches_that_do_not_fit_are_refused():
  model = mlp((6,), (7,), 3, batch_norm="running", ghost_size=4)
  with pytest.raises(ValueError, match="a batch of 6 is not a multiple of ghost_size=4: use 4 or 8"):
    model.apply(*variables_of(model), images_of((6, 6)), train=True)
  with pytest.raises(ValueError, match="ghost batches need batch_norm='running'"):
    mlp((6,), (7,), 3, batch_norm="batch", ghost_size=4)


def test_the_simple_cnn_is_that_of_shallue():
  model = cnn((8, 8, 1), 3, channels=(4, 5), kernel_size=5, pool_every=1, widths=(6,))  # simple_cnn at a smaller size
  variables = variables_of(model)
  images = images_of((2, 8, 8, 1))
  x = images
  for layer in range(2):
    p = variables.params[f"Conv_{layer}"]
    assert p["kernel"].shape[:2] == (5, 5)
    numbers = ("NHWC", "HWIO", "NHWC")
    x = nn.relu(jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers) + p["bias"])
    x = nn.max_pool(x, (2, 2), (2, 2))
  for layer, last in (("Dense_0", False), ("Dense_1", True)):
    p = variables.params[layer]
    x = x.reshape(2, -1) @ p["kernel"] + p["bias"]
    x = x if last else nn.relu(x)
  np.testing.assert_allclose(applied(model, variables, images, train=True)[0], x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("size", "c"), [("narrow", 16), ("base", 32), ("wide", 64)])
def test_sizes_of_the_simple_cnn(size, c):
  model = simple_cnn((28, 28, 1), 10, size=size)
  assert layers_of(model, (28, 28, 1)) == [f"c{c}/5/1@28", f"c{2 * c}/5/1@14", f"f{32 * c}", "f10"]
  convolutions = 25 * c + c + 25 * c * 2 * c + 2 * c
  dense = 7 * 7 * 2 * c * 32 * c + 32 * c + 32 * c * 10 + 10
  assert num_parameters(model) == convolutions + dense
  assert size != "base" or convolutions + dense == 3_274_634


def test_an_unknown_size_is_refused():
  with pytest.raises(ValueError, match="size='huge'; wanted one of narrow, base, wide"):
    simple_cnn((28, 28, 1), 10, size="huge")


def test_lenet():
  """The second convolution does not pad: 14x14 become 10x10, and 5x5x16 = 400 after the pool."""
  model = lenet((28, 28, 1), 10)
  assert layers_of(model, (28, 28, 1)) == ["c6/5/1@28", "c16/5/1@14", "f120", "f84", "f10"]
  convolutions = (25 * 6 + 6) + (25 * 6 * 16 + 16)
  assert num_parameters(model) == convolutions + (400 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10) == 61_706

  def by_hand(p, state, x):
    for layer, padding in enumerate(("SAME", "VALID")):
      x = pooled(nn.relu(convolved(x, p[f"Conv_{layer}"], padding=padding)))
    for layer in range(2):
      x = nn.relu(mapped(x, p[f"Dense_{layer}"]))
    return mapped(x, p["Dense_2"])

  assert_is(lenet((14, 12, 2), 3), by_hand, (2, 14, 12, 2))


def test_cnn_is_convolutions_a_pool_and_a_dense_layer():
  model = cnn((9, 8, 2), 3, channels=(4, 5, 6))
  variables = variables_of(model)
  images = images_of((4, 9, 8, 2))
  logits, state = applied(model, variables, images, train=True)
  x = images
  for layer in range(3):
    p = variables.params[f"Conv_{layer}"]
    numbers = ("NHWC", "HWIO", "NHWC")
    x = nn.relu(jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers) + p["bias"])
    if layer == 1:
      x = nn.max_pool(x, (2, 2), (2, 2))
  dense = variables.params["Dense_0"]
  # Same sums of up to 100 and 96 terms, in another order; logits are of order 10.
  np.testing.assert_allclose(logits, x.reshape(4, -1) @ dense["kernel"] + dense["bias"], rtol=1e-5, atol=1e-4)
  assert x.shape == (4, 4, 4, 6)
  assert state == variables.model_state == {}


@pytest.mark.parametrize("model", [mlp((8, 8, 1), (9,), 10, batch_norm="running"), cnn((8, 8, 1), 10, channels=(3,))])
def test_init_is_a_pure_function_of_the_key(model):
  keys = jax.random.split(KEY, 2)
  stacked = jax.vmap(model.init)(keys)
  for i, key in enumerate(keys):
    assert jax.tree.all(jax.tree.map(lambda a, s, i=i: bool(jnp.all(a == s[i])), model.init(key), stacked))
  kernels = [leaf for path, leaf in jax.tree.leaves_with_path(stacked.params) if "kernel" in jax.tree_util.keystr(path)]
  assert len(kernels) == 2
  assert not any(bool(jnp.any(kernel[0] == kernel[1])) for kernel in kernels)


def assert_normal(kernel, variance):
  # The standard error of a variance is at most sqrt(2 / n) of it, its value for a normal; ours is truncated.
  np.testing.assert_allclose(np.var(kernel), variance, rtol=4 * np.sqrt(2 / kernel.size))
  assert abs(np.mean(kernel)) < 4 * np.sqrt(variance / kernel.size)


def test_initial_kernels_are_he_normal_before_a_relu_and_lecun_normal_at_the_end():
  params = mlp((28, 28, 1), (512,), 10).init(KEY).params
  assert_normal(params["Dense_0"]["kernel"], 2 / 784)
  assert_normal(params["Dense_1"]["kernel"], 1 / 512)
  params = jax.jit(Conv(64, kernel_size=5).init)(KEY, jnp.zeros((1, 5, 5, 16)))["params"]
  assert_normal(params["kernel"], 2 / (5 * 5 * 16))
  assert not params["bias"].any()


@pytest.mark.parametrize("images", [np.zeros((5, 8, 8, 1), np.uint8), np.zeros((8, 8, 1)), np.zeros((5, 8, 8, 3))])
@pytest.mark.parametrize("model", [mlp((8, 8, 1), (9,), 10), cnn((8, 8, 1), 10)])
def test_unscaled_or_misshapen_images_are_refused(model, images):
  with pytest.raises(ValueError, match=r"wanted floats of shape \[B, 8, 8, 1\]"):
    model.apply(*variables_of(model), images, train=False)
