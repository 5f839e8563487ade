"""The judge of the intervals themselves: how often do those of the noise scale hold the truth, where the truth is known?"""

import math
from collections.abc import Sequence
from typing import Any

from scipy.special import betaincinv

from bsjax.analysis.claim import Finding, Verdict, columns, conjunction, in_words, inside, judged, unjudged
from bsjax.analysis.fits import Interval
from bsjax.records import Record

COVERAGE_KIND = "coverage"
LEAST_COVERAGE, MOST_COVERAGE = 0.93, 0.97
"""What a 95 % interval may really cover."""
JUDGED = ("linear_gaussian", "linear_decaying", "logistic", "student_t")
"""The problems of the claim. The others show where the interval ends."""
GIVEN_REGIMES, REFUSED_REGIMES = ("clear", "ample"), ("hopeless", "zero gradient")

COVERAGE = unjudged(
  "coverage",
  statement="The 95 % interval of the noise scale holds it 93 to 97 times in 100 where it is given, and is refused where it must be",
  source="draws from problems with a known noise scale; McCandlish et al. (2018), Eq. 2.9, for the noise scale",
  expected="0.93 to 0.97",
  unit="share of given intervals that hold the truth, on the problem farthest from 0.95",
)


def coverage_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
  """Returns one flat row for each complete cell, in the order of the records: its description, counts and shares.

  `coverage` is the share of the given intervals that hold the truth, with its exact binomial 95 % interval (Clopper and Pearson 1934);
  `signal_coverage` that of the signal-to-noise ratio, whose interval does not wait for a verdict.
  """
  rows = []
  for record in records:
    if record.trial.get("kind") != COVERAGE_KIND or record.status.get("state") != "complete":
      continue
    (measured,) = record.probes
    trial, given = record.trial, measured["given"]
    coverage = binomial_interval(measured["covered"], given)
    rows.append(
      {
        **{name: trial[name] for name in ("problem", "noise_scale", "regime", "num_examples", "num_draws")},
        "effective_dimension": measured["effective_dimension"],
        "given": given,
        "covered": measured["covered"],
        "too_high": measured["too_high"],
        "too_low": measured["too_low"],
        "share_given": given / trial["num_draws"],
        "coverage": coverage.value if given else None,
        "coverage_ci_low": coverage.low if given else None,
        "coverage_ci_high": coverage.high if given else None,
        "median_ci_ratio": measured["median_ci_ratio"],
        "signal_given": measured["signal_given"],
        "signal_coverage": measured["signal_covered"] / measured["signal_given"] if measured["signal_given"] else None,
      }
    )
  return rows


def judge_coverage(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether the intervals of the noise scale cover it as often as they say, and are refused where they must be.

  Cells are a problem, a true noise scale and a data set size. Those in the regimes "clear" and "ample" are where intervals are
  given: |G|^2 lies far above its sampling error. Those in "hopeless" (|G|^2 well below it) and "zero gradient" are where every draw is
  to be refused. "borderline" cells are reported and not judged: there the verdict itself selects draws.

  Rule: holds if on each problem of `JUDGED` the coverage over all its given cells has a binomial interval inside [0.93, 0.97], no single
  cell is outside that range beyond what chance explains (its interval at level 0.05 / number of cells lies outside), and no draw in a
  refused cell got a number. Fails if the pooled interval of a problem, or a single cell in this sense, lies outside, or a refused cell
  got a number. Else, or without cells of both kinds, inconclusive.

  Series, one entry for each cell: problem, noise_scale (NaN without a gradient), regime, num_examples, share_given, coverage,
  coverage_low, coverage_high (NaN where none was given).
  """
  del study
  rows = coverage_rows(records)
  names = "problem noise_scale regime num_examples share_given coverage coverage_ci_low coverage_ci_high"
  series = columns(
    names.replace("_ci_", "_"),
    [tuple(math.nan if row[name] is None else row[name] for name in names.split()) for row in rows],
  )
  given = [row for row in rows if row["problem"] in JUDGED and row["regime"] in GIVEN_REGIMES and row["given"]]
  refused = [row for row in rows if row["problem"] in JUDGED and row["regime"] in REFUSED_REGIMES]
  if not given or not refused:
    reading = (
      f"There are {len(given)} cells in which intervals were given and {len(refused)} in which they must be refused, and the claim needs "
      "both kinds. Draw more cells to judge it."
    )
    return Finding(COVERAGE, series, reading)

  pooled = {
    problem: _pooled([row for row in given if row["problem"] == problem])
    for problem in dict.fromkeys(row["problem"] for row in given)
  }
  strays = [
    row
    for row in given
    if inside(
      binomial_interval(row["covered"], row["given"], level=1 - 0.05 / len(given)), LEAST_COVERAGE, MOST_COVERAGE
    )
    == "fails"
  ]
  wrong, draws = sum(row["given"] for row in refused), sum(row["num_draws"] for row in refused)
  exceptions: Verdict = "fails" if strays or wrong else "holds"
  verdict = conjunction(*(inside(interval, LEAST_COVERAGE, MOST_COVERAGE) for interval in pooled.values()), exceptions)
  worst = max(pooled, key=lambda problem: abs(pooled[problem].value - 0.95))
  cells = [row["coverage"] for row in given]
  reading = (
    f"Of the intervals given, {_in_percent(pooled[worst])} hold the truth on {worst}, the problem farthest from 95 %; single cells range "
    f"from {100 * min(cells):.1f} to {100 * max(cells):.1f} %. Where nothing can be said, {wrong:,} of {draws:,} draws got a number."
    f"{_strays_remark(strays)}"
  )
  n = sum(row["given"] for row in given)
  return Finding(judged(COVERAGE, pooled[worst], n=n, verdict=verdict), series, reading)


def binomial_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
  """Bounds a probability from counts, exactly; NaN without trials.

  Source: Clopper and Pearson (1934).
  """
  if not trials:
    return Interval(math.nan, math.nan, math.nan)
  tail = (1 - level) / 2
  low = betaincinv(successes, trials - successes + 1, tail) if successes else 0.0
  high = betaincinv(successes + 1, trials - successes, 1 - tail) if successes < trials else 1.0
  return Interval(successes / trials, float(low), float(high))


def _pooled(rows: Sequence[dict[str, Any]]) -> Interval:
  return binomial_interval(sum(row["covered"] for row in rows), sum(row["given"] for row in rows))


def _in_percent(interval: Interval) -> str:
  return f"{in_words(Interval(*(100 * bound for bound in interval)), '.1f')} %"


def _strays_remark(strays: Sequence[dict[str, Any]]) -> str:
  if not strays:
    return ""
  row = strays[0]
  more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
  return (
    f" Outside of 93 to 97 % beyond chance: {row['problem']} at noise scale {row['noise_scale']:,.0f} with {row['num_examples']:,} "
    f"examples{more}."
  )
