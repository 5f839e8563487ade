"""The six networks of Keskar et al. (2017), as the authors' released code builds them.

F1 is `f1((28, 28, 1), 10)` and F2 `f2((360,), 1973)`; C1 and C3 are `shallow((32, 32, 3), 10)` and the same with 100 classes, C2 and C4
are `deep` likewise. Table 1 and appendix B of the paper name the layers; where the text and the authors' `network_zoo.py` differ, the code
is followed: the convolutions of C1 have stride 1 and its pools 3x3 windows with stride 2, and C2 has dropout between its convolutions.
Batch norm sits between each map (whose bias is kept) and its ReLU, never on the logits, and uses the moments of the batch at hand in
inference too: `batch_norm="batch"`, Keras' mode 2. Pass "running" for losses of single examples.

Differences: kernels start He normal (before a ReLU) and LeCun normal (before the logits), theirs uniform with Glorot's variance (the
default of Keras 1); the variance of batch norm gets BATCH_NORM_EPSILON added, in Keras 1e-3.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from bsjax.conv import max_pool
from bsjax.models.layers import Conv, Dropout, dense
from bsjax.models.model import Model, make_model
from bsjax.models.networks import mlp
from bsjax.models.norm import BatchNormMode, make_norm
from bsjax.types import Array

DEEP_BLOCKS = ((1, 2, 0.3), (2, 2, 0.4), (4, 3, 0.4), (8, 3, 0.4), (8, 3, 0.4))
"""Of each block of `deep`: channels, in those of the first; convolutions; share dropped after each of them but the last."""


def f1(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  batch_norm: BatchNormMode = "batch",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds F1: five layers of (dense 512, batch norm, ReLU), then the logits; 1,462,794 parameters on MNIST."""
  return mlp(input_shape, (512,) * 5, num_classes, batch_norm=batch_norm, ghost_size=ghost_size, dtype=dtype)


def f2(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  batch_norm: BatchNormMode = "batch",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds F2: seven layers of (dense 512, batch norm, ReLU), then the logits; 2,780,085 parameters for TIMIT's 360 features and 1,973
  classes. TIMIT is licensed and not part of this laboratory."""
  return mlp(input_shape, (512,) * 7, num_classes, batch_norm=batch_norm, ghost_size=ghost_size, dtype=dtype)


def shallow(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  channels: int = 64,
  widths: Sequence[int] = (384, 192),
  batch_norm: BatchNormMode = "batch",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds C1 (10 classes; 1,757,834 parameters on 32x32x3) and C3 (100 classes; 1,775,204).

  Twice (convolution 5x5, batch norm, ReLU, max pool 3x3 of stride 2), then (dense, batch norm, ReLU, dropout 0.5) per width, then the
  logits; all paddings "SAME".

  Args:
    channels: Output channels of both convolutions.
    batch_norm, ghost_size: As `BatchNorm` says.
    dtype: As in `mlp`.
  """
  network = _Shallow(channels, tuple(widths), num_classes, make_norm(batch_norm, ghost_size, dtype), dtype)
  return make_model(network, tuple(input_shape))


def deep(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  channels: int = 64,
  batch_norm: BatchNormMode = "batch",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds C2 (10 classes; 14,991,946 parameters on 32x32x3) and C4 (100 classes; 15,038,116).

  Five blocks of (convolution 3x3, batch norm, ReLU), as many as DEEP_BLOCKS says, with dropout between them and a max pool 2x2 after them;
  then dropout 0.5, (dense 512, batch norm, ReLU, dropout 0.5) and the logits; all paddings "SAME".

  Args:
    channels: Output channels of the first convolution; those of the others, and the dense layer's `8 channels`, are in proportion.
    batch_norm, ghost_size: As `BatchNorm` says.
    dtype: As in `mlp`.
  """
  network = _Deep(channels, num_classes, make_norm(batch_norm, ghost_size, dtype), dtype)
  return make_model(network, tuple(input_shape))


class _Shallow(nn.Module):
  channels: int
  widths: tuple[int, ...]
  num_classes: int
  norm: Callable[..., nn.Module]
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for _ in range(2):
      x = nn.relu(self.norm()(Conv(self.channels, 5, dtype=self.dtype)(x), train))
      x = max_pool(x, window=3, padding="SAME")
    x = x.reshape(x.shape[0], -1)
    for width in self.widths:
      x = nn.relu(self.norm()(dense(width, self.dtype)(x), train))
      x = Dropout(0.5)(x, train)
    return nn.Dense(self.num_classes)(x)


class _Deep(nn.Module):
  channels: int
  num_classes: int
  norm: Callable[..., nn.Module]
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for multiple, num_convolutions, rate in DEEP_BLOCKS:
      for number in range(num_convolutions):
        x = Dropout(rate if number else 0.0)(x, train)
        x = nn.relu(self.norm()(Conv(multiple * self.channels, dtype=self.dtype)(x), train))
      x = max_pool(x, padding="SAME")
    x = Dropout(0.5)(x.reshape(x.shape[0], -1), train)
    x = nn.relu(self.norm()(dense(8 * self.channels, self.dtype)(x), train))
    return nn.Dense(self.num_classes)(Dropout(0.5)(x, train))
