"""A segment whose batches are read from the host while the device computes: for data that do not fit it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bsjax.data import RecordSource, Source, stream_batches
from bsjax.train.evaluate import eval_chunk, evaluate_source
from bsjax.train.path import device_memory
from bsjax.train.segment import Rows, everywhere, lane_sharding, program_config, row_of, spreads_batches
from bsjax.train.state import LOSS_STREAM, ORDER_STREAM, TrainState, stream
from bsjax.train.step import NOISE_COLUMNS, StepLog, make_logged_step
from bsjax.train.trial import TrialConfig
from bsjax.types import Array, Batch, Hparams, Metrics
from bsjax.workloads import Workload

BLOCK_STEPS = 32
"""Steps whose batches are put on the device together, at most: enough that the call costs little beside them."""
BLOCK_SHARE = 1 / 32
"""Of a device's memory, for the batches of one block, unless a single one is larger; two blocks are there at a time."""


def block_steps(source: Source | RecordSource, config: TrialConfig, mesh: Mesh) -> int:
  """Counts the steps of a block: a row is cut into the fewest blocks that keep to `BLOCK_STEPS` and `BLOCK_SHARE`, as equal as can be."""
  devices = mesh.shape["data"] if spreads_batches(config, mesh) else 1
  batch_bytes = config.batch_size // devices * sum(spec.nbytes for spec in source.spec.values())
  most = min(BLOCK_STEPS, max(1, int(BLOCK_SHARE * device_memory(mesh.local_devices[0])) // batch_bytes))
  return -(-config.eval_every // -(-config.eval_every // most))


class Block(NamedTuple):
  """The batches of consecutive steps on the device, `[K, B, ...]`, of which the first `num_steps` are filled."""

  batches: Batch
  num_steps: int


def read_blocks(
  source: Source | RecordSource, config: TrialConfig, mesh: Mesh, seed: int, first_step: int
) -> Iterator[Block]:
  """Yields the batches of a trial from `first_step`, the beginning of a row, to its end; no block goes beyond a row.

  Each process reads its own slice of every batch where batches are spread, and all of it where they are not.

  Raises:
    DataError: when it is the turn of a block whose examples cannot be read.
  """
  spread, sharding = spreads_batches(config, mesh), _block_sharding(config, mesh)
  most, processes = block_steps(source, config, mesh), jax.process_count() if spread else 1
  batches = stream_batches(
    source,
    stream(jnp.uint32(seed), ORDER_STREAM),
    first_step,
    num_steps=config.num_steps - first_step,
    batch_size=config.batch_size,
    with_replacement=config.with_replacement,
    process_index=jax.process_index() if spread else 0,
    process_count=processes,
  )

  def fill(count: int) -> dict[str, np.ndarray]:
    shape = most, config.batch_size // processes
    local = {name: np.zeros((*shape, *spec.shape), spec.dtype) for name, spec in source.spec.items()}
    for number in range(count):
      for name, array in next(batches).items():
        local[name][number] = array
    return local

  def put(array: np.ndarray) -> Array:
    return jax.make_array_from_process_local_data(sharding, array, (most, config.batch_size, *array.shape[2:]))

  for step in range(first_step, config.num_steps, config.eval_every):
    for begin in range(step, step + config.eval_every, most):
      count = min(most, step + config.eval_every - begin)
      yield Block({name: put(array) for name, array in fill(count).items()}, count)


def _block_sharding(config: TrialConfig, mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P(None, "data") if spreads_batches(config, mesh) else P())


@jax.jit
def _only_lane(stacked: Any) -> Any:
  return jax.tree.map(lambda array: array[0], stacked)


@functools.lru_cache(maxsize=32)
def _compile(
  workload: Workload, config: TrialConfig, mesh: Mesh
) -> tuple[Callable[..., tuple[TrainState, StepLog]], Callable[..., Rows]]:
  """Compiles what a row is made of: `block(states, hparams, seeds, log, first, batches, count)` and `finish(log, metrics)`.

  `log` has a place for every step of a row; a block writes those of its `count` steps from place `first` on.
  """
  step = make_logged_step(workload, config, mesh)

  def block(
    states: TrainState, hparams: Hparams, seeds: Array, log: StepLog, first: Array, batches: Batch, count: Array
  ) -> tuple[TrainState, StepLog]:
    state, hparam, seed = _only_lane((states, hparams, seeds))
    loss_key = stream(seed, LOSS_STREAM)

    def one_step(number: Array, carry: tuple[TrainState, StepLog]) -> tuple[TrainState, StepLog]:
      state, log = carry
      batch = jax.tree.map(lambda array: array[number], batches)
      state, told = step(state, hparam, batch, loss_key)
      return state, jax.tree.map(lambda places, value: places.at[first + number].set(value), log, told)

    state, log = jax.lax.fori_loop(0, count, one_step, (state, log))
    return jax.tree.map(lambda array: array[None], state), log

  def finish(log: StepLog, metrics: Metrics) -> Rows:
    return jax.tree.map(lambda value: value[None, None], row_of(log, metrics))

  lanes, copies = lane_sharding(mesh), everywhere(mesh)
  return (
    jax.jit(
      block,
      in_shardings=(lanes, lanes, lanes, copies, copies, _block_sharding(config, mesh), copies),
      out_shardings=(lanes, copies),
      donate_argnums=0,
    ),
    jax.jit(finish),
  )


def streamed_segment(workload: Workload, config: TrialConfig, mesh: Mesh) -> Callable[..., tuple[TrainState, Rows]]:
  """Builds `segment(states, hparams, seeds, num_rows, train, validation) -> (states, rows)`, as `build_segment` does for one lane.

  `train` and `validation` are sources. The batches are read, decoded and put on the device while it computes. At most two blocks are
  there, the one that is computed and the next; the host holds one more, and what `read_ahead` may be ahead. A call returns when its last
  evaluation is done. It reads on where the call before ended; another seed or step opens the stream anew.

  Args:
    mesh: its axis "trial" has one device; batches are spread over "data" as in the compiled segment.

  Raises:
    ValueError: several devices on the axis "trial", and as `make_logged_step`.
    DataError: from a call, a record that cannot be read.

  Holds: the same batches, steps and evaluations as the compiled segment makes; on the CPU bitwise the same numbers (tests).
  """
  if mesh.shape["trial"] > 1:
    raise ValueError(
      f"data_path='streamed' trains one trial at a time, the mesh spreads trials over {mesh.shape['trial']} devices: "
      "give them to the batch, make_mesh(trial=1)"
    )
  block, finish = _compile(workload, program_config(config), mesh)
  noise = {name: jnp.zeros(config.eval_every, dtype) for name, dtype in NOISE_COLUMNS.items() if config.noise_route}
  blank = jax.device_put(StepLog(jnp.zeros(config.eval_every), noise), everywhere(mesh))
  shapes = jax.eval_shape(workload.init, jax.random.key(0))
  chunk_size = eval_chunk(workload.example_metrics, shapes.params, shapes.model_state, workload.validation.spec)
  position: tuple[int, int] | None = None
  blocks: Iterator[Block] = iter(())

  def segment(
    states: TrainState,
    hparams: Hparams,
    seeds: Array,
    num_rows: np.ndarray,
    train: Source | RecordSource,
    validation: Source | RecordSource,
  ) -> tuple[TrainState, Rows]:
    nonlocal position, blocks
    seed, step = int(np.asarray(seeds)[0]), int(np.asarray(states.step)[0])
    if position != (seed, step):
      blocks = read_blocks(train, config, mesh, seed, step)
    position = None  # unless this call comes to its end
    rows = []
    for _ in range(int(np.asarray(num_rows).item())):
      log, first = blank, 0
      while first < config.eval_every:
        batches, count = next(blocks)
        previous = log
        states, log = block(states, hparams, seeds, log, np.int32(first), batches, np.int32(count))
        first += count
        jax.block_until_ready(previous)  # so that the block before is off the device when the next one comes
      params, model_state = _only_lane((states.params, states.model_state))
      metrics = evaluate_source(workload.example_metrics, params, model_state, validation, chunk_size)
      rows.append(finish(log, metrics))
      step += config.eval_every
    position = seed, step
    return states, jax.tree.map(lambda *values: jnp.concatenate(values, axis=1), *rows)

  return segment
