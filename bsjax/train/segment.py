"""A segment: many steps of one or several trials, with their evaluations, in one compiled call."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bsjax.data import independent_indices, segment_indices
from bsjax.train.evaluate import Chunked, evaluate, spread_chunks
from bsjax.train.state import LOSS_STREAM, ORDER_STREAM, TrainState, init_state, stream
from bsjax.train.step import NOISE_COLUMNS, StepLog, make_logged_step, row_noise
from bsjax.train.trial import TrialConfig
from bsjax.types import Array, Batch, Hparams, Metrics
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

  Raises:
    ValueError: fewer than one along an axis, or more than there are.
  """
  count = jax.device_count()
  if trial < 1 or (data is not None and data < 1):
    raise ValueError(f"mesh of trial={trial} x data={data}; wanted at least 1 device along each axis")
  if data is None:
    data = max(1, count // trial)
  if trial * data > count:
    raise ValueError(f"mesh of trial={trial} x data={data} needs {trial * data} devices, there are {count}: use fewer")
  devices = jax.devices()[: trial * data]
  return jax.make_mesh((trial, data), ("trial", "data"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def rows_per_segment(config: TrialConfig) -> int:
  """Says how many rows one call writes at most: at least one, however long the steps between evaluations are."""
  return max(1, STEPS_PER_SEGMENT // config.eval_every)


def spreads_batches(config: TrialConfig, mesh: Mesh) -> bool:
  """Tells whether each batch lies spread over the axis "data": where that divides it, unless the step spreads its microbatches itself."""
  accumulates = bool(config.microbatch_size) and config.noise_route != "device"
  return mesh.shape["data"] > 1 and config.batch_size % mesh.shape["data"] == 0 and not accumulates


def row_of(log: StepLog, metrics: Metrics) -> Rows:
  """Sums up the steps of one row, whose `log` has a leading axis of steps, and the evaluation after them: scalars."""
  bad = ~jnp.isfinite(log.loss)
  bad_at_end = ~jnp.isfinite(metrics["loss"])
  first = jnp.where(jnp.any(bad), jnp.argmax(bad) + 1, jnp.where(bad_at_end, len(log.loss), 0))
  return Rows(jnp.mean(log.loss), log.loss[-1], first.astype(jnp.int32), metrics, row_noise(log.noise))


def program_config(config: TrialConfig) -> TrialConfig:
  """Strips a config of what the program does not read: the number of steps, where to stop, probes and parent.

  So trials of every budget and schedule length, with or without probes and from any start, share one compilation.
  """
  return dataclasses.replace(
    config, num_steps=config.eval_every, probes=(), probe_steps=(), parent="", stop_at_target=False
  )


def build_segment(
  workload: Workload, config: TrialConfig, lanes: int, mesh: Mesh, in_turn: int = 1
) -> Callable[..., tuple[TrainState, Rows]]:
  """Builds the program of `_build`, or hands out the one built before.

  Args:
    lanes: trials in one call, over all devices of the axis "trial".
    in_turn: groups of lanes that the program works through one after the other; it divides `lanes`, and the lanes of a group
      run side by side under `vmap`.

  Raises:
    ValueError: as `make_logged_step`, before anything is traced.
  """
  return _build(workload, program_config(config), lanes, mesh, in_turn)


@functools.lru_cache(maxsize=32)
def _build(
  workload: Workload, config: TrialConfig, lanes: int, mesh: Mesh, in_turn: int
) -> Callable[..., tuple[TrainState, Rows]]:
  """Compiles `segment(states, hparams, seeds, num_rows, train, validation) -> (states, rows)`; `states` is donated.

  Every array of `states`, `hparams` and `seeds` has a leading axis of `lanes` trials, which do not touch each other and may
  stand at different steps. `num_rows` (i32[], at most `rows_per_segment`) is an argument, so the same program makes the last,
  shorter segment; as i32[in_turn] it says so for each group of `lane_groups`, and a group of 0 rows costs nothing. `train` are
  the training arrays [N, ...] on the device, `validation` a `Chunked` set whose chunks the axis "data" divides.

  Holds: a lane's numbers depend on its own trial only, bitwise; one program per (workload, config, lanes, in_turn, mesh).
  With a "data" axis that divides the batch size each batch is spread over it; sums over the batch then cross devices and
  losses agree with one device to rounding. In a group of one nothing is vmapped. Norms of gradients cost nothing in steps that do
  not log them, except under vmap, where every step computes them. The order of examples is drawn once for neighbouring lanes
  of one seed and step, for no more epochs than the call reads, and not for lanes that make no rows: it costs as much as the steps of the
  smallest networks.

  Raises:
    ValueError: `in_turn` does not divide the lanes of a device.
  """
  step = make_logged_step(workload, config, mesh)
  spread_lanes = mesh.shape["trial"]
  if lanes % (in_turn * spread_lanes):
    raise ValueError(
      f"{lanes} lanes on {spread_lanes} devices do not make {in_turn} groups: use a multiple of {in_turn * spread_lanes} lanes"
    )
  rows_max, inner = rows_per_segment(config), config.eval_every
  spread = spreads_batches(config, mesh)
  data_sharding = NamedSharding(mesh, P("data"))

  def gather(train: Batch, index: Array) -> Batch:
    batch = jax.tree.map(lambda array: array[index], train)
    return jax.lax.with_sharding_constraint(batch, data_sharding) if spread else batch

  def draw_order(seed: Array, first_step: Array, num_rows: Array, num_examples: int) -> Array:
    if config.with_replacement:
      draw_indices = independent_indices
    else:
      draw_indices = functools.partial(segment_indices, num_read=num_rows * inner)
    return draw_indices(
      stream(seed, ORDER_STREAM),
      first_step,
      num_steps=rows_max * inner,
      batch_size=config.batch_size,
      num_examples=num_examples,
    ).reshape(rows_max, inner, config.batch_size)

  def draw_orders(seeds: Array, first_steps: Array, num_rows: Array, num_examples: int) -> Array:
    draw = functools.partial(draw_order, num_examples=num_examples)
    if lanes == 1:
      return draw(seeds[0], first_steps[0], num_rows[0])[None]

    def after(previous: tuple[Any, Array], lane: tuple[Array, Array, Array]) -> tuple[Any, Array]:
      (last_seed, last_step, last_rows), _ = previous
      seed, first_step, rows = lane
      # with 0 rows nobody reads its order
      drawn = (rows == 0) | ((seed == last_seed) & (first_step == last_step) & (rows <= last_rows))
      drawn_last = jax.lax.cond(drawn, lambda: previous, lambda: (lane, draw(*lane)))
      return drawn_last, drawn_last[1]

    def draw_in_turn(seeds: Array, first_steps: Array, num_rows: Array) -> Array:
      nobody = seeds[0], jnp.int32(-1), num_rows[0]
      blank = jnp.zeros((rows_max, inner, config.batch_size), jnp.int32)
      return jax.lax.scan(after, (nobody, blank), (seeds, first_steps, num_rows))[1]

    rows_of_lanes = num_rows[lane_groups(lanes, in_turn, mesh)]
    # each device draws those of its own lanes, and asks no other how many epochs that takes
    on_each_device = jax.shard_map(draw_in_turn, mesh=mesh, in_specs=P("trial"), out_specs=P("trial"), check_vma=False)
    return on_each_device(seeds, first_steps, rows_of_lanes)

  def lane_segment(
    state: TrainState,
    hparams: Hparams,
    seed: Array,
    indices: Array,
    num_rows: Array,
    train: Batch,
    validation: Chunked,
  ) -> tuple[TrainState, Rows]:
    loss_key = stream(seed, LOSS_STREAM)

    def one_step(state: TrainState, index: Array) -> tuple[TrainState, StepLog]:
      return step(state, hparams, gather(train, index), loss_key)

    def one_row(row: Array, carry: tuple[TrainState, Rows]) -> tuple[TrainState, Rows]:
      state, rows = carry
      state, log = jax.lax.scan(one_step, state, indices[row])
      metrics = evaluate(workload.example_metrics, state.params, state.model_state, validation)
      new = row_of(log, metrics)
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
    num_rows = jnp.broadcast_to(num_rows, in_turn)
    orders = draw_orders(seeds, states.step, num_rows, len(next(iter(train.values()))))
    side_by_side = lanes // in_turn

    def one_group(inputs: tuple[tuple[TrainState, Hparams, Array, Array], Array]) -> tuple[TrainState, Rows]:
      group, rows = inputs
      if side_by_side == 1:
        state, hparam, seed, order = jax.tree.map(lambda array: array[0], group)
        outputs = lane_segment(state, hparam, seed, order, rows, train, validation)
        return jax.tree.map(lambda array: array[None], outputs)
      over_lanes = jax.vmap(lane_segment, in_axes=(0, 0, 0, 0, None, None, None), spmd_axis_name="trial")
      return over_lanes(*group, rows, train, validation)

    if in_turn == 1:
      return one_group(((states, hparams, seeds, orders), num_rows[0]))

    def split(array: Array) -> Array:  # [devices, groups, side by side]: every device has lanes of every group
      apart = array.reshape(spread_lanes, in_turn, -1, *array.shape[1:])
      return jnp.swapaxes(apart, 0, 1).reshape(in_turn, side_by_side, *array.shape[1:])

    def merge(array: Array) -> Array:
      apart = array.reshape(in_turn, spread_lanes, -1, *array.shape[2:])
      return jnp.swapaxes(apart, 0, 1).reshape(lanes, *array.shape[2:])

    groups = jax.tree.map(split, (states, hparams, seeds, orders))
    outputs = jax.lax.map(one_group, (groups, num_rows))
    return jax.tree.map(merge, outputs)

  return jax.jit(
    segment,
    in_shardings=(lane_sharding(mesh),) * 3 + (everywhere(mesh),) * 2 + (spread_chunks(mesh),),
    out_shardings=lane_sharding(mesh),
    donate_argnums=0,
  )


def idle_lanes(workload: Workload, config: TrialConfig, lanes: int, mesh: Mesh) -> tuple[TrainState, Hparams, Array]:
  """Makes the states, hyperparameters and seeds of lanes that hold no trial: zeros, as sharded as the segment wants them."""
  one = jax.eval_shape(
    lambda hparams, seed: init_state(workload, config.optimizer, hparams, seed),
    Hparams(*(jnp.float32(0) for _ in Hparams._fields)),
    jnp.uint32(0),
  )
  states = jax.tree.map(lambda leaf: np.zeros((lanes, *leaf.shape), leaf.dtype), one)
  hparams = jax.tree.map(lambda _: np.zeros(lanes, np.float32), Hparams(*range(len(Hparams._fields))))
  return jax.device_put((states, hparams, np.zeros(lanes, np.uint32)), lane_sharding(mesh))


def lane_sharding(mesh: Mesh) -> NamedSharding:
  """Spreads a leading axis of lanes over the axis "trial"."""
  return NamedSharding(mesh, P("trial"))


def everywhere(mesh: Mesh) -> NamedSharding:
  """Puts a copy on every device of the mesh."""
  return NamedSharding(mesh, P())


def lane_groups(lanes: int, in_turn: int, mesh: Mesh) -> np.ndarray:
  """Says in which of the groups that take turns each lane is, i[lanes]: neighbours on one device are side by side."""
  per_device = lanes // mesh.shape["trial"]
  return np.arange(lanes) % per_device // (per_device // in_turn)


def device_arrays(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
  """Puts a data set on every device of the mesh: the path for data that fit one device."""
  return jax.device_put(dict(arrays), everywhere(mesh))
