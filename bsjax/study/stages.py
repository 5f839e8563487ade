"""Batch-size schedules: a training in stages, each of one batch size, each going on where the one before ended."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from bsjax.records import Record, read_record
from bsjax.train import Plan, Trial, TrialConfig, make_trial, run_trials
from bsjax.types import Hparams
from bsjax.workloads import Workload

SEEDS_APART = 10_000
"""Each stage draws its order of examples from a seed of its own, so that none repeats the first epoch of another."""


class Stage(NamedTuple):
  """A stretch of training at one batch size and rate."""

  batch_size: int
  rate_factor: float
  """Times the training's learning rate."""
  num_epochs: float


def growth_stages(
  batch_size: int, *, factor: float, at_epochs: Sequence[float], num_epochs: float, largest: int
) -> list[Stage]:
  """Grow the batch where a schedule would divide the rate: rate / batch size falls by the same factor.

  Args:
    batch_size: of the first stage.
    factor: by which the batch grows at each of `at_epochs`, above 1.
    num_epochs: of the whole training.
    largest: the batch grows no further than this; what is left of the factor divides the rate instead.

  Raises:
    ValueError: epochs that do not ascend within the training, a factor of 1 or less, or a first batch beyond the largest.

  Source: Smith et al. (2018), "Don't decay the learning rate, increase the batch size", section 5.1; they name N / 10 for `largest`.

  >>> [stage[:2] for stage in growth_stages(128, factor=5, at_epochs=[60, 120, 160], num_epochs=200, largest=5120)]
  [(128, 1.0), (640, 1.0), (3200, 1.0), (5120, 0.32)]
  """
  bounds = [0.0, *at_epochs, num_epochs]
  if not all(before < after < math.inf for before, after in zip(bounds, bounds[1:], strict=False)):
    raise ValueError(f"at_epochs={list(at_epochs)}: wanted ascending epochs between 0 and num_epochs={num_epochs:g}")
  if not 1 < factor < math.inf:
    raise ValueError(f"factor={factor:g}, wanted a finite number above 1")
  if not 1 <= batch_size <= largest:
    raise ValueError(f"batch_size={batch_size}, wanted 1 to largest={largest}")
  stages = []
  for number, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
    wanted = batch_size * factor**number
    size = min(largest, round(wanted))
    stages.append(Stage(size, min(1.0, size / wanted), end - begin))
  return stages


def num_steps_of(stage: Stage, train_size: int) -> int:
  """Counts the updates of a stage, at least one."""
  return max(1, round(stage.num_epochs * train_size / stage.batch_size))


def run_stages(
  workload: Workload,
  next_stage: Callable[[Sequence[Record]], Stage | None],
  hparams: Hparams,
  seed: int,
  folder: Path,
  *,
  mesh: Mesh,
  optimizer: str = "sgd",
  rows_per_stage: int = 16,
  probe: Any = None,
  probes: tuple[str, ...] = (),
  provenance: dict[str, Any] | None = None,
) -> list[Record]:
  """Trains stage after stage and returns their records; parameters, moments and batch-norm statistics go on.

  Args:
    next_stage: told the records so far, returns the next stage or None at the end: a list's turn, or a choice by what was measured.
    probe, probes: measured at the end of every stage; see `run_trials`.
    rows_per_stage: evaluations in a stage, about.

  Holds: one compiled program for every batch size. A rerun computes what is missing. Stages after one that diverged are not trained. Steps
  and examples in the rows are those of the stage; `join_stages` counts on.
  """
  records: list[Record] = []
  while (stage := next_stage(records)) is not None:
    trial = _trial_of(workload, stage, hparams, seed, records, optimizer, rows_per_stage, probes)
    run_trials(  # one trial at a time: no lanes beside it
      workload, [trial], folder, mesh=mesh, probe=probe, provenance=provenance, keep_final=True, plan=Plan()
    )
    records.append(read_record(folder / trial.id))
    if records[-1].status["state"] != "complete":
      break
  return records


def listed(stages: Sequence[Stage]) -> Callable[[Sequence[Record]], Stage | None]:
  """Turns a list of stages into a `next_stage`."""
  return lambda records: stages[len(records)] if len(records) < len(stages) else None


def _trial_of(
  workload: Workload,
  stage: Stage,
  hparams: Hparams,
  seed: int,
  records: Sequence[Record],
  optimizer: str,
  rows_per_stage: int,
  probes: tuple[str, ...],
) -> Trial:
  num_steps = num_steps_of(stage, len(workload.train))
  every = max(1, num_steps // rows_per_stage)
  num_steps = -(-num_steps // every) * every
  config = TrialConfig(
    workload=workload.name,
    batch_size=stage.batch_size,
    num_steps=num_steps,
    eval_every=every,
    optimizer=optimizer,
    probes=probes,
    probe_steps=(num_steps,) if probes else (),
    parent=records[-1].id if records else "",
  )
  scaled = hparams._replace(learning_rate=hparams.learning_rate * stage.rate_factor)
  return make_trial(config, scaled, seed + SEEDS_APART * len(records))


def join_stages(records: Sequence[Record]) -> list[dict[str, Any]]:
  """Strings the rows of all stages together, with steps, examples and tokens counted from the start of the training."""
  rows: list[dict[str, Any]] = []
  before = dict.fromkeys(("step", "examples_seen", "tokens_seen"), 0)
  for record in records:
    batch_size = {"batch_size": record.trial["config"]["batch_size"]}
    rows += [
      row | {name: count + row[name] for name, count in before.items() if name in row} | batch_size
      for row in record.metrics
    ]
    if rows:
      before = {name: rows[-1].get(name, 0) for name in before}
  return rows


def noise_batch_size(noise_scale: float, *, exchange_rate: float, smallest: int, largest: int) -> int:
  """Chooses the next batch size from the gradient noise scale: sqrt(r x noise scale), rounded, within bounds.

  Args:
    noise_scale: in examples; NaN, where it could not be measured, gives the smallest.
    exchange_rate: r, in examples a step: how many more examples one may look at to save one update.

  Source: McCandlish et al. (2018), equations D.2 and D.3: r = B^2 / noise_scale is held constant.
  """
  if not (exchange_rate > 0 and 1 <= smallest <= largest):
    raise ValueError(
      f"{exchange_rate=}, {smallest=}, {largest=}: wanted a positive number and 1 <= smallest <= largest"
    )
  if not noise_scale >= 0:
    return smallest
  return min(largest, max(smallest, round(min(1e18, math.sqrt(exchange_rate * noise_scale)))))
