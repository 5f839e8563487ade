"""A segment: many steps of one or several trials, with their evaluations, in one compiled call."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bsjax.data import independent_indices, segment_indices
from bsjax.train.evaluate import Chunked, evaluate
from bsjax.train.state import LOSS_STREAM, ORDER_STREAM, TrainState, stream
from bsjax.train.step import NOISE_COLUMNS, StepLog, make_logged_step, row_noise
from bsjax.train.trial import TrialConfig
from bsjax.types import Array, Batch, Hparams
from bsjax.workloads import Workload

STEPS_PER_SEGMENT = 256
"""About how many steps one compiled call makes; rows reach the disk after each call."""


class Rows(NamedTuple):
  """What a segment logs: one entry per `eval_every` steps, f32[lanes, rows] unless said otherwise.

  `train_loss` is the mean over the minibatches since the row before, `minibatch_loss` that of the last one, both
  before their updates; `validation` holds the metrics after them; `first_nonfinite` i32 counts the steps of the row
  up to and including the first with a non-finite loss, 0 if there is none. `noise` is empty without a `noise_route`; else
  `small_sq_norm` and `big_sq_norm` are means over those `noise_steps` (i32) of the row that the config asks for.
  """

  train_loss: Array
  minibatch_loss: Array
  first_nonfinite: Array
  validation: Mapping[str, Array]
  noise: Mapping[str, Array]


def make_mesh(*, trial: int = 1, data: int | None = None) -> Mesh:
  """Arranges the devices along the axes "trial" and "data"; one device is the 1x1 mesh.

  Args:
    trial: devices across which lanes are spread.
    data: devices across which each batch is spread; all that remain by default.
  """
  count = jax.device_count()
  if data is None:
    data = count // trial
  if trial < 1 or data < 1 or trial * data > count:
    raise ValueError(f"mesh of trial={trial} x data={data} needs {trial * data} devices, there are {count}")
  devices = jax.devices()[: trial * data]
  return jax.make_mesh((trial, data), ("trial", "data"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def rows_per_segment(config: TrialConfig) -> int:
  """Says how many rows one call writes at most: at least one, however long the steps between evaluations are."""
  return max(1, STEPS_PER_SEGMENT // config.eval_every)


def build_segment(
  workload: Workload, config: TrialConfig, lanes: int, mesh: Mesh
) -> Callable[..., tuple[TrainState, Rows]]:
  """Builds the program of `_build`, or hands out the one built before.

  What the program does not read is left out of the key: the number of steps, where to stop, probes and parent, so that trials of every
  budget and schedule length, with or without probes and from any start share one compilation.

  Raises:
    ValueError: as `make_logged_step`, before anything is traced.
  """
  config = dataclasses.replace(
    config, num_steps=config.eval_every, probes=(), probe_steps=(), parent="", stop_at_target=False
  )
  return _build(workload, config, lanes, mesh)


@functools.lru_cache(maxsize=32)
def _build(workload: Workload, config: TrialConfig, lanes: int, mesh: Mesh) -> Callable[..., tuple[TrainState, Rows]]:
  """Compiles `segment(states, hparams, seeds, num_rows, train, validation) -> (states, rows)`; `states` is donated.

  Every array of `states`, `hparams` and `seeds` has a leading axis of `lanes` trials, which do not touch each other and may
  stand at different steps. `num_rows` (i32[], at most `rows_per_segment`) is an argument, so the same program makes
  the last, shorter segment. `train` are the training arrays [N, ...] on the device, `validation` a `Chunked` set.

  Holds: a lane's numbers depend on its own trial only, bitwise; one program per (workload, config, lanes, mesh).
  With a "data" axis that divides the batch size each batch is spread over it; sums over the batch then cross devices and
  losses agree with one device to rounding. With one lane nothing is vmapped. Norms of gradients cost nothing in steps that do
  not log them, except under vmap, where every step computes them.
  """
  step = make_logged_step(workload, config, mesh)
  rows_max, inner = rows_per_segment(config), config.eval_every
  # an accumulating step spreads its microbatches itself
  accumulates = bool(config.microbatch_size) and config.noise_route != "device"
  spread = mesh.shape["data"] > 1 and config.batch_size % mesh.shape["data"] == 0 and not accumulates
  data_sharding = NamedSharding(mesh, P("data"))

  def gather(train: Batch, index: Array) -> Batch:
    batch = jax.tree.map(lambda array: array[index], train)
    return jax.lax.with_sharding_constraint(batch, data_sharding) if spread else batch

  def lane_segment(
    state: TrainState, hparams: Hparams, seed: Array, num_rows: Array, train: Batch, validation: Chunked
  ) -> tuple[TrainState, Rows]:
    order_key, loss_key = stream(seed, ORDER_STREAM), stream(seed, LOSS_STREAM)
    num_examples = len(next(iter(train.values())))
    draw_indices = independent_indices if config.with_replacement else segment_indices
    indices = draw_indices(
      order_key, state.step, num_steps=rows_max * inner, batch_size=config.batch_size, num_examples=num_examples
    ).reshape(rows_max, inner, config.batch_size)

    def one_step(state: TrainState, index: Array) -> tuple[TrainState, StepLog]:
      return step(state, hparams, gather(train, index), loss_key)

    def one_row(row: Array, carry: tuple[TrainState, Rows]) -> tuple[TrainState, Rows]:
      state, rows = carry
      state, (losses, noise) = jax.lax.scan(one_step, state, indices[row])
      metrics = evaluate(workload.example_metrics, state.params, state.model_state, validation)
      bad = ~jnp.isfinite(losses)
      bad_at_end = ~jnp.isfinite(metrics["loss"])
      first = jnp.where(jnp.any(bad), jnp.argmax(bad) + 1, jnp.where(bad_at_end, inner, 0))
      new = Rows(jnp.mean(losses), losses[-1], first.astype(jnp.int32), metrics, row_noise(noise))
      return state, jax.tree.map(lambda buffer, value: buffer.at[row].set(value), rows, new)

    metrics_shape = jax.eval_shape(
      functools.partial(evaluate, workload.example_metrics), state.params, state.model_state, validation
    )
    blank = Rows(
      jnp.zeros(rows_max),
      jnp.zeros(rows_max),
      jnp.zeros(rows_max, jnp.int32),
      jax.tree.map(lambda leaf: jnp.zeros(rows_max, leaf.dtype), metrics_shape),
      {name: jnp.zeros(rows_max, dtype) for name, dtype in NOISE_COLUMNS.items() if config.noise_route},
    )
    return jax.lax.fori_loop(0, num_rows, one_row, (state, blank))

  def segment(
    states: TrainState, hparams: Hparams, seeds: Array, num_rows: Array, train: Batch, validation: Chunked
  ) -> tuple[TrainState, Rows]:
    if lanes == 1:
      state, hparam, seed = jax.tree.map(lambda array: array[0], (states, hparams, seeds))
      outputs = lane_segment(state, hparam, seed, num_rows, train, validation)
      return jax.tree.map(lambda array: array[None], outputs)
    over_lanes = jax.vmap(lane_segment, in_axes=(0, 0, 0, None, None, None), spmd_axis_name="trial")
    return over_lanes(states, hparams, seeds, num_rows, train, validation)

  return jax.jit(
    segment,
    in_shardings=(lane_sharding(mesh),) * 3 + (everywhere(mesh),) * 3,
    out_shardings=lane_sharding(mesh),
    donate_argnums=0,
  )


def lane_sharding(mesh: Mesh) -> NamedSharding:
  """Spreads a leading axis of lanes over the axis "trial"."""
  return NamedSharding(mesh, P("trial"))


def everywhere(mesh: Mesh) -> NamedSharding:
  """Puts a copy on every device of the mesh."""
  return NamedSharding(mesh, P())


def device_arrays(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
  """Puts a data set on every device of the mesh: the path for data that fit one device."""
  return jax.device_put(dict(arrays), everywhere(mesh))
