"""Gradient noise from two batch sizes: the norms that gradient accumulation and data parallelism compute in passing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bsjax.probes.chunks import count_examples
from bsjax.probes.estimate import Estimate, ratio_of_means
from bsjax.probes.per_example import LossFn, per_example_losses
from bsjax.types import Array, Batch, Key, Params

BatchLossFn = Callable[[Params, Batch, Key], Array]
"""The mean loss of a batch, f32[], of any number of examples on its leading axis."""


class GroupedGradient(NamedTuple):
  """The gradient g_B of a batch of B examples, made of m microbatches of b = B / m, and what their noise shows in."""

  loss: Array
  """Mean loss of the batch, f32[]."""
  mean_grad: Params
  """g_B = (1/m) sum_j g_j, like the parameters: the gradient of the whole batch, to rounding."""
  small: Array
  """(1/m) sum_j |g_j|^2, f32[]; 0 where it was not asked for."""
  big: Array
  """|g_B|^2, f32[]; 0 where it was not asked for."""


class TwoBatchNoise(NamedTuple):
  """Means over R batches at fixed parameters, with standard errors. Python numbers."""

  grad_sq_norm: float
  grad_sq_norm_sem: float
  grad_cov_trace: float
  grad_cov_trace_sem: float
  noise_scale: Estimate
  """tr(Sigma) / |G|^2 in examples; its `n_examples` counts the batches."""


def two_batch_estimates(small: Any, big: Any, *, microbatch_size: int, batch_size: int) -> tuple[Any, Any]:
  """Estimate |G|^2 and tr(Sigma) from mean squared norms at two batch sizes.

  With b = `microbatch_size` and B = `batch_size`,

      |G|^2_hat = (B big - b small) / (B - b),          S_hat = (small - big) / (1/b - 1/B)

  Args:
    small, big: mean |g_b|^2 and |g_B|^2, numbers or arrays of one shape.

  Returns:
    `(grad_sq_norm, grad_cov_trace)`, of the arguments' shape.

  Raises:
    ValueError: not 0 < b < B.

  Holds: both are unbiased, since E|g_n|^2 = |G|^2 + tr(Sigma)/n for n independent examples. For batches drawn without
  replacement from N examples with the gradient G_N and the unbiased tr(Sigma) = sum_i |g_i - G_N|^2 / (N - 1), that is

      E|g_n|^2 = |G_N|^2 + tr(Sigma) (1/n - 1/N),

  S_hat stays unbiased for tr(Sigma), and |G|^2_hat estimates |G_N|^2 - tr(Sigma)/N: not the data set's |G_N|^2, but, if
  its examples are drawn from a distribution, that distribution's |G|^2. Both may come out negative, and their ratio is
  biased: average the parts over batches before dividing (`smoothed_parts`, `two_batch_noise`). Where b far exceeds the noise
  scale, S_hat is a small difference: float32 norms lose about 1e-6 b / (noise scale) of it.

  Source: McCandlish et al. (2018), equation A.2; footnote 6 for 1/n - 1/N.

  >>> two_batch_estimates(1.0 + 12.0 / 4, 1.0 + 12.0 / 16, microbatch_size=4, batch_size=16)
  (1.0, 12.0)
  """
  b, B = microbatch_size, batch_size  # noqa: N806  (as in the formula)
  if not 0 < b < B:
    raise ValueError(f"microbatch_size={b} and batch_size={B}: two sizes are needed, 0 < microbatch_size < batch_size.")
  return (B * big - b * small) / (B - b), (small - big) / (1 / b - 1 / B)


def accumulated_gradient(
  loss_fn: BatchLossFn, params: Params, microbatches: Batch, key: Key, *, with_norms: bool | Array = True
) -> GroupedGradient:
  """Compute the gradient of a batch one microbatch after the other, in the memory of one microbatch's.

  Args:
    loss_fn: the mean loss of a microbatch; microbatch j gets `fold_in(key, j)`.
    params: where to evaluate.
    microbatches: leading axes [m, b].
    with_norms: whether to compute `small` and `big`; may be traced: the norms are then skipped where it is False (but
      computed all the same under `vmap`, which turns the branch into a selection).

  Holds: `loss` and `mean_grad` do not depend on `with_norms`, on the CPU not by a bit (a test). Sums are float32 for
  half-precision parameters.

  Source: McCandlish et al. (2018), appendix A.1.
  """

  def one(index: Array, microbatch: Batch) -> tuple[Array, Params, Array]:
    loss, grad = _value_and_grad(loss_fn, params, microbatch, jax.random.fold_in(key, index))
    return loss, grad, _sq_norm_where(with_norms, grad)

  num_microbatches = count_examples(microbatches)
  numbered = jnp.arange(num_microbatches), microbatches
  shapes = jax.eval_shape(one, *jax.tree.map(lambda array: array[0], numbered))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  sums, _ = jax.lax.scan(lambda sums, item: (optax.tree.add(sums, one(*item)), None), zeros, numbered)
  return _grouped(sums, params, num_microbatches, with_norms)


def device_gradient(
  loss_fn: BatchLossFn, params: Params, batch: Batch, key: Key, *, mesh: Mesh, with_norms: bool | Array = True
) -> GroupedGradient:
  """Compute the gradient of a batch with one microbatch on each device of the mesh axis "data".

  A device's gradient before the all-reduce is that of its microbatch, and the reduced one that of the batch: `small` costs
  one more number in the all-reduce. `shard_map` makes each device's own gradient an array of the program. Left to the
  partitioner, a `vmap` over groups may be cut in any way that gives the same sums, and its convolutions become grouped ones.

  Args:
    loss_fn: the mean loss of a microbatch; device j gets `fold_in(key, j)`.
    params: where to evaluate; the same on every device.
    batch: leading axis B, a multiple of the number of devices m on "data"; device j gets examples jb to (j + 1)b - 1.
    with_norms: as in `accumulated_gradient`.

  Raises:
    ValueError: the axis has one device, or does not divide B.

  Holds: equals `accumulated_gradient` with the same m, to rounding.

  Source: McCandlish et al. (2018), appendix A.1.
  """
  check_device_groups(count_examples(batch), mesh)

  def one(params: Params, microbatch: Batch, key: Key, with_norms: Array) -> tuple[Array, Params, Array]:
    loss, grad = _value_and_grad(loss_fn, params, microbatch, jax.random.fold_in(key, jax.lax.axis_index("data")))
    return jax.lax.psum((loss, grad, _sq_norm_where(with_norms, grad)), "data")

  # check_vma would sum the gradient over devices by itself, and refuse losses with a scan that starts from zeros
  mapped = jax.shard_map(one, mesh=mesh, in_specs=(P(), P("data"), P(), P()), out_specs=P(), check_vma=False)
  return _grouped(mapped(params, batch, key, jnp.asarray(with_norms)), params, mesh.shape["data"], with_norms)


def check_device_groups(batch_size: int, mesh: Mesh) -> int:
  """Count the examples per device of the axis "data", or say why there are no groups to compare."""
  devices = mesh.shape["data"]
  if devices < 2 or batch_size % devices:
    raise ValueError(
      f"the mesh has {devices} devices on its axis 'data' for a batch of {batch_size}: the device route wants at least 2, "
      "dividing the batch; use another mesh or batch size, or the microbatch route."
    )
  return batch_size // devices


def microbatch_sq_norms(
  loss_fn: LossFn, params: Params, examples: Batch, *, num_microbatches: int
) -> tuple[Array, Array, Params]:
  """Compare a batch's gradient with those of its microbatches, one after the other.

  Args:
    loss_fn: the loss of one example.
    params: where to evaluate.
    examples: leading axis B, a multiple of m = `num_microbatches`, cut in consecutive microbatches.

  Returns:
    `(small, big, mean_grad)` as in `GroupedGradient`, for `two_batch_estimates`.

  Raises:
    ValueError: m < 2, or B is not a multiple of m.
  """
  batch_size = count_examples(examples)
  if num_microbatches < 2 or batch_size % num_microbatches:
    raise ValueError(
      f"num_microbatches={num_microbatches} for {batch_size} examples: wanted at least 2, dividing their number."
    )
  shape = num_microbatches, batch_size // num_microbatches
  microbatches = jax.tree.map(lambda array: array.reshape(*shape, *array.shape[1:]), examples)
  found = accumulated_gradient(_mean_loss(loss_fn), params, microbatches, jax.random.key(0))
  return found.small, found.big, found.mean_grad


def device_sq_norms(loss_fn: LossFn, params: Params, examples: Batch, *, mesh: Mesh) -> tuple[Array, Array, Params]:
  """Compare a batch's gradient with those of its parts on each device of the mesh axis "data".

  Returns:
    `(small, big, mean_grad)`: what `microbatch_sq_norms` gives for as many microbatches as there are devices, to rounding.

  Raises:
    ValueError: as `device_gradient`.
  """
  found = device_gradient(_mean_loss(loss_fn), params, examples, jax.random.key(0), mesh=mesh)
  return found.small, found.big, found.mean_grad


def two_batch_noise(small: np.ndarray, big: np.ndarray, *, microbatch_size: int, batch_size: int) -> TwoBatchNoise:
  """Estimate the noise scale from R batches at the same parameters, with an interval, or refuse.

  The replicates are the R pairs of `two_batch_estimates`, and the noise scale is the ratio of their means. Norms logged in
  training are no such replicates: the weights move between them, and what they give is `smoothed_parts`, without an interval.

  Args:
    small, big: f[R], R at least 2; from independent batches.
  """
  sq_norms, traces = two_batch_estimates(
    np.asarray(small, np.float64), np.asarray(big, np.float64), microbatch_size=microbatch_size, batch_size=batch_size
  )
  if sq_norms.size < 2:
    raise ValueError(f"{sq_norms.size} batches tell nothing about their spread; give at least 2.")
  sq_norm_sem, trace_sem = (float(np.std(part, ddof=1) / part.size**0.5) for part in (sq_norms, traces))
  return TwoBatchNoise(
    float(sq_norms.mean()), sq_norm_sem, float(traces.mean()), trace_sem, ratio_of_means(traces, sq_norms)
  )


def smoothed_parts(
  small: np.ndarray, big: np.ndarray, counts: np.ndarray, *, microbatch_size: int, batch_size: int, decay: float
) -> tuple[np.ndarray, np.ndarray]:
  """Smooth the two parts of the noise scale along a training run.

  For rows t of c_t logged steps each, with x_t a row's mean of |G|^2_hat, or of S_hat, an exponential moving average per
  logged step, divided by the sum of its weights:

      e_t = decay^c_t e_(t-1) + (1 - decay^c_t) x_t,    w_t = decay^c_t w_(t-1) + (1 - decay^c_t),    result e_t / w_t

  The noise scale is the ratio of the two results, S over |G|^2; an average of ratios would be dominated by the rows in which
  |G|^2_hat happens to be near 0.

  Args:
    small, big: row means, f[T]; anything where `counts` is 0.
    counts: how many logged steps each row averages, i[T].
    decay: in [0, 1), per logged step; the average reaches back about 1 / (1 - decay) of them.

  Returns:
    `(grad_sq_norm, grad_cov_trace)`, f64[T] each; NaN before the first logged step.

  Source: McCandlish et al. (2018), appendix A.1. The division by w_t is the bias correction of Kingma and Ba (2015), section 3,
  counted in logged steps.
  """
  if not 0 <= decay < 1:
    raise ValueError(f"decay={decay}, wanted a number in [0, 1)")
  parts = np.stack(
    two_batch_estimates(
      np.asarray(small, np.float64), np.asarray(big, np.float64), microbatch_size=microbatch_size, batch_size=batch_size
    )
  )
  smoothed = np.full_like(parts, np.nan)
  average, weight = np.zeros(2), 0.0
  for row, count in enumerate(np.asarray(counts)):
    if count:
      keep = decay ** float(count)
      average, weight = keep * average + (1 - keep) * parts[:, row], keep * weight + (1 - keep)
    if weight:
      smoothed[:, row] = average / weight
  return smoothed[0], smoothed[1]


def _mean_loss(loss_fn: LossFn) -> BatchLossFn:
  return lambda params, batch, key: jnp.mean(per_example_losses(loss_fn, params, batch))


def _value_and_grad(loss_fn: BatchLossFn, params: Params, batch: Batch, key: Key) -> tuple[Array, Params]:
  """Differentiates the loss; half-precision results become float32, to be summed."""
  results = jax.value_and_grad(loss_fn)(params, batch, key)
  return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), results)


def _sq_norm_where(wanted: bool | Array, grad: Params) -> Array:
  return jax.lax.cond(wanted, lambda grad: optax.tree.norm(grad, squared=True), lambda grad: jnp.zeros(()), grad)


def _grouped(
  sums: tuple[Array, Params, Array], params: Params, num_microbatches: int, with_norms: bool | Array
) -> GroupedGradient:
  """Turns sums over microbatches into means. `big` is taken from the sum, which is there: the mean may never be written out."""
  loss, grad, small = sums
  scale = 1 / num_microbatches
  mean_grad = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grad, params)
  return GroupedGradient(loss * scale, mean_grad, small * scale, _sq_norm_where(with_norms, grad) * scale**2)
