"""Judges of sharp minima: do small batches end flatter by every measure, and does any measure rank the test error?"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from bsjax.analysis.claim import Finding, Verdict, columns, conjunction, in_words, judged, positive, unjudged
from bsjax.analysis.claims_training import LEAST_SHARPNESS_SLOPE
from bsjax.analysis.fits import CONFIDENCE, UNKNOWN, Interval
from bsjax.analysis.ranks import MIN_CLUSTERS, cluster_weights, kendall_tau, partial_tau, tau_interval
from bsjax.analysis.solutions import (
  PHASES,
  Solution,
  batch_norm_words,
  judged_measures,
  measure_label,
  measurements,
  read_solutions,
  reliable,
  spectra,
  trials_lost,
)
from bsjax.records import Record

LEAST_TAU = 0.1
"""At tau 0.1 the flatter one of two solutions has the smaller test error in 55 of 100 cases: hardly better than a coin."""

FLAT = unjudged(
  "flat_measures",
  statement="Small batches end in flatter minima, by every measure, at equal training loss and at equal epochs",
  source="Keskar et al. (2017), Tables 3-4 and Fig. 4",
  expected="above 0",
  unit="slope of log(sharpness) against log B",
)

GENERALIZES = unjudged(
  "flat_generalizes",
  statement="A flatter minimum generalises better, at equal training loss",
  source="Keskar et al. (2017); tested as in Jiang et al. (2020), with Kendall's rank correlation",
  expected="above 0 for at least one measure",
  unit="Kendall's tau-b of sharpness and test error",
)


# --- flat_measures ---


def common_slope(batch_sizes: np.ndarray, rate_parts: np.ndarray, values: np.ndarray) -> Interval:
  """Fits log value = a_r + slope * log B through the geometric means over seeds of each cell (batch size, rate part r).

  One slope for all rates and an intercept for each, by ordinary least squares. The interval comes from the scatter of the cells about the
  fit (Student's t, cells - rates - 1 degrees of freedom), so a bend widens it, and so do slopes that differ between rates.

  Args:
    batch_sizes, rate_parts, values: f64[n], positive, one entry for each trial.

  Returns: unknown unless some rate has two batch sizes; no interval without a degree of freedom.
  """
  cells: dict[tuple[float, float], list[float]] = {}
  for size, part, value in zip(batch_sizes, rate_parts, values, strict=True):
    cells.setdefault((float(part), float(size)), []).append(math.log(value))
  parts = np.array([part for part, _ in cells])
  log_b = np.log([size for _, size in cells])
  means = np.array([np.mean(logs) for logs in cells.values()])
  for part in np.unique(parts):
    log_b[parts == part] -= log_b[parts == part].mean()
    means[parts == part] -= means[parts == part].mean()
  if not np.any(np.abs(log_b) > 1e-9):
    return UNKNOWN
  slope = float(log_b @ means / (log_b @ log_b))
  freedom = len(cells) - len(np.unique(parts)) - 1
  if freedom < 1:
    return Interval(slope, math.nan, math.nan)
  residuals = means - slope * log_b
  half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(residuals @ residuals / freedom / (log_b @ log_b))
  return Interval(slope, float(slope - half), float(slope + half))


def judge_flat_measures(study: dict, records: Sequence[Record]) -> Finding:
  """Judges for every measure of flatness, at equal training loss and at equal epochs, whether it grows with the batch size.

  Slope and interval: `common_slope`, over the solutions of each phase. Values that are not positive or not `reliable` are left out and
  counted, as are trials that diverged or never reached the training loss. The smallest eigenvalue is measured but not judged
  (`NO_FLATNESS`).

  Rule for each measure and phase: holds if the interval lies above 0; fails if it lies below `LEAST_SHARPNESS_SLOPE`; else inconclusive.
  The claim says "every": it holds if it holds for all, and fails if it fails for one. `measured` is the number of the measure and phase
  that decide, its unit names them: the weakest where all hold, else the lowest that fails or is open. Each interval is at the 95 % level by
  itself: that all lie above 0 needs no correction, but one lone failure among many measures is weak evidence, so the reading counts them.

  Series, one entry for each measurement: phase, measure, batch_size, rate_part, seed, value, error, grad_norm, train_loss, test_error,
  test_loss, used. For each phase and measure: slope_phase, slope_measure, slope, slope_low, slope_high, slope_verdict, slope_points
  (measurements used) and slope_cells. 0-d: batch_norm, the words for the statistics used. And those of `spectra`.
  """
  solutions = read_solutions(records)
  series = measurements(study, solutions, logarithm=True)
  slopes: dict[tuple[str, str], Interval] = {}
  counts: dict[tuple[str, str], int] = {}
  rows = []
  for phase in PHASES:
    for measure in judged_measures(study):
      chosen = _chosen(series, phase, measure)
      size, part, value = (series[name][chosen] for name in ("batch_size", "rate_part", "value"))
      slopes[phase, measure], counts[phase, measure] = common_slope(size, part, value), int(chosen.sum())
      verdict = positive(slopes[phase, measure], least=LEAST_SHARPNESS_SLOPE)
      cells = len(set(zip(size.tolist(), part.tolist(), strict=True)))
      rows.append((phase, measure, *slopes[phase, measure], verdict, counts[phase, measure], cells))
  series |= columns("slope_phase slope_measure slope slope_low slope_high slope_verdict slope_points slope_cells", rows)
  series["batch_norm"] = batch_norm_words(solutions)
  series |= spectra(records)
  if not any(math.isfinite(slope.low) for slope in slopes.values()):
    sizes = {s.batch_size for s in solutions}
    reading = (
      f"No measure of flatness is usable at enough batch sizes and rates for an interval ({len(solutions)} complete solutions, batch "
      f"sizes {', '.join(map(str, sorted(sizes))) or 'none'}). Solutions of three batch sizes, with measures that converged, would decide."
    )
    return Finding(FLAT, series, reading)
  verdicts = {key: positive(slope, least=LEAST_SHARPNESS_SLOPE) for key, slope in slopes.items()}
  verdict = conjunction(*verdicts.values())
  phase, measure = min((key for key in verdicts if verdicts[key] == verdict), key=lambda key: _lowest(slopes[key]))
  decisive = slopes[phase, measure]
  tallies = {
    words: _tally({m: verdicts[p, m] for p, m in verdicts if p == each}, "small batches end flatter")
    for each, words in PHASES.items()
  }
  first, second = tallies.values()
  summary = f"{' and '.join(tallies)} {first}" if first == second else "; ".join(map(" ".join, tallies.items()))
  left_out = int(len(series["used"]) - series["used"].sum())
  remarks = [
    f"{left_out} of {len(series['used'])} values are left out, not positive or not known well enough"
    if left_out
    else "",
    *trials_lost(records, solutions),
  ]
  number = f"is {in_words(decisive)}" if math.isfinite(decisive.value) else "is not known"
  reading = f"{_capital(summary)}. " + "; ".join(
    [f"The slope that decides, of {measure_label(measure)} {PHASES[phase]}, {number}", *filter(None, remarks)]
  )
  claim = FLAT._replace(unit=f"slope of log({measure_label(measure)}) against log B, {PHASES[phase]}")
  return Finding(judged(claim, decisive, n=counts[phase, measure], verdict=verdict), series, f"{reading}.")


def _chosen(series: Mapping[str, np.ndarray], phase: str, measure: str) -> np.ndarray:
  """Selects the measurements that are used of one phase and measure."""
  return (series["phase"] == phase) & (series["measure"] == measure) & series["used"].astype(bool)


def _lowest(interval: Interval) -> float:
  return interval.low if math.isfinite(interval.low) else math.inf


def _tally(verdicts: Mapping[str, Verdict], says: str) -> str:
  """Says how many measures say so, how many do not and how many say nothing, and names those outside the largest camp.

  >>> _tally({"trace": "holds", "sam": "holds", "average": "fails"}, "small batches end flatter")
  'small batches end flatter by 2 of 3 measures, and not by 1 (average sharpness)'
  """
  camps = {
    verdict: [measure_label(m) for m in verdicts if verdicts[m] == verdict]
    for verdict in ("holds", "fails", "inconclusive")
  }
  largest, total = max(camps, key=lambda verdict: len(camps[verdict])), len(verdicts)
  if len(camps[largest]) == total:
    return {
      "holds": f"{says} by all {total} measures",
      "fails": f"{says} by none of {total} measures",
      "inconclusive": f"all {total} measures leave it open whether {says}",
    }[largest]
  named = {v: f" ({', '.join(names)})" if names and v != largest else "" for v, names in camps.items()}
  parts = [f"{says} by {len(camps['holds']) or 'none'} of {total} measures{named['holds']}"]
  parts += [f"not by {len(camps['fails'])}{named['fails']}"] if camps["fails"] else []
  parts += [f"{len(camps['inconclusive'])}{named['inconclusive']} leave it open"] if camps["inconclusive"] else []
  return f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _capital(text: str) -> str:
  return text[:1].upper() + text[1:]


# --- flat_generalizes ---


class _Ranking(NamedTuple):
  """How one measure ranks the solutions: tau with the test error, and the same tau in three other ways."""

  test_error: Interval
  test_loss: Interval
  partial: Interval
  granulated: Interval
  num_points: int


def judge_flat_generalizes(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether any measure of flatness ranks the test errors of the solutions at equal training loss.

  Kendall's tau-b between the measure and the test error over all solutions of phase "level", positive where the flatter one generalises
  better. Seeds of one setting (batch size and rate) are alike, so the intervals resample whole settings (`cluster_weights`), and they hold
  for all measures at once (Bonferroni). Values that are not `reliable` are left out; negative ones have their rank.

  Beside it, in the series and the reading: tau with the test loss; the partial tau given the training loss, because training losses are
  equal only to the grid of checkpoints; the granulated tau, over pairs that share rate and seed and differ in batch size alone; and as a
  control the tau of the training loss itself with the test error.

  Rule for each measure: holds if the interval lies above 0; fails if it lies below `LEAST_TAU`; else inconclusive. The claim holds if it
  holds for at least one measure, and fails if it fails for all. `measured` is the tau of the measure whose interval has the highest lower
  end. Needs `MIN_CLUSTERS` settings of two batch sizes or more. Nothing here is causal: batch size and rate were chosen, and move
  sharpness and test error alike.

  Series, one entry for each measurement: as in `judge_flat_measures`. For each measure: tau_measure, tau_verdict, tau_points; tau, tau_low,
  tau_high; and the same three with the prefixes test_loss_, partial_ and granulated_. 0-d: control_tau, control_tau_low, control_tau_high,
  level (of the intervals), batch_norm.
  """
  everything = read_solutions(records)
  solutions = [s for s in everything if s.phase == "level"]
  series = measurements(study, solutions, logarithm=False)
  tested = [s for s in solutions if math.isfinite(s.test_error) and math.isfinite(s.train_loss)]
  missing = _missing(tested)
  measures = [] if missing else judged_measures(study)
  level = 1 - (1 - CONFIDENCE) / max(len(measures), 1)
  rankings = {measure: _ranking(measure, tested, level) for measure in measures}
  verdicts = {measure: positive(rankings[measure].test_error, least=LEAST_TAU) for measure in measures}
  control = UNKNOWN if missing else _control(tested, level)
  series |= columns(
    "tau_measure tau_verdict tau_points tau tau_low tau_high test_loss_tau test_loss_tau_low test_loss_tau_high"
    " partial_tau partial_tau_low partial_tau_high granulated_tau granulated_tau_low granulated_tau_high",
    [
      (m, verdicts[m], r.num_points, *r.test_error, *r.test_loss, *r.partial, *r.granulated)
      for m, r in rankings.items()
    ],
  )
  series |= {f"control_tau{end}": np.asarray(x) for end, x in zip(("", "_low", "_high"), control, strict=True)}
  series |= {"level": np.asarray(level), "batch_norm": batch_norm_words(solutions)}
  known = [measure for measure in measures if math.isfinite(rankings[measure].test_error.low)]
  if not known:
    reason = missing or f"no measure is known well enough in {MIN_CLUSTERS} settings"
    reading = (
      f"{_capital(reason)}. Solutions at equal training loss from {MIN_CLUSTERS} settings (batch size and rate), of two batch sizes or "
      "more and with test errors that differ, would decide."
    )
    return Finding(GENERALIZES, series, reading)
  best = max(known, key=lambda measure: rankings[measure].test_error.low)
  ranking, says = rankings[best], list(verdicts.values())
  verdict: Verdict = (
    "holds" if "holds" in says else "fails" if all(said == "fails" for said in says) else "inconclusive"
  )
  losses = [s.train_loss for s in tested]
  remarks = trials_lost(records, everything)
  reading = (
    f"Over {len(tested)} solutions with training losses of {min(losses):.2g} to {max(losses):.2g} "
    f"{_tally(verdicts, 'the flatter one generalises better')}; the strongest is {measure_label(best)}, with Kendall's tau "
    f"{in_words(ranking.test_error)} (with the test loss {_in_words(ranking.test_loss)}; where batch size alone differs "
    f"{_in_words(ranking.granulated)}; given the training loss {_in_words(ranking.partial)}). "
    f"The training loss itself has tau {_in_words(control)} with the test error; "
    f"{''.join(f'{remark}; ' for remark in remarks)}batch size and rate move sharpness and test error alike, so no tau here says that "
    "flatness is the cause."
  )
  claim = GENERALIZES._replace(unit=f"Kendall's tau-b of {measure_label(best)} and test error")
  return Finding(judged(claim, ranking.test_error, n=ranking.num_points, verdict=verdict), series, reading)


def _in_words(interval: Interval) -> str:
  return in_words(interval) if math.isfinite(interval.value) else "unknown"


def _missing(tested: Sequence[Solution]) -> str:
  """Says why no measure can be ranked against the test error; empty if nothing stands in the way."""
  sizes, settings = {s.batch_size for s in tested}, {s.setting for s in tested}
  if not tested:
    return "no complete solution at equal training loss has its test error and training loss measured"
  if len(sizes) < 2:
    return f"all solutions at equal training loss were trained with batch size {min(sizes)}"
  if len(settings) < MIN_CLUSTERS:
    return f"solutions at equal training loss come from {len(settings)} settings only"
  if len({s.test_error for s in tested}) < 2:
    return f"all {len(tested)} solutions at equal training loss have the same test error"
  return ""


def _ranking(measure: str, tested: Sequence[Solution], level: float) -> _Ranking:
  """Ranks the solutions whose value of the measure is reliable."""
  chosen = [s for s in tested if reliable(s.measures.get(measure, {}))]
  if len(chosen) < 2:
    return _Ranking(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, len(chosen))
  values = np.array([s.measures[measure]["value"] for s in chosen])
  error, loss, train_loss = (
    np.array([getattr(s, name) for s in chosen]) for name in ("test_error", "test_loss", "train_loss")
  )
  weights = cluster_weights([s.setting for s in chosen])
  twins = [(s.rate_part, s.seed) for s in chosen]
  samples = kendall_tau(values, error, weights=weights)
  partial = partial_tau(
    samples, kendall_tau(values, train_loss, weights=weights), kendall_tau(error, train_loss, weights=weights)
  )
  granulated = kendall_tau(values, error, weights=weights, groups=twins)
  with_loss = kendall_tau(values, loss, weights=weights)
  test_error, test_loss, partial_error, granulated_error = (
    _interval(taus, chosen, level) for taus in (samples, with_loss, partial, granulated)
  )
  return _Ranking(test_error, test_loss, partial_error, granulated_error, len(chosen))


def _control(tested: Sequence[Solution], level: float) -> Interval:
  """Ranks the test errors by the training loss itself, which should be equal and is so only to the grid of checkpoints."""
  train_loss, error = (np.array([getattr(s, name) for s in tested]) for name in ("train_loss", "test_error"))
  return _interval(kendall_tau(train_loss, error, weights=cluster_weights([s.setting for s in tested])), tested, level)


def _interval(samples: np.ndarray, chosen: Sequence[Solution], level: float) -> Interval:
  settings = {s.setting for s in chosen}
  return tau_interval(samples, num_clusters=len(settings), level=level)
