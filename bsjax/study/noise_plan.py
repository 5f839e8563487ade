"""What a study of gradient noise trains: batch sizes, rates, checkpoints and the branches of the temperature test."""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from bsjax.optim import scale_learning_rate
from bsjax.train import TrialConfig
from bsjax.workloads import Workload

ROWS_PER_TRIAL = 256
"""A trial along training is evaluated about this often; its checkpoints are among those steps."""
LATE_CHECKPOINTS = 4
"""Checkpoints between 3/4 of the steps and the end: the end is their mean."""
ROUTE_CHECKPOINTS = 4
"""Checkpoints of a trial, spread over all, at which the four routes are compared."""
MARKS = 16
"""Checkpoints of one stretch of the temperature test."""
TEMPERATURE_FACTORS = (16, 4)
"""The factor of McCandlish et al. (2018), Fig. 15, and what is taken where the training set is too small for it. Both are squares."""
LARGEST_PART = 1 / 4
"""The largest batch of the temperature test, as a part of the training set: beyond it batches overlap and are no longer independent."""
DEFAULT_RATES = (1 / 4, 1.0)
"""Rates of a batch size, as parts of the square-root rule's from the workload's preset."""
ALONG_PROBES = ("noise", "hessian_noise", "adam_noise", "routes")


@dataclass(frozen=True)
class NoisePlan:
  """A study of gradient noise, as plain numbers; two with equal plans give equal records.

  `learning_rates` are the same at every batch size; empty: `DEFAULT_RATES` times the rule's. `num_epochs` is the length of a trial along
  training, and of each of the three stretches of the temperature test.
  """

  batch_sizes: tuple[int, ...]
  learning_rates: tuple[float, ...]
  num_epochs: float
  seeds: int
  optimizer: str
  momentum: float


class Branch(NamedTuple):
  """What the middle stretch of the temperature test changes batch size and rate to."""

  name: str
  batch_size: int
  learning_rate: float


def make_noise_plan(workload: Workload, **overrides: object) -> NoisePlan:
  """Takes three batch sizes of the workload's preset and its epochs, and replaces what `overrides` gives (None keeps the preset's).

  Raises:
    ValueError: a number out of range; the message names it.
  """
  sizes = workload.preset.batch_sizes
  plan = NoisePlan(
    batch_sizes=tuple(sorted({sizes[len(sizes) * part // 10] for part in (3, 5, 7)})),
    learning_rates=(),
    num_epochs=workload.preset.num_epochs,
    seeds=5,
    optimizer="sgd",
    momentum=0.9,
  )
  given = {name: value for name, value in overrides.items() if value is not None}
  plan = dataclasses.replace(plan, **given)  # type: ignore[arg-type]
  _check(plan, len(workload.train))
  return plan


def _check(plan: NoisePlan, train_size: int) -> None:
  if not plan.batch_sizes:
    raise ValueError("--batch_sizes is empty, wanted at least one batch size")
  for size in plan.batch_sizes:
    if not 1 <= size <= train_size:
      raise ValueError(f"--batch_sizes has {size}, wanted 1 to {train_size}, the size of the training set")
  for rate in plan.learning_rates:
    if not (math.isfinite(rate) and rate > 0):
      raise ValueError(f"--learning_rates has {rate}, wanted finite numbers above 0")
  if not (math.isfinite(plan.num_epochs) and plan.num_epochs > 0):
    raise ValueError(f"--num_epochs={plan.num_epochs}, wanted a finite number above 0")
  if plan.seeds < 2:
    raise ValueError(f"--seeds={plan.seeds}, wanted at least 2: intervals come from the spread between seeds")
  if not 0 <= plan.momentum < 1:
    raise ValueError(f"--momentum={plan.momentum}, wanted 0 <= momentum < 1")


def rates_of(plan: NoisePlan, workload: Workload, batch_size: int) -> tuple[float, ...]:
  """Returns the learning rates of a batch size, ascending."""
  return tuple(sorted(plan.learning_rates)) or tuple(part * _rule(workload, batch_size) for part in DEFAULT_RATES)


def _rule(workload: Workload, batch_size: int) -> float:
  preset = workload.preset
  return scale_learning_rate(
    "sqrt", preset.base_learning_rate, batch_size=batch_size, reference_batch_size=preset.reference_batch_size
  )


def along_config(plan: NoisePlan, workload: Workload, batch_size: int) -> TrialConfig:
  """Builds the configuration of the trials that are measured from their first step to their last."""
  num_steps = max(1, round(plan.num_epochs * len(workload.train) / batch_size))
  every = max(1, num_steps // ROWS_PER_TRIAL)
  num_steps -= num_steps % every
  return TrialConfig(
    workload=workload.name,
    batch_size=batch_size,
    num_steps=num_steps,
    eval_every=every,
    optimizer=plan.optimizer,
    probes=ALONG_PROBES,
    probe_steps=checkpoint_steps(num_steps, every),
  )


def checkpoint_steps(num_steps: int, every: int) -> tuple[int, ...]:
  """Lays out checkpoints: step 0, then doubling from the first evaluation on, and evenly over the last quarter.

  >>> checkpoint_steps(256, 2)
  (0, 2, 4, 8, 16, 32, 64, 128, 192, 212, 234, 256)
  """
  rows = num_steps // every
  doubling = {2**power for power in range(rows.bit_length()) if 2**power <= 3 / 4 * rows}
  late = {round(rows * (3 / 4 + part / (LATE_CHECKPOINTS - 1) / 4)) for part in range(LATE_CHECKPOINTS)}
  return tuple(every * row for row in sorted({0, *doubling, *late, rows}))


def route_steps(config: TrialConfig) -> frozenset[int]:
  """Chooses `ROUTE_CHECKPOINTS` of a trial's checkpoints, the first and the last among them."""
  last = len(config.probe_steps) - 1
  chosen = {round(last * part / (ROUTE_CHECKPOINTS - 1)) for part in range(ROUTE_CHECKPOINTS)}
  return frozenset(config.probe_steps[index] for index in chosen)


def temperature_factor(workload: Workload, batch_size: int) -> int | None:
  """Returns the first of `TEMPERATURE_FACTORS` that a batch size allows: up to `LARGEST_PART` of the data, and down by its root."""
  for factor in TEMPERATURE_FACTORS:
    if batch_size * factor <= LARGEST_PART * len(workload.train) and batch_size % math.isqrt(factor) == 0:
      return factor
  return None


def temperature_branches(plan: NoisePlan, workload: Workload) -> tuple[Branch, ...]:
  """Returns the branches of the temperature test, the unchanged one first; none where the training set is too small for any factor.

  The base is the largest power of two, up to the reference batch size, that allows the larger factor (else the smaller), at
  the largest of its rates: the higher the temperature, the sooner it decides the noise.

  Source: McCandlish et al. (2018), Fig. 15: rate and batch size such that T = eps / B falls 16-fold in three ways, and a control.
  """
  sizes = [2**power for power in range(workload.preset.reference_batch_size.bit_length())]
  allowed = [(temperature_factor(workload, size) or 0, size) for size in sizes]
  factor, size = max(allowed)
  if not factor:
    return ()
  rate, root = rates_of(plan, workload, size)[-1], math.isqrt(factor)
  return (
    Branch("unchanged", size, rate),
    Branch(f"B x {factor}", size * factor, rate),
    Branch(f"rate / {factor}", size, rate / factor),
    Branch(f"rate / {root} and B x {root}", size * root, rate / root),
    Branch(f"rate / {root} and B / {root}", size // root, rate / root),
  )


def stretch_config(plan: NoisePlan, workload: Workload, branches: tuple[Branch, ...], batch_size: int) -> TrialConfig:
  """Builds the configuration of one stretch of the temperature test: the same number of examples at every batch size.

  Batches are drawn with replacement, as the prediction assumes. In shuffled epochs their noise cancels over an epoch, and a run at a low
  temperature is quieter than predicted (a test of the judge simulates it).
  """
  largest = max(branch.batch_size for branch in branches)
  steps = max(1, round(plan.num_epochs * len(workload.train) / largest))
  marks = min(MARKS, steps)
  every = round(steps / marks) * (largest // batch_size)
  return TrialConfig(
    workload=workload.name,
    batch_size=batch_size,
    num_steps=marks * every,
    eval_every=every,
    optimizer=plan.optimizer,
    probes=("noise",),
    probe_steps=tuple(mark * every for mark in range(marks + 1)),
    with_replacement=True,
  )
