"""The best learning rate against batch size, and how wide the region of good rates is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.analysis.finite_trials import MIN_REACHED, draw_minima
from bsjax.analysis.fits import (
  NUM_RESAMPLES,
  RESAMPLING_SEED,
  UNKNOWN,
  Interval,
  loglog_slope,
  percentiles,
)
from bsjax.analysis.steps_to_result import steps_to_result, sweep_trials
from bsjax.records import Record

GOOD_FACTOR = 2.0
"""A learning rate is good if it reaches the goal in at most this factor times the fewest steps."""
RULES = {"constant": 0.0, "square root": 0.5, "linear": 1.0}
"""Exponent of B in the published rules for the learning rate."""
MIN_SLOPE_SIZES = 3


class RatePoint(NamedTuple):
  """The best rate and the good-rate width of one batch size.

  `best` is the winner's rate, averaged in log over the winners of halves of the trials, with the middle of those winners. `width` is in
  natural units of log rate. `on_edge`: the best trial sits on the edge of what was searched. `truncated`: the lowest or the highest rate
  tried is good, so the region may go on beyond it. `reason` says why there are no numbers.
  """

  batch_size: int
  best: Interval
  width: Interval
  on_edge: bool
  truncated: bool
  reason: str


class RateCurve(NamedTuple):
  """Best rates and widths over the batch sizes, with log-log slopes; `agrees` names the rules within the interval of `best_slope`.

  Slopes leave out points that are on an edge or truncated; their intervals come from the scatter of the points about the line.
  """

  points: tuple[RatePoint, ...]
  best_slope: Interval
  width_slope: Interval
  agrees: tuple[str, ...]
  best_reason: str
  width_reason: str


def effective_rate(optimizer: str, hparams: dict[str, Any]) -> float:
  """Returns learning_rate / (1 - momentum) for "momentum" and "nesterov", and the learning rate for all others.

  Source: Shallue et al. (2019), "effective learning rate", as drawn by the authors' code.
  """
  momentum = hparams.get("momentum", 0.0) if optimizer in ("momentum", "nesterov") else 0.0
  return hparams["learning_rate"] / (1 - momentum)


def rate_curve(
  study: dict, records: Sequence[Record], *, effective: bool = False, factor: float = GOOD_FACTOR
) -> RateCurve:
  """Describes best rates and good-rate widths at all batch sizes; with `effective`, of the effective rate.

  All feasible and infeasible trials of the sweep count as tried; those that are incomplete or did not reach the goal are not good.
  """
  searched = {"learning_rate", "momentum"} if effective else {"learning_rate"}
  rates, steps, on_edge = {}, {}, set()
  for result in steps_to_result(study, records):
    trials = sweep_trials(study, records, result.batch_size)
    rates[result.batch_size] = np.array(
      [effective_rate(study["optimizer"] if effective else "", trial.hparams) for trial in trials], float
    )
    steps[result.batch_size] = np.array(
      [t.steps if t.state == "complete" and t.steps is not None else np.nan for t in trials], float
    )
    if searched & set(result.edges):
      on_edge.add(result.batch_size)
  return fit_rates(rates, steps, on_edge=on_edge, factor=factor)


def fit_rates(
  rates: dict[int, np.ndarray], steps: dict[int, np.ndarray], *, on_edge: set[int], factor: float = GOOD_FACTOR
) -> RateCurve:
  """Fits best rate and good-rate width against batch size, next to the rules' exponents.

  Args:
    rates, steps: for each batch size f64[n], one entry for each trial; steps not finite where it did not reach the goal.
    on_edge: batch sizes whose best trial sits on an edge of the search.

  Source of the rules: Shallue et al. (2019), linear and square-root heuristics through the smallest batch size.
  """
  rng = np.random.default_rng(RESAMPLING_SEED)
  points = []
  for size in sorted(rates):
    reached = int(np.isfinite(steps[size]).sum())
    if reached < MIN_REACHED:
      reason = f"{reached} of {len(steps[size])} trials reached the goal, and {MIN_REACHED} are needed"
      points.append(RatePoint(size, UNKNOWN, UNKNOWN, size in on_edge, False, reason))
      continue
    winners = np.log(rates[size][draw_minima(steps[size], NUM_RESAMPLES, rng)])
    width, truncated = good_rate_width(rates[size], steps[size], factor=factor)
    best = percentiles(float(np.exp(winners.mean())), np.exp(winners))
    points.append(RatePoint(size, best, width, size in on_edge, truncated, ""))
  inner = [p for p in points if not (p.reason or p.on_edge)]
  whole = [p for p in points if not (p.reason or p.truncated)]
  best_reason, width_reason = (
    "" if len(kept) >= MIN_SLOPE_SIZES else f"{len(kept)} batch sizes {what}, and {MIN_SLOPE_SIZES} are needed"
    for kept, what in ((inner, "have their best rate inside the search"), (whole, "show both ends of the good region"))
  )
  best_slope = UNKNOWN if best_reason else _slope(inner, [p.best.value for p in inner])
  width_slope = UNKNOWN if width_reason else _slope(whole, [p.width.value for p in whole])
  agrees = tuple(name for name, exponent in RULES.items() if best_slope.low <= exponent <= best_slope.high)
  return RateCurve(tuple(points), best_slope, width_slope, agrees, best_reason, width_reason)


def good_rate_width(rates: np.ndarray, steps: np.ndarray, *, factor: float = GOOD_FACTOR) -> tuple[Interval, bool]:
  """Measures how much log rate is good: rates whose steps are within a factor of the fewest.

  Each trial stands for the log rates that are nearest to its own, and the width is the sum of these cells over the good trials. This
  needs no assumption on how rates were drawn. Where the rate alone is tuned it is the length of the good region; where more is tuned,
  that length averaged over the other hyperparameters as they were drawn, since every trial brings its own.

  Args:
    rates, steps: f64[n], one entry for each trial; steps not finite where it did not reach the goal (such a trial is not good).

  Returns: the width, with its interval from resampled trials (their cells and the limit on the steps held); and whether the lowest or
    highest rate tried is good, so that the region may go on. The interval errs on the wide side where rates lie evenly, as
    quasi-random ones do.
  """
  rates, steps = np.asarray(rates, float), np.asarray(steps, float)
  distinct, which, repeats = np.unique(np.log(rates), return_inverse=True, return_counts=True)
  borders = (distinct[1:] + distinct[:-1]) / 2
  ends = np.concatenate([distinct[:1], borders, distinct[-1:]])
  cells = (np.diff(ends) / repeats)[which]
  good = np.isfinite(steps) & (steps <= factor * np.nanmin(steps))
  shares = cells * good
  rng = np.random.default_rng(RESAMPLING_SEED)
  samples = shares[rng.integers(len(shares), size=(NUM_RESAMPLES, len(shares)))].sum(axis=1)
  return percentiles(float(shares.sum()), samples), bool(
    good[rates == rates.min()].any() or good[rates == rates.max()].any()
  )


def _slope(points: Sequence[RatePoint], values: Sequence[float]) -> Interval:
  return loglog_slope(np.array([p.batch_size for p in points]), np.array(values))
