"""Small networks: a multilayer perceptron and plain convolutional networks, as pairs of pure functions."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn

from bsjax.conv import Padding, max_pool
from bsjax.models.layers import Conv, Dropout, dense
from bsjax.models.model import Model, make_model
from bsjax.models.norm import BatchNormMode, make_norm
from bsjax.types import Array


def mlp(
  input_shape: Sequence[int],
  widths: Sequence[int],
  num_classes: int,
  *,
  batch_norm: BatchNormMode = "none",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds a perceptron: flatten, then (dense, batch norm if any, ReLU) per width, then a dense layer to the logits.

  Kernels are He normal (variance 2 / fan-in) before a ReLU and LeCun normal (1 / fan-in) before the logits, biases zero. The fully
  connected family of Shallue et al. (2019) is `mlp(shape, (1024,), 10)`, `(1024, 1024)`, `(512,) * 3` and so on, without batch norm.
  `"running"` and `"batch"` have the same parameters and state, so a network trained in one can be evaluated in the other.

  Args:
    batch_norm, ghost_size: as `BatchNorm` says.
    dtype: what the hidden layers compute in; None: the dtype of the parameters. With `jnp.bfloat16`, parameters, moments and logits
      stay float32, in every network here.

  Holds: moments are taken over the whole batch given, the global one under `jit` on a mesh; the variance is the biased one,
  by centring. Under `vmap` over examples each would be normalised by itself: only `"none"`, or `"running"` with
  `train=False`, has per-example losses.
  """
  return make_model(
    _Mlp(tuple(widths), num_classes, make_norm(batch_norm, ghost_size, dtype), dtype), tuple(input_shape)
  )


def cnn(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  channels: Sequence[int] = (16, 32),
  kernel_size: int = 3,
  pool_every: int = 2,
  widths: Sequence[int] = (),
  dropout: float = 0.0,
  dtype: Any = None,
) -> Model:
  """Builds a convolutional network: (convolution, ReLU) per entry of `channels`, 2x2 max pools between, (dense, ReLU, dropout) per
  entry of `widths`, then a dense layer to the logits; initial weights as in `mlp`.

  Args:
    input_shape: `(H, W, C)`.
    num_classes: Number of logits.
    channels: Output channels of each convolution; padding is "SAME" and the stride 1. The default is meant for 8x8 digits.
    pool_every: Convolutions before each pool.
    dropout: Share of the units of each hidden dense layer that a training step leaves out; needs a key then.
    dtype: As in `mlp`.
  """
  return make_model(
    _Cnn(
      tuple(channels), ["SAME"] * len(channels), kernel_size, pool_every, tuple(widths), dropout, num_classes, dtype
    ),
    tuple(input_shape),
  )


SIMPLE_CNN_CHANNELS = {"narrow": 16, "base": 32, "wide": 64}


def simple_cnn(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  size: Literal["narrow", "base", "wide"] = "base",
  dropout: float = 0.0,
  dtype: Any = None,
) -> Model:
  """Builds the Simple CNN of Shallue et al. (2019): two 5x5 convolutions with 2x2 max pools, one hidden dense layer.

  "base" has 32 and 64 channels and 1,024 hidden units (3,274,634 parameters for `((28, 28, 1), 10)`). With `dropout=0.4` it is the network
  of McCandlish et al. (2018), appendix A.4, for MNIST and SVHN.

  Differences: we could not look up the layers of "narrow" and "wide"; here they have half and double of the channels and hidden units,
  a quarter and four times of most parameters.

  Raises:
    ValueError: An unknown size.
  """
  if size not in SIMPLE_CNN_CHANNELS:
    raise ValueError(f"{size=}; wanted one of {', '.join(SIMPLE_CNN_CHANNELS)}.")
  first = SIMPLE_CNN_CHANNELS[size]
  return cnn(
    input_shape,
    num_classes,
    channels=(first, 2 * first),
    kernel_size=5,
    pool_every=1,
    widths=(32 * first,),
    dropout=dropout,
    dtype=dtype,
  )


def lenet(input_shape: Sequence[int], num_classes: int, *, dtype: Any = None) -> Model:
  """Builds a LeNet: 5x5 convolutions to 6 ("SAME" padding) and 16 channels ("VALID"), each with a 2x2 max pool; dense 120, 84, logits.

  61,706 parameters for `((28, 28, 1), 10)`.

  Source: LeCun et al. (1998), section II.B. You et al. (2019) compare LAMB with other optimizers on "LeNet" and MNIST (table 8) and list
  no layers, so the layers are our choice. Differences from 1998: images of 28x28 padded by the first convolution; ReLU for tanh; max pools
  for averages with trained coefficients; every map of the second convolution sees all maps of the first; logits for radial basis functions.
  """
  network = _Cnn((6, 16), ["SAME", "VALID"], 5, 1, (120, 84), 0.0, num_classes, dtype)
  return make_model(network, tuple(input_shape))


class _Mlp(nn.Module):
  widths: tuple[int, ...]
  num_classes: int
  norm: Callable[..., nn.Module]
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = x.reshape(x.shape[0], -1)
    for width in self.widths:
      # The bias is kept before batch norm too, as Keskar et al. do, though it changes nothing there but the parameter count.
      x = nn.relu(self.norm()(dense(width, self.dtype)(x), train))
    return nn.Dense(self.num_classes)(x)


class _Cnn(nn.Module):
  channels: tuple[int, ...]
  paddings: Sequence[Padding]
  kernel_size: int
  pool_every: int
  widths: tuple[int, ...]
  dropout: float
  num_classes: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for number, (features, padding) in enumerate(zip(self.channels, self.paddings, strict=True), start=1):
      x = nn.relu(Conv(features, self.kernel_size, padding=padding, dtype=self.dtype)(x))
      if number % self.pool_every == 0:
        x = max_pool(x)
    x = x.reshape(x.shape[0], -1)
    for width in self.widths:
      x = Dropout(self.dropout)(nn.relu(dense(width, self.dtype)(x)), train)
    return nn.Dense(self.num_classes)(x)
