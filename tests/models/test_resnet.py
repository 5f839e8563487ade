"""Residual networks: parameter counts, strides and shortcuts, initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import KEY, assert_is, convolved, layers_of, mapped, normalised, num_parameters, pooled

from bsjax.models import cifar_resnet, imagenet_resnet


@pytest.mark.parametrize(
  ("depth", "shortcut", "parameters"),
  [(8, "pad", 75_290), (32, "pad", 464_154), (8, "project", 75_290 + 3_040), (32, "project", 464_154 + 3_040)],
)
def test_parameter_counts_of_small_images(depth, shortcut, parameters):
  """Projections are 16 x 16 + 16 x 32 + 32 x 64 numbers, and a scale and a bias for 16 + 32 + 64 channels: 3,040."""
  assert num_parameters(cifar_resnet((32, 32, 3), 10, depth=depth, shortcut=shortcut)) == parameters


def test_resnet_50():
  model = imagenet_resnet((224, 224, 3), 1000)
  assert num_parameters(model) == 25_557_032

  def block(c, size, stride, project):
    side = [f"c{4 * c}/1/{stride}@{size}", "n"] if project else []
    inner = size // stride
    return [f"c{c}/1/1@{size}", "n", f"c{c}/3/{stride}@{size}", "n", f"c{4 * c}/1/1@{inner}", "n", *side]

  expected = ["c64/7/2@224", "n"]
  for c, size, blocks, stride in ((64, 56, 3, 1), (128, 56, 4, 2), (256, 28, 6, 2), (512, 14, 3, 2)):
    expected += block(c, size, stride, True)
    expected += block(c, size // stride, 1, False) * (blocks - 1)
  assert layers_of(model, (224, 224, 3)) == [*expected, "f1000"]


def half(kernel_size):
  return [(kernel_size // 2, kernel_size // 2)] * 2


@pytest.mark.parametrize("train", [False, True])
def test_bottleneck_blocks_by_hand(train):
  def by_hand(p, state, x):
    def normed_conv(x, p, s, number, kernel_size, stride=1):
      y = convolved(x, p[f"Conv_{number}"], stride=stride, padding=half(kernel_size))
      return normalised(y, p[f"BatchNorm_{number}"], None if train else s[f"BatchNorm_{number}"])

    x = pooled(jax.nn.relu(normed_conv(x, p, state, 0, 7, 2)), 3, 2, half(3))
    for stage, stride in ((0, 1), (1, 2)):
      q, s = (tree[f"Stage_{stage}_Block_0"] for tree in (p, state))
      y = jax.nn.relu(normed_conv(x, q, s, 0, 1))
      y = jax.nn.relu(normed_conv(y, q, s, 1, 3, stride))
      y = normed_conv(y, q, s, 2, 1)
      side = convolved(x, q["shortcut"], stride=stride, padding=half(1))
      x = jax.nn.relu(normalised(side, q["shortcut_norm"], None if train else s["shortcut_norm"]) + y)
    return mapped(x.mean((1, 2)), p["Dense_0"])

  assert_is(imagenet_resnet((14, 18, 2), 3, blocks=(1, 1), channels=2), by_hand, (3, 14, 18, 2), train=train)


@pytest.mark.parametrize("shortcut", ["pad", "project"])
def test_basic_blocks_by_hand(shortcut):
  def by_hand(p, state, x):
    x = jax.nn.relu(normalised(convolved(x, p["Conv_0"]), p["BatchNorm_0"], state["BatchNorm_0"]))
    for stage, stride in ((0, 1), (1, 2), (2, 2)):
      q, s = (tree[f"Stage_{stage}_Block_0"] for tree in (p, state))
      y = convolved(x, q["Conv_0"], stride=stride, padding=half(3))
      y = jax.nn.relu(normalised(y, q["BatchNorm_0"], s["BatchNorm_0"]))
      y = normalised(convolved(y, q["Conv_1"]), q["BatchNorm_1"], s["BatchNorm_1"])
      if shortcut == "project":
        x = normalised(convolved(x, q["shortcut"], stride=stride), q["shortcut_norm"], s["shortcut_norm"])
      elif stage:
        x = x[:, ::2, ::2]
        x = jnp.concatenate([x, jnp.zeros_like(x)], axis=3)
      x = jax.nn.relu(x + y)
    return mapped(x.mean((1, 2)), p["Dense_0"])

  assert_is(cifar_resnet((8, 6, 2), 3, depth=8, channels=2, shortcut=shortcut), by_hand, (3, 8, 6, 2))


def test_depth_counts_three_stages_of_blocks():
  words = layers_of(cifar_resnet((32, 32, 3), 10, depth=14), (32, 32, 3))
  convolutions = [word for word in words if word[0] == "c"]
  assert convolutions == (["c16/3/1@32"] * 5 + ["c32/3/2@32"] + ["c32/3/1@16"] * 3 + ["c64/3/2@16"] + ["c64/3/1@8"] * 3)
  assert len(words) == 2 * len(convolutions) + 1


@pytest.mark.parametrize("zero_last_gamma", [True, False])
def test_initial_values_of_goyal(zero_last_gamma):
  model = imagenet_resnet((8, 8, 3), 1000, blocks=(1,), channels=4, zero_last_gamma=zero_last_gamma)
  params = model.init(KEY).params
  scales = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(params)
    if "scale" in jax.tree_util.keystr(path)
  }
  zero = {name for name, leaf in scales.items() if not leaf.any()}
  assert zero == ({"Stage_0_Block_0/BatchNorm_2/scale"} if zero_last_gamma else set())
  assert len(scales) == 5
  assert all((leaf == 1).all() for name, leaf in scales.items() if name not in zero)
  kernel = params["Dense_0"]["kernel"]
  # The standard error of a deviation is 1 / sqrt(2 n) of it; n = 16,000.
  np.testing.assert_allclose(np.std(kernel), 0.01, rtol=4 / np.sqrt(2 * kernel.size))


def test_without_batch_norm_convolutions_have_a_bias():
  for model in (
    cifar_resnet((8, 8, 1), 2, depth=8, batch_norm="none"),
    imagenet_resnet((8, 8, 1), 2, batch_norm="none"),
  ):
    variables = jax.eval_shape(model.init, KEY)
    assert variables.model_state == {}
    assert set(variables.params["Conv_0"]) == {"kernel", "bias"}
  assert set(jax.eval_shape(cifar_resnet((8, 8, 1), 2, depth=8).init, KEY).params["Conv_0"]) == {"kernel"}


def test_impossible_networks_are_refused():
  for depth in (2, 9):
    with pytest.raises(ValueError, match=f"depth={depth}; wanted 6 n"):
      cifar_resnet((8, 8, 1), 2, depth=depth)
  with pytest.raises(ValueError, match="shortcut='identity'; wanted 'pad' or 'project'"):
    cifar_resnet((8, 8, 1), 2, shortcut="identity")
