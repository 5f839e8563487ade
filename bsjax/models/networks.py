"""The networks: a multilayer perceptron and a small convolutional network, as pairs of pure functions."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsjax.conv import conv, max_pool
from bsjax.models.model import Model, make_model
from bsjax.types import Array

BatchNorm = Literal["none", "running", "batch"]
"""Which statistics normalise a layer: no normalisation; those of the batch in training and running averages in
inference; or those of whatever batch is given, in inference too."""

BATCH_NORM_MOMENTUM = 0.9
"""Weight of the old value in a running average. Our choice (Goyal et al. 2017, section 5.1, use the same)."""
BATCH_NORM_EPSILON = 1e-5
"""Added to the variance before its root: a constant feature is then mapped to its bias. Our choice."""


def mlp(
  input_shape: Sequence[int],
  widths: Sequence[int],
  num_classes: int,
  *,
  batch_norm: BatchNorm = "none",
  ghost_size: int = 0,
) -> Model:
  """Builds a perceptron: flatten, then (dense, batch norm if any, ReLU) per width, then a dense layer to the logits.

  `mlp((28, 28, 1), (512,) * 5, 10, batch_norm="batch")` is F1 of Keskar et al. (2017, table 1 and appendix B);
  `"batch"` is what their code does (Keras' mode 2). They start from uniform weights; kernels here are He normal (variance
  2 / fan-in) before a ReLU and LeCun normal (1 / fan-in) before the logits, biases zero.
  `"running"` and `"batch"` have the same parameters and state, so a network trained in one can be evaluated in the other.

  Args:
    ghost_size: with "running", normalise so many consecutive examples of a training batch at a time (`GhostNorm`); 0: all together.

  Holds: moments are taken over the whole batch given, the global one under `jit` on a mesh; the variance is the biased one,
  by centring. Under `vmap` over examples each would be normalised by itself: only `"none"`, or `"running"` with
  `train=False`, has per-example losses.
  """
  if ghost_size and batch_norm != "running":
    raise ValueError(f"{ghost_size=} with {batch_norm=}: ghost batches need batch_norm='running'.")
  return make_model(_Mlp(tuple(widths), num_classes, batch_norm, ghost_size), tuple(input_shape))


def cnn(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  channels: Sequence[int] = (16, 32),
  kernel_size: int = 3,
  pool_every: int = 2,
  widths: Sequence[int] = (),
) -> Model:
  """Builds a convolutional network: (convolution, ReLU) per entry of `channels`, 2x2 max pools between, (dense, ReLU) per entry of
  `widths`, then a dense layer to the logits.

  `cnn((28, 28, 1), 10, channels=(32, 64), kernel_size=5, pool_every=1, widths=(1024,))` is the Simple CNN (base) of Shallue et al. (2019,
  appendix B); initial weights as in `mlp`.

  Args:
    input_shape: `(H, W, C)`.
    num_classes: Number of logits.
    channels: Output channels of each convolution; padding is "SAME" and the stride 1. The default is meant for 8x8 digits.
    pool_every: Convolutions before each pool.
  """
  network = _Cnn(tuple(channels), num_classes, kernel_size, pool_every, tuple(widths))
  return make_model(network, tuple(input_shape))


class Conv(nn.Module):
  """A convolution with bias, by the loop-safe `conv`; He normal kernel (variance 2 / (k k I)), zero bias.

  `f[B, H, W, I] -> f[B, H', W', features]`; parameters `kernel` `[k, k, I, features]` and `bias` `[features]`.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: Literal["SAME", "VALID"] = "SAME"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return conv(x, kernel, stride=self.stride, padding=self.padding) + bias[None, None, None]


class GhostNorm(nn.Module):
  """Batch norm over ghost batches: in training, every `ghost_size` consecutive examples are normalised by their own moments.

      y = scale (x - mean_g) / sqrt(var_g + BATCH_NORM_EPSILON) + bias,        g the ghost batch of x

  f32[B, F] -> f32[B, F]; a batch of at most `ghost_size` is one ghost batch. The running averages take the mean over the ghost batches
  of their means and (biased) variances, once for each batch, and are used in inference. Parameters and state are named and shaped like
  those of `flax.linen.BatchNorm`.

  Raises:
    ValueError: in training, a larger batch that is not a multiple of `ghost_size`.

  Source: Hoffer, Hubara and Soudry (2017), algorithm 1. There the running averages are updated ghost batch by ghost batch, with the
  weight of each decaying; here the ghost batches of a batch weigh alike, so their order does not matter.
  """

  ghost_size: int

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    batch_size, features = x.shape
    size = min(self.ghost_size, batch_size)
    if train and batch_size % size:
      raise ValueError(
        f"a batch of {batch_size} is not a multiple of ghost_size={size}: use {batch_size - batch_size % size} or "
        f"{batch_size - batch_size % size + size}."
      )
    mean = self.variable("batch_stats", "mean", jnp.zeros, (features,))
    var = self.variable("batch_stats", "var", jnp.ones, (features,))
    scale = self.param("scale", nn.initializers.ones, (features,))
    bias = self.param("bias", nn.initializers.zeros, (features,))
    if not train:
      return scale * (x - mean.value) * jax.lax.rsqrt(var.value + BATCH_NORM_EPSILON) + bias
    ghosts = x.reshape(-1, size, features)
    means = jnp.mean(ghosts, axis=1, keepdims=True)
    variances = jnp.mean((ghosts - means) ** 2, axis=1, keepdims=True)
    for running, found in ((mean, means), (var, variances)):
      running.value = BATCH_NORM_MOMENTUM * running.value + (1 - BATCH_NORM_MOMENTUM) * jnp.mean(found, axis=(0, 1))
    normalised = (ghosts - means) * jax.lax.rsqrt(variances + BATCH_NORM_EPSILON)
    return scale * normalised.reshape(x.shape) + bias


class _Mlp(nn.Module):
  widths: tuple[int, ...]
  num_classes: int
  batch_norm: BatchNorm
  ghost_size: int = 0

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = x.reshape(x.shape[0], -1)
    for layer, width in enumerate(self.widths):
      # The bias is kept before batch norm too, as Keskar et al. do, though it changes nothing there but the parameter count.
      x = nn.Dense(width, kernel_init=nn.initializers.he_normal())(x)
      if self.ghost_size:
        x = GhostNorm(self.ghost_size, name=f"BatchNorm_{layer}")(x, train)
      elif self.batch_norm != "none":
        x = nn.BatchNorm(
          use_running_average=self.batch_norm == "running" and not train,
          momentum=BATCH_NORM_MOMENTUM,
          epsilon=BATCH_NORM_EPSILON,
          use_fast_variance=False,
        )(x)
      x = nn.relu(x)
    return nn.Dense(self.num_classes)(x)


class _Cnn(nn.Module):
  channels: tuple[int, ...]
  num_classes: int
  kernel_size: int
  pool_every: int
  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    del train
    for number, features in enumerate(self.channels, start=1):
      x = nn.relu(Conv(features, self.kernel_size)(x))
      if number % self.pool_every == 0:
        x = max_pool(x)
    x = x.reshape(x.shape[0], -1)
    for width in self.widths:
      x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.he_normal())(x))
    return nn.Dense(self.num_classes)(x)
