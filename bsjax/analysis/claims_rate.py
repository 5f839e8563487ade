"""Judges of what batch size does to a step: its speed on this machine, and the learning rate it wants."""

import math
from collections.abc import Sequence

import numpy as np

from bsjax.analysis.claim import Finding, columns, in_words, inside, judged, unjudged
from bsjax.analysis.fits import KNEE_SHARE, bootstrap_slope, knee, loglog_slope, vertex
from bsjax.analysis.selection import (
  batch_size,
  best_rate,
  is_number,
  num_steps,
  of_kind,
  tuned_rate,
)
from bsjax.records import Record

ALMOST_LINEAR = 0.8
"""Throughput proportional to B^0.8 gains a factor of 1.74 from doubling the batch size, 87 % of the possible 2."""
LINEAR_LOW, LINEAR_HIGH = 0.75, 1.25
"""Exponents nearer to the linear rule (1) than to the square-root rule (0.5), and as much on the other side."""

THROUGHPUT = unjudged(
  "throughput",
  statement="Examples per second grow almost linearly with batch size until the hardware saturates",
  source="measured on this machine",
  expected=f"at least {ALMOST_LINEAR} (linear: 1)",
  unit="slope of log(examples per second) against log B, up to the knee",
)


def throughput_points(records: Sequence[Record]) -> list[tuple[int, int, float, float]]:
  """Returns (batch size, repeat, examples per second, seconds per step) of every timing row, ordered by batch size."""
  rows = [
    (batch_size(r), int(row.get("repeat", i)), float(row["examples_per_second"]), float(row["seconds_per_step"]))
    for r in of_kind(records, "timing")
    for i, row in enumerate(r.metrics)
    if is_number(row.get("examples_per_second")) and is_number(row.get("seconds_per_step"))
  ]
  return sorted(rows, key=lambda row: row[:2])


def judge_throughput(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether throughput is almost proportional to batch size up to the knee, where it saturates.

  Knee: see `bsjax.analysis.fits.knee`, on the medians over repeats. Slope: over the batch sizes up to the knee, but at least the first
  three, so that hardware saturated from the start does not escape judgement; its interval resamples the repeats.

  Rule: holds if the interval lies above `ALMOST_LINEAR`, fails if it lies below, else inconclusive. Needs three batch sizes with two
  repeats each.

  Series: batch_size, repeat, examples_per_second, seconds_per_step: one entry for each repeat; 0-d knee (NaN if none was seen).
  """
  del study
  series = columns("batch_size repeat examples_per_second seconds_per_step", throughput_points(records)) | {
    "knee": np.array(np.nan)
  }
  sizes = np.unique(series["batch_size"])
  repeats = [int(np.sum(series["batch_size"] == size)) for size in sizes]
  if len(sizes) < 3 or min(repeats) < 2:
    reading = (
      f"Step times were measured at {len(sizes)} batch sizes, and the claim needs at least three with two repeats each. "
      "Time more batch sizes on this machine to judge it."
    )
    return Finding(THROUGHPUT, series, reading)
  medians = np.array([np.median(series["examples_per_second"][series["batch_size"] == size]) for size in sizes])
  bend = knee(sizes, medians)
  series["knee"] = np.array(np.nan if bend is None else float(bend))
  last = max(sizes[2], sizes[-1] if bend is None else bend)
  before = series["batch_size"] <= last
  slope = bootstrap_slope(series["batch_size"][before], series["examples_per_second"][before])
  verdict = inside(slope, ALMOST_LINEAR, math.inf)
  conclusion = {
    "holds": "so growth is almost linear",
    "fails": "which is less than almost linear",
    "inconclusive": "which leaves open whether growth is almost linear",
  }[verdict]
  saturation = (
    f"No knee was seen up to batch size {int(sizes[-1])}: throughput still grows there"
    if bend is None
    else f"The knee is at batch size {bend}, the smallest with {100 * KNEE_SHARE:.0f} % of the highest throughput measured"
  )
  reading = (
    f"From batch size {int(sizes[0])} to {int(last)} examples per second grow as B to the power {in_words(slope)}, {conclusion}. "
    f"{saturation}."
  )
  return Finding(judged(THROUGHPUT, slope, n=int(before.sum()), verdict=verdict), series, reading)


LINEAR = unjudged(
  "linear_scaling",
  statement="The best learning rate grows in proportion to batch size",
  source="Goyal et al. (2017), linear scaling rule",
  expected="1 (square-root rule: 0.5)",
  unit="slope of log(tuned learning rate) against log B",
)


def rate_scores(study: dict, records: Sequence[Record], size: int) -> dict[float, float]:
  """Returns the mean steps to target over the tuning seeds of every rate tried at a batch size; infinite if a seed failed."""
  budget = num_steps(study, "target", size)
  trials = [
    r
    for r in records
    if r.trial.get("kind") == "train" and batch_size(r) == size and r.trial["config"].get("num_steps") == budget
  ]
  return best_rate(
    trials, objective="steps_to_target", target=study["target"], seeds=study.get("tuning_seeds", ())
  ).scores


def refined_rate(rate: float, scores: dict[float, float]) -> float:
  """Moves a grid's best rate to the lowest point of the parabola through log score at it and its two neighbours, in log rate.

  The rate itself where a neighbour is missing or failed, or where the parabola does not turn between them.
  """
  rates = sorted(scores)
  nearest = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / rate)), default=0)
  three = rates[nearest - 1 : nearest + 2] if nearest > 0 else []
  if len(three) < 3 or not all(0 < scores[r] < math.inf for r in three):
    return rate
  lowest = vertex([math.log(r) for r in three], [math.log(scores[r]) for r in three])
  return rate if lowest is None else math.exp(lowest)


def judge_linear_scaling(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether the rate with the fewest steps to target is proportional to batch size, and finds where that stops.

  Rates are refined between grid points by `refined_rate`. The slope's interval comes from the scatter of the batch sizes about a
  straight line, so the spacing of the grid and a bend both widen it. Rates on the edge of their grid are marked and left out of slope
  and rules. The linear rule is drawn through the smallest batch size used; it stops holding at the first batch size from which on the
  rate stays below the rule by more than one step of the grid.

  Rule: holds if the interval lies within `LINEAR_LOW` to `LINEAR_HIGH`, fails if outside, else inconclusive. Needs three batch sizes
  that are not on an edge; a tuned rate counts only with the trials that chose it.

  Series: batch_size, learning_rate (refined), edge; the grid's points grid_batch_size, grid_learning_rate, grid_score (mean steps to
  target, NaN = a seed diverged or never reached it); curves rule_batch_size, linear, sqrt; 0-d slope.
  """
  tuned, grid, steps = [], [], []
  for size in sorted(study.get("batch_sizes", ())):
    scores = rate_scores(study, records, size)
    rates = sorted(scores)
    grid += [(size, rate, scores[rate] if scores[rate] < math.inf else np.nan) for rate in rates]
    steps += [b / a for a, b in zip(rates, rates[1:], strict=False)]
    best = tuned_rate(study, "target", size)
    if best is not None and scores:
      tuned.append(
        (size, best.learning_rate if best.edge else refined_rate(best.learning_rate, scores), best.edge is not None)
      )
  series = (
    columns("batch_size learning_rate edge", tuned)
    | columns("grid_batch_size grid_learning_rate grid_score", grid)
    | columns("rule_batch_size linear sqrt", [])
    | {"slope": np.array(np.nan)}
  )
  series["edge"] = series["edge"].astype(bool)
  inner = ~series["edge"]
  sizes, rates = series["batch_size"][inner], series["learning_rate"][inner]
  on_edge = series["batch_size"][~inner].astype(int).tolist()
  marked = f" ({len(on_edge)} more sit on the edge of their grid and are left out)" if on_edge else ""
  if len(sizes) < 3:
    reading = (
      f"A rate for the target was tuned inside its grid at {len(sizes)} batch sizes{marked}, and a slope with an interval needs at least "
      "three. Widen the grids or tune more batch sizes to judge the claim."
    )
    return Finding(LINEAR, series, reading)
  rule = sizes / sizes[0]
  series |= {"rule_batch_size": sizes, "linear": rates[0] * rule, "sqrt": rates[0] * np.sqrt(rule)}
  slope = loglog_slope(sizes, rates)
  series["slope"] = np.array(slope.value)
  verdict = inside(slope, LINEAR_LOW, LINEAR_HIGH)
  grid_step = float(np.median(steps)) if steps else 2.0
  below = rates * grid_step < series["linear"]
  stop = next((int(size) for i, size in enumerate(sizes) if below[i:].all()), None)
  conclusion = {
    "holds": "which is proportional growth within the tolerance",
    "fails": "which is not proportional growth"
    + (", and nearer to the square-root rule" if 0.25 < slope.value < LINEAR_LOW else ""),
    "inconclusive": "which leaves proportional growth open",
  }[verdict]
  where = (
    f"At batch size {int(sizes[-1])} the best rate is still not more than one step of the grid (a factor of {grid_step:.2g}) below the "
    f"linear rule through batch size {int(sizes[0])}"
    if stop is None
    else f"The linear rule through batch size {int(sizes[0])} stops holding at {stop}, from which on the tuned rate stays more than one "
    f"step of the grid (a factor of {grid_step:.2g}) below it"
  )
  reading = f"The best rate grows as B to the power {in_words(slope)} over {len(sizes)} batch sizes{marked}, {conclusion}. {where}."
  return Finding(judged(LINEAR, slope, n=len(sizes), verdict=verdict), series, reading)
