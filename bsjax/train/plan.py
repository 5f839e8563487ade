"""The plan of a pool: how many trials run side by side, and how many in turn, inside one program.

A plan changes nothing but the time. In turn, a trial's numbers are bitwise those it has alone. Side by side, each step rounds
differently: losses agree to 1e-6 over the first steps, then training amplifies the difference as it would any other, after 300 steps to
1e-5 or 1e-4 of a small loss, and to more under batch norm at B = 4. In float64 it is 1e-12, 1e-8 with batch norm: nothing else differs.

Steps of small networks are bound by starting their operations and gain from running side by side; larger ones are bound by arithmetic
and memory, and lose by it. A table of measured break-evens decides where the answer is clear or hardly matters; near a break-even,
and where the pool is long enough to repay it, both neighbours are timed. A folder remembers what was decided.
"""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bsjax.records import RecordError, trial_id
from bsjax.records.folder import read_json, write_json
from bsjax.train.evaluate import Chunked
from bsjax.train.segment import build_segment, idle_lanes, program_config, rows_per_segment
from bsjax.train.trial import Trial, TrialConfig
from bsjax.types import Batch, Hparams
from bsjax.workloads import Workload, num_params

PLANS_FILE = "plans.json"
"""What was decided for the pools of a folder, beside their trials: a pool that goes on must go on with the same program."""


class Plan(NamedTuple):
  """How each device of the mesh axis "trial" works through its trials; several devices share a pool's trials between them."""

  side_by_side: int = 1
  """Trials that one device runs together, under `vmap`."""
  in_turn: int = 1
  """Groups of such trials that one call of the program works through, one after the other, under `lax.map`."""


PLANS = {"sequential": Plan(), "map": Plan(1, 8), "vmap": Plan(8, 1), "map_of_vmap": Plan(8, 8)}
"""Plans by name, to be forced; "shard" is any of them on a mesh whose axis "trial" has several devices."""


def num_lanes(plan: Plan, mesh: Mesh) -> int:
  """Counts the trials that a pool holds at a time, on all devices."""
  return plan.side_by_side * plan.in_turn * mesh.shape["trial"]


class Row(NamedTuple):
  """A line of a table: the plan of steps of fewer FLOP than `below`."""

  below: float
  plan: Plan


TABLES = {
  "cpu": (Row(1.6e6, Plan(8, 8)), Row(2e7, Plan(1, 8)), Row(math.inf, Plan())),
  "gpu": (Row(2e9, Plan(8, 1)), Row(math.inf, Plan())),
}
"""By backend. CPU: measured (docs/bench_sweep.md). GPU, and whatever is not named: a guess until it is measured."""
CROWD, CROWD_FLOPS, CROWD_PLAN = 32, 1e5, Plan(32, 2)
"""On the CPU, so many waiting trials of smaller steps than that fill a wider plan; with fewer, idle lanes would cost as much as busy
ones."""
UNSURE = 2.5
"""A step within this factor of a break-even may be on either side of it: the table was measured on other networks."""
MEASURE_FROM = 500_000
"""Trial-steps from which timing two plans pays. On the CPU the loser's compilation and the timing take about 3 seconds, and a
wrong choice near a break-even loses about 10 microseconds a step."""
REPEATS = 3


class Choice(NamedTuple):
  """A plan and what it rests on: "table", "measured" or "forced"; `seconds` per step of a trial, of the plans that were timed."""

  plan: Plan
  basis: str
  seconds: tuple[tuple[Plan, float], ...] = ()


@functools.lru_cache(maxsize=32)
def step_flops(workload: Workload, batch_size: int) -> float:
  """Estimates the FLOP of one step: three times those of the loss of a batch, or 6 P B if that is more.

  The first counts convolutions, whose filters are used at every position; the second what is inside loops, which XLA counts once.
  Nothing is compiled.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  params, model_state = jax.eval_shape(workload.init, key)
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, *spec.shape), spec.dtype) for name, spec in workload.train.spec.items()
  }
  cost = jax.jit(workload.train_loss).lower(params, model_state, batch, key).cost_analysis() or {}
  return max(3 * cost.get("flops", 0.0), 6.0 * num_params(workload) * batch_size)


def candidates(flops: float, num_trials: int, backend: str) -> list[Plan]:
  """Lists the plan that the table has for a step of so many FLOP, and after it, near a break-even, that of the other side.

  Args:
    num_trials: that wait for one device.
  """
  if backend == "cpu" and num_trials >= CROWD and flops < CROWD_FLOPS:
    return [CROWD_PLAN]
  table = TABLES.get(backend, TABLES["gpu"])
  here = next(index for index, row in enumerate(table) if flops < row.below)
  found = [table[here].plan]
  if here and flops < table[here - 1].below * UNSURE:
    found.append(table[here - 1].plan)
  elif flops * UNSURE >= table[here].below:
    found.append(table[here + 1].plan)
  return found


def choose_plan(plans: list[Plan], trial_steps: int, measure: Callable[[Plan], float]) -> Choice:
  """Picks a plan: the first of the candidates, or the fastest where it pays to time them.

  Args:
    trial_steps: how many steps of all trials lie ahead.
    measure: gives the seconds per step of a trial under a plan.
  """
  if len(plans) == 1 or trial_steps < MEASURE_FROM:
    return Choice(plans[0], "table")
  timed = tuple((plan, measure(plan)) for plan in plans)
  return Choice(min(timed, key=lambda pair: pair[1])[0], "measured", timed)


def measure_plan(
  workload: Workload, config: TrialConfig, plan: Plan, mesh: Mesh, seeds: list[int], train: Batch, validation: Any
) -> float:
  """Times the very program of a plan, on states of zeros: seconds per step of a trial, the best of a few segments.

  The program is compiled, and of the plan that wins this is the compilation that its pool uses.

  Args:
    seeds: of the trials that wait; trials of one seed share the drawing of their order.
    train: on the device, as `validation`, a `Chunked` set.
  """
  lanes = num_lanes(plan, mesh)
  segment = build_segment(workload, config, lanes, mesh, plan.in_turn)
  states, hparams, idle_seeds = idle_lanes(workload, config, lanes, mesh)
  seeds_array = jax.device_put(np.resize(np.asarray(seeds, np.uint32), lanes), idle_seeds.sharding)
  rows = rows_per_segment(config)
  times = []
  for num_rows in (0, *[rows] * REPEATS):  # the first call compiles
    started = time.perf_counter()
    states, _ = segment(states, hparams, seeds_array, np.full(plan.in_turn, num_rows, np.int32), train, validation)
    jax.block_until_ready(states)
    times.append(time.perf_counter() - started)
  return min(times[1:]) / (rows * config.eval_every * lanes)


def decide_plan(
  forced: Plan | None,
  workload: Workload,
  waiting: list[Trial],
  folder: Path,
  mesh: Mesh,
  checkpoints: Path,
  train: Batch | None = None,
  validation: Chunked | None = None,
) -> Plan:
  """Settles the plan of a pool and leaves it in the folder, where a rerun finds it.

  Args:
    forced: the plan that it has to be; None: the remembered one, else the fastest.
    waiting: trials of one config.
    checkpoints: where trials that were begun have their states.
    train, validation: on the device, to time plans with; needed unless a plan is forced.

  Raises:
    RecordError: trials were begun under another plan than the forced one, or the file is damaged.
  """
  config = waiting[0].config
  remembered = remembered_plan(folder, config, mesh)
  if forced is not None and remembered not in (None, forced) and checkpoints.exists():
    raise RecordError(
      f"the trials of {checkpoints} were begun under {tuple(remembered)}, wanted plan={tuple(forced)}: leave plan out to go on with them, "
      "or delete that folder to begin them anew"
    )
  if remembered is not None and forced in (None, remembered):
    return remembered
  if forced is not None:
    choice = Choice(forced, "forced")
  else:
    seeds = sorted(trial.seed for trial in waiting)
    for_each = -(-len(waiting) // mesh.shape["trial"])
    plans = candidates(step_flops(workload, config.batch_size), for_each, jax.default_backend())
    assert train is not None
    measure = lambda plan: measure_plan(workload, config, plan, mesh, seeds, train, validation)  # noqa: E731
    choice = choose_plan(plans, len(waiting) * config.num_steps, measure)
  remember_plan(folder, config, mesh, choice)
  return choice.plan


def remembered_plan(folder: Path, config: TrialConfig, mesh: Mesh) -> Plan | None:
  """Reads what was decided for this program in this folder, on this kind of device and so many of them; None if nothing was.

  Raises:
    RecordError: the file is damaged.
  """
  entry = _read_plans(folder).get(_program_id(config))
  if entry is None or (entry["device_kind"], entry["devices"]) != _device(mesh):
    return None
  return Plan(entry["side_by_side"], entry["in_turn"])


def remember_plan(folder: Path, config: TrialConfig, mesh: Mesh, choice: Choice) -> None:
  """Writes a decision, before the first step that follows it."""
  kind, devices = _device(mesh)
  entry = {
    "workload": config.workload,
    "batch_size": config.batch_size,
    "optimizer": config.optimizer,
    **choice.plan._asdict(),
    "device_kind": kind,
    "devices": devices,
    "basis": choice.basis,
    "seconds_per_step": [{**plan._asdict(), "seconds": seconds} for plan, seconds in choice.seconds],
  }
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / PLANS_FILE, _read_plans(folder) | {_program_id(config): entry})


def _read_plans(folder: Path) -> dict[str, Any]:
  path = folder / PLANS_FILE
  if not path.exists():
    return {}
  try:
    return read_json(path)
  except RecordError as error:
    raise RecordError(
      f"{path} is not whole JSON: delete that file and the folder checkpoints beside it, and run again"
    ) from error


def _program_id(config: TrialConfig) -> str:
  return trial_id(Trial(program_config(config), Hparams(0.0), 0).description["config"])


def _device(mesh: Mesh) -> tuple[str, int]:
  return mesh.devices.flat[0].device_kind, mesh.shape["trial"]
