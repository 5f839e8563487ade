"""What a batch-size study trains: batch sizes, budgets, seeds and the first grid of rates, all decided before the first step."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from bsjax.optim import scale_learning_rate
from bsjax.train import TrialConfig
from bsjax.types import Hparams
from bsjax.workloads import Workload, num_params

ROWS_PER_TRIAL = 512
"""The longer of the two budgets is evaluated about this often, so steps to target are coarse by 1/512 of that budget."""
FIRST_FINAL_SEED = 1000
"""Final seeds begin here: no seed that chose a rate also judges it."""


@dataclass(frozen=True)
class Plan:
  """A study, as plain numbers; two studies with equal plans give equal records."""

  batch_sizes: tuple[int, ...]
  num_epochs: float
  num_steps: int
  optimizer: str
  schedule: str
  warmup_fraction: float
  momentum: float
  weight_decay: float
  base_learning_rate: float
  reference_batch_size: int
  scaling_rule: str
  num_rates: int
  tuning_seeds: int
  final_seeds: int

  @property
  def tuning_seed_values(self) -> list[int]:
    """The seeds that choose the rate."""
    return list(range(self.tuning_seeds))

  @property
  def final_seed_values(self) -> list[int]:
    """The seeds that are reported."""
    return list(range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + self.final_seeds))


def make_plan(workload: Workload, **overrides: object) -> Plan:
  """Takes the workload's preset and replaces what `overrides` gives (None keeps the preset's).

  Raises:
    ValueError: a number out of range; the message names it.
  """
  preset = workload.preset
  plan = Plan(
    batch_sizes=preset.batch_sizes,
    num_epochs=preset.num_epochs,
    num_steps=preset.num_steps,
    optimizer="sgd",
    schedule="constant",
    warmup_fraction=0.0,
    momentum=0.9,
    weight_decay=0.0,
    base_learning_rate=preset.base_learning_rate,
    reference_batch_size=preset.reference_batch_size,
    scaling_rule="sqrt",
    num_rates=preset.num_rates,
    tuning_seeds=preset.tuning_seeds,
    final_seeds=preset.final_seeds,
  )
  given = {name: value for name, value in overrides.items() if value is not None}
  plan = dataclasses.replace(plan, **given)  # type: ignore[arg-type]
  _check(plan, len(workload.train))
  return plan


def _check(plan: Plan, train_size: int) -> None:
  if not plan.batch_sizes:
    raise ValueError("--batch_sizes is empty, wanted at least one batch size")
  for size in plan.batch_sizes:
    if size < 1:
      raise ValueError(f"--batch_sizes has {size}, wanted at least 1")
    if size > train_size:
      raise ValueError(
        f"--batch_sizes has {size}, but the training set has {train_size} examples: use at most {train_size}"
      )
  if not (math.isfinite(plan.base_learning_rate) and plan.base_learning_rate > 0):
    raise ValueError(f"--base_learning_rate={plan.base_learning_rate}, wanted a finite number above 0")
  if not (math.isfinite(plan.num_epochs) and plan.num_epochs > 0):
    raise ValueError(f"--num_epochs={plan.num_epochs}, wanted a finite number above 0")
  for name, least in (
    ("num_steps", 1),
    ("num_rates", 1),
    ("tuning_seeds", 1),
    ("final_seeds", 3),
    ("reference_batch_size", 1),
  ):
    if getattr(plan, name) < least:
      raise ValueError(f"--{name}={getattr(plan, name)}, wanted at least {least}")
  if not 0 <= plan.momentum < 1:
    raise ValueError(f"--momentum={plan.momentum}, wanted 0 <= momentum < 1")
  if not (math.isfinite(plan.weight_decay) and plan.weight_decay >= 0):
    raise ValueError(f"--weight_decay={plan.weight_decay}, wanted a finite number, 0 or more")
  if not 0 <= plan.warmup_fraction < 1:
    raise ValueError(f"--warmup_fraction={plan.warmup_fraction}, wanted 0 <= warmup_fraction < 1")


def workload_facts(workload: Workload) -> dict[str, Any]:
  """Describes a workload in `study.json`, for an analysis that sees nothing else; of a text, also the tokens of an example."""
  facts = {
    "workload": workload.name,
    "dataset": workload.train.name,
    "train_size": len(workload.train),
    "validation_size": len(workload.validation),
    "test_size": len(workload.test),
    "num_params": num_params(workload),
    "batch_norm": workload.batch_norm,
  }
  return facts | ({"tokens_per_example": workload.tokens_per_example} if workload.tokens_per_example else {})


def budget_steps(plan: Plan, budget: str, *, batch_size: int, train_size: int) -> int:
  """Counts the updates of a budget, rounded down to whole evaluation intervals (by less than 1/512 of the longer budget).

  "steps" allows every batch size the same updates; "epochs" allows the same examples: num_epochs * N / B updates.
  """
  every = eval_every(plan, batch_size=batch_size, train_size=train_size)
  steps = plan.num_steps if budget == "steps" else round(plan.num_epochs * train_size / batch_size)
  return max(every, steps - steps % every)


def eval_every(plan: Plan, *, batch_size: int, train_size: int) -> int:
  """Chooses the steps between evaluations: the same for both budgets of a batch size, so that they share one program."""
  shorter, longer = sorted((plan.num_steps, round(plan.num_epochs * train_size / batch_size)))
  return max(1, min(longer // ROWS_PER_TRIAL, shorter))


def make_config(
  plan: Plan, workload_name: str, budget: str, *, batch_size: int, train_size: int, probes: tuple[str, ...] = ()
) -> TrialConfig:
  """Builds the static configuration of a budget's trials; `probes` are made at the last step."""
  num_steps = budget_steps(plan, budget, batch_size=batch_size, train_size=train_size)
  return TrialConfig(
    workload=workload_name,
    batch_size=batch_size,
    num_steps=num_steps,
    eval_every=eval_every(plan, batch_size=batch_size, train_size=train_size),
    optimizer=plan.optimizer,
    schedule=plan.schedule,
    warmup="gradual" if plan.warmup_fraction else "none",
    probes=probes,
    probe_steps=(num_steps,) if probes else (),
  )


def make_hparams(plan: Plan, config: TrialConfig, learning_rate: float) -> Hparams:
  """Builds the hyperparameters of a trial; the warm-up is a fraction of its budget."""
  warmup_steps = min(config.num_steps - 1, round(plan.warmup_fraction * config.num_steps))
  return Hparams(learning_rate, momentum=plan.momentum, weight_decay=plan.weight_decay, warmup_steps=warmup_steps)


def first_rates(plan: Plan, *, batch_size: int) -> list[float]:
  """Lays the first grid of a batch size: `num_rates` factors of 2 around the scaling rule's guess.

  Every rate is `base_learning_rate` times a power of two, so grids of different batch sizes share their points.
  """
  guess = scale_learning_rate(
    plan.scaling_rule,
    plan.base_learning_rate,
    batch_size=batch_size,
    reference_batch_size=plan.reference_batch_size,
  )
  middle = round(math.log2(guess / plan.base_learning_rate))
  first = middle - plan.num_rates // 2
  return [plan.base_learning_rate * 2.0**power for power in range(first, first + plan.num_rates)]
