"""What a study of large batches trains: the arms, their search spaces, and budgets of equal epochs."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bsjax.optim import scale_learning_rate
from bsjax.study.space import Dimension, Space, centred
from bsjax.study.sweep_plan import FIRST_FINAL_SEED, RATE_FACTOR
from bsjax.train import TrialConfig
from bsjax.types import Hparams
from bsjax.workloads import Workload

MOMENTUM = 0.9
"""Of every arm; for AdamW and LAMB it is beta1."""
FIRST_REPEAT_SEED = 3000
"""Trials that search have the seeds 0, 1, 2, ...; the best points are repeated at seeds from here on, before the final seeds judge."""
REPEATED_POINTS, REPEATS = 4, 3
"""So many of the best points of a search are trained again at so many fresh seeds, which choose among them: a minimum over single trials
picks luck as well as hyperparameters."""
SHORTEST_WARMUP, LONGEST_WARMUP = 0.05, 0.5
"""Warm-ups are searched between these parts of the budget."""
ROWS_PER_TRIAL = 64
"""Trials are evaluated about this often: steps to target are late by up to 1/64 of the budget."""
SIZE_FACTOR, NUM_SIZES = 4, 3
"""By default the largest batch sizes of the preset, at least this factor apart, and so many of them."""
RECIPE_WARMUP = 5 / 90
"""Goyal et al.'s warm-up: 5 of 90 epochs."""


class Arm(NamedTuple):
  """One way to train large batches: all but the rate and the length of a warm-up, which are tuned.

  `base_learning_rate` is the centre of the search at the reference batch size, where it is not the workload's own; `scaling_rule` carries
  it to other batch sizes. `weight_decay` is the published one.
  """

  optimizer: str
  schedule: str
  warmup: str
  weight_decay: float
  scaling_rule: str
  base_learning_rate: float | None = None


def _momentum(schedule: str, warmup: str) -> Arm:
  return Arm("momentum", schedule, warmup, weight_decay=1e-4, scaling_rule="linear")


ARMS = {
  "momentum_constant": _momentum("constant", "none"),
  "momentum_warmup": _momentum("constant", "gradual"),
  "momentum_cosine": _momentum("cosine", "none"),
  "momentum_warmup_cosine": _momentum("cosine", "gradual"),
  "lars_warmup_cosine": Arm("lars", "cosine", "gradual", 1e-4, "sqrt", 1.0),
  "lamb_warmup_cosine": Arm("lamb", "cosine", "gradual", 0.01, "sqrt", 0.01),
  "adamw_warmup_cosine": Arm("adamw", "cosine", "gradual", 0.01, "sqrt", 0.004),
}
"""Weight decay: Goyal et al. (2017), section 5.1, for momentum and LARS; You et al. (2019, v3), appendix D, for LAMB, and the same for
AdamW. Rules: linear for momentum (Goyal et al., section 2.1); square root for the others (You et al., tables 5 and 6). The centres only say
where the search begins: a best rate on the edge of its space widens it."""
BASELINE = "momentum_constant"
"""What is tuned at the reference batch size, for comparison."""
RECIPES = {"rule_constant": "momentum_constant", "rule_warmup": "momentum_warmup"}
"""Goyal et al.'s linear rule as it stands, untuned: without and with their gradual warm-up. Each trains as this arm does."""


@dataclass(frozen=True)
class LargeBatchPlan:
  """A study of large batches, as plain numbers and names; two with equal plans give equal records.

  Every batch size sees `num_epochs` epochs. `base_learning_rate` is the workload's guess for SGD without momentum at
  `reference_batch_size`, the batch size of the baseline.
  """

  batch_sizes: tuple[int, ...]
  arms: tuple[str, ...]
  num_epochs: float
  num_trials: int
  final_seeds: int
  base_learning_rate: float
  reference_batch_size: int


def make_large_batch_plan(workload: Workload, **overrides: object) -> LargeBatchPlan:
  """Takes the workload's preset and replaces what `overrides` gives (None keeps the preset's).

  Raises:
    ValueError: a number out of range or an unknown arm; the message names it.
  """
  preset = workload.preset
  given = {name: value for name, value in overrides.items() if value is not None}
  reference = int(given.get("reference_batch_size", preset.reference_batch_size))  # type: ignore[call-overload]
  plan = LargeBatchPlan(
    batch_sizes=_largest(preset.batch_sizes, reference),
    arms=tuple(ARMS),
    num_epochs=preset.num_epochs,
    num_trials=32,
    final_seeds=16,
    base_learning_rate=preset.base_learning_rate,
    reference_batch_size=reference,
  )
  plan = dataclasses.replace(plan, **given)  # type: ignore[arg-type]
  check_arms_plan(plan, len(workload.train))
  return plan


def _largest(batch_sizes: tuple[int, ...], reference: int) -> tuple[int, ...]:
  """Picks the largest batch sizes above the reference, at least `SIZE_FACTOR` apart; ascending.

  >>> _largest((1, 2, 4, 8, 16, 32, 64, 128), 4)
  (8, 32, 128)
  """
  chosen: list[int] = []
  for size in sorted(batch_sizes, reverse=True):
    if size > reference and len(chosen) < NUM_SIZES and (not chosen or SIZE_FACTOR * size <= chosen[-1]):
      chosen.append(size)
  return tuple(chosen[::-1])


def check_arms_plan(plan: LargeBatchPlan, train_size: int) -> None:
  """Checks the numbers of a plan.

  Raises:
    ValueError: one that is out of range; the message names it.
  """
  reference = plan.reference_batch_size
  if not 1 <= reference <= train_size:
    raise ValueError(f"--reference_batch_size={reference}, wanted 1 to {train_size}, the size of the training set")
  if not plan.batch_sizes:
    raise ValueError(f"--batch_sizes is empty, wanted at least one above {reference}, the baseline's batch size")
  for size in plan.batch_sizes:
    if not reference < size <= train_size:
      raise ValueError(
        f"--batch_sizes has {size}, wanted more than {reference}, the baseline's batch size (--reference_batch_size), and at most "
        f"{train_size}, the size of the training set"
      )
  unknown = [name for name in plan.arms if name not in ARMS]
  if unknown or not plan.arms:
    raise ValueError(f"--arms={','.join(plan.arms)}, wanted some of {', '.join(ARMS)}")
  for name, least, most in (("num_trials", REPEATED_POINTS, FIRST_FINAL_SEED // 2), ("final_seeds", 2, 1000)):
    if not least <= getattr(plan, name) <= most:
      raise ValueError(f"--{name}={getattr(plan, name)}, wanted {least} to {most}")
  if not (math.isfinite(plan.base_learning_rate) and plan.base_learning_rate > 0):
    raise ValueError(f"base_learning_rate={plan.base_learning_rate:g}, wanted a finite number above 0")
  if not (math.isfinite(plan.num_epochs) and plan.num_epochs > 0):
    raise ValueError(f"--num_epochs={plan.num_epochs:g}, wanted a finite number above 0")
  largest = max(plan.batch_sizes)
  if plan.num_epochs * train_size / largest < 2:
    raise ValueError(
      f"--num_epochs={plan.num_epochs:g} is less than 2 steps at batch size {largest}, wanted at least {2 * largest / train_size:g}"
    )


class Budget(NamedTuple):
  """The steps of every trial of a batch size, and those between two evaluations."""

  num_steps: int
  every: int


def budget_of(plan: LargeBatchPlan, *, batch_size: int, train_size: int) -> Budget:
  """Counts the steps of `num_epochs` epochs, to the nearest whole evaluation interval: off by 1 % at most."""
  steps = plan.num_epochs * train_size / batch_size
  every = max(1, int(steps) // ROWS_PER_TRIAL)
  return Budget(max(2, round(steps / every) * every), every)


def arm_config(
  name: str, workload: Workload, *, batch_size: int, budget: Budget, look_steps: tuple[int, ...] = ()
) -> TrialConfig:
  """Builds the configuration of an arm's trials; those with `look_steps` look at the test set there, as final ones do at their end."""
  arm = ARMS[name]
  return TrialConfig(
    workload=workload.name,
    batch_size=batch_size,
    num_steps=budget.num_steps,
    eval_every=budget.every,
    optimizer=arm.optimizer,
    schedule=arm.schedule,
    warmup=arm.warmup,
    probes=("test",) if look_steps else (),
    probe_steps=look_steps,
  )


def arm_space(name: str, plan: LargeBatchPlan, *, batch_size: int, budget: Budget) -> Space:
  """Builds the search space of an arm: the rate around its rule's, and with a warm-up its steps.

  With momentum m every step adds up to 1 / (1 - m) of its rate in the end, so the workload's rate, which is meant for SGD without, is
  multiplied by 1 - m.
  """
  arm = ARMS[name]
  base = arm.base_learning_rate or plan.base_learning_rate * (1 - MOMENTUM)
  centre = scale_learning_rate(
    arm.scaling_rule, base, batch_size=batch_size, reference_batch_size=plan.reference_batch_size
  )
  rate = centred("learning_rate", centre, RATE_FACTOR)
  if arm.warmup == "none":
    return (rate,)
  low, high = (max(1.0, round(part * budget.num_steps, 0)) for part in (SHORTEST_WARMUP, LONGEST_WARMUP))
  return rate, Dimension("warmup_steps", "integer", low, high)


def arm_hparams(name: str, point: Mapping[str, float]) -> Hparams:
  """Builds the hyperparameters of a point of an arm's space; a decay spans what the warm-up leaves of the budget."""
  fixed = Hparams(point["learning_rate"], momentum=MOMENTUM, weight_decay=ARMS[name].weight_decay)
  return fixed._replace(**point)


def recipe_point(
  recipe: str, plan: LargeBatchPlan, rate: float, *, batch_size: int, budget: Budget
) -> dict[str, float]:
  """Carries the reference batch size's best rate to a large one by the linear rule; the warm-up starts from it, k times smaller.

  Source: Goyal et al. (2017), sections 2.1 and 2.2.
  """
  scaled = scale_learning_rate("linear", rate, batch_size=batch_size, reference_batch_size=plan.reference_batch_size)
  point = {"learning_rate": scaled}
  if ARMS[RECIPES[recipe]].warmup == "none":
    return point
  steps = max(1, round(RECIPE_WARMUP * budget.num_steps))
  return point | {"warmup_steps": float(steps), "warmup_factor": rate / scaled}
