"""VGG-11, configuration A of Simonyan and Zisserman (2015)."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from bsjax.conv import max_pool
from bsjax.models.layers import Conv, Dropout, dense
from bsjax.models.model import Model, make_model
from bsjax.models.norm import BatchNormMode, make_norm
from bsjax.types import Array

STAGES = ((1, 1), (2, 1), (4, 2), (8, 2), (8, 2))
"""Of each stage: channels, in those of the first; number of convolutions."""


def vgg11(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  channels: int = 64,
  widths: Sequence[int] = (4096, 4096),
  batch_norm: BatchNormMode = "none",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds VGG-11: eight 3x3 convolutions with ReLU in five stages, a 2x2 max pool after each stage, then (dense, ReLU, dropout 0.5) per
  width and a dense layer to the logits. 132,863,336 parameters for `((224, 224, 3), 1000)`.

  Args:
    input_shape: `(H, W, C)`, of any size. The first dense layer is as large as what the pools leave: 7x7 pixels of 224x224, one of 32x32. A
      pool that would leave nothing, on an image below 32x32, is left out.
    channels: Output channels of the first convolution; those of the others are in proportion.
    widths: Units of the hidden dense layers.
    batch_norm, ghost_size: As `BatchNorm` says; after each convolution. The paper has none, nor has the default here.
    dtype: As in `mlp`.

  Source: Simonyan and Zisserman (2015), table 1 and section 3.1. They start from N(0, 0.01); here kernels start He normal, before the
  logits LeCun normal. Shallue et al. (2019) train a VGG-11 on ImageNet; we could not look up whether they changed a layer.
  """
  norm = make_norm(batch_norm, ghost_size, dtype)
  return make_model(_Vgg(channels, tuple(widths), num_classes, norm, dtype), tuple(input_shape))


class _Vgg(nn.Module):
  channels: int
  widths: tuple[int, ...]
  num_classes: int
  norm: Callable[..., nn.Module]
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    for multiple, num_convolutions in STAGES:
      for _ in range(num_convolutions):
        x = nn.relu(self.norm()(Conv(multiple * self.channels, dtype=self.dtype)(x), train))
      if min(x.shape[1:3]) > 1:
        x = max_pool(x)
    x = x.reshape(x.shape[0], -1)
    for width in self.widths:
      x = Dropout(0.5)(nn.relu(dense(width, self.dtype)(x)), train)
    return nn.Dense(self.num_classes)(x)
