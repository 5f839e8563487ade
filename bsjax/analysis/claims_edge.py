"""The judge of the edge of stability: does gradient descent drive the largest eigenvalue to 2 / learning rate, and only large batches?"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from bsjax.analysis.claim import Finding, Verdict, columns, conjunction, in_words, inside, judged, positive, unjudged
from bsjax.analysis.claims_escape import TOP_EIGENVALUE, eigenvalues_left_out, measure_curve
from bsjax.analysis.claims_gradient_noise import exponential, student_interval
from bsjax.analysis.claims_training import MAX_RESIDUAL
from bsjax.analysis.fits import Interval
from bsjax.analysis.selection import batch_size, learning_rate, num_diverged, of_kind
from bsjax.records import Record

EDGE_KIND = "edge"
WINDOW = 3
"""The eigenvalue jumps from step to step at the edge: a median of three checkpoints passes over a single spike."""
PEAK_LOW, PEAK_HIGH = 0.8, 1.25
"""How near 1 the peak must be, the same factor each way: published curves overshoot 2 / rate by some 10 to 20 %, and a rate that differs
by 1.25 has an edge of its own, from which this one must be told apart."""
REACHED = 0.9
"""From here on training is at the edge: below it, steps along the sharpest direction still shrink tenfold in about ten steps."""
LEFT = 0.75
"""Below this for good, training has left the edge, as it does when the cross-entropy nears zero; the gap to `REACHED` is for scatter."""
LEAST_RISE = 1.05
"""A curve that gained this factor in the second half of its steps is still rising."""
LEAST_PEAK_SLOPE = 0.05
"""A peak that grows by less than 3.5 % when the batch size doubles does not depend on it."""

State = Literal["reached", "never reached", "not there yet", "began above", "too few checkpoints"]
JUDGED_STATES = ("reached", "never reached")

EDGE_OF_STABILITY = unjudged(
  "edge_of_stability",
  statement="Full-batch gradient descent drives the largest Hessian eigenvalue up to 2 / learning rate and holds it there; smaller "
  "batches keep it below",
  source="Cohen et al. (2021); Andreyev and Beneventano (2024) for batch sharpness",
  expected=f"{PEAK_LOW:g} to {PEAK_HIGH:g} (prediction: 1)",
  unit="peak of the largest eigenvalue times rate / 2, full batch",
)


class _Run(NamedTuple):
  """One trial: where its ratio to the edge went, and its batch sharpness's."""

  batch_size: int
  learning_rate: float
  seed: int
  peak: float
  plateau: float
  plateau_share: float
  batch_peak: float
  batch_plateau: float
  state: State


def full_batch_size(study: dict) -> int:
  """Returns the examples of a full batch: those that the edge trials train on, by default the whole training set."""
  return int(study.get("edge", {}).get("train_size", study["train_size"]))


def judge_edge_of_stability(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether the ratio r = top_eigenvalue * learning_rate / 2 peaks near 1 in full-batch descent, and lower in smaller batches.

  On a quadratic of curvature h, gradient descent at the rate eta grows without bound where h > 2 / eta, that is r > 1. Trials of kind
  "edge" are plain SGD without momentum. A trial's peak is the largest of the medians of `WINDOW` successive checkpoints. Its plateau is
  the geometric mean of r from the first such median of at least `REACHED` until they stay below `LEFT`; NaN where it was never reached.
  Eigenvalues with a residual above `MAX_RESIDUAL` of them are left out and counted.

  Counted but not judged are trials that began above the edge, which can only come down to it; and full-batch trials that stayed below
  `REACHED` while r still gained the factor `LEAST_RISE` in the second half of their steps: training was too short, or the rate too
  small. Smaller batches of that rate and seed, as short, are not judged either. While there are such trials, nothing fails.

  Rule: (a) the mean log peak of full-batch trials must lie in [log `PEAK_LOW`, log `PEAK_HIGH`]. (b) The slope of log peak against log B,
  fitted with an intercept for each rate, must be positive (least: `LEAST_PEAK_SLOPE`). Both are first taken over the rates of one seed,
  and their intervals are Student's over seeds: rates of a seed share its initial weights, and they were chosen, not drawn, so their
  spread says nothing of another repeat; the reading tells it. The claim holds if both hold, and fails if one fails. `measured` is the
  peak, unless (b) decides (the unit says so).

  Series, one entry for each checkpoint: batch_size, learning_rate, seed, step, examples_seen, top_eigenvalue, ratio, and batch_ratio and
  gradient_ratio, the same of the batch sharpness and of the curvature along the gradient (NaN = not measured or not converged). For each
  trial: trial_batch_size, trial_learning_rate, trial_seed, peak, plateau, plateau_share (of the steps), batch_peak, batch_plateau (by
  the same rules, of batch_ratio), state. 0-d: full_batch_size.

  Source: Cohen et al. (2021), section 3, for r; Andreyev and Beneventano (2024) for the batch sharpness, which is said to hover at
  2 / rate at every batch size. The rule, the window and all constants are ours.
  """
  full = full_batch_size(study)
  trials = sorted(of_kind(records, EDGE_KIND), key=lambda r: (batch_size(r), learning_rate(r), r.trial["seed"]))
  runs = [_run(record, full) for record in trials]
  series = columns(
    "batch_size learning_rate seed step examples_seen top_eigenvalue ratio batch_ratio gradient_ratio",
    [row for record in trials for row in _checkpoints(record)],
  )
  names = "trial_batch_size trial_learning_rate trial_seed peak plateau plateau_share batch_peak batch_plateau state"
  series |= columns(names, runs) | {"full_batch_size": np.array(full)}
  remarks = _remarks(records, trials, runs, full)
  waiting = {(run.learning_rate, run.seed) for run in runs if run.state == "not there yet"}
  judged_runs = [run for run in runs if run.state in JUDGED_STATES and (run.learning_rate, run.seed) not in waiting]
  if not judged_runs:
    reading = (
      f"No complete trial of plain gradient descent tells how far it drives the largest eigenvalue. Trials at the full batch of {full:,} "
      f"examples and at smaller ones, with a checkpoint every few steps, would decide{remarks}."
    )
    return Finding(EDGE_OF_STABILITY, series, reading)
  full_runs = [run for run in judged_runs if run.batch_size == full]
  peak, slope = _over_seeds(full_runs, _mean_log_peak), _over_seeds(judged_runs, _peak_slope)
  at_edge, below = (
    "inconclusive" if waiting and verdict == "fails" else verdict
    for verdict in (inside(peak, math.log(PEAK_LOW), math.log(PEAK_HIGH)), positive(slope, least=LEAST_PEAK_SLOPE))
  )
  verdict = conjunction(at_edge, below)
  if at_edge == verdict:
    claim = judged(EDGE_OF_STABILITY, exponential(peak), n=len(full_runs), verdict=verdict)
  else:
    claim = EDGE_OF_STABILITY._replace(
      expected="above 0", unit="slope of log(peak of the eigenvalue times rate / 2) against log B"
    )
    claim = judged(claim, slope, n=len(judged_runs), verdict=verdict)
  first = f"{_full_clause(full_runs, peak, at_edge)}; {_slope_clause(slope, below)}."
  second = f"{_batch_clause([run for run in runs if run.batch_size < full])}{remarks}."
  return Finding(claim, series, f"{first} {second}")


def _run(record: Record, full: int) -> _Run:
  """Reads peak, plateau and state off one trial."""
  size, rate = batch_size(record), learning_rate(record)
  examples, eigenvalues = measure_curve(record, TOP_EIGENVALUE)
  steps, ratio = examples / size, eigenvalues * rate / 2
  peak, plateau, share = _peak_and_plateau(steps, ratio)
  batch_examples, batch_sharpness = measure_curve(record, "batch_sharpness")
  batch_peak, batch_plateau, _ = _peak_and_plateau(batch_examples / size, batch_sharpness * rate / 2)
  state: State
  if math.isnan(peak):
    state = "too few checkpoints"
  elif ratio[0] > 1:
    state = "began above"
  elif peak >= REACHED:
    state = "reached"
  elif size == full and _still_rising(steps, ratio):
    state = "not there yet"
  else:
    state = "never reached"
  return _Run(size, rate, record.trial["seed"], peak, plateau, share, batch_peak, batch_plateau, state)


def running_median(values: np.ndarray) -> np.ndarray:
  """Returns the medians of `WINDOW` successive values: f64[n] -> f64[n - `WINDOW` + 1], or none for fewer values."""
  if len(values) < WINDOW:
    return np.empty(0)
  return np.median(np.lib.stride_tricks.sliding_window_view(values, WINDOW), axis=1)


def _peak_and_plateau(steps: np.ndarray, ratio: np.ndarray) -> tuple[float, float, float]:
  """Returns the peak of the running median, the geometric mean over the plateau, and the plateau's share of the steps after 0."""
  smooth = running_median(ratio)
  if not len(smooth):
    return math.nan, math.nan, math.nan
  peak = float(smooth.max())
  if peak < REACHED:
    return peak, math.nan, 0.0
  # The median number i is centred on checkpoint i + 1; a plateau that lasts to the last median lasts to the end.
  first, last = int(np.argmax(smooth >= REACHED)) + 1, int(np.flatnonzero(smooth >= LEFT)[-1]) + 1
  last = len(ratio) - 1 if last == len(smooth) else last
  return peak, float(np.exp(np.mean(np.log(ratio[first : last + 1])))), float((steps[last] - steps[first]) / steps[-1])


def _still_rising(steps: np.ndarray, ratio: np.ndarray) -> bool:
  """Tells whether the last median of the ratio is `LEAST_RISE` times that at half the steps."""
  smooth = running_median(ratio)
  halfway = np.interp(steps[-1] / 2, steps[1:-1], smooth)
  return bool(smooth[-1] >= LEAST_RISE * halfway)


def _checkpoints(record: Record) -> list[tuple]:
  """Returns the rows of the series along one trial."""
  size, rate = batch_size(record), learning_rate(record)
  curves = [measure_curve(record, name) for name in (TOP_EIGENVALUE, "batch_sharpness", "gradient_curvature")]
  eigenvalue, batch, gradient = (dict(zip(curve.examples, curve.values, strict=True)) for curve in curves)
  rows = []
  for examples in sorted(eigenvalue.keys() | batch.keys() | gradient.keys()):
    top, *others = (values.get(examples, math.nan) for values in (eigenvalue, batch, gradient))
    ratios = (value * rate / 2 for value in (top, *others))
    rows.append((size, rate, record.trial["seed"], examples / size, examples, top, *ratios))
  return rows


def _over_seeds(runs: Sequence[_Run], statistic: Callable[[list[_Run]], float]) -> Interval:
  """Applies a statistic to the runs of each seed, and averages over the seeds where it is defined."""
  values = [statistic([run for run in runs if run.seed == seed]) for seed in sorted({run.seed for run in runs})]
  return student_interval([value for value in values if math.isfinite(value)])


def _mean_log_peak(runs: Sequence[_Run]) -> float:
  return float(np.mean([math.log(run.peak) for run in runs]))


def _peak_slope(runs: Sequence[_Run]) -> float:
  """Fits log peak = a(rate) + slope * log B by least squares; NaN unless some rate has two batch sizes."""
  covariance = variance = 0.0
  for rate in {run.learning_rate for run in runs}:
    here = [run for run in runs if run.learning_rate == rate]
    u, v = (np.log([getattr(run, name) for run in here]) for name in ("batch_size", "peak"))
    covariance += float((u - u.mean()) @ v)
    variance += float((u - u.mean()) @ (u - u.mean()))
  return covariance / variance if variance > 0 else math.nan


def _full_clause(runs: Sequence[_Run], peak: Interval, verdict: Verdict) -> str:
  """Says where full-batch descent went, at which rates, and for how long it stayed."""
  if not runs:
    return "No full-batch trial tells how far descent drives the largest eigenvalue"
  by_rate = [
    math.exp(_mean_log_peak([run for run in runs if run.learning_rate == rate]))
    for rate in sorted({run.learning_rate for run in runs})
  ]
  spread = f" ({min(by_rate):.2f} to {max(by_rate):.2f} at {len(by_rate)} rates)" if len(by_rate) > 1 else ""
  outcome = {
    "holds": "so it is driven to the edge",
    "fails": "which is not the edge",
    "inconclusive": "which leaves open whether it is driven to the edge",
  }[verdict]
  stayed = [run for run in runs if run.state == "reached"]
  held = (
    f", and where it arrives it averages {np.exp(np.mean(np.log([run.plateau for run in stayed]))):.2f} for "
    f"{100 * np.mean([run.plateau_share for run in stayed]):.0f} % of the steps"
    if stayed
    else ""
  )
  return f"At full batch the largest eigenvalue times rate / 2 peaks at {in_words(exponential(peak))}{spread}, {outcome}{held}"


def _slope_clause(slope: Interval, verdict: Verdict) -> str:
  if not math.isfinite(slope.value):
    return "no rate was run at two batch sizes, so nothing is known of smaller ones"
  outcome = {
    "holds": "so smaller batches keep it lower",
    "fails": "so smaller batches do not keep it lower",
    "inconclusive": "which leaves open whether smaller batches keep it lower",
  }[verdict]
  return f"the slope of the log peak against log B is {in_words(slope)}, {outcome}"


def _batch_clause(smaller: Sequence[_Run]) -> str:
  """Says whether batch sharpness sits at the edge where the largest eigenvalue stays below it."""
  measured = [run for run in smaller if math.isfinite(run.batch_peak)]
  if not measured:
    return "Batch sharpness was not measured along trials of smaller batches"
  arrived = [run for run in measured if math.isfinite(run.batch_plateau)]
  mean = _over_seeds(arrived, lambda runs: float(np.mean([math.log(run.batch_plateau) for run in runs])))
  plateau = f" and averages {in_words(exponential(mean))} from there on" if arrived else ""
  return f"With smaller batches, batch sharpness times rate / 2 reaches {REACHED:g} in {len(arrived)} of {len(measured)} trials{plateau}"


def _remarks(records: Iterable[Record], trials: Sequence[Record], runs: Sequence[_Run], full: int) -> str:
  """Says which trials and eigenvalues are counted apart, if any are."""
  counts = {
    "stayed below the edge at full batch": sum(r.state == "never reached" and r.batch_size == full for r in runs),
    "had not reached the edge at full batch but were still rising": sum(r.state == "not there yet" for r in runs),
    "began above the edge": sum(r.state == "began above" for r in runs),
    f"had fewer than {WINDOW} usable checkpoints": sum(r.state == "too few checkpoints" for r in runs),
    "diverged": num_diverged(r for r in records if r.trial.get("kind") == EDGE_KIND),
  }
  left_out, total = eigenvalues_left_out(trials)
  remarks = [f"{count} {'trial' if count == 1 else 'trials'} {what}" for what, count in counts.items() if count]
  if left_out:
    remarks.append(
      f"{left_out} of {total} eigenvalues are left out, not positive or with a residual above {100 * MAX_RESIDUAL:.0f} %"
    )
  return "".join(f"; {remark}" for remark in remarks)
