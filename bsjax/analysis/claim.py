"""What a judge hands on: a claim with its verdict, and the numbers its figure draws."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from bsjax.analysis.fits import Interval

Verdict = Literal["holds", "fails", "inconclusive"]


class Claim(NamedTuple):
  """One sentence about batch size, judged. `_asdict()` is ready for JSON: numbers are floats or None, never NaN.

  `expected` says in words what the claim predicts for `measured`; `ci_low` and `ci_high` bound a 95 % interval; `n` counts the
  points that went into `measured`; `figure` is the name of the figure that shows them.
  """

  id: str
  statement: str
  source: str
  expected: str
  measured: float | None
  ci_low: float | None
  ci_high: float | None
  unit: str
  n: int | None
  verdict: Verdict
  figure: str


class Finding(NamedTuple):
  """A claim, the arrays its figure draws (keys: see the judge's docstring), and two sentences to stand under the figure."""

  claim: Claim
  series: dict[str, np.ndarray]
  reading: str


def unjudged(claim_id: str, *, statement: str, source: str, expected: str, unit: str) -> Claim:
  """Returns a claim as it stands before anything was measured: inconclusive, with the figure of the same name."""
  return Claim(claim_id, statement, source, expected, None, None, None, unit, None, "inconclusive", claim_id)


def judged(claim: Claim, interval: Interval, *, n: int, verdict: Verdict) -> Claim:
  """Returns the claim with what was measured."""
  measured, low, high = map(finite_or_none, interval)
  return claim._replace(measured=measured, ci_low=low, ci_high=high, n=n, verdict=verdict)


def finite_or_none(x: float) -> float | None:
  """Turns NaN and infinities into None, for JSON."""
  return float(x) if math.isfinite(x) else None


def columns(names: str, rows: Sequence[tuple]) -> dict[str, np.ndarray]:
  """Turns rows into one array for each of the names, which are separated by spaces; empty arrays if there are no rows."""
  keys = names.split()
  arrays = [np.asarray(column) for column in zip(*rows, strict=True)] if rows else [np.empty(0) for _ in keys]
  return dict(zip(keys, arrays, strict=True))


def inside(interval: Interval, low: float, high: float) -> Verdict:
  """Judges a claim that a value lies in [low, high] (a test of equivalence).

  Holds if the whole interval lies inside, fails if the whole interval lies outside, and is inconclusive if the interval crosses a
  border or is not known. So a precise value near the prediction holds, and a vague interval around it does not.
  """
  if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
    return "inconclusive"
  if low <= interval.low and interval.high <= high:
    return "holds"
  return "fails" if interval.high < low or interval.low > high else "inconclusive"


def positive(interval: Interval, *, least: float) -> Verdict:
  """Judges a claim that a value is above zero; `least` > 0 is the smallest value worth the claim's name.

  Holds if the whole interval lies above zero. Otherwise fails if the whole interval lies below `least`: then the effect is absent or
  reversed, and known to be. Otherwise, or without an interval, inconclusive.
  """
  if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
    return "inconclusive"
  if interval.low > 0:
    return "holds"
  return "fails" if interval.high < least else "inconclusive"


def every(*verdicts: Verdict) -> Verdict:
  """Joins the conditions of one claim: all must hold; one failure fails it."""
  if "fails" in verdicts:
    return "fails"
  return "holds" if all(verdict == "holds" for verdict in verdicts) else "inconclusive"


def conjunction(*verdicts: Verdict) -> Verdict:
  """Joins a claim made for several settings: it holds if it holds in all, and fails if it fails in one."""
  return "fails" if "fails" in verdicts else "inconclusive" if "inconclusive" in verdicts else "holds"


def in_words(interval: Interval, spec: str = "z.2f") -> str:
  """Writes "0.98 [0.95, 1.01]", or says that there is no interval; the `z` in a format leaves no "-0.00"."""
  if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
    return f"{interval.value:{spec}} (no interval)"
  return f"{interval.value:{spec}} [{interval.low:{spec}}, {interval.high:{spec}}]"


def negated(interval: Interval) -> Interval:
  """Returns the interval of minus the value."""
  return Interval(-interval.value, -interval.high, -interval.low)
