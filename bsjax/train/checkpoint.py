"""Checkpoints of a pool of trials, through Orbax, with a checksum of every array.

Orbax commits atomically but restores flipped bits without a word; so each checkpoint carries the CRC-32 of its arrays,
and one that does not match is passed over for the one before it.
"""

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bsjax.records import RecordError, read_record
from bsjax.train.state import TrainState
from bsjax.train.trial import TrialConfig

KEPT = 2
FINAL = "final"
"""The folder in a trial's directory that holds its last state."""


def _manager(folder: Path) -> ocp.CheckpointManager:
  policy = ocp.checkpoint_managers.preservation_policy
  return ocp.CheckpointManager(
    folder.absolute(),
    options=ocp.CheckpointManagerOptions(preservation_policy=policy.LatestN(KEPT), enable_async_checkpointing=False),
  )


def _checksums(states: TrainState) -> list[int]:
  return [zlib.crc32(np.ascontiguousarray(leaf).tobytes()) for leaf in jax.tree.leaves(states)]


def save_checkpoint(folder: Path, states: TrainState, lanes: list[dict[str, Any]]) -> None:
  """Writes the states of all lanes and which trial each holds, and waits until they are durable."""
  host_states = jax.device_get(states)
  with _manager(folder) as manager:
    number = (manager.latest_step() or 0) + 1
    meta = {"lanes": lanes, "crc32": _checksums(host_states)}
    manager.save(
      number, args=ocp.args.Composite(states=ocp.args.StandardSave(host_states), meta=ocp.args.JsonSave(meta))
    )


def restore_checkpoint(folder: Path, like: TrainState) -> tuple[TrainState, list[dict[str, Any]]] | None:
  """Reads the newest checkpoint whose checksums match, as host arrays; None where none was ever written.

  Args:
    like: a state of the same shapes and dtypes (`jax.eval_shape`'s will do).

  Raises:
    RecordError: there are checkpoints, but none is whole. Never starts silently from scratch.
  """
  if not folder.exists():
    return None
  with _manager(folder) as manager:
    numbers = sorted(manager.all_steps(), reverse=True)
    for number in numbers:
      try:
        found = manager.restore(
          number,
          args=ocp.args.Composite(states=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore()),
        )
      except Exception as error:  # Orbax raises many kinds for a damaged file; which one does not matter here
        print(f"checkpoint {folder / str(number)} cannot be read ({type(error).__name__}): trying the one before it")
        continue
      states = jax.device_get(found["states"])
      if _checksums(states) == found["meta"]["crc32"]:
        return states, found["meta"]["lanes"]
      print(f"checkpoint {folder / str(number)} does not match its checksums: trying the one before it")
  if numbers:
    raise RecordError(f"no whole checkpoint in {folder}: delete that folder to compute its trials anew")
  return None


def save_final(trial_folder: Path, state: TrainState) -> None:
  """Leaves a trial's last state in its directory, for trials that start from it."""
  save_checkpoint(trial_folder / FINAL, state, [])


def restore_final(folder: Path, config: TrialConfig, like: TrainState) -> TrainState:
  """Reads the last state of the trial `config.parent` in `folder`, as host arrays.

  Raises:
    RecordError: the parent is missing, not complete, or its state is missing or damaged.
    ValueError: the parent is of another workload or optimizer than `config`.
  """
  parent = folder / config.parent
  if not (parent / "status.json").exists():
    raise RecordError(f"there is no parent trial {parent}: run it before its children, with keep_final")
  record = read_record(parent)
  if record.status["state"] != "complete":
    raise RecordError(
      f"parent trial {parent} is {record.status['state']}: only the end of a complete one can be a start"
    )
  for name in ("workload", "optimizer"):
    if (theirs := record.trial["config"][name]) != (ours := getattr(config, name)):
      raise ValueError(f"parent trial {parent} has {name}={theirs!r}, its child {ours!r}: they must agree")
  try:
    found = restore_checkpoint(parent / FINAL, like)
  except RecordError:
    found = None
  if found is None:
    raise RecordError(
      f"{parent / FINAL} holds no whole state: delete the folder {parent} and run that trial again with keep_final"
    )
  return found[0]
