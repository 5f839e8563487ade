"""The judge of the temperature test: does the noise scale follow learning rate over batch size when they change in mid-training?"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from bsjax.analysis.claim import Finding, columns, conjunction, every, in_words, inside, judged, unjudged
from bsjax.analysis.claims_gradient_noise import exponential, smoothed_noise_scale, student_interval, total_rows
from bsjax.analysis.fits import Interval
from bsjax.analysis.selection import batch_size, learning_rate, of_kind
from bsjax.records import Record

TEMPERATURE_KIND = "temperature"
UNCHANGED = "unchanged"
"""The branch that trains on as before: what every other branch is compared with."""
SETTLED_FRACTION = 1 / 2
"""A change takes time to show: what counts is the second half of a stretch."""
TOLERANCE = math.log(2)
"""Measured and predicted agree within a factor of 2: over a change of 16 that is the difference between the exponents 1 and 3/4."""

TEMPERATURE = unjudged(
  "temperature",
  statement="The noise scale is inversely proportional to the temperature, learning rate / batch size, and returns with it",
  source="McCandlish et al. (2018), Eq. C.2 and Fig. 15",
  expected="1",
  unit="measured / predicted factor of the noise scale, in the branch that decides",
)


class _Stretch(NamedTuple):
  """The settled part of one stretch of one branch and seed."""

  branch: str
  phase: str
  seed: int
  noise_scale: float


def judge_temperature(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether the noise scale rises by T / T' when the temperature T = eps / B falls to T' in the middle of training.

  Trials of kind "temperature" name their `branch`, their `phase` ("before", "during" the change, "after" it) and the examples seen before
  their first step. A stretch's noise scale is that of the training set itself, of which the prediction speaks and which is exact: mean
  tr(Sigma) over mean |G|^2 over the checkpoints of its second half. For each seed it is divided by that of the branch that was not
  changed, at the same examples seen; log(measured / predicted) is averaged over seeds, with Student's interval. Momentum cancels in T / T'.

  The prediction assumes a quadratic loss, a small temperature and independent batches, so the study draws them with replacement.
  In shuffled epochs, where training relaxes over more than one, their noise cancels, and a run at a low temperature is quieter than
  predicted: a test simulates both on a quadratic.

  Rule, for each branch: holds if that interval lies within +- `TOLERANCE` both during the change and, with the prediction 1, after it;
  fails if either lies outside; else inconclusive. The claim holds if it holds in every branch, and fails if it fails in one. The control
  changes rate and batch size by the same factor and so is predicted to change nothing; it counts as the others do.

  Series, one entry for each checkpoint: branch, phase, seed, examples_seen, noise_scale. For each changed branch: factor_branch,
  predicted, factor, factor_low, factor_high, and after, after_low, after_high: the factors during the change and after it.
  """
  del study
  trials = of_kind(records, TEMPERATURE_KIND)
  series = columns(
    "branch phase seed examples_seen noise_scale",
    sorted(
      (
        record.trial["branch"],
        record.trial["phase"],
        record.trial["seed"],
        record.trial["examples_before"] + row["step"] * batch_size(record),
        smoothed_noise_scale([row], "dataset_grad_sq_norm"),
      )
      for record in trials
      for row in total_rows(record)
    ),
  )
  stretches = [_settled(record) for record in trials if record.trial["phase"] != "before"]
  settled = {(s.branch, s.phase, s.seed): s.noise_scale for s in stretches}
  predicted = _predictions(trials)
  rows, verdicts, ratios = [], {}, {}
  for branch, factor in predicted.items():
    during, after = (_log_ratio(settled, branch, phase) for phase in ("during", "after"))
    ratio = Interval(*(bound - math.log(factor) for bound in during))
    ratios[branch] = ratio
    verdicts[branch] = every(inside(ratio, -TOLERANCE, TOLERANCE), inside(after, -TOLERANCE, TOLERANCE))
    rows.append((branch, factor, *exponential(during), *exponential(after)))
  series |= columns("factor_branch predicted factor factor_low factor_high after after_low after_high", rows)
  if not rows:
    return Finding(
      TEMPERATURE,
      series,
      "No complete trial changes its learning rate or batch size in the middle. Such branches beside one without change would decide.",
    )
  verdict = conjunction(*verdicts.values())
  deciding = max((b for b in verdicts if verdicts[b] == verdict), key=lambda b: _distance(ratios[b]))
  row = rows[list(predicted).index(deciding)]
  held = sum(v == "holds" for v in verdicts.values())
  reading = (
    f"At {deciding} the noise scale of the training set changes by a factor of {_factor(row[2:5])} where {row[1]:.3g} is predicted, and "
    f"stands at {_factor(row[5:8])} times the unchanged run's after the change is undone. Prediction and return agree within a factor of "
    f"{math.exp(TOLERANCE):.0f} in {held} of {len(rows)} branches, and branches of equal temperature with each other within a factor of "
    f"{_spread(rows):.2f}."
  )
  n = len({s.seed for s in stretches})
  return Finding(judged(TEMPERATURE, exponential(ratios[deciding]), n=n, verdict=verdict), series, reading)


def _factor(bounds: tuple) -> str:
  return in_words(Interval(*bounds), ".3g") if math.isfinite(bounds[0]) else "an unknown number of"


def _spread(rows: Sequence[tuple]) -> float:
  """Returns the largest ratio of two measured factors with the same prediction."""
  known = [(predicted, factor) for _, predicted, factor, *_ in rows if math.isfinite(factor)]
  return max((a / b for p, a in known for q, b in known if math.isclose(p, q)), default=1.0)


def _settled(record: Record) -> _Stretch:
  rows = total_rows(record)
  late = [row for row in rows if row["step"] >= SETTLED_FRACTION * record.trial["config"]["num_steps"]]
  return _Stretch(
    record.trial["branch"],
    record.trial["phase"],
    record.trial["seed"],
    smoothed_noise_scale(late, "dataset_grad_sq_norm"),
  )


def _predictions(trials: Sequence[Record]) -> dict[str, float]:
  """Returns T / T' of each changed branch, in the order of the factor and the name; empty without an unchanged one."""
  temperatures = {r.trial["branch"]: learning_rate(r) / batch_size(r) for r in trials if r.trial["phase"] == "during"}
  base = temperatures.pop(UNCHANGED, None)
  if base is None:
    return {}
  return dict(sorted(((b, base / t) for b, t in temperatures.items()), key=lambda item: (-round(item[1], 6), item[0])))


def _log_ratio(settled: dict[tuple[str, str, int], float], branch: str, phase: str) -> Interval:
  """Averages log(noise scale of the branch / of the unchanged one) over the seeds that have both."""
  seeds = sorted(seed for b, p, seed in settled if (b, p) == (branch, phase) and (UNCHANGED, phase, seed) in settled)
  return student_interval([math.log(settled[branch, phase, seed] / settled[UNCHANGED, phase, seed]) for seed in seeds])


def _distance(interval: Interval) -> float:
  """Returns how far an interval reaches from 0; infinite where there is none."""
  ends = [abs(end) for end in interval[1:]]
  return max(ends) if all(map(math.isfinite, ends)) else math.inf
