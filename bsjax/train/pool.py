"""A pool of lanes: trials of one config take turns in one compiled program, and leave records.

A lane that finishes, diverges or has reached the target where its config stops takes the next waiting trial. A lane's
numbers do not depend on its neighbours, so records are the same whatever was already done, interrupted or added.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bsjax.records import RecordError, append_rows, create_trial, cut_rows, read_record, set_status, trial_id
from bsjax.records.write import METRICS, PROBES
from bsjax.train.checkpoint import restore_checkpoint, restore_final, save_checkpoint, save_final
from bsjax.train.evaluate import chunked, eval_chunk, spread_chunks
from bsjax.train.path import DataPath, choose_data_path
from bsjax.train.plan import Plan, decide_plan, num_lanes
from bsjax.train.segment import (
  Rows,
  build_segment,
  device_arrays,
  idle_lanes,
  lane_groups,
  lane_sharding,
  rows_per_segment,
)
from bsjax.train.state import TrainState, branch_state, init_state
from bsjax.train.streamed import streamed_segment
from bsjax.train.trial import Trial, TrialConfig
from bsjax.types import Hparams
from bsjax.workloads import Workload

Probe = Callable[[Trial, TrainState], list[dict[str, Any]]]
"""Measures at a step of `config.probe_steps` and returns flat rows for `probes.jsonl`."""


@functools.lru_cache(maxsize=32)
def _init(workload: Workload, optimizer: str) -> Callable[[Hparams, np.uint32], TrainState]:
  return jax.jit(lambda hparams, seed: init_state(workload, optimizer, hparams, seed))


@functools.lru_cache(maxsize=8)
def _put(sharding: NamedSharding) -> Callable[[Any, Any, int], Any]:
  """Writes one lane of stacked arrays, which keep their sharding: another one would compile the segment again."""

  def put(stacked: Any, one: Any, lane: int) -> Any:
    return jax.tree.map(lambda array, value: array.at[lane].set(value), stacked, one)

  return jax.jit(put, donate_argnums=0, out_shardings=sharding)


@jax.jit
def _take(stacked: Any, lane: int) -> Any:
  return jax.tree.map(lambda array: array[lane], stacked)


@dataclass
class _Lane:
  """A trial in its seat: the step of its state on the device, and how many steps were reported as progress."""

  trial: Trial
  folder: Path
  step: int
  began: float
  reported: int
  diverged_at: int | None = None
  reached: bool = False
  """Its target, in a config that stops there."""

  @property
  def ended(self) -> bool:
    """Whether its rows ended before its steps: what the device computed beyond is not looked at."""
    return self.reached or self.diverged_at is not None


class _InFlight(NamedTuple):
  """A dispatched segment: its rows, how many for each group, and each lane with the step at which they begin."""

  rows: Rows
  num_rows: np.ndarray
  seats: list[tuple[_Lane, int] | None]


def is_finished(folder: Path) -> bool:
  """Tells whether a trial directory needs no more work; a damaged one raises `RecordError`."""
  return (folder / "status.json").exists() and read_record(folder).status["state"] in ("complete", "diverged")


def run_trials(
  workload: Workload,
  trials: Sequence[Trial],
  folder: Path,
  *,
  mesh: Mesh,
  probe: Probe | None = None,
  provenance: dict[str, Any] | None = None,
  on_progress: Callable[[int], None] = lambda steps: None,
  checkpoint_seconds: float = 20.0,
  keep_final: bool = False,
  plan: Plan | None = None,
  data_path: DataPath | None = None,
) -> None:
  """Trains every trial that is not finished and writes its directory `<folder>/<trial id>/`.

  A trial with a `parent` starts from that trial's last parameters, model state and optimizer state, at step 0: its schedule
  begins anew and its order of examples is that of its own seed. The parent lies in the same folder, complete, and was run
  with `keep_final`.

  Args:
    trials: of one config; duplicates are run once.
    mesh: axes "trial" and "data"; lanes are spread over the first, batches over the second.
    probe: called with the state of one trial at each of `config.probe_steps`.
    provenance: written in every `trial.json` (kind, code revision, versions, device, command).
    on_progress: called with the number of trial-steps that were just settled (trained, skipped or given up).
    checkpoint_seconds: at most about this much work is lost to a kill.
    keep_final: leave the last state of each trial that completes in `<folder>/<trial id>/final/`, for trials to start from.
    plan: how many trials run side by side and in turn; None: what the folder remembers, else what is fastest here
      (`bsjax.train.plan`). It decides the time, and the rounding of the numbers.
    data_path: "resident" holds the data on the device, "streamed" reads them from the host and trains one trial at a time; None: by
      size (`bsjax.train.path`). Trained one at a time, trials have the same numbers on both, on the CPU bitwise (tests): what was begun
      on one path may go on on the other.

  Raises:
    ValueError: the trials' configs differ; the parent is of another workload or optimizer; a trial's last state is to be kept where it
      may stop at its target, between two states that the host sees; or the streamed path with several devices for trials, or another plan
      than one trial at a time.
    RecordError: a damaged file; interrupted trials that were begun under another plan or on other devices; a parent that is missing, not
      complete, or without a whole final state.
    DataError: on the streamed path, a record that cannot be read; rows before it are kept, a rerun goes on from the last checkpoint.

  Holds: a rerun after a kill continues from the last checkpoint and gives bitwise the records of an uninterrupted run;
  a diverged trial takes no further segment and never touches another.
  """
  config = trials[0].config
  if any(trial.config != config for trial in trials):
    raise ValueError("trials of one pool must share their config, these differ: run one pool per config")
  if keep_final and config.stop_at_target:
    raise ValueError("keep_final with stop_at_target: the state at the target is not kept, choose one of them")
  waiting = list(dict.fromkeys(trial for trial in trials if not is_finished(folder / trial.id)))
  on_progress(config.num_steps * (len(set(trials)) - len(waiting)))
  if not waiting:
    return

  checkpoints = folder / "checkpoints" / trial_id(trials[0].description["config"])
  way = _prepare(data_path or choose_data_path(workload, mesh), plan, workload, waiting, folder, mesh, checkpoints)
  described = {"plan": way.plan._asdict() | {"devices": mesh.shape["trial"]}, "data_path": way.path}
  if num_lanes(way.plan, mesh) > 1:
    waiting.sort(key=lambda trial: trial.seed)  # neighbours of one seed share the drawing of their order
  pool = _Pool(workload, config, folder, way.plan, mesh, (provenance or {}) | described, probe, on_progress, keep_final)
  pool.restore(checkpoints, waiting)
  saved = time.monotonic()
  in_flight: _InFlight | None = None
  while True:
    due = time.monotonic() - saved > checkpoint_seconds
    must_stop = due or any(lane is not None and pool.must_stop(lane) for lane in pool.lanes)
    if in_flight is not None and (must_stop or way.path == "streamed"):  # a streamed row is done when its call returns
      pool.write(in_flight)
      in_flight = None
    if in_flight is None:
      pool.settle(waiting)
      if all(lane is None for lane in pool.lanes):
        break
      if due:
        save_checkpoint(checkpoints, pool.states, pool.occupants())
        saved = time.monotonic()
    num_rows = np.minimum(pool.next_rows(), way.most_rows)
    pool.states, rows = way.segment(pool.states, pool.hparams, pool.seeds, num_rows, way.train, way.validation)
    dispatched = _InFlight(rows, num_rows, pool.advance(num_rows))
    if in_flight is not None:
      pool.write(in_flight)  # while the device computes the segment just dispatched
    in_flight = dispatched
  shutil.rmtree(checkpoints, ignore_errors=True)
  with contextlib.suppress(OSError):  # other pools may have theirs beside it
    checkpoints.parent.rmdir()


class _Way(NamedTuple):
  """How a pool trains: the segment and what it reads, the plan of its lanes, and the rows of one call."""

  path: DataPath
  plan: Plan
  segment: Callable[..., tuple[TrainState, Rows]]
  train: Any
  validation: Any
  most_rows: int


def _prepare(
  path: DataPath,
  plan: Plan | None,
  workload: Workload,
  waiting: list[Trial],
  folder: Path,
  mesh: Mesh,
  checkpoints: Path,
) -> _Way:
  """Puts the data where the path wants them, settles the plan and builds the segment."""
  config = waiting[0].config
  if path == "streamed":
    if plan not in (None, Plan()):
      raise ValueError(f"data_path='streamed' trains one trial at a time, plan={tuple(plan)} more: leave plan out")
    segment = streamed_segment(workload, config, mesh)
    plan = decide_plan(Plan(), workload, waiting, folder, mesh, checkpoints)
    return _Way(path, plan, segment, workload.train, workload.validation, most_rows=1)
  train = device_arrays(workload.train.arrays, mesh)
  shapes = jax.eval_shape(workload.init, jax.random.key(0))
  size = eval_chunk(workload.example_metrics, shapes.params, shapes.model_state, workload.validation.spec)
  validation = jax.device_put(chunked(workload.validation.arrays, size, mesh.shape["data"]), spread_chunks(mesh))
  plan = decide_plan(plan, workload, waiting, folder, mesh, checkpoints, train, validation)
  segment = build_segment(workload, config, num_lanes(plan, mesh), mesh, plan.in_turn)
  return _Way(path, plan, segment, train, validation, most_rows=rows_per_segment(config))


class _Pool:
  """The lanes with their stacked states on the device: the one mutable thing of a sweep."""

  def __init__(
    self,
    workload: Workload,
    config: TrialConfig,
    folder: Path,
    plan: Plan,
    mesh: Mesh,
    provenance: dict[str, Any],
    probe: Probe | None,
    on_progress: Callable[[int], None],
    keep_final: bool,
  ) -> None:
    self.config, self.folder, self.provenance, self.probe, self.on_progress, self.keep_final = (
      config,
      folder,
      provenance,
      probe,
      on_progress,
      keep_final,
    )
    self.target = workload.target
    self.tokens_per_step = config.batch_size * workload.tokens_per_example
    self._init = _init(workload, config.optimizer)
    self.lanes: list[_Lane | None] = [None] * num_lanes(plan, mesh)
    self.group_of = lane_groups(len(self.lanes), plan.in_turn, mesh)
    self.seats = np.argsort(self.group_of, kind="stable").tolist()
    self.sharding = lane_sharding(mesh)
    self.states, self.hparams, self.seeds = idle_lanes(workload, config, len(self.lanes), mesh)
    self.shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.states)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.shapes)
    self.start = branch_state(restore_final(folder, config, like=one)) if config.parent else None

  @staticmethod
  def _one_hparams(hparams: Hparams) -> Hparams:
    return jax.tree.map(np.float32, hparams)

  def _seat(self, index: int, trial: Trial, folder: Path, state: TrainState, step: int) -> None:
    self.lanes[index] = _Lane(trial, folder, step, time.monotonic(), reported=step)
    self.states, self.hparams, self.seeds = _put(self.sharding)(
      (self.states, self.hparams, self.seeds), (state, self._one_hparams(trial.hparams), np.uint32(trial.seed)), index
    )

  def restore(self, checkpoints: Path, waiting: list[Trial]) -> None:
    """Seats the trials of the last checkpoint that still need work, at the step they had reached."""
    found = restore_checkpoint(checkpoints, self.shapes)
    if found is None:
      return
    states, occupants = found
    if len(occupants) != len(self.lanes):
      raise RecordError(
        f"{checkpoints} holds {len(occupants)} lanes, this pool has {len(self.lanes)} (another plan or device): delete that folder to "
        "compute its unfinished trials anew"
      )
    wanted = {trial.id: trial for trial in waiting}
    for index, occupant in enumerate(occupants):
      if occupant["id"] not in wanted or not (self.folder / occupant["id"] / "status.json").exists():
        continue
      trial = wanted[occupant["id"]]
      waiting.remove(trial)
      folder = self.folder / occupant["id"]
      cut_rows(folder / METRICS, last_step=occupant["step"])
      cut_rows(folder / PROBES, last_step=occupant["step"] - 1)  # `settle` measures at this step again
      self._seat(index, trial, folder, jax.tree.map(lambda array, index=index: array[index], states), occupant["step"])
      self.on_progress(occupant["step"])

  def occupants(self) -> list[dict[str, Any]]:
    """Says for a checkpoint which trial each lane holds and its step; an idle lane has an empty id."""
    return [{"id": lane.folder.name, "step": lane.step} if lane else {"id": "", "step": 0} for lane in self.lanes]

  def must_stop(self, lane: _Lane) -> bool:
    """Tells whether the host must see this lane's state before another segment."""
    return lane.step >= self.config.num_steps or lane.step in self.config.probe_steps or lane.ended

  def next_rows(self) -> np.ndarray:
    """Counts the rows that each group of lanes is to make, i32[in_turn]: none where no lane of it holds a trial.

    As many as any lane has left, at most a segment, but none beyond a step at which the host must see a lane's state. A lane that is
    done before its neighbours goes on unseen: a few wasted steps, against a call for every end where trials end at different times.
    """
    groups: list[list[_Lane | None]] = [[] for _ in range(self.group_of[-1] + 1)]
    for group, lane in zip(self.group_of, self.lanes, strict=True):
      groups[group].append(lane)
    return np.array([self._group_rows(lanes) for lanes in groups], np.int32)

  def _group_rows(self, lanes: list[_Lane | None]) -> int:
    looks = (*self.config.probe_steps, *([self.config.num_steps] if self.keep_final else []))
    steps = [lane.step for lane in lanes if lane is not None]
    ahead = max((self.config.num_steps - step for step in steps), default=0)
    before = min((look - step for step in steps for look in looks if look > step), default=ahead)
    return min(rows_per_segment(self.config), min(ahead, before) // self.config.eval_every)

  def advance(self, num_rows: np.ndarray) -> list[tuple[_Lane, int] | None]:
    """Moves every lane on by a dispatched segment and returns where each of them stood."""
    seats: list[tuple[_Lane, int] | None] = []
    for index, lane in enumerate(self.lanes):
      seats.append(None if lane is None else (lane, lane.step))
      if lane is not None:
        lane.step += int(num_rows[self.group_of[index]]) * self.config.eval_every
    return seats

  def write(self, in_flight: _InFlight) -> None:
    """Fetches the rows of a segment and appends them to their trials, up to a trial's divergence."""
    host: Rows = jax.device_get(in_flight.rows)
    every = self.config.eval_every
    for index, seat in enumerate(in_flight.seats):
      if seat is None or seat[0].ended:
        continue
      lane, first_step = seat
      out: list[dict[str, Any]] = []
      num_rows = min(int(in_flight.num_rows[self.group_of[index]]), (self.config.num_steps - first_step) // every)
      for row in range(num_rows):
        step = first_step + (row + 1) * every
        if bad := int(host.first_nonfinite[index, row]):
          lane.diverged_at = step - every + bad
          break
        out.append(
          {
            "step": step,
            "examples_seen": step * self.config.batch_size,
            **({"tokens_seen": step * self.tokens_per_step} if self.tokens_per_step else {}),
            "train_loss": host.train_loss[index, row],
            "minibatch_loss": host.minibatch_loss[index, row],
            **{f"validation_{name}": values[index, row] for name, values in host.validation.items()},
            **{name: values[index, row] for name, values in host.noise.items()},
          }
        )
        lane.reached = self.config.stop_at_target and self.target.is_reached(float(out[-1][self.target.metric]))
        if lane.reached:
          break
      append_rows(lane.folder / METRICS, out)
      self._report(lane, num_rows * every)

  def _report(self, lane: _Lane, steps: int) -> None:
    lane.reported += steps
    self.on_progress(steps)

  def settle(self, waiting: list[Trial]) -> None:
    """Probes lanes that ask for it, closes those that are done, and seats waiting trials in the free lanes."""
    for index, lane in enumerate(self.lanes):
      if lane is None:
        continue
      if not lane.ended and lane.step in self.config.probe_steps:
        self._measure(index, lane)
      if not lane.ended and lane.step < self.config.num_steps:
        continue
      if self.keep_final and lane.diverged_at is None:
        save_final(lane.folder, _take(self.states, index))
      set_status(
        lane.folder,
        "complete" if lane.diverged_at is None else "diverged",
        first_nonfinite_step=lane.diverged_at,
        wall_seconds=round(time.monotonic() - lane.began, 3),
      )
      self._report(lane, self.config.num_steps - lane.reported)
      self.lanes[index] = None
    for index in self.seats:  # the first groups first: one without trials costs nothing
      if self.lanes[index] is None and waiting:
        trial = waiting.pop(0)
        folder = self.folder / trial.id
        create_trial(folder, {"id": folder.name} | trial.description | self.provenance)
        start = self.start
        if start is None:
          start = self._init(self._one_hparams(trial.hparams), np.uint32(trial.seed))
        self._seat(index, trial, folder, start, 0)
        if 0 in self.config.probe_steps:
          self._measure(index, self.lanes[index])

  def _measure(self, index: int, lane: _Lane | None) -> None:
    assert lane is not None
    assert self.probe is not None, f"config asks for probes {self.config.probes}, run_trials was given none"
    append_rows(lane.folder / PROBES, self.probe(lane.trial, _take(self.states, index)))
