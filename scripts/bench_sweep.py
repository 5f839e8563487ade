"""How fast is a sweep, against the same trials one after another in PyTorch and in a Python loop, and under the best plan found by hand?

  python -m scripts.bench_sweep                                       all cases, some minutes on one core
  python -m scripts.bench_sweep --only=tiny --versus=jax_loop         one case against one opponent
  python -m scripts.bench_sweep --only=mlp512_b8 --trial_devices=2    our trials on two cores at once, by wall time

Prints one JSON object per case and opponent. `ratio` is our time per trial and step over theirs, below 1 is faster: the median of
the ratios of alternating repetitions, `low` and `high` the smallest and the largest of them, `n` their number; `wall_ratio` is the median
of the same by wall time. Clock, pinning and opponents are those of `scripts.bench_train`, whose --repeats holds here too.

Ours is a whole sweep of rates and seeds through `run_trials`, into a new folder each time: plan, seats, records and all. With
--trial_devices as many trials run at once, each on a core of its own, as the devices of the mesh axis "trial"; opponents stay on one.
`bare_seconds` is the same program without records, `first_run_seconds` the wall time of the first sweep of the process, compilation
included. Opponents train one trial at a time and write nothing; their networks are built before the clock starts. Larger cases have
fewer trials.

  torch, jax_loop   as in `scripts.bench_train`
  best_plan         our own sweep under each of the plans of HAND, the fastest of them
Before anything is timed, a trial of the sweep and the opponent train from the same start, and their losses must agree.
"""
# ruff: noqa: I001  (bench_train pins the process before JAX is imported)

from scripts import bench_train
from scripts.bench_train import CHECK_STEPS, HPARAMS, LOSS_TOLERANCE, SEED, Bench, Case, clock, has_torch

import dataclasses
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from bsjax.records import read_records
from bsjax.train import Plan, TrialConfig, build_segment, chunked, device_arrays, make_mesh, make_trial, run_trials
from bsjax.train.evaluate import spread_chunks
from bsjax.train.plan import num_lanes, remembered_plan
from bsjax.train.segment import idle_lanes, rows_per_segment
from bsjax.types import Hparams

_TRIAL_DEVICES = flags.DEFINE_integer("trial_devices", 1, "Devices across which our trials are spread.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A network, how many trials of it (a multiple of `num_seeds`), and the steps of each."""

  case: Case
  num_trials: int
  num_steps: int
  eval_every: int = 64
  num_seeds: int = 4


SWEEPS = {
  "tiny": Sweep(bench_train.CASES["tiny_b8"], 64, 2048),
  "tiny_seeds": Sweep(bench_train.CASES["tiny_b8"], 64, 2048, num_seeds=64),
  "small": Sweep(Case(32, (64,), 10, widths=(64,)), 64, 1024),
  "mlp512_b8": Sweep(bench_train.CASES["mlp512_b8"], 8, 256),
  "cnn_b8": Sweep(bench_train.CASES["cnn_b8"], 4, 64),
}
HAND = (Plan(), Plan(1, 8), Plan(1, 64), Plan(8, 1), Plan(8, 8), Plan(32, 2), Plan(64, 1))
"""Plans tried by hand; those of more lanes than trials are left out."""
OPPONENTS = ("jax_loop", "torch", "best_plan")

for name in ("only", "versus"):  # bench_train's cases and opponents are others
  delattr(flags.FLAGS, name)
_ONLY = flags.DEFINE_list("only", list(SWEEPS), "Cases to run.")
_VERSUS = flags.DEFINE_list("versus", list(OPPONENTS), "Opponents to run against.")
flags.register_validator("only", lambda names: set(names) <= set(SWEEPS), f"wanted some of {', '.join(SWEEPS)}")
flags.register_validator("versus", lambda names: set(names) <= set(OPPONENTS), f"wanted some of {', '.join(OPPONENTS)}")


class Times:
  """Seconds of each call per trial and step: of the CPU, and of the wall, which is all there is for several or other devices."""

  def __init__(self, function: Callable[[], Any], trial_steps: int):
    self.function, self.trial_steps = function, trial_steps
    self.seconds: list[float] = []
    self.wall_seconds: list[float] = []

  def call(self) -> None:
    started, wall_started = clock(), time.perf_counter()
    self.function()
    spent, wall_spent = clock() - started, time.perf_counter() - wall_started
    self.seconds.append((spent if _TRIAL_DEVICES.value == 1 else wall_spent) / self.trial_steps)
    self.wall_seconds.append(wall_spent / self.trial_steps)

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)


class SweepBench:
  """One case: its workload and trials, shared by all of our plans."""

  def __init__(self, sweep: Sweep):
    self.sweep, self.bench = sweep, Bench(sweep.case)
    self.workload, self.mesh = self.bench.workload, make_mesh(trial=_TRIAL_DEVICES.value, data=1)
    self.scratch, self.runs = tempfile.TemporaryDirectory(), itertools.count()
    self.config = TrialConfig(
      "bench", sweep.case.batch_size, sweep.num_steps, sweep.eval_every, optimizer=self.bench.config.optimizer
    )
    rates = [HPARAMS.learning_rate / 2**number for number in range(sweep.num_trials // sweep.num_seeds)]
    seeds = range(SEED, SEED + sweep.num_seeds)
    self.trials = [make_trial(self.config, Hparams(rate), seed) for rate in rates for seed in seeds]
    self.trial_steps = sweep.num_trials * sweep.num_steps

  def run(self, plan: Plan | None = None) -> Plan:
    """Runs the sweep into a new folder, which is removed with all others at the end, and returns the plan that it went by."""
    folder = Path(self.scratch.name) / str(next(self.runs))
    run_trials(self.workload, self.trials, folder, mesh=self.mesh, plan=plan)
    settled = remembered_plan(folder, self.config, self.mesh)
    assert settled is not None
    return settled

  def first_loss(self, plan: Plan) -> float:
    """Trains the trial that every opponent trains for a few steps, among others of the sweep, and returns its mean loss."""
    config = dataclasses.replace(self.config, num_steps=CHECK_STEPS, eval_every=CHECK_STEPS)
    trials = [trial._replace(config=config) for trial in self.trials]
    with tempfile.TemporaryDirectory() as folder:
      run_trials(self.workload, trials, Path(folder), mesh=self.mesh, plan=plan)
      records = {record.id: record for record in read_records(Path(folder))}
    return records[trials[0].id].metrics[0]["train_loss"]

  def bare(self, plan: Plan) -> Times:
    """The segment of a plan by itself: no seats, no rows, no disk."""
    lanes = num_lanes(plan, self.mesh)
    segment = build_segment(self.workload, self.config, lanes, self.mesh, plan.in_turn)
    train = device_arrays(self.workload.train.arrays, self.mesh)
    validation = jax.device_put(chunked(self.workload.validation.arrays), spread_chunks(self.mesh))
    states, hparams, seeds = idle_lanes(self.workload, self.config, lanes, self.mesh)
    seeds = jax.device_put(jnp.arange(lanes, dtype=jnp.uint32) * self.sweep.num_seeds // lanes, seeds.sharding)
    num_rows = min(rows_per_segment(self.config), self.sweep.num_steps // self.config.eval_every)

    def call() -> None:
      nonlocal states
      states, _ = segment(states, hparams, seeds, jnp.full(plan.in_turn, num_rows), train, validation)
      jax.block_until_ready(states)

    return Times(call, lanes * num_rows * self.config.eval_every)


def run_case(name: str, versus: str) -> dict[str, Any]:
  """Checks that both sides train alike, then times them in turn.

  Raises:
    RuntimeError: if their losses differ by more than rounding can.
  """
  ours = SweepBench(SWEEPS[name])
  started = time.perf_counter()
  plan = ours.run()
  first_run = time.perf_counter() - started
  sweep, bare = Times(ours.run, ours.trial_steps), ours.bare(plan)
  if versus == "best_plan":
    plans = [hand for hand in HAND if num_lanes(hand, ours.mesh) <= len(ours.trials)]
    theirs = {hand: Times(lambda hand=hand: ours.run(hand), ours.trial_steps) for hand in plans}  # type: ignore[misc]
  else:
    check = Bench(dataclasses.replace(SWEEPS[name].case, steps=CHECK_STEPS))
    loss, other_loss = ours.first_loss(plan), getattr(check, versus)()()
    if not math.isclose(loss, other_loss, rel_tol=LOSS_TOLERANCE):
      raise RuntimeError(f"{name}: mean loss {loss} of ours and {other_loss} of {versus}, so they do not train alike.")
    theirs = {plan: Times(getattr(ours.bench, versus)(), ours.bench.steps)}
  for side in (bare, *theirs.values()):
    side.function()  # compiles, warms up
  for _ in range(bench_train._REPEATS.value):
    for side in (sweep, bare, *theirs.values()):
      side.call()
  best = min(theirs, key=lambda key: theirs[key].median)
  other = theirs[best]
  ratios = [mine / their for mine, their in zip(sweep.seconds, other.seconds, strict=True)]
  wall_ratios = [mine / their for mine, their in zip(sweep.wall_seconds, other.wall_seconds, strict=True)]
  line = {
    "bench": "sweep",
    "case": name,
    "versus": versus,
    "ratio": round(statistics.median(ratios), 4),
    "low": round(min(ratios), 4),
    "high": round(max(ratios), 4),
    "n": len(ratios),
    "wall_ratio": round(statistics.median(wall_ratios), 4),
    "device": jax.devices()[0].device_kind,
    "clock": "cpu, one core" if jax.default_backend() == "cpu" and _TRIAL_DEVICES.value == 1 else "wall",
    "trial_devices": _TRIAL_DEVICES.value,
    "trials": len(ours.trials),
    "steps": ours.sweep.num_steps,
    "plan": list(plan),
    "seconds": sweep.median,
    "bare_seconds": bare.median,
    "their_seconds": other.median,
    "first_run_seconds": round(first_run, 2),
  }
  if versus == "best_plan":
    line["plans"] = {"x".join(map(str, hand)): times.median for hand, times in theirs.items()}
    line["best"] = "x".join(map(str, best))
  return line


def main(arguments: list[str]) -> None:
  if len(arguments) > 1:
    raise app.UsageError(f"wanted flags only, got {' '.join(arguments[1:])}")
  if _TRIAL_DEVICES.value > 1:
    jax.config.update("jax_num_cpu_devices", _TRIAL_DEVICES.value)  # before anything asks for devices
    if bench_train._ALL_CORES:
      os.sched_setaffinity(0, bench_train._ALL_CORES)
  if bench_train._ALL_CORES and jax.default_backend() != "cpu":
    os.sched_setaffinity(0, bench_train._ALL_CORES)
  opponents = [name for name in _VERSUS.value if name != "torch" or has_torch()]
  for name in _ONLY.value:
    for versus in opponents:
      print(json.dumps(run_case(name, versus)), flush=True)


if __name__ == "__main__":
  app.run(main)
