"""The time of one training step on this machine."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bsjax.data import segment_indices
from bsjax.records import append_rows, create_trial, read_record, set_status, trial_id
from bsjax.train import ORDER_STREAM, TrainState, Trial, TrialConfig, init_state, make_step, stream
from bsjax.types import Array, Batch, Hparams
from bsjax.workloads import Workload

TIMED_SECONDS, TIMED_REPEATS = 0.15, 5
DISTINCT_BATCHES, TIMED_BYTES = 64, 2**28


def time_steps(workload: Workload, config: TrialConfig, hparams: Hparams) -> list[dict[str, Any]]:
  """Measures the seconds of one training step inside a compiled loop, without evaluation, one trial by itself.

  Compiles first, doubles the number of steps until a call takes half of `TIMED_SECONDS`, then times `TIMED_REPEATS` calls.
  The batches are the first `DISTINCT_BATCHES` of an epoch's order, over and over, drawn from the first examples that `TIMED_BYTES` hold, or
  from one batch of them: reading the rest is not timed.

  Returns: one row per repeat with `seconds_per_step` and `examples_per_second` (wall clock).
  """
  step = make_step(workload, config)
  fitting = TIMED_BYTES * len(workload.train) // workload.train.nbytes
  count = min(len(workload.train), max(config.batch_size, fitting))
  train = {name: jnp.asarray(array) for name, array in workload.train.first(count).arrays.items()}
  key = stream(jnp.uint32(0), ORDER_STREAM)
  indices = segment_indices(
    key,
    jnp.int32(0),
    num_steps=DISTINCT_BATCHES,
    batch_size=config.batch_size,
    num_examples=count,
  )

  @jax.jit
  def many(state: TrainState, hparams: Hparams, num_steps: Array, indices: Array, train: Batch) -> TrainState:
    def one(number: Array, state: TrainState) -> TrainState:
      batch = {name: array[indices[number % DISTINCT_BATCHES]] for name, array in train.items()}
      return step(state, hparams, batch, key)[0]

    return jax.lax.fori_loop(0, num_steps, one, state)

  state = init_state(workload, config.optimizer, hparams, jnp.uint32(0))

  def seconds(num_steps: int) -> float:
    began = time.perf_counter()
    jax.block_until_ready(many(state, hparams, jnp.int32(num_steps), indices, train))
    return time.perf_counter() - began

  seconds(1)
  num_steps = 1
  while seconds(num_steps) < TIMED_SECONDS / 2 and num_steps < 2**20:
    num_steps *= 2
  rows = []
  for repeat in range(TIMED_REPEATS):
    per_step = seconds(num_steps) / num_steps
    rows.append(
      {
        "step": repeat,
        "repeat": repeat,
        "num_steps": num_steps,
        "seconds_per_step": per_step,
        "examples_per_second": config.batch_size / per_step,
      }
    )
  return rows


def record_timing(workload: Workload, trial: Trial, folder: Path, provenance: dict[str, Any]) -> None:
  """Times the steps of a trial's configuration into a record of kind "timing" below `folder`, once: a finished one is kept on a rerun."""
  description = {"kind": "timing"} | trial.description
  path = folder / trial_id(description)
  if not (path / "status.json").exists() or read_record(path).status["state"] != "complete":
    create_trial(path, {"id": path.name} | description | provenance)
    append_rows(path / "metrics.jsonl", time_steps(workload, trial.config, trial.hparams))
    set_status(path, "complete")
