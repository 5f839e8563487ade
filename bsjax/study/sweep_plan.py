"""What a sweep trains: batch sizes, budgets, a search space for each batch size, and how finely trials look for their target."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from bsjax.optim import (
  OPTIMIZERS,
  SCALING_RULES,
  SCHEDULES,
  WARMUPS,
  half_life_beta2,
  noise_limited_rate,
  scale_learning_rate,
)
from bsjax.study.space import Space, centred, parse_space
from bsjax.train import TrialConfig
from bsjax.types import Hparams
from bsjax.workloads import Workload

FIRST_FINAL_SEED, FIRST_PILOT_SEED = 1000, 2000
"""Sweep trials have the seeds 0, 1, 2, ...: each is one draw of hyperparameters and seed. Final and pilot seeds begin here."""
RATE_FACTOR = 16.0
"""The rates of a batch size reach from its centre divided by this to its centre times this."""
SPACE_RULES = (*SCALING_RULES, "noise")
"""Rules that centre the rates of a batch size: "noise" is rate_max / (1 + noise scale / B)."""
ROUND = 16
"""Trials of a batch size are drawn in rounds: a later round knows how soon trials of the earlier ones arrived."""
GIVE_UP_FACTOR = 4
"""A trial of a later round ends at this multiple of the fewest steps that earlier rounds needed: it can be no minimum any more."""
MOST_WIDENINGS = 3
"""A space whose best point sits on its edge is widened at most this often, then the point is marked."""
PILOT_TRIALS, PILOT_ROWS, PILOT_PARTS = 8, 128, (16, 4, 1)
"""Trials that find out how many steps a target takes, how often they look for it, and the parts of the budget that they try in turn: where
a sixteenth is enough, nobody pays for more."""
GUESSED_RATES = {
  "adam": 0.003,
  "adamw": 0.003,
  "adafactor": 0.02,
  "lamb": 0.02,
  "lamb_v3": 0.02,
  "muon": 0.02,
  "lars": 20.0,
  "lars_2017": 20.0,
  "lars_2019": 0.02,
}
"""Where the search begins, at the reference batch size, for optimizers that make the length of a step their own; for all others it is the
workload's. A wrong guess costs wider spaces."""
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
  noise_scale: float
  base_learning_rate: float
  reference_batch_size: int
  momentum: float
  weight_decay: float
  half_life: float
  """Examples after which Adam's second moment forgets half; 0: beta2 is the same at all batch sizes."""
  microbatch_size: int
  """Batches larger than this accumulate gradients of so many examples; 0: none does."""


def make_sweep_plan(workload: Workload, **overrides: object) -> SweepPlan:
  """Takes the workload's preset and replaces what `overrides` gives (None keeps the preset's).

  Raises:
    ValueError: a number out of range, an unknown name or an impossible space; the message names it.
  """
  preset = workload.preset
  given = {name: value for name, value in overrides.items() if value is not None}
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
    noise_scale=0.0,
    base_learning_rate=GUESSED_RATES.get(str(given.get("optimizer")), preset.base_learning_rate),
    reference_batch_size=preset.reference_batch_size,
    momentum=0.9,
    weight_decay=0.0,
    half_life=0.0,
    microbatch_size=0,
  )
  plan = dataclasses.replace(plan, **given)  # type: ignore[arg-type]
  _check(plan, len(workload.train))
  if plan.microbatch_size and workload.batch_norm != "none":
    raise ValueError(
      f"--microbatch_size={plan.microbatch_size} with {workload.name}, which has batch norm: its statistics would be those of a "
      f"microbatch; "
      "wanted 0, or a workload with ghost batches"
    )
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
    ("scaling_rule", SPACE_RULES),
  ):
    if getattr(plan, name) not in known:
      raise ValueError(f"--{name}={getattr(plan, name)}, wanted one of {', '.join(known)}")
  if not 0 <= plan.momentum < 1:
    raise ValueError(f"--momentum={plan.momentum:g}, wanted 0 <= momentum < 1")
  for name in ("weight_decay", "half_life"):
    if not 0 <= getattr(plan, name) < math.inf:
      raise ValueError(f"--{name}={getattr(plan, name):g}, wanted a finite number, 0 or more")
  for size in plan.batch_sizes:
    microbatch = plan.microbatch_size
    if microbatch < 0 or (0 < microbatch < size and size % microbatch):
      raise ValueError(
        f"--microbatch_size={microbatch}, wanted 0 or a divisor of every larger batch size, so of {size}"
      )
  if not 0 <= plan.noise_scale < math.inf or (plan.scaling_rule == "noise") != (plan.noise_scale > 0):
    raise ValueError(
      f"--scaling_rule={plan.scaling_rule} with --noise_scale={plan.noise_scale:g}: wanted a number of examples above 0 for the rule "
      f"noise, "
      "none for others"
    )
  if not 0 <= plan.warmup_fraction < 1 or (plan.warmup == "none") != (plan.warmup_fraction == 0):
    raise ValueError(
      f"--warmup={plan.warmup} with --warmup_fraction={plan.warmup_fraction:g}: wanted a fraction between 0 and 1 with a warm-up, 0 without"
    )


def space_of(plan: SweepPlan, batch_size: int) -> Space:
  """Returns the search space of a batch size: the plan's, with a rate around the scaling rule's where it names none."""
  space = parse_space(plan.space) if plan.space else ()
  if any(dimension.name == "learning_rate" for dimension in space):
    return space
  sizes = {"batch_size": batch_size, "reference_batch_size": plan.reference_batch_size}
  if plan.scaling_rule == "noise":
    centre = noise_limited_rate(plan.base_learning_rate, plan.noise_scale, **sizes)
  else:
    centre = scale_learning_rate(plan.scaling_rule, plan.base_learning_rate, **sizes)
  return (centred("learning_rate", centre, RATE_FACTOR), *space)


def most_steps(plan: SweepPlan, *, batch_size: int, train_size: int) -> int:
  """Counts the steps that a trial of a batch size may take."""
  return max(plan.num_steps, round(plan.num_epochs * train_size / batch_size))


def sweep_hparams(plan: SweepPlan, point: Mapping[str, float], budget: int, *, batch_size: int) -> Hparams:
  """Builds the hyperparameters of a point; the schedule spans the budget of the batch size, however soon a trial is cut."""
  warmup_steps = round(plan.warmup_fraction * budget)
  fixed = Hparams(
    plan.base_learning_rate,
    momentum=plan.momentum,
    weight_decay=plan.weight_decay,
    warmup_steps=warmup_steps,
    decay_steps=0.0 if plan.schedule in ("constant", "inverse_sqrt") else float(budget - warmup_steps),
  )
  if plan.half_life:
    fixed = fixed._replace(beta2=half_life_beta2(plan.half_life, batch_size=batch_size))
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
    microbatch_size=plan.microbatch_size if plan.microbatch_size < batch_size else 0,
    stop_at_target=True,
  )


def pilot_every(num_steps: int) -> int:
  """Chooses the steps between the looks of trials that look coarsely, as those of the pilot."""
  return max(1, num_steps // PILOT_ROWS)


def fine_every(fewest_steps: int | None, budget: int) -> int:
  """Chooses the steps between two looks for the target, from the fewest steps of the pilot; half of them may still be found.

  >>> fine_every(1000, 8000), fine_every(60, 8000), fine_every(None, 8000)
  (10, 1, 80)
  """
  expected = budget if fewest_steps is None else fewest_steps
  return max(1, int(QUANTISATION * expected / 2))
