"""Residual networks: ResNet-50 for ImageNet and the family of depth 6 n + 2 for CIFAR."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from bsjax.conv import max_pool
from bsjax.models.layers import Conv
from bsjax.models.model import Model, make_model
from bsjax.models.norm import BatchNormMode, make_norm
from bsjax.types import Array

Shortcut = Literal["pad", "project"]


def imagenet_resnet(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  blocks: Sequence[int] = (3, 4, 6, 3),
  channels: int = 64,
  zero_last_gamma: bool = True,
  batch_norm: BatchNormMode = "running",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds a residual network of bottleneck blocks, by default ResNet-50: 25,557,032 parameters for `((224, 224, 3), 1000)`.

  Convolution 7x7 of stride 2, batch norm, ReLU, max pool 3x3 of stride 2, then one stage per entry of `blocks`, the mean over all pixels
  and a dense layer to the logits. A block is

      y = relu(shortcut(x) + BN(W_3 relu(BN(W_2 relu(BN(W_1 x))))))

  with W_1 1x1 and W_2 3x3 to C channels and W_3 1x1 to 4 C. C doubles from stage to stage. The first block of each stage but the first has
  stride 2 on W_2 ("v1.5"; He et al. have it on W_1). The shortcut is the identity, in the first block of a stage BN(W_s x) with W_s 1x1 of
  the block's stride. Convolutions have no bias (but do with `batch_norm="none"`) and pad each edge by half the kernel.

  Args:
    blocks: Blocks per stage.
    channels: C in the first stage, and output channels of the first convolution.
    zero_last_gamma: Whether the last batch norm of each block starts with scale zero, so that every block starts as its shortcut.
    batch_norm, ghost_size: As `BatchNorm` says. Goyal et al. normalise 32 examples of a worker at a time: `ghost_size=32`.
    dtype: As in `mlp`.

  Holds: convolution kernels start He normal (variance 2 / fan-in), the last dense layer's N(0, 0.01^2).

  Source: Goyal et al. (2017), section 5.1, on the network of He et al. (2016), table 1.
  """
  norm = make_norm(batch_norm, ghost_size, dtype)
  conv = partial(_centred_conv, use_bias=batch_norm == "none", dtype=dtype)
  network = _ImagenetResnet(tuple(blocks), channels, zero_last_gamma, num_classes, conv, norm)
  return make_model(network, tuple(input_shape))


def cifar_resnet(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  depth: int = 32,
  channels: int = 16,
  shortcut: Shortcut = "pad",
  batch_norm: BatchNormMode = "running",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds a residual network of `depth = 6 n + 2` layers for small images: three stages of n basic blocks.

  Convolution 3x3, batch norm, ReLU, the stages, the mean over all pixels and a dense layer to the logits. A block is

      y = relu(shortcut(x) + BN(W_2 relu(BN(W_1 x))))

  with 3x3 convolutions to C channels; C doubles from stage to stage, where W_1 has stride 2. Biases and paddings as in `imagenet_resnet`.

  For `((32, 32, 3), 10)`, ResNet-32 has 464,154 parameters with "pad" and 467,194 with "project", ResNet-8 75,290 and 78,330.

  Args:
    depth: Layers with weights that are not shortcuts.
    channels: C in the first stage.
    shortcut: What fits x to y where sizes differ. "pad": every second pixel, and zeros for the new channels, without parameters (option A
      of He et al., which they use here). "project": BN(W_s x), W_s 1x1, in the first block of every stage, also of the first, where sizes
      are equal: as in the official code of TensorFlow.
    batch_norm, ghost_size: As `BatchNorm` says.
    dtype: As in `mlp`.

  Raises:
    ValueError: A depth that is not 6 n + 2, or an unknown shortcut.

  Source: He et al. (2016), section 4.2. McCandlish et al. (2018), appendix A.4, train the ResNet-32 of TensorFlow's official code, so
  theirs is `shortcut="project"`; that code has had blocks with batch norm before and after each convolution, they do not say which they
  ran, and these are after. Shallue et al. (2019) train a ResNet-8; we could not look up its layers and take n = 1.
  """
  n, rest = divmod(depth - 2, 6)
  if n < 1 or rest:
    raise ValueError(f"{depth=}; wanted 6 n + 2 with n >= 1: 8, 14, 20, 26, 32, ...")
  if shortcut not in ("pad", "project"):
    raise ValueError(f"{shortcut=}; wanted 'pad' or 'project'.")
  norm = make_norm(batch_norm, ghost_size, dtype)
  conv = partial(_centred_conv, use_bias=batch_norm == "none", dtype=dtype)
  return make_model(_CifarResnet(n, channels, shortcut, num_classes, conv, norm), tuple(input_shape))


def _centred_conv(features: int, kernel_size: int, stride: int = 1, **options: Any) -> Conv:
  """Pads each edge by half the kernel, as Torch does; "SAME" padding of an even image at stride 2 is one-sided."""
  return Conv(features, kernel_size, stride, padding=kernel_size // 2, **options)


class _BottleneckBlock(nn.Module):
  channels: int
  stride: int
  project: bool
  last_scale_init: Callable[..., Array]
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    y = nn.relu(self.norm()(self.conv(self.channels, 1)(x), train))
    y = nn.relu(self.norm()(self.conv(self.channels, 3, self.stride)(y), train))
    y = self.norm(scale_init=self.last_scale_init)(self.conv(4 * self.channels, 1)(y), train)
    if self.project:
      x = self.norm(name="shortcut_norm")(self.conv(4 * self.channels, 1, self.stride, name="shortcut")(x), train)
    return nn.relu(x + y)


class _BasicBlock(nn.Module):
  channels: int
  stride: int
  project: bool
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    y = nn.relu(self.norm()(self.conv(self.channels, 3, self.stride)(x), train))
    y = self.norm()(self.conv(self.channels, 3)(y), train)
    if self.project:
      x = self.norm(name="shortcut_norm")(self.conv(self.channels, 1, self.stride, name="shortcut")(x), train)
    elif x.shape != y.shape:
      new_channels = self.channels - x.shape[-1]
      x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, new_channels)))
    return nn.relu(x + y)


class _ImagenetResnet(nn.Module):
  blocks: tuple[int, ...]
  channels: int
  zero_last_gamma: bool
  num_classes: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    last_scale_init = nn.initializers.zeros if self.zero_last_gamma else nn.initializers.ones
    x = nn.relu(self.norm()(self.conv(self.channels, 7, 2)(x), train))
    x = max_pool(x, window=3, padding=1)
    for stage, num_blocks in enumerate(self.blocks):
      for number in range(num_blocks):
        first = number == 0
        stride = 2 if first and stage else 1
        name = f"Stage_{stage}_Block_{number}"
        block = _BottleneckBlock(
          self.channels * 2**stage, stride, first, last_scale_init, self.conv, self.norm, name=name
        )
        x = block(x, train)
    x = jnp.mean(x, (1, 2))
    return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))(x)


class _CifarResnet(nn.Module):
  num_blocks: int
  channels: int
  shortcut: Shortcut
  num_classes: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    x = nn.relu(self.norm()(self.conv(self.channels, 3)(x), train))
    for stage in range(3):
      for number in range(self.num_blocks):
        first = number == 0
        stride = 2 if first and stage else 1
        project = first and self.shortcut == "project"
        name = f"Stage_{stage}_Block_{number}"
        x = _BasicBlock(self.channels * 2**stage, stride, project, self.conv, self.norm, name=name)(x, train)
    return nn.Dense(self.num_classes)(jnp.mean(x, (1, 2)))
