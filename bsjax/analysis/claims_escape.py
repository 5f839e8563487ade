"""The judge of the escape test: do small batches lead out of a sharp minimum, and do large ones lead into one?"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bsjax.analysis.claim import Finding, Verdict, columns, conjunction, in_words, judged, negated, positive, unjudged
from bsjax.analysis.claims_gradient_noise import exponential, student_interval
from bsjax.analysis.claims_training import MAX_RESIDUAL
from bsjax.analysis.fits import Interval
from bsjax.analysis.selection import batch_size, is_number, learning_rate, num_diverged, of_kind, probe_rows
from bsjax.analysis.solutions import measure_label, reliable
from bsjax.records import Record

ESCAPE_KIND = "escape"
CONTROLS = {"large_small": "large_large", "small_large": "small_small"}
"""Each switched branch, named after the batch sizes before and after the switch, and the branch that goes on as before."""
BRANCHES = (*CONTROLS, *CONTROLS.values())
SIGNS = {"large_small": -1, "small_large": 1}
"""Which way log(sharpness / control's) should go in each switched branch."""
SETTLED_FRACTION = 1 / 2
"""A switch takes time to show: what counts is the second half of the stretch."""
LEAST_LOG_FACTOR = math.log(1.1)
"""A tenth is the least change of sharpness worth the name: published sharpness of large and small batches differs tenfold and more."""
TOP_EIGENVALUE = "top_eigenvalue"
SHARPNESS = (TOP_EIGENVALUE, "keskar_1e-3", "trace")
"""Measures that are compared by their ratio; the first one decides."""

NOISE_ESCAPES = unjudged(
  "noise_escapes",
  statement="The noise of small batches leads out of sharp minima: a large-batch minimiser flattens when it is trained on with small "
  "batches, and a small-batch minimiser sharpens when it is trained on with large ones",
  source="Keskar et al. (2017), section 4 and Fig. 5",
  expected="below 1 from large to small batches, above 1 from small to large",
  unit="largest Hessian eigenvalue / that of the unswitched run",
)


class Curve(NamedTuple):
  """One quantity along one trial: f64[n] each, rising in `examples` (seen since the trial's first step)."""

  examples: np.ndarray
  values: np.ndarray


class _Comparison(NamedTuple):
  """A quantity of a switched branch against its control: mean over seeds of a difference (of logarithms, for a sharpness)."""

  interval: Interval
  num_seeds: int


def measure_curve(record: Record, measure: str) -> Curve:
  """Returns the reliable positive values of a measure along a trial."""
  rows = (row for row in probe_rows(record, "measure") if row["measure"] == measure and reliable(row))
  return _curve(record, ((row["step"], row["value"]) for row in rows if row["value"] > 0))


def field_curve(record: Record, probe: str, field: str) -> Curve:
  """Returns a field of a probe along a trial, where it is a number."""
  return _curve(record, ((row["step"], row[field]) for row in probe_rows(record, probe) if is_number(row.get(field))))


def _curve(record: Record, points: Iterable[tuple[int, float]]) -> Curve:
  by_step = dict(sorted(points))
  steps, values = np.array(list(by_step), float), np.array(list(by_step.values()), float)
  return Curve(steps * batch_size(record), values)


def eigenvalues_left_out(records: Iterable[Record]) -> tuple[int, int]:
  """Counts the largest eigenvalues that are not positive or not reliable, and all of them."""
  rows = [row for r in records for row in probe_rows(r, "measure") if row["measure"] == TOP_EIGENVALUE]
  return sum(not (reliable(row) and row["value"] > 0) for row in rows), len(rows)


def judge_noise_escapes(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether small batches flatten a large-batch minimiser, and whether large batches sharpen a small-batch minimiser.

  Trials of kind "escape" name their `branch`, "large_small" for a large-batch minimiser that is trained on with small batches;
  "large_large" and "small_small" go on as before and are the controls, since sharpness changes with further training anyway. For each
  seed, log(sharpness / control's), at equal examples seen since the switch, is averaged over the second half of the stretch
  (`settled_difference`); the mean over seeds carries Student's interval. Sharpness is the largest Hessian eigenvalue; the reading
  tells the same of Keskar's sharpness, the trace and test accuracy. Eigenvalues that are not positive, or whose residual exceeds
  `MAX_RESIDUAL` of them, are left out and counted.

  The switched branch takes over the learning rate of its new batch size, too: what is compared are two ways to train, not two
  amounts of noise at one rate. All measures here change when layers are rescaled without changing the function (Dinh et al., 2017).

  Rule: in each direction, holds if the interval lies on the expected side of 0; fails if it does not reach a change by
  `LEAST_LOG_FACTOR` to that side; else inconclusive. The claim is made for both directions: it holds if it holds in both and fails if
  it fails in one. `measured` is the factor in the direction that decides (its unit names it); where both agree, the weaker one.

  Series, one entry for each checkpoint: branch, seed, batch_size, learning_rate, step, examples_seen, top_eigenvalue, converged, keskar,
  trace, test_accuracy, distance (from the minimiser); NaN = not measured. For each switched branch and measure: factor_branch,
  factor_measure, factor, factor_low, factor_high, factor_seeds.

  Source: Keskar et al. (2017), section 4: they switch the other way round, from small to large batches, after a varying warm start.
  """
  del study
  stretches = [r for r in records if r.trial.get("kind") == ESCAPE_KIND and r.trial.get("branch") in BRANCHES]
  trials = {(r.trial["branch"], r.trial["seed"]): r for r in of_kind(stretches, ESCAPE_KIND)}
  compared = {
    branch: {measure: _compare(trials, branch, measure) for measure in (*SHARPNESS, "test_accuracy")}
    for branch in CONTROLS
  }
  series = columns(
    "branch seed batch_size learning_rate step examples_seen top_eigenvalue converged keskar trace test_accuracy distance",
    [row for key in sorted(trials) for row in _checkpoints(trials[key])],
  )
  series |= columns(
    "factor_branch factor_measure factor factor_low factor_high factor_seeds",
    [
      (branch, measure, *exponential(compared[branch][measure].interval), compared[branch][measure].num_seeds)
      for branch in CONTROLS
      for measure in SHARPNESS
      if compared[branch][measure].num_seeds
    ],
  )
  deciding = {branch: compared[branch][TOP_EIGENVALUE] for branch in CONTROLS}
  remarks = _remarks(stretches, list(trials.values()))
  if not any(comparison.num_seeds for comparison in deciding.values()):
    reading = (
      "No seed has a switched branch and its control with converged eigenvalues in the second half of the stretch. "
      f"Two seeds of the branches {', '.join(BRANCHES)} would decide{remarks}."
    )
    return Finding(NOISE_ESCAPES, series, reading)
  support = {
    branch: comparison.interval if SIGNS[branch] > 0 else negated(comparison.interval)
    for branch, comparison in deciding.items()
  }
  verdicts = {branch: positive(interval, least=LEAST_LOG_FACTOR) for branch, interval in support.items()}
  verdict = conjunction(*verdicts.values())
  decisive = min((b for b in CONTROLS if verdicts[b] == verdict), key=lambda b: _least(support[b]))
  claim = NOISE_ESCAPES._replace(
    expected="below 1" if SIGNS[decisive] < 0 else "above 1",
    unit=f"{NOISE_ESCAPES.unit}, from {decisive.replace('_', ' to ')} batches",
  )
  claim = judged(claim, exponential(deciding[decisive].interval), n=deciding[decisive].num_seeds, verdict=verdict)
  clauses = [_clause(trials, branch, compared[branch]) for branch in CONTROLS]
  reading = f"{'; '.join(clauses)}. {_conclusion(verdicts)}{remarks}."
  return Finding(claim, series, reading[0].upper() + reading[1:])


def _quantity(record: Record, name: str) -> Curve:
  """Returns a curve as it is compared: logarithms of a sharpness, test accuracy as it is."""
  if name not in SHARPNESS:
    return field_curve(record, "test", name)
  curve = measure_curve(record, name)
  return curve._replace(values=np.log(curve.values))


def _compare(trials: dict[tuple[str, int], Record], branch: str, name: str) -> _Comparison:
  """Averages the settled difference between a branch and its control over the seeds that have both."""
  control = CONTROLS[branch]
  seeds = sorted(seed for b, seed in trials if b == branch and (control, seed) in trials)
  differences = []
  for seed in seeds:
    pair = trials[branch, seed], trials[control, seed]
    end = min(max((row["step"] for row in r.probes), default=0) * batch_size(r) for r in pair)
    differences.append(settled_difference(*(_quantity(r, name) for r in pair), end=end))
  known = [difference for difference in differences if math.isfinite(difference)]
  return _Comparison(student_interval(known), len(known))


def settled_difference(curve: Curve, control: Curve, *, end: float) -> float:
  """Averages a curve minus its control over the checkpoints of both in the last `SETTLED_FRACTION` of [0, `end`] examples.

  Each curve is read at all of these, interpolated linearly between its own checkpoints, so that they are compared at equal examples
  seen. Where one of them ends, so does the mean.

  Returns: NaN if no checkpoint is left.
  """
  if not (len(curve.examples) and len(control.examples)):
    return math.nan
  start = max((1 - SETTLED_FRACTION) * end, curve.examples[0], control.examples[0])
  stop = min(end, curve.examples[-1], control.examples[-1])
  at = np.union1d(curve.examples, control.examples)
  at = at[(at > 0) & (at >= start) & (at <= stop)]
  if not len(at):
    return math.nan
  return float(np.mean(np.interp(at, *curve) - np.interp(at, *control)))


def _checkpoints(record: Record) -> list[tuple]:
  """Returns the rows of the series along one trial."""
  fields = {"test_accuracy": ("test", "test_accuracy"), "distance": ("distance", "from_parent")}
  at: dict[int, dict] = {}
  for row in record.probes:
    here = at.setdefault(row["step"], {})
    if row["probe"] == "measure" and is_number(row.get("value")):
      here[row["measure"]] = row["value"]
      here["converged"] = here.get("converged", False) or (row["measure"] == TOP_EIGENVALUE and reliable(row))
    for name, (probe, field) in fields.items():
      if row["probe"] == probe and is_number(row.get(field)):
        here[name] = row[field]
  size, rate = batch_size(record), learning_rate(record)
  return [
    (
      record.trial["branch"],
      record.trial["seed"],
      size,
      rate,
      step,
      step * size,
      here.get(TOP_EIGENVALUE, math.nan),
      here.get("converged", False),
      *(here.get(name, math.nan) for name in ("keskar_1e-3", "trace", *fields)),
    )
    for step, here in sorted(at.items())
  ]


def _least(interval: Interval) -> float:
  """Returns how much an interval supports its claim at least; nothing at all where there is none."""
  return interval.low if math.isfinite(interval.low) else -math.inf


def _setting(trials: dict[tuple[str, int], Record], branch: str) -> str:
  """Writes the batch size and rate of a branch."""
  record = next(r for (b, _), r in sorted(trials.items()) if b == branch)
  return f"B = {batch_size(record):,} at rate {learning_rate(record):.3g}"


def _clause(trials: dict[tuple[str, int], Record], branch: str, compared: dict[str, _Comparison]) -> str:
  """Says what one switch did: the deciding factor, the other measures, test accuracy, and how far the branch went."""
  control = CONTROLS[branch]
  origin = branch.split("_")[0]
  if not compared[TOP_EIGENVALUE].num_seeds:
    return f"no seed compares {branch} with {control}"
  first, *others = SHARPNESS
  beside = [
    f"{measure_label(name)}: {in_words(exponential(compared[name].interval), '.3g')}"
    for name in others
    if compared[name].num_seeds
  ]
  if compared["test_accuracy"].num_seeds:
    beside.append(f"test accuracy: {in_words(compared['test_accuracy'].interval, '+z.4f')}")
  distances = [_distance(trials, b) for b in (branch, control)]
  if all(map(math.isfinite, distances)):
    beside.append(f"distance from the minimiser: {distances[0]:.3g} against {distances[1]:.3g}")
  return (
    f"trained on with {_setting(trials, branch)}, {origin}-batch minimisers have a {measure_label(first)} "
    f"{in_words(exponential(compared[first].interval), '.3g')} times that with {_setting(trials, control)}"
    + (f" ({', '.join(beside)})" if beside else "")
  )


def _distance(trials: dict[tuple[str, int], Record], branch: str) -> float:
  """Averages over seeds the distance from the minimiser at the end of a branch."""
  curves = [field_curve(r, "distance", "from_parent").values for (b, _), r in trials.items() if b == branch]
  ends = [values[-1] for values in curves if len(values)]
  return float(np.mean(ends)) if ends else math.nan


def _conclusion(verdicts: dict[str, Verdict]) -> str:
  small = {
    "holds": "Small batches lead out of the sharp minimum",
    "fails": "Small batches do not lead out of the sharp minimum",
    "inconclusive": "Whether small batches lead out of the sharp minimum is left open",
  }[verdicts["large_small"]]
  large = {
    "holds": "large batches sharpen the flat one",
    "fails": "large batches do not sharpen the flat one",
    "inconclusive": "whether large batches sharpen the flat one is left open",
  }[verdicts["small_large"]]
  joined = "and" if verdicts["large_small"] == verdicts["small_large"] else "but"
  return f"{small}, {joined} {large}"


def _remarks(stretches: Sequence[Record], trials: Sequence[Record]) -> str:
  """Says what was left out, if anything was."""
  left_out, total = eigenvalues_left_out(trials)
  diverged = num_diverged(stretches)
  remarks = []
  if left_out:
    remarks.append(
      f"{left_out} of {total} eigenvalues are left out, not positive or with a residual above {100 * MAX_RESIDUAL:.0f} %"
    )
  if diverged:
    remarks.append(f"{diverged} {'trial' if diverged == 1 else 'trials'} diverged")
  return "".join(f"; {remark}" for remark in remarks)
