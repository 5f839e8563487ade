"""What a study of sharp minima trains: solutions over batch sizes and rates, escapes from two of them, and the edge of stability."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bsjax.optim import OPTIMIZERS, scale_learning_rate
from bsjax.train import TrialConfig
from bsjax.workloads import Workload

Statistics = Literal["running", "batch", "ghost"]
STATISTICS: tuple[Statistics, ...] = ("running", "batch", "ghost")
"""Which batch-norm statistics a measure uses: running averages; those of groups as large as Keskar et al.'s; those of groups of 32."""
ROWS_PER_TRIAL = 512
"""Checkpoints lie on a grid of at most about this many steps, denser early on: see `geometric_steps`."""
CHECKPOINTS, ESCAPE_CHECKPOINTS, EDGE_CHECKPOINTS = 96, 10, 20
RATE_PARTS = (1 / 4, 1.0)
"""Rates of a batch size, as parts of the square-root rule's from the workload's preset."""
EDGE_PARTS = (1 / 4, 1 / 2, 1.0)
"""Rates of the edge of stability, as parts of the rule's at full batch."""
EDGE_SHRINKS = (1, 4, 16)
"""Its batch sizes: the full batch divided by these."""
EDGE_SEEDS = 3
EPOCHS_FACTOR = 4
"""Solutions are trained so many times longer than the workload's preset: sharpness is a matter of the end of training."""
ESCAPE_PART = 1 / 2
"""An escape is followed for this part of the length of the solution that it leaves."""


@dataclass(frozen=True)
class SharpPlan:
  """A study of sharp minima, as plain numbers; two with equal plans give equal records.

  `num_epochs` is where solutions are compared at equal epochs; they train on to `num_steps` steps where that is longer, in search
  of the training loss `train_loss`, at which they are compared too. `num_examples` is on how many of the training examples, the first,
  curvature is measured, and those that the edge of stability trains on. `statistics` says with which batch-norm
  statistics; "running" for a model without batch norm.
  """

  batch_sizes: tuple[int, ...]
  rate_parts: tuple[float, ...]
  num_epochs: float
  num_steps: int
  train_loss: float
  seeds: int
  optimizer: str
  momentum: float
  num_examples: int
  statistics: Statistics


def make_sharp_plan(workload: Workload, **overrides: object) -> SharpPlan:
  """Takes up to five batch sizes of the workload's preset, and replaces what `overrides` gives (None keeps the default).

  Raises:
    ValueError: a number out of range; the message names it.
  """
  preset = workload.preset
  stride = max(1, (len(preset.batch_sizes) - 1) // 4)
  plan = SharpPlan(
    batch_sizes=preset.batch_sizes[::-1][::stride][:5][::-1],
    rate_parts=RATE_PARTS,
    num_epochs=EPOCHS_FACTOR * preset.num_epochs,
    num_steps=preset.num_steps,
    train_loss=preset.train_loss,
    seeds=5,
    optimizer="sgd",
    momentum=0.9,
    num_examples=min(len(workload.train), 10_000),
    statistics="running",
  )
  given = {name: value for name, value in overrides.items() if value is not None}
  plan = dataclasses.replace(plan, **given)  # type: ignore[arg-type]
  _check(plan, workload)
  return plan


def _check(plan: SharpPlan, workload: Workload) -> None:
  train_size = len(workload.train)
  if len(plan.batch_sizes) < 2:
    raise ValueError(f"--batch_sizes has {len(plan.batch_sizes)}, wanted at least 2: small and large are compared")
  for size in plan.batch_sizes:
    if not 1 <= size <= train_size:
      raise ValueError(f"--batch_sizes has {size}, wanted 1 to {train_size}, the size of the training set")
  for name, values in (
    ("rate_parts", plan.rate_parts),
    ("num_epochs", [plan.num_epochs]),
    ("train_loss", [plan.train_loss]),
  ):
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
      raise ValueError(f"--{name}={','.join(f'{value:g}' for value in values)}, wanted finite numbers above 0")
  for name, least in (("num_steps", 1), ("seeds", 2)):
    if getattr(plan, name) < least:
      raise ValueError(f"--{name}={getattr(plan, name)}, wanted at least {least}")
  if plan.optimizer not in OPTIMIZERS:
    raise ValueError(f"--optimizer={plan.optimizer}, wanted one of {', '.join(OPTIMIZERS)}")
  if not 0 <= plan.momentum < 1:
    raise ValueError(f"--momentum={plan.momentum}, wanted 0 <= momentum < 1")
  if not 2 <= plan.num_examples <= train_size:
    raise ValueError(f"--num_examples={plan.num_examples}, wanted 2 to {train_size}, the size of the training set")
  if plan.statistics not in STATISTICS:
    raise ValueError(f"--statistics={plan.statistics}, wanted one of {', '.join(STATISTICS)}")
  if plan.statistics != "running" and workload.batch_norm == "none":
    raise ValueError(f"--statistics={plan.statistics}, but {workload.name} has no batch norm: leave the flag out")


def rule_rate(workload: Workload, batch_size: int) -> float:
  """Returns the square-root rule's rate, from the base rate of the workload's preset."""
  preset = workload.preset
  return scale_learning_rate(
    "sqrt", preset.base_learning_rate, batch_size=batch_size, reference_batch_size=preset.reference_batch_size
  )


def geometric_steps(num_steps: int, every: int, count: int) -> tuple[int, ...]:
  """Lays out at most `count` steps, a constant factor apart as far as the multiples of `every` allow; 0 and the end among them.

  >>> geometric_steps(64, 2, 8)
  (0, 2, 4, 8, 16, 32, 64)
  """
  rows = num_steps // every
  points = np.round(np.geomspace(1, rows, max(2, count - 1))).astype(int)
  return tuple(every * int(row) for row in sorted({0, *points, rows}))


def steps_between_rows(workload: Workload, num_steps: int, batch_size: int, checkpoints: int) -> int:
  """Chooses the steps between two rows, each of which evaluates the validation set.

  A row costs no more than the steps before it (2 P V against 6 P B each), as long as that leaves `checkpoints` of them; and there are
  no more than about `ROWS_PER_TRIAL`.
  """
  finest = max(1, num_steps // ROWS_PER_TRIAL)
  affordable = -(-len(workload.validation) // (3 * batch_size))
  return max(finest, min(affordable, num_steps // checkpoints))


class Grid(NamedTuple):
  """The steps of a batch size's solutions: all of them, those between two evaluations, and where equal epochs are compared."""

  num_steps: int
  every: int
  budget: int


def solution_grid(plan: SharpPlan, workload: Workload, batch_size: int) -> Grid:
  """Counts the steps of the solutions of a batch size, in whole evaluation intervals."""
  budget = max(1, round(plan.num_epochs * len(workload.train) / batch_size))
  longer = max(budget, plan.num_steps)
  every = min(steps_between_rows(workload, longer, batch_size, CHECKPOINTS), budget)
  return Grid(longer - longer % every, every, budget - budget % every)


def solution_config(plan: SharpPlan, workload: Workload, batch_size: int) -> TrialConfig:
  """Builds the configuration of the solutions of a batch size; both comparisons happen at steps of `probe_steps`."""
  grid = solution_grid(plan, workload, batch_size)
  return TrialConfig(
    workload=workload.name,
    batch_size=batch_size,
    num_steps=grid.num_steps,
    eval_every=grid.every,
    optimizer=plan.optimizer,
    probes=("solution",),
    probe_steps=tuple(sorted({*geometric_steps(grid.num_steps, grid.every, CHECKPOINTS), grid.budget})),
  )


def extremes(plan: SharpPlan) -> dict[str, int]:
  """Names the smallest and the largest batch size: escapes and landscapes lie between solutions of these two."""
  return {"small": min(plan.batch_sizes), "large": max(plan.batch_sizes)}


def extreme_part(plan: SharpPlan) -> float:
  """Returns the part of the rule's rate at which the solutions of `extremes` were trained: the largest that does not exceed it."""
  return max((part for part in plan.rate_parts if part <= 1), default=min(plan.rate_parts))


def escape_config(plan: SharpPlan, workload: Workload, batch_size: int) -> TrialConfig:
  """Builds the configuration of a stretch from a minimiser: the same examples for every batch size, checkpoints from step 0 on."""
  steps = max(1, round(ESCAPE_PART * plan.num_epochs * len(workload.train) / batch_size))
  every = steps_between_rows(workload, steps, batch_size, ESCAPE_CHECKPOINTS)
  steps -= steps % every
  return TrialConfig(
    workload=workload.name,
    batch_size=batch_size,
    num_steps=steps,
    eval_every=every,
    optimizer=plan.optimizer,
    probes=("escape",),
    probe_steps=geometric_steps(steps, every, ESCAPE_CHECKPOINTS),
  )


def edge_workload(plan: SharpPlan, workload: Workload) -> Workload:
  """Cuts the training set to the examples on which curvature is measured, where it has more; the name then says so.

  A full-batch step passes over all of them; Cohen et al. (2021) took the first 5,000 of CIFAR-10.
  """
  train = workload.train
  if len(train) <= plan.num_examples:
    return workload
  name = f"{workload.name}_first_{plan.num_examples}"
  return dataclasses.replace(workload, name=name, train=train.first(plan.num_examples))


def edge_batch_sizes(plan: SharpPlan) -> tuple[int, ...]:
  """Returns the full batch and what it is divided into, ascending."""
  return tuple(sorted({max(1, plan.num_examples // shrink) for shrink in EDGE_SHRINKS}))


def edge_seeds(plan: SharpPlan) -> range:
  """Returns the seeds of the edge of stability."""
  return range(min(plan.seeds, EDGE_SEEDS))


def edge_rates(plan: SharpPlan, workload: Workload) -> tuple[float, ...]:
  """Returns the rates at which the edge of stability is looked for, the same at all batch sizes."""
  full = rule_rate(workload, plan.num_examples)
  return tuple(part * full for part in EDGE_PARTS)


def edge_config(plan: SharpPlan, workload: Workload, batch_size: int) -> TrialConfig:
  """Builds the configuration of plain gradient descent at one batch size: equal steps for all."""
  every = steps_between_rows(workload, plan.num_steps, edge_batch_sizes(plan)[0], EDGE_CHECKPOINTS)
  steps = plan.num_steps - plan.num_steps % every
  return TrialConfig(
    workload=workload.name,
    batch_size=batch_size,
    num_steps=steps,
    eval_every=every,
    optimizer="sgd",
    probes=("edge",),
    probe_steps=geometric_steps(steps, every, EDGE_CHECKPOINTS),
  )
