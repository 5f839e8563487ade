"""The judge of Shallue's second claim: no batch size costs quality, given tuning and budget."""

import math

import numpy as np
from scipy import stats

from bsjax.analysis.claim import Finding, Verdict, columns, conjunction, in_words, inside, judged, unjudged
from bsjax.analysis.claims_steps import Sweeps
from bsjax.analysis.fits import CONFIDENCE, UNKNOWN, Interval
from bsjax.analysis.quality import is_accuracy, qualities

MARGIN = 0.2
"""A fifth of the mean error is the least loss of quality worth the name, or one test example if that is more."""

SAME_BEST_ERROR = unjudged(
  "same_best_error",
  statement="Tuned, and given enough steps, every batch size reaches the same quality",
  source="Shallue et al. (2019), section 4.7 and Fig. 9",
  expected="at most a fifth more",
  unit="test error of a batch size / mean of the others",
)


def judge_same_best_error(sweeps: Sweeps) -> Finding:
  """Judges whether any batch size ends worse than the others, each tuned for the best value of the target's metric.

  The error is that on the test set, at the look along a whole budget at which the validation set is best (`stopped_test_error`), at
  fresh seeds. For each batch size the mean over its seeds is compared with the mean over the other batch sizes (`excess_over_others`), with
  simultaneous intervals.

  Rule, for each batch size and optimizer: no loss is seen if the whole interval of the excess lies below the margin (`MARGIN` of the mean
  error of the others, at least one test example); a loss is seen if the whole interval lies above it. The claim holds if no batch
  size loses, fails if one does. `measured` is the ratio of errors at the batch size that decides, which its unit names.

  Series, one entry for each seed: optimizer, batch_size, error; for each batch size: size_optimizer, size_batch_size, excess, excess_low,
  excess_high, margin, num_seeds, num_trials.
  """
  seeds, sizes = [], []
  verdicts: dict[tuple[str, int], Verdict] = {}
  ratios: dict[tuple[str, int], Interval] = {}
  remarks = []
  for name, (study, records) in sweeps.items():
    found = [q for q in qualities(study, records) if len(q.errors) >= 2]
    if len(found) < 2:
      continue
    errors = [q.errors for q in found]
    remarks += [
      f"{name}, batch size {q.batch_size}: {q.num_seeds - len(q.errors)} of {q.num_seeds} seeds did not complete"
      for q in qualities(study, records)
      if len(q.errors) < q.num_seeds
    ]
    measured = {q.batch_size for q in qualities(study, records)}
    if measured:
      missing = [size for size in study["batch_sizes"] if size not in measured]
      remarks += [f"{name}, batch size {size}: no trial reached the target" for size in missing]
    for q, values, excess in zip(found, errors, excess_over_others(errors), strict=True):
      others = float(np.mean([np.mean(e) for p, e in zip(found, errors, strict=True) if p is not q]))
      margin = max(MARGIN * others, 1 / study["test_size"] if is_accuracy(study["target"]) else 0.0)
      key = name, q.batch_size
      verdicts[key] = inside(excess, -math.inf, margin)
      ratios[key] = Interval(*((others + end) / others for end in excess)) if others > 0 else UNKNOWN
      seeds += [(name, q.batch_size, value) for value in values.tolist()]
      sizes.append((name, q.batch_size, *excess, margin, len(values), q.num_trials))
  series = columns("optimizer batch_size error", seeds) | columns(
    "size_optimizer size_batch_size excess excess_low excess_high margin num_seeds num_trials", sizes
  )
  if not verdicts:
    reading = (
      "Fewer than two batch sizes have two fresh seeds that were trained for their whole budget (--quality_trials)."
    )
    return Finding(SAME_BEST_ERROR, series, reading)
  verdict = conjunction(*verdicts.values())
  rank = {key: (verdicts[key] != verdict, -row[2] / row[5]) for key, row in zip(verdicts, sizes, strict=True)}
  decisive = min(rank, key=lambda key: rank[key])
  claim = SAME_BEST_ERROR._replace(unit=f"{SAME_BEST_ERROR.unit}, batch size {decisive[1]} ({decisive[0]})")
  claim = judged(claim, ratios[decisive], n=len(seeds), verdict=verdict)
  reading = " ".join(_in_words(name, series) for name in sweeps if (series["size_optimizer"] == name).any())
  return Finding(claim, series, reading + (f" Left out: {'; '.join(remarks)}." if remarks else ""))


def excess_over_others(groups: list[np.ndarray]) -> list[Interval]:
  """Estimates the mean of each group minus the mean of the means of all others, with intervals that hold together in 95 % of cases.

  Variances are pooled over the groups (each has only a few seeds); Bonferroni's correction for the number of groups. No intervals for
  fewer than two groups. In 4,000 draws of normal errors, 11 groups of 5 seeds, all intervals were right in 96.2 % where the variances were
  equal, in 90.4 % where six of the groups had twice the standard deviation of the others, and in 90.6 % where one had
  (`simultaneous_coverage` in `tests/analysis/test_claims_quality.py`).
  """
  count = len(groups)
  if count < 2:
    return [UNKNOWN for _ in groups]
  means = np.array([np.mean(group) for group in groups])
  freedom = sum(len(group) - 1 for group in groups)
  variance = sum(float(np.sum((group - np.mean(group)) ** 2)) for group in groups) / freedom
  quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / count, freedom)
  found = []
  for i, group in enumerate(groups):
    rest = [j for j in range(count) if j != i]
    spread = variance * (1 / len(group) + sum(1 / len(groups[j]) for j in rest) / len(rest) ** 2)
    value = float(means[i] - means[rest].mean())
    half = float(quantile * math.sqrt(spread))
    found.append(Interval(value, value - half, value + half))
  return found


def _in_words(name: str, series: dict[str, np.ndarray]) -> str:
  at = series["optimizer"] == name
  sizes = np.unique(series["batch_size"][at])
  means = [float(series["error"][at & (series["batch_size"] == size)].mean()) for size in sizes]
  low, high = int(np.argmin(means)), int(np.argmax(means))
  here = series["size_optimizer"] == name
  worst = int(np.flatnonzero(here)[np.argmax(series["excess"][here])])
  excess = Interval(*(float(series[f"excess{end}"][worst]) for end in ("", "_low", "_high")))
  return (
    f"{name}: the mean test error after a whole budget, stopped by the validation set, is smallest at batch size {sizes[low]:,} "
    f"({means[low]:.4g}) and largest at "
    f"{sizes[high]:,} ({means[high]:.4g}). The largest excess over the others is {in_words(excess, 'z.4f')}; a loss would be "
    f"{series['margin'][worst]:.4f}."
  )
