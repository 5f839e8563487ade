"""What a sweep trains: batch sizes, budgets, a search space for each batch size, and how finely trials look for their target."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from bsjax.optim import OPTIMIZERS, SCALING_RULES, SCHEDULES, WARMUPS, scale_learning_rate
from bsjax.study.space import Space, centred, parse_space
from bsjax.train import TrialConfig
from bsjax.types import Hparams
from bsjax.workloads import Workload

FIRST_FINAL_SEED, FIRST_PILOT_SEED = 1000, 2000
"""Sweep trials have the seeds 0, 1, 2, ...: each is one draw of hyperparameters and seed. Final and pilot seeds begin here."""
RATE_FACTOR = 16.0
"""The rates of a batch size reach from its centre divided by this to its centre times this."""
ROUND = 16
"""Trials of a batch size are drawn in rounds: a later round knows how soon trials of the earlier ones arrived."""
GIVE_UP_FACTOR = 4
"""A trial of a later round ends at this multiple of the fewest steps that earlier rounds needed: it can be no minimum any more."""
MOST_WIDENINGS = 3
"""A space whose best point sits on its edge is widened at most this often, then the point is marked."""
PILOT_TRIALS, PILOT_ROWS = 8, 128
"""Trials that find out how many steps a target takes, and how often they look for it."""
QUANTISATION = 0.02
"""Targets are looked for at this part of the steps to result, or every step: what a curve is off by."""


@dataclass(frozen=True)
class SweepPlan:
  """A sweep, as plain numbers and names; two with equal plans give equal records.

  A batch size may take `num_epochs` epochs or `num_steps` steps, whichever is more. `space` is read by `parse_space`; without a
  learning rate in it, rates are searched around the scaling rule's.
  """

  batch_sizes: tuple[int, ...]
  num_epochs: float
  num_steps: int
  num_trials: int
  final_seeds: int
  optimizer: str
  schedule: str
  warmup: str
  warmup_fraction: float
  space: str
  scaling_rule: str
  base_learning_rate: float
  reference_batch_size: int
  momentum: float
  weight_decay: float


def make_sweep_plan(workload: Workload, **overrides: object) -> SweepPlan:
  """Takes the workload's preset and replaces what `overrides` gives (None keeps the preset's).

  Raises:
    ValueError: a number out of range, an unknown name or an impossible space; the message names it.
  """
  preset = workload.preset
  plan = SweepPlan(
    batch_sizes=preset.batch_sizes,
    num_epochs=2 * preset.num_epochs,
    num_steps=2 * preset.num_steps,
    num_trials=64,
    final_seeds=preset.final_seeds,
    optimizer="sgd",
    schedule="constant",
    warmup="none",
    warmup_fraction=0.0,
    space="",
    scaling_rule="sqrt",
    base_learning_rate=preset.base_learning_rate,
    reference_batch_size=preset.reference_batch_size,
    momentum=0.9,
    weight_decay=0.0,
  )
  given = {name: value for name, value in overrides.items() if value is not None}
  plan = dataclasses.replace(plan, **given)  # type: ignore[arg-type]
  _check(plan, len(workload.train))
  for batch_size in plan.batch_sizes:
    space_of(plan, batch_size)
  return plan


def _check(plan: SweepPlan, train_size: int) -> None:
  if not plan.batch_sizes:
    raise ValueError("--batch_sizes is empty, wanted at least one batch size")
  for size in plan.batch_sizes:
    if not 1 <= size <= train_size:
      raise ValueError(f"--batch_sizes has {size}, wanted 1 to {train_size}, the size of the training set")
  for name, value in (("num_epochs", plan.num_epochs), ("base_learning_rate", plan.base_learning_rate)):
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f"--{name}={value:g}, wanted a finite number above 0")
  for name, least, most in (
    ("num_steps", 1, math.inf),
    ("num_trials", 1, FIRST_FINAL_SEED // 2),
    ("final_seeds", 0, math.inf),
    ("reference_batch_size", 1, math.inf),
  ):
    if not least <= getattr(plan, name) <= most:
      wanted = f"at least {least}" if most == math.inf else f"{least} to {most}"
      raise ValueError(f"--{name}={getattr(plan, name)}, wanted {wanted}")
  for name, known in (
    ("optimizer", OPTIMIZERS),
    ("schedule", [name for name in SCHEDULES if name != "step"]),
    ("warmup", WARMUPS),
    ("scaling_rule", SCALING_RULES),
  ):
    if getattr(plan, name) not in known:
      raise ValueError(f"--{name}={getattr(plan, name)}, wanted one of {', '.join(known)}")
  if not 0 <= plan.momentum < 1:
    raise ValueError(f"--momentum={plan.momentum:g}, wanted 0 <= momentum < 1")
  if not (math.isfinite(plan.weight_decay) and plan.weight_decay >= 0):
    raise ValueError(f"--weight_decay={plan.weight_decay:g}, wanted a finite number, 0 or more")
  if not 0 <= plan.warmup_fraction < 1 or (plan.warmup == "none") != (plan.warmup_fraction == 0):
    raise ValueError(
      f"--warmup={plan.warmup} with --warmup_fraction={plan.warmup_fraction:g}: wanted a fraction between 0 and 1 with a warm-up, 0 without"
    )


def space_of(plan: SweepPlan, batch_size: int) -> Space:
  """Returns the search space of a batch size: the plan's, with a rate around the scaling rule's where it names none."""
  space = parse_space(plan.space) if plan.space else ()
  if any(dimension.name == "learning_rate" for dimension in space):
    return space
  centre = scale_learning_rate(
    plan.scaling_rule, plan.base_learning_rate, batch_size=batch_size, reference_batch_size=plan.reference_batch_size
  )
  return (centred("learning_rate", centre, RATE_FACTOR), *space)


def most_steps(plan: SweepPlan, *, batch_size: int, train_size: int) -> int:
  """Counts the steps that a trial of a batch size may take."""
  return max(plan.num_steps, round(plan.num_epochs * train_size / batch_size))


def sweep_hparams(plan: SweepPlan, point: Mapping[str, float], budget: int) -> Hparams:
  """Builds the hyperparameters of a point; the schedule spans the budget of the batch size, however soon a trial is cut."""
  warmup_steps = round(plan.warmup_fraction * budget)
  fixed = Hparams(
    plan.base_learning_rate,
    momentum=plan.momentum,
    weight_decay=plan.weight_decay,
    warmup_steps=warmup_steps,
    decay_steps=0.0 if plan.schedule in ("constant", "inverse_sqrt") else float(budget - warmup_steps),
  )
  return fixed._replace(**point)


def sweep_config(plan: SweepPlan, workload: Workload, *, batch_size: int, num_steps: int, every: int) -> TrialConfig:
  """Builds the configuration of trials that end at their target, or at `num_steps` rounded up to whole evaluation intervals."""
  return TrialConfig(
    workload=workload.name,
    batch_size=batch_size,
    num_steps=-(-num_steps // every) * every,
    eval_every=every,
    optimizer=plan.optimizer,
    schedule=plan.schedule,
    warmup=plan.warmup,
    stop_at_target=True,
  )


def pilot_every(budget: int) -> int:
  """Chooses the steps between the looks of the pilot's trials."""
  return max(1, budget // PILOT_ROWS)


def fine_every(fewest_steps: int | None, budget: int) -> int:
  """Chooses the steps between two looks for the target, from the fewest steps of the pilot; half of them may still be found.

  >>> fine_every(1000, 8000), fine_every(60, 8000), fine_every(None, 8000)
  (10, 1, 80)
  """
  expected = budget if fewest_steps is None else fewest_steps
  return max(1, int(QUANTISATION * expected / 2))
