"""The layers that the image networks share: convolutions, dense layer before a ReLU, dropout.

Each has `dtype`, what it computes in: None is the dtype of its parameters, `jnp.bfloat16` casts input and parameters and returns
bfloat16; parameters are float32 either way.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from bsjax.conv import Padding, conv, transposed_conv
from bsjax.types import Array


class Conv(nn.Module):
  """A convolution by the loop-safe `conv`; He normal kernel (variance 2 / (k k I)), zero bias.

  `f[B, H, W, I] -> f[B, H', W', features]`; parameters `kernel` `[k, k, I, features]` and, if `use_bias`, `bias` `[features]`.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: Padding = "SAME"
  use_bias: bool = True
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = conv(x, kernel, stride=self.stride, padding=self.padding)
    return y if bias is None else y + bias[None, None, None]


class TransposedConv(nn.Module):
  """A `transposed_conv`, `f[B, H, W, I] -> f[B, 2 H, 2 W, features]`, with zero bias.

  He normal kernel `[4, 4, I, features]`: an output sees 2 x 2 x I entries of it, so the variance is 2 / (4 I).
  """

  features: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (4, 4, x.shape[-1], self.features)
    # The initialiser divides by 4 x 4 x I, four times the fan-in.
    kernel = self.param("kernel", nn.initializers.variance_scaling(8.0, "fan_in", "truncated_normal"), shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    return transposed_conv(x, kernel) + bias[None, None, None]


def dense(width: int, dtype: Any = None) -> nn.Dense:
  """Builds a dense layer for a ReLU: He normal kernel (variance 2 / fan-in), zero bias."""
  return nn.Dense(width, dtype=dtype, kernel_init=nn.initializers.he_normal())


class Dropout(nn.Module):
  """Sets entries to zero, each with probability `rate`, and divides the others by `1 - rate`, so that expectations stay.

  Only in training; in inference it is the identity. One key draws the masks of the whole batch, one entry independent of another:
  the same key gives the same masks, on a mesh too.

  Raises:
    ValueError: in training, where the model was applied without a key.

  Source: Srivastava et al. (2014), section 4; they scale weights at inference instead, which gives the same expectations.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    if not train or self.rate == 0:
      return x
    if not self.has_rng("dropout"):
      raise ValueError(
        f"a network with dropout (rate {self.rate}) was applied with train=True and no key: pass key=jax.random.key(...), "
        "another one every step."
      )
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
    return jnp.where(keep, x / (1 - self.rate), 0)
