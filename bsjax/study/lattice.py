"""A lattice of learning rates: at every batch size the steps to the target from the best rate down to rates that fail, on either side."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.analysis.regret import (
  ADAM_KIND,
  LATTICE_KIND,
  NOISE_KIND,
  POINTS_PER_OCTAVE,
  clip_steps,
  fewest_steps,
)
from bsjax.analysis.selection import is_number
from bsjax.optim import scale_adam, scale_learning_rate
from bsjax.records import Record
from bsjax.study.measure_noise import NoiseMeasurements
from bsjax.study.sweep import Sweep
from bsjax.study.sweep_plan import (
  FIRST_PILOT_SEED,
  GIVE_UP_FACTOR,
  MOST_WIDENINGS,
  QUANTISATION,
  fine_every,
  pilot_every,
)
from bsjax.train import Plan as LanePlan
from bsjax.types import Hparams

REACH = 2
"""A lattice begins with so many rates on either side of the guess, and grows by as many at a time."""
MOST_ROUNDS = 10
"""A lattice that is open after so many rounds stays open on that side, and says so."""
MOST_ATTEMPTS = 3
"""A lattice is laid again where its trials looked for the target too rarely or were cut too soon."""
PILOT_MARGIN = 2.0
"""The fewest steps of the pilot are those of a lucky trial: the mean at the best rate is taken to be at most so many times as large."""
NOISE_STEPS, NOISE_SPAN = 6, 32
"""The noise scale is measured at so many steps, log-spaced from this part of the steps to the target to all of them."""
ADAM_EPSILON = 1e-8
"""The published epsilon, which Adam's own rule scales."""


class Expected(NamedTuple):
  """Between how many steps the target is expected at the best rate; None where nothing is known."""

  fewest: float | None
  most: float | None


class Grown(NamedTuple):
  """What was found at a batch size: rates number `first` to `last`, the best of them (None if none arrived), open sides, and why none."""

  first: int
  last: int
  every: int
  best: int | None
  fewest: float | None
  open: tuple[str, ...]
  reason: str


def lay_lattices(sweep: Sweep, *, seeds: int, measurements: NoiseMeasurements) -> dict[str, Any]:
  """Lays the lattice of one optimizer at all batch sizes, from the largest down, and measures the noise scale at each best rate.

  The largest batch size begins with a pilot. The next smaller one begins at the best rate of the one before times the square-root rule;
  it needs at least as many steps, and under perfect scaling at most as many examples: that tells how finely to look and when to
  give up.

  Returns: what `study.json` says of the lattices, by batch size.

  Holds: what is trained depends on the plan and the records of larger batch sizes only, so a rerun retraces it.
  """
  described, before = {}, None
  for size in sorted(sweep.plan.batch_sizes, reverse=True):
    sweep.progress.begin(size, sweep.name)
    guess, expected = _guess(sweep, size, before)
    grown = _lay(sweep, size, guess, expected, range(seeds))
    if grown.best is not None:
      before = size, grown
      _measure_noise(sweep, size, grown, measurements)
    described[str(size)] = _describe(sweep, grown)
  return dict(reversed(described.items()))


def _guess(sweep: Sweep, size: int, before: tuple[int, Grown] | None) -> tuple[int, Expected]:
  """Guesses the number of the best rate and its steps, from the batch size before or, where there is none, from a pilot."""
  plan = sweep.plan
  if before is not None:
    larger, grown = before
    assert grown.best is not None
    assert grown.fewest is not None
    moved = round(POINTS_PER_OCTAVE / 2 * math.log2(size / larger))
    return grown.best + moved, Expected(grown.fewest, grown.fewest * larger / size)
  rule = scale_learning_rate("sqrt", 1.0, batch_size=size, reference_batch_size=plan.reference_batch_size)
  guess = round(POINTS_PER_OCTAVE * math.log2(rule))
  budget = sweep.budget(size)
  points = [_point(sweep, k) for k in range(guess - REACH, guess + REACH + 1)]
  config = sweep.config(size, budget, pilot_every(budget))
  pilot = sweep.run(config, points, [FIRST_PILOT_SEED] * len(points), "pilot")
  fewest = min((steps for record in pilot if (steps := sweep.steps(record)) is not None), default=None)
  return guess, Expected(fewest, fewest and PILOT_MARGIN * fewest)


def _point(sweep: Sweep, k: int) -> dict[str, float]:
  return {"learning_rate": sweep.plan.base_learning_rate * 2.0 ** (k / POINTS_PER_OCTAVE)}


def _lay(sweep: Sweep, size: int, guess: int, expected: Expected, seeds: Sequence[int]) -> Grown:
  """Grows a lattice, again if it turns out that the steps were expected wrongly.

  No trial takes more than `GIVE_UP_FACTOR` budgets: where most seeds fail even at the best rate, these count in its mean steps.
  """
  budget = sweep.budget(size)
  longest = GIVE_UP_FACTOR * budget
  grown = None
  for _ in range(MOST_ATTEMPTS):
    every = fine_every(None if expected.fewest is None else math.floor(expected.fewest), budget)
    most = budget if expected.most is None else min(longest, math.ceil(GIVE_UP_FACTOR * expected.most))
    grown = _grow(sweep, size, guess, every, most, seeds)
    if grown.fewest is None:
      if most >= budget:
        break
      expected = Expected(expected.fewest, None)
      continue
    if (every == 1 or every <= QUANTISATION * grown.fewest) and most >= min(longest, GIVE_UP_FACTOR * grown.fewest):
      break
    guess, expected = (
      grown.best if grown.best is not None else guess,
      Expected(grown.fewest, PILOT_MARGIN * grown.fewest),
    )
  assert grown is not None
  return grown


def _grow(sweep: Sweep, size: int, guess: int, every: int, most: int, seeds: Sequence[int]) -> Grown:
  """Adds rates on either side until the best shows, and beyond it on each side a rate that fails at every seed."""
  records: dict[int, list[Record]] = {}
  wanted = list(range(guess - REACH, guess + REACH + 1))
  for number in range(MOST_ROUNDS):
    config = sweep.config(size, most, every)
    points = [_point(sweep, k) for k in wanted for _ in seeds]
    trained = sweep.run(config, points, [*seeds] * len(wanted), LATTICE_KIND)
    records |= {k: trained[at * len(seeds) : (at + 1) * len(seeds)] for at, k in enumerate(wanted)}
    first, last = min(records), max(records)
    steps = np.array([[sweep.steps(record) or math.nan for record in records[k]] for k in range(first, last + 1)]).T
    found = fewest_steps(steps, GIVE_UP_FACTOR)
    if found is None:
      open_sides = _sides_without_arrival(sweep, records) if number < MOST_WIDENINGS else ()
    else:
      most = min(most, math.ceil(GIVE_UP_FACTOR * found[1]))
      open_sides = _open_sides(steps, *found)
    if not open_sides:
      break
    wanted = [*range(first - REACH, first)] * ("low" in open_sides) + [*range(last + 1, last + 1 + REACH)] * (
      "high" in open_sides
    )
    if number < MOST_ROUNDS - 1:
      sweep.progress.expect_more(len(wanted) * len(seeds))
  if found is None:
    return Grown(first, last, every, None, None, (), _why_not(sweep, records))
  return Grown(first, last, every, first + found[0], found[1], open_sides, "")


def _open_sides(steps: np.ndarray, best: int, fewest: float) -> tuple[str, ...]:
  """Names the sides of the best rate on which no rate fails at every seed; f64[n, K] steps, NaN where a trial did not arrive."""
  failed = np.asarray(clip_steps(steps, GIVE_UP_FACTOR * fewest)[1].all(axis=0))
  sides = {"low": failed[:best], "high": failed[best + 1 :]}
  return tuple(side for side, rates in sides.items() if not rates.any())


def _sides_without_arrival(sweep: Sweep, records: dict[int, list[Record]]) -> tuple[str, ...]:
  """Names the side towards which trials came nearer to the target; the low one where all diverged, none where the nearest lies inside."""
  nearest = _nearest(sweep, records)
  if nearest is None or nearest[0] == min(records):
    return ("low",)
  return ("high",) if nearest[0] == max(records) else ()


def _nearest(sweep: Sweep, records: dict[int, list[Record]]) -> tuple[int, float] | None:
  """Returns the rate whose trials came nearest to the target, and how near; None where all diverged."""
  target = sweep.workload.target
  best_of: Callable[..., float] = max if target.direction == "max" else min
  values = {
    k: [
      row[target.metric]
      for record in trials
      if record.status["state"] == "complete"
      for row in record.metrics
      if is_number(row.get(target.metric))
    ]
    for k, trials in records.items()
  }
  reached = {k: best_of(found) for k, found in values.items() if found}
  if not reached:
    return None
  k = best_of(reached, key=lambda rate: reached[rate])
  return int(k), reached[int(k)]


def _why_not(sweep: Sweep, records: dict[int, list[Record]]) -> str:
  nearest, target = _nearest(sweep, records), sweep.workload.target
  if nearest is None:
    return "every trial diverged"
  return f"not reached: the nearest {target.metric} is {nearest[1]:.4g}, the target {target.goal:g}"


def _describe(sweep: Sweep, grown: Grown) -> dict[str, Any]:
  return {
    "first": grown.first,
    "last": grown.last,
    "eval_every": grown.every,
    "best_learning_rate": None if grown.best is None else _point(sweep, grown.best)["learning_rate"],
    "fewest_steps": grown.fewest,
    "open": list(grown.open),
    "reason": grown.reason,
  }


def noise_steps(num_steps: int, every: int) -> tuple[int, ...]:
  """Lays out the steps at which the noise scale is measured: multiples of `every` up to the last, which is `num_steps`.

  >>> noise_steps(640, 4)
  (20, 40, 80, 160, 320, 640)
  """
  points = np.geomspace(max(1, num_steps / NOISE_SPAN / every), num_steps // every, NOISE_STEPS)
  return tuple(sorted({every * round(point) for point in points}))


def _measure_noise(sweep: Sweep, size: int, grown: Grown, measurements: NoiseMeasurements) -> None:
  """Trains seed 0 at the best rate once more, as long as the target takes on average, with noise probes along the way."""
  assert grown.best is not None
  assert grown.fewest is not None
  config = sweep.config(size, math.ceil(grown.fewest), grown.every)
  config = dataclasses.replace(
    config, stop_at_target=False, probes=("noise",), probe_steps=noise_steps(config.num_steps, grown.every)
  )
  alone = sweep._replace(lane_plan=LanePlan())
  alone.run(config, [_point(sweep, grown.best)], [0], NOISE_KIND, probe=measurements)


def carry_adam(sweep: Sweep, lattices: dict[str, Any], *, seeds: int) -> dict[str, str]:
  """Trains every batch size at what Adam's square-root rule makes of the best rate at the reference batch size.

  Returns: the batch sizes where this has no meaning, or no lattice to compare with, and why.
  """
  reference = sweep.plan.reference_batch_size
  skipped = {}
  rate = lattices[str(reference)]["best_learning_rate"]
  for size in (size for size in sweep.plan.batch_sizes if size != reference):
    entry = lattices[str(size)]
    if rate is None or entry["reason"]:
      skipped[str(size)] = entry["reason"] or f"no best rate at batch size {reference}"
      continue
    try:
      carried = scale_adam(
        Hparams(rate, momentum=sweep.plan.momentum, epsilon=ADAM_EPSILON),
        batch_size=size,
        reference_batch_size=reference,
      )
    except ValueError as error:
      skipped[str(size)] = str(error)
      continue
    point = {name: float(getattr(carried, name)) for name in ("learning_rate", "momentum", "beta2", "epsilon")}
    config = sweep.config(size, math.ceil(GIVE_UP_FACTOR * entry["fewest_steps"]), entry["eval_every"])
    sweep.run(config, [point] * seeds, range(seeds), ADAM_KIND)
  return skipped
