"""What it does to a minimum that it was taken over finitely many trials: its bias, its spread, and a check at fresh seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from bsjax.analysis.fits import CONFIDENCE, UNKNOWN, Interval
from bsjax.analysis.selection import batch_size, steps_to_target
from bsjax.analysis.steps_to_result import StepsToResult
from bsjax.records import Record

MIN_REACHED = 4
"""With fewer trials that reached the goal, more than one half-sample in ten holds none of them: too few to tell the spread of a minimum."""

HALF_STRETCH = np.sqrt(3 / 2)
"""Halves of one sample show two thirds of the variance of a minimum over n/2 trials: see `resample_minimum`."""


class TuningBias(NamedTuple):
  """How far the fewest steps of n trials lie above those of more trials, at all batch sizes together; factors on the steps.

  `gain`: steps with half of the trials over steps with all of them, geometric mean over the batch sizes, with its interval from their
  scatter; `gains` f64[n], one for each batch size. Another doubling of the trials is expected to lower the steps by at most this factor.
  `remaining`: the factor by which no number of further trials would lower them by more, if only tuning, not luck, separates trials.
  `trend`: slope of log gain against log B. An interval that holds 0 says that no bending of the curve by uneven tuning was seen.
  """

  batch_sizes: np.ndarray
  gains: np.ndarray
  gain: Interval
  remaining: Interval
  trend: Interval


class FinalCheck(NamedTuple):
  """Steps at fresh seeds over the steps of the best trial, with the same hyperparameters.

  `ratio` is the geometric mean with Student's interval; above 1 by as much as the minimum owes to luck. NaN, with the reason, if a fresh
  seed never reached the goal or if there are too few.
  """

  batch_size: int
  ratio: Interval
  num_seeds: int
  num_reached: int
  reason: str


def expected_minimum(values: np.ndarray, num_trials: int) -> float:
  """Returns the mean, over all subsets of `num_trials` of the values, of the smallest value in the subset.

  With sorted values x_1 <= ... <= x_n, the i-th is the smallest of C(n - i, m - 1) of the C(n, m) subsets of size m, so the mean is
  sum_i x_i C(n - i, m - 1) / C(n, m): exact, unbiased for the expected minimum of m fresh trials, and no subset need be drawn.

  Args:
    values: f64[n], one for each trial; values that are not finite are trials that failed. Subsets of failures only are left out.
    num_trials: m, from 1 to n. At n the answer is the minimum.

  Returns: NaN if every trial failed.

  Source: the order-statistics formula for the expected best of m < n trials, as in Dodge et al. (2019), here without replacement.
  """
  ranked, weights = _ranked(values, num_trials)
  return float(ranked @ weights) if len(ranked) else np.nan


def draw_minima(values: np.ndarray, num_draws: int, rng: np.random.Generator) -> np.ndarray:
  """Draws halves of the trials without replacement and returns which trial is the smallest in each: i64[num_draws].

  The ordinary bootstrap of a minimum is inconsistent: two resamples in three contain the smallest value, however many trials there
  are. Halves of the trials (n/2 out of n, without replacement) are real sweeps, if smaller ones.
  """
  order = np.argsort(np.where(np.isfinite(values), values, np.inf), kind="stable")
  ranked, weights = _ranked(values, half(values))
  return order[rng.choice(len(ranked), size=num_draws, p=weights)]


def resample_minimum(values: np.ndarray, num_draws: int, rng: np.random.Generator) -> np.ndarray:
  """Draws values that the minimum over all n trials might have had: f64[num_draws], min - stretch (min of a half - its mean).

  The minimum over n/2 fresh trials varies more than the one over n, by the factor 2^(1/a) where the share of trials within t of the
  lowest value grows as t^a: twice for two hyperparameters, hardly where seeds decide. Halves of one sample show only part of that,
  since they share their trials: for a = 1 two thirds of the variance (the i-th lowest value is a sum of i exponential gaps and is the
  minimum of a half with probability 2^-i: 8/3 of 4 squared gaps). `HALF_STRETCH` restores it, so the spread errs on the wide side, most
  where few hyperparameters and no luck decide. The sign turns the longer tail of a minimum, which lies above, to the side of the truth.
  """
  drawn = values[draw_minima(values, num_draws, rng)]
  return np.nanmin(values) - HALF_STRETCH * (drawn - expected_minimum(values, half(values)))


def half(values: np.ndarray) -> int:
  """Returns half the number of trials, rounded up."""
  return (len(values) + 1) // 2


def _ranked(values: np.ndarray, num_trials: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the finite values in order and the probability of each to be the smallest of a subset that is not all failures."""
  values = np.asarray(values, float)
  if not 1 <= num_trials <= len(values):
    raise ValueError(f"num_trials={num_trials} of {len(values)} values cannot be drawn; use 1 to {len(values)}.")
  ranked = np.sort(values[np.isfinite(values)])
  above = len(values) - 1 - np.arange(len(ranked))
  log_weights = (
    special.gammaln(above + 1) - special.gammaln(num_trials) - special.gammaln(np.maximum(above - num_trials + 2, 1))
  )
  log_weights = np.where(above >= num_trials - 1, log_weights, -np.inf)
  weights = np.exp(log_weights - log_weights.max(initial=-np.inf)) if len(ranked) else log_weights
  return ranked, weights / weights.sum() if len(ranked) else weights


def tuning_bias(steps: Mapping[int, np.ndarray], *, num_tuned: int) -> TuningBias:
  """Estimates how far the fewest steps of finitely many trials lie above those of more trials.

  The minimum over n trials is biased low against a single trial and high against more trials. The gain of the last doubling is
  measured without bias, g = log(S_(n/2)) - log(S_n) by `expected_minimum`; one batch size gives a number as uncertain as it is large, so
  the batch sizes are averaged. If the lower tail of log steps is no heavier than exponential, every further doubling gains less.

  Bound on all further gains: near its lowest point log steps is a bowl in `num_tuned` = d hyperparameters (or fewer, which is better),
  the share of trials within t of it grows as t^(d/2), so the bias of n trials falls as n^(-2/d) and sums to g / (2^(2/d) - 1).
  It holds where tuning separates the trials. Where their seeds do, better luck can always be found and there is no bound:
  `check_final_seeds` measures the part of luck.

  Args:
    steps: for each batch size f64[n], one entry for each trial drawn; not finite where it did not reach the goal.
    num_tuned: how many hyperparameters were drawn.

  Holds: batch sizes with fewer than `MIN_REACHED` trials that reached the goal are left out. Equal gains leave the critical batch size
    as it is and raise S_min and E_min; gains that change with B (`trend`) bend the curve.
  """
  sizes = [size for size in sorted(steps) if np.isfinite(steps[size]).sum() >= MIN_REACHED]
  logs = [np.log(np.asarray(steps[size], float)) for size in sizes]
  gains = np.array([expected_minimum(x, half(x)) - expected_minimum(x, len(x)) for x in logs])
  gain = mean_interval(gains)
  rest = 1 / (2 ** (2 / num_tuned) - 1)
  trend = UNKNOWN
  if len(sizes) > 2:
    line = stats.linregress(np.log(sizes), gains)
    spread = stats.t.ppf((1 + CONFIDENCE) / 2, len(sizes) - 2) * line.stderr
    trend = Interval(float(line.slope), float(line.slope - spread), float(line.slope + spread))
  return TuningBias(
    np.array(sizes),
    np.exp(gains),
    Interval(*np.exp(gain).tolist()),
    Interval(*np.exp(np.multiply(rest, gain)).tolist()),
    trend,
  )


def mean_interval(values: np.ndarray) -> Interval:
  """Returns the mean with Student's interval; no interval from fewer than two values."""
  values = np.asarray(values, float)
  if len(values) < 2:
    return Interval(float(values[0]), np.nan, np.nan) if len(values) else UNKNOWN
  spread = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
  return Interval(float(values.mean()), float(values.mean() - spread), float(values.mean() + spread))


def check_final_seeds(study: dict, records: Sequence[Record], results: Sequence[StepsToResult]) -> list[FinalCheck]:
  """Compares the best trial of each batch size with fresh seeds at its hyperparameters, which no choice has seen.

  Args:
    results: of `steps_to_result`; batch sizes that were not reached are left out.
  """
  checks = []
  for result in results:
    if result.steps is None:
      continue
    finals = [
      record
      for record in records
      if record.trial.get("kind") == "final"
      and record.trial["seed"] in study["final_seeds"]
      and batch_size(record) == result.batch_size
      and record.trial["hparams"] == result.hparams
    ]
    steps = [steps_to_target(record, study["target"]) for record in finals if record.status.get("state") == "complete"]
    reached = [s for s in steps if s is not None]
    reason = (
      f"only {len(finals)} fresh seeds were trained, and 2 are needed"
      if len(finals) < 2
      else f"{len(finals) - len(reached)} of {len(finals)} fresh seeds never reached the goal"
      if len(reached) < len(finals)
      else ""
    )
    log_ratio = UNKNOWN if reason else mean_interval(np.log(np.array(reached) / result.steps))
    ratio = Interval(*np.exp(log_ratio).tolist())
    checks.append(FinalCheck(result.batch_size, ratio, len(finals), len(reached), reason))
  return checks
