"""A sweep from plan to records: for every batch size a pilot, rounds of trials, wider spaces, and the best point at fresh seeds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from bsjax.analysis.selection import is_number, steps_to_target
from bsjax.records import Record, read_record
from bsjax.study.plan import workload_facts
from bsjax.study.space import Space, describe_space, draw_points, edges_of, widen
from bsjax.study.sweep_plan import (
  FIRST_FINAL_SEED,
  FIRST_PILOT_SEED,
  GIVE_UP_FACTOR,
  MOST_WIDENINGS,
  PILOT_PARTS,
  PILOT_TRIALS,
  QUANTISATION,
  ROUND,
  SweepPlan,
  fine_every,
  most_steps,
  pilot_every,
  space_of,
  sweep_config,
  sweep_hparams,
)
from bsjax.study.sweep_progress import SweepProgress
from bsjax.train import Plan as LanePlan
from bsjax.train import TrialConfig, make_trial, run_trials
from bsjax.train.pool import Probe
from bsjax.workloads import Workload

SPACE_SEED = 0
"""Every batch size looks at the same quasi-random places of its own space."""
Point = Mapping[str, float]


class Sweep(NamedTuple):
  """What every part of a sweep needs."""

  workload: Workload
  plan: SweepPlan
  folder: Path
  mesh: Mesh
  provenance: dict[str, Any]
  progress: SweepProgress
  name: str = ""
  """What the progress bar calls it, where there are several."""
  lane_plan: LanePlan | None = None
  """How trials take turns: one of `bsjax.train.PLANS`; None: what is fastest."""

  def run(
    self, config: TrialConfig, points: Sequence[Point], seeds: Sequence[int], kind: str, *, probe: Probe | None = None
  ) -> list[Record]:
    """Trains what is missing of some points, each at its seed, and returns the records of all of them."""
    budget = self.budget(config.batch_size)
    trials = [
      make_trial(config, sweep_hparams(self.plan, point, budget, batch_size=config.batch_size), seed)
      for point, seed in zip(points, seeds, strict=True)
    ]
    run_trials(
      self.workload,
      trials,
      self.folder,
      mesh=self.mesh,
      probe=probe,
      provenance={"kind": kind} | self.provenance,
      on_progress=lambda steps: self.progress.advance(config, steps),
      plan=self.lane_plan,
    )
    return [read_record(self.folder / trial.id) for trial in trials]

  def budget(self, batch_size: int) -> int:
    """Counts the steps that a trial may take."""
    return most_steps(self.plan, batch_size=batch_size, train_size=len(self.workload.train))

  def config(self, batch_size: int, num_steps: int, every: int) -> TrialConfig:
    """Builds the configuration of trials that end at their target or at `num_steps`."""
    return sweep_config(self.plan, self.workload, batch_size=batch_size, num_steps=num_steps, every=every)

  def steps(self, record: Record) -> int | None:
    """Reads the steps of a trial to its target."""
    return steps_to_target(record, self.workload.target._asdict())


def run_sweep(sweep: Sweep) -> dict[str, Any]:
  """Trains all batch sizes and returns `study.json`: what the records mean, for an analysis that sees nothing else.

  Holds: what is trained depends on the plan and on the records of earlier rounds only, so a rerun retraces it and computes exactly
  what is missing.
  """
  entries = {}
  for batch_size in sweep.plan.batch_sizes:
    sweep.progress.begin(batch_size, sweep.name)
    entries[str(batch_size)] = _sweep_batch_size(sweep, batch_size)
  plan = sweep.plan
  return {
    **workload_facts(sweep.workload),
    "target": sweep.workload.target._asdict(),
    "batch_sizes": list(plan.batch_sizes),
    "optimizer": plan.optimizer,
    "momentum": plan.momentum,
    "weight_decay": plan.weight_decay,
    "schedule": plan.schedule,
    "warmup": plan.warmup,
    "warmup_fraction": plan.warmup_fraction,
    "scaling_rule": plan.scaling_rule,
    "noise_scale": plan.noise_scale,
    "half_life": plan.half_life,
    "microbatch_size": plan.microbatch_size,
    "num_trials": plan.num_trials,
    "quantisation": QUANTISATION,
    "give_up_factor": GIVE_UP_FACTOR,
    "final_seeds": list(range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + plan.final_seeds)),
    "sweep": entries,
  }


def _sweep_batch_size(sweep: Sweep, batch_size: int) -> dict[str, Any]:
  budget, space = sweep.budget(batch_size), space_of(sweep.plan, batch_size)
  pilot = _run_pilot(sweep, batch_size, space)
  every = fine_every(pilot, budget)
  points = draw_points(space, sweep.plan.num_trials, seed=SPACE_SEED)
  records = _run_rounds(sweep, batch_size, every, points, [], pilot)
  for widening in range(MOST_WIDENINGS + 1):
    edges = _edges(sweep, space, points, records)
    wider, beyond = widen(space, edges)
    if widening == MOST_WIDENINGS or wider == space:
      break
    more = draw_points(beyond, -(-sweep.plan.num_trials // 4), seed=SPACE_SEED + 1 + widening)
    sweep.progress.expect_more(len(more))
    points, space = [*points, *more], wider
    records = _run_rounds(sweep, batch_size, every, points, records, pilot)
  best = _nearest(sweep, records)
  if best is not None and sweep.steps(records[best]) is None:
    best = None
  if best is not None:
    seeds = range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + sweep.plan.final_seeds)
    sweep.run(sweep.config(batch_size, budget, every), [points[best]] * len(seeds), seeds, "final")
  return {
    "num_steps": budget,
    "eval_every": every,
    "num_trials": len(points),
    "space": describe_space(space),
    "edges": edges,
    "best": best,
  }


def _run_pilot(sweep: Sweep, batch_size: int, space: Space) -> int | None:
  """Finds out coarsely how many steps the target takes: in a part of the budget if that is enough, else in more of it."""
  budget = sweep.budget(batch_size)
  points = draw_points(space, PILOT_TRIALS, seed=SPACE_SEED)
  seeds = range(FIRST_PILOT_SEED, FIRST_PILOT_SEED + PILOT_TRIALS)
  fewest = None
  for num_steps in sorted({-(-budget // part) for part in PILOT_PARTS}):
    config = sweep.config(batch_size, num_steps, pilot_every(num_steps))
    fewest = _fewest(sweep, sweep.run(config, points, seeds, "pilot"))
    if fewest is not None:
      break
  return fewest


def _run_rounds(
  sweep: Sweep, batch_size: int, every: int, points: Sequence[Point], records: list[Record], pilot: int | None
) -> list[Record]:
  """Trains the points that have no record yet, round by round; each round ends where its trials can be no minimum any more.

  The first round takes the pilot's word for that; if none of its trials arrived by then, all of them get their whole budget.
  """
  budget = sweep.budget(batch_size)

  def run(numbers: range, most: int) -> list[Record]:
    config = sweep.config(batch_size, most, every)
    return sweep.run(config, [points[number] for number in numbers], numbers, "sweep")

  while len(records) < len(points):
    fewest = _fewest(sweep, records)
    bound = pilot if fewest is None and not records else fewest
    most = budget if bound is None else min(budget, GIVE_UP_FACTOR * bound)
    numbers = range(len(records), min(len(points), len(records) + ROUND))
    found = run(numbers, most)
    if most < budget and fewest is None and _fewest(sweep, found) is None:
      found = run(numbers, budget)
    records = [*records, *found]
  return records


def _fewest(sweep: Sweep, records: Sequence[Record]) -> int | None:
  return min((steps for record in records if (steps := sweep.steps(record)) is not None), default=None)


def _edges(sweep: Sweep, space: Space, points: Sequence[Point], records: Sequence[Record]) -> dict[str, str]:
  """Names the edges that the nearest trial sits on; where all diverged, rates were too large."""
  nearest = _nearest(sweep, records)
  return {"learning_rate": "low"} if nearest is None else edges_of(space, points[nearest])


def _nearest(sweep: Sweep, records: Sequence[Record]) -> int | None:
  """Returns the number of the trial with the fewest steps to its target, or of the one that came nearest; the first of equals.

  None where all diverged.
  """
  target = sweep.workload.target
  sign = -1 if target.direction == "max" else 1

  def rank(number: int) -> tuple[float, float, int]:
    steps = sweep.steps(records[number])
    if steps is not None:
      return steps, 0.0, number
    values = [sign * row[target.metric] for row in records[number].metrics if is_number(row.get(target.metric))]
    return math.inf, min(values, default=math.inf), number

  complete = [number for number, record in enumerate(records) if record.status["state"] == "complete"]
  return min(complete, key=rank, default=None)
