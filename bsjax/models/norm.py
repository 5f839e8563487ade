"""Batch norm, and which examples share their moments."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsjax.types import Array

BatchNormMode = Literal["none", "running", "batch"]
"""Which moments normalise a layer: no normalisation; those of the batch in training and running averages in
inference; or those of whatever batch is given, in inference too."""

BATCH_NORM_MOMENTUM = 0.9
"""Weight of the old value in a running average. Our choice (Goyal et al. 2017, section 5.1, use the same)."""
BATCH_NORM_EPSILON = 1e-5
"""Added to the variance before its root: a constant feature is then mapped to its bias. Our choice."""


class BatchNorm(nn.Module):
  """Normalises each feature by its moments over groups of examples.

      y = scale (x - mean_g) / sqrt(var_g + BATCH_NORM_EPSILON) + bias,        g the group of the example

  `f[B, ..., F] -> f[B, ..., F]`: moments are taken over the examples of a group and all axes between, for each of the F features. The
  variance is the biased one, by centring. Parameters `scale` and `bias`, state `mean` and `var`, all `[F]` and named like those of
  `flax.linen.BatchNorm`, whose values this layer has (where there is one group).

  - "running": in training the groups are the batch or, with `ghost_size`, every so many consecutive examples of it (ghost batches;
    a batch of at most so many is one). In inference mean_g and var_g are running averages, which every batch of training moves
    by a tenth of the way to the mean over its groups of their means and variances.
  - "batch": the batch is the group, in inference too. The running averages are kept, so that the modes share parameters and state.
  - "none": the identity, without parameters.

  Computed with a constant c in the place of the mean, which is right for any c and in every derivative:

      var_g = E_g (x - c)^2 - (mean_g - c)^2,        y = (x - c) slope_g + (bias - (mean_g - c) slope_g)

  At c = mean_g the values are the centred ones bit for bit, what mean_g - c adds to them is zero, and the gradient through the mean is
  had from sums that the gradients of `scale` and `bias` need anyway: two passes over the examples fewer than by the definition.

  Over devices: under `jit` on a mesh with the batch spread over an axis, moments are those of the whole batch ("synchronised"), since
  `jit` computes what one device would. The unsynchronised norm of Goyal et al. (2017), section 3, every worker by itself, is
  `ghost_size` = examples per device: each device's examples are then a group, and no moment crosses devices but for the running averages.

  Args:
    mode: above.
    ghost_size: examples of a ghost batch, for "running" only; 0: the batch is one group.
    dtype: of the result; None: that of the input and parameters. Moments are float32 at least.
    scale_init: ones, or zeros for the last norm of a residual branch, which then starts as the identity.

  Raises:
    ValueError: in training, a larger batch that is not a multiple of `ghost_size`.

  Source: Ioffe and Szegedy (2015), algorithm 1; "batch" is mode 2 of Keras 1. Ghost batches: Hoffer, Hubara and Soudry (2017), algorithm
  1. There the running averages are updated ghost batch by ghost batch, with the weight of each decaying; here the ghost batches of a
  batch weigh alike, so their order does not matter.
  """

  mode: BatchNormMode
  ghost_size: int = 0
  dtype: Any = None
  scale_init: Callable[..., Array] = nn.initializers.ones

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    if self.mode == "none":
      return x
    features = x.shape[-1:]
    mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
    var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
    scale = self.param("scale", self.scale_init, features)
    bias = self.param("bias", nn.initializers.zeros, features)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if not train and self.mode == "running":
      y = (wide - mean.value) * (jax.lax.rsqrt(var.value + BATCH_NORM_EPSILON) * scale) + bias
    else:
      groups = wide.reshape(-1, self._group_size(len(x)), *x.shape[1:])
      axes = tuple(range(1, groups.ndim - 1))
      means = jnp.mean(groups, axes, keepdims=True)
      centres = jax.lax.stop_gradient(means)
      variances = jnp.mean(jnp.square(groups - centres), axes, keepdims=True) - jnp.square(means - centres)
      slopes = jax.lax.rsqrt(variances + BATCH_NORM_EPSILON) * scale
      y = (groups - centres) * slopes + (bias - (means - centres) * slopes)
      if train:
        for running, found in ((mean, means), (var, variances)):
          found = jnp.mean(found.reshape(-1, *features), axis=0)
          running.value = BATCH_NORM_MOMENTUM * running.value + (1 - BATCH_NORM_MOMENTUM) * found
    return y.reshape(x.shape).astype(y.dtype if self.dtype is None else self.dtype)

  def _group_size(self, batch_size: int) -> int:
    size = min(self.ghost_size or batch_size, batch_size)
    if rest := batch_size % size:
      raise ValueError(
        f"a batch of {batch_size} is not a multiple of ghost_size={size}: use {batch_size - rest} or {batch_size - rest + size}."
      )
    return size


def make_norm(batch_norm: BatchNormMode, ghost_size: int, dtype: Any) -> Callable[..., BatchNorm]:
  """Makes the constructor of a network's norms; `make_norm(...)(scale_init=...)` is one layer.

  Raises:
    ValueError: An unknown mode, or ghost batches in another mode than "running".
  """
  if batch_norm not in get_args(BatchNormMode):
    raise ValueError(f"{batch_norm=}; wanted one of {', '.join(get_args(BatchNormMode))}.")
  if ghost_size and batch_norm != "running":
    raise ValueError(f"{ghost_size=} with {batch_norm=}: ghost batches need batch_norm='running'.")
  return partial(BatchNorm, batch_norm, ghost_size, dtype)
