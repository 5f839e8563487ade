"""What the tests of the networks share: random variables, a list of the layers, and the layers once more in plain JAX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bsjax.models import BatchNorm, Conv, Dropout
from bsjax.models.layers import TransposedConv

KEY = jax.random.key(0)


def num_parameters(model):
  return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, KEY).params))


def random_variables(model, dtype="float64"):
  """Fills parameters and statistics with uniform values, none of them 0 or 1; kernels of He's size, so that depth keeps scales."""
  generator = np.random.default_rng(1)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    low, high = {"var": (0.5, 1.5), "scale": (0.5, 1.5), "kernel": (-1, 1)}.get(name, (-0.3, 0.3))
    factor = np.sqrt(6 / np.prod(leaf.shape[:-1])) if name == "kernel" else 1.0
    return np.asarray(factor * generator.uniform(low, high, leaf.shape), dtype)

  return jax.tree.map_with_path(fill, jax.eval_shape(model.init, KEY))


def layers_of(model, input_shape):
  """Lists the layers in order as words: `c64/5/1@32` a convolution to 64 channels, 5x5 of stride 1, of images of 32 rows; `t` likewise a
  transposed one, `n` batch norm, `d0.5` dropout, `f10` a dense layer."""
  words = []

  def note(next_fun, args, kwargs, context):
    layer = context.module
    if context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    if isinstance(layer, Conv):
      words.append(f"c{layer.features}/{layer.kernel_size}/{layer.stride}@{args[0].shape[1]}")
    elif isinstance(layer, TransposedConv):
      words.append(f"t{layer.features}@{args[0].shape[1]}")
    elif isinstance(layer, nn.Dense):
      words.append(f"f{layer.features}")
    elif isinstance(layer, BatchNorm) and layer.mode != "none":
      words.append("n")
    elif isinstance(layer, Dropout) and layer.rate:
      words.append(f"d{layer.rate}")
    return next_fun(*args, **kwargs)

  variables = jax.eval_shape(model.init, KEY)
  images = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
  with nn.intercept_methods(note):
    jax.eval_shape(functools.partial(model.apply, train=True), *variables, images, key=KEY)
  return words


def convolved(x, p, *, stride=1, padding="SAME"):
  numbers = ("NHWC", "HWIO", "NHWC")
  y = jax.lax.conv_general_dilated(x, p["kernel"], (stride, stride), padding, dimension_numbers=numbers)
  return y + p["bias"] if "bias" in p else y


def normalised(x, p, statistics=None):
  """Batch norm by given moments, or by those of the batch."""
  axes = tuple(range(x.ndim - 1))
  mean, var = (x.mean(axes), x.var(axes)) if statistics is None else (statistics["mean"], statistics["var"])
  return (x - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def pooled(x, window=2, stride=2, padding="VALID"):
  return nn.max_pool(x, (window, window), (stride, stride), padding)


def mapped(x, p):
  """A dense layer of flattened images."""
  return x.reshape(len(x), -1) @ p["kernel"] + p["bias"]


def assert_is(model, by_hand, images, *, train=False):
  """Compares a network with `by_hand(params, state, images)` in float64: thousands of roundings of 2^-53, magnified by norms."""
  with jax.enable_x64(True):
    params, state = random_variables(model)
    images = np.random.default_rng(2).uniform(0, 1, images)
    actual = jax.jit(functools.partial(model.apply, train=train))(params, state, images)[0]
    expected = jax.jit(by_hand)(params, state, images)
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)
