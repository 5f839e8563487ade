"""A convolutional autoencoder of images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bsjax.models.layers import Conv, TransposedConv, dense
from bsjax.models.model import Model, make_model
from bsjax.models.norm import BatchNormMode, make_norm
from bsjax.types import Array

LEAKY_SLOPE = 0.1
"""Of the encoder's leaky ReLU, for negative inputs."""


def autoencoder(
  input_shape: Sequence[int],
  *,
  code_size: int = 128,
  channels: int = 64,
  batch_norm: BatchNormMode = "running",
  ghost_size: int = 0,
  dtype: Any = None,
) -> Model:
  """Builds an autoencoder: images in [0, 1] to a code of `code_size` numbers and back to images in (0, 1).

      z = encoder(x),    x' = sigmoid(decoder(z)),    a loss of one example that is meant for it: mean over pixels of (x' - x)^2

  The squared error is convex in x', so that Gauss-Newton products exist with x' as the model's outputs; pixels are its units.

  With c = `channels`, encoder: 4x4 convolutions of stride 2 to c, 2c and 4c channels, dense 2c, dense to the code; leaky ReLU after each
  but the last, batch norm before it but in the first. Decoder: dense to H/16 x W/16 x 7c, then four times a transposed 4x4 convolution
  of stride 2, to 4c, 2c, c and C channels; ReLU after each but the last, batch norm before the first two of them.

  Args:
    input_shape: `(H, W, C)`, H and W multiples of 16.
    code_size: Entries of the code.
    channels: Output channels of the first convolution.
    batch_norm, ghost_size: As `BatchNorm` says.
    dtype: As in `mlp`; reconstructions are float32 at least.

  Returns:
    A model whose `apply(params, model_state, images f32[B, H, W, C], *, train)` gives `(reconstructions f32[B, H, W, C], model_state)`.

  Raises:
    ValueError: If H or W is no multiple of 16.

  Source: McCandlish et al. (2018), appendix A.4, name the architecture of InfoGAN (Chen et al., 2016), on SVHN. We could not look up its
  list of layers: those here are ours, of its kind (a recognition network as encoder, a generator as decoder), and so are the code's
  size, the slope of the leaky ReLU, the sigmoid and the loss.
  """
  if len(input_shape) != 3 or input_shape[0] % 16 or input_shape[1] % 16:
    raise ValueError(
      f"autoencoder got input_shape={tuple(input_shape)}; wanted (height, width, channels) with height and width multiples of 16: "
      "pad or crop the images."
    )
  network = _Autoencoder(code_size, channels, make_norm(batch_norm, ghost_size, dtype), dtype)
  return make_model(network, tuple(input_shape))


class _Autoencoder(nn.Module):
  code_size: int
  channels: int
  norm: Callable[..., nn.Module]
  dtype: Any

  @nn.compact
  def __call__(self, images: Array, train: bool) -> Array:
    batch, height, width, colours = images.shape
    c, leaky = self.channels, partial(nn.leaky_relu, negative_slope=LEAKY_SLOPE)
    x = leaky(Conv(c, 4, 2, dtype=self.dtype)(images))
    for features in (2 * c, 4 * c):
      x = leaky(self.norm()(Conv(features, 4, 2, dtype=self.dtype)(x), train))
    x = leaky(self.norm()(dense(2 * c, self.dtype)(x.reshape(batch, -1)), train))
    code = nn.Dense(self.code_size, dtype=self.dtype, name="code")(x)

    x = dense(height // 16 * (width // 16) * 7 * c, self.dtype)(code)
    x = nn.relu(self.norm()(x, train)).reshape(batch, height // 16, width // 16, 7 * c)
    x = nn.relu(self.norm()(TransposedConv(4 * c, self.dtype)(x), train))
    for features in (2 * c, c):
      x = nn.relu(TransposedConv(features, self.dtype)(x))
    pixels = TransposedConv(colours, self.dtype)(x)
    return nn.sigmoid(pixels.astype(jnp.promote_types(pixels.dtype, jnp.float32)))
