"""Judges of what batch size does to a training run: how many steps it takes, how it generalises, where it ends."""

from collections.abc import Sequence

import numpy as np

from bsjax.analysis.claim import (
  Claim,
  Finding,
  Verdict,
  columns,
  conjunction,
  in_words,
  judged,
  negated,
  positive,
  unjudged,
)
from bsjax.analysis.fits import (
  CONFIDENCE,
  UNKNOWN,
  CriticalBatchSize,
  Interval,
  bootstrap_critical_batch_size,
  bootstrap_slope,
  loglog_slope,
  welch,
)
from bsjax.analysis.selection import (
  BUDGETS,
  batch_size,
  final_records,
  last_probe_value,
  steps_to_target,
  tuned_rate,
)
from bsjax.records import Record

LEAST_STEPS_SLOPE = 0.05
"""Doubling the batch size saves less than 3.5 % of the steps below this; perfect scaling has -1."""
LEAST_ACCURACY = 0.002
"""A difference of less than two test examples in a thousand is no difference in generalisation."""
LEAST_SHARPNESS_SLOPE = 0.05
"""Sharpness that grows by less than 3.5 % when the batch size doubles does not depend on it."""
MAX_RESIDUAL = 0.05
"""An eigenvalue whose Lanczos residual exceeds this part of it is not used: it has not converged."""
CURVE_POINTS = 65

STEPS = unjudged(
  "more_steps",
  statement="Small batches need more updates to reach the target",
  source="Shallue et al. (2019), steps to result; McCandlish et al. (2018), Eqs. 2.11-2.12",
  expected="below 0 (perfect scaling: -1)",
  unit="slope of log(steps to target) against log B",
)


def steps_points(study: dict, records: Sequence[Record]) -> list[tuple[int, int, float]]:
  """Returns (batch size, seed, steps to target) of the final trials at the rate tuned for the target.

  NaN steps for a trial that ended, or diverged, without reaching it; unfinished trials are left out.
  """
  ended = [
    r
    for r in final_records(study, records, "target", complete=False)
    if r.status.get("state") in ("complete", "diverged")
  ]
  found = ((batch_size(r), r.trial["seed"], steps_to_target(r, study["target"])) for r in ended)
  return [(size, seed, np.nan if steps is None else float(steps)) for size, seed, steps in found]


def fit_critical_batch_size(study: dict, records: Sequence[Record]) -> CriticalBatchSize:
  """Fits S = S_min (1 + B_crit / B) to `steps_points`."""
  points = np.array(steps_points(study, records)).reshape(-1, 3)
  return bootstrap_critical_batch_size(points[:, 0], points[:, 2])


def judge_more_steps(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether steps to target fall as the batch grows, and fits the critical batch size.

  Trials at the rate tuned for the target, in the longer of the two budgets; batch sizes where a seed never reached the target are left
  out of slope and fit, and said so. Interval of the slope: bootstrap over seeds.

  Rule: holds if the interval lies below 0; fails if it lies above -`LEAST_STEPS_SLOPE`; else inconclusive. The verdict does not need a
  critical batch size. Needs two batch sizes with two seeds each.

  Series: points batch_size, seed, steps (NaN = never); curves fit_batch_size, fit_steps, fit_low, fit_high (NaN without a fit) and
  perfect_steps (through the geometric mean at the smallest batch size used); 0-d s_min, critical_batch_size, critical_low, critical_high.
  """
  points = steps_points(study, records)
  fit = fit_critical_batch_size(study, records)
  series = columns("batch_size seed steps", points) | _steps_curves(points, fit)
  used = np.isin(series["batch_size"], fit.used)
  if len(fit.used) < 2:
    reading = (
      f"All seeds, at least two, reached the target at {len(fit.used)} batch sizes, and a comparison needs at least two. "
      f"{_never_reached(fit).capitalize() or 'More trials would decide'}."
    )
    return Finding(STEPS, series, reading)
  slope = bootstrap_slope(series["batch_size"][used], series["steps"][used])
  verdict = positive(negated(slope), least=LEAST_STEPS_SLOPE)
  change = {
    "holds": "Steps to target fall as the batch grows",
    "fails": "Steps to target do not fall as the batch grows",
    "inconclusive": "Whether steps to target fall as the batch grows is left open by the interval",
  }[verdict]
  edges = [size for size in fit.used if (tuned := tuned_rate(study, "target", size)) and tuned.edge]
  remarks = [
    text
    for text in (
      _never_reached(fit),
      f"the rate sits on the edge of its grid at batch size {_listed(edges)}, where fewer steps may be possible"
      if edges
      else "",
    )
    if text
  ]
  critical = (
    f"The critical batch size cannot be determined: {fit.reason}"
    if fit.reason
    else f"The fit gives a critical batch size of {in_words(fit.critical, '.3g')} examples and at least {in_words(fit.s_min, '.3g')} "
    f"steps, and misses the measured means by {100 * fit.misfit:.2g} % (root mean square)"
  )
  reading = (
    f"{change}, with slope {in_words(slope)} over batch sizes {fit.used[0]} to {fit.used[-1]} where perfect scaling has -1. "
    f"{'; '.join([critical, *remarks])}."
  )
  return Finding(judged(STEPS, slope, n=int(used.sum()), verdict=verdict), series, reading)


def _steps_curves(points: Sequence[tuple[int, int, float]], fit: CriticalBatchSize) -> dict[str, np.ndarray]:
  """Returns the curves and scalars of `judge_more_steps`; empty curves with fewer than two batch sizes."""
  scalars = (fit.s_min.value, *fit.critical)
  series = {
    key: np.array(value)
    for key, value in zip(("s_min", "critical_batch_size", "critical_low", "critical_high"), scalars, strict=True)
  }
  grid = np.geomspace(fit.used[0], fit.used[-1], CURVE_POINTS) if len(fit.used) > 1 else np.empty(0)
  missing = np.full_like(grid, np.nan)
  series |= {
    "fit_batch_size": grid,
    "fit_steps": missing,
    "fit_low": missing,
    "fit_high": missing,
    "perfect_steps": missing,
  }
  if len(grid):
    first = [steps for size, _, steps in points if size == fit.used[0]]
    series["perfect_steps"] = np.exp(np.mean(np.log(first))) * fit.used[0] / grid
  if len(grid) and not fit.reason:
    series["fit_steps"] = fit.s_min.value * (1 + fit.critical.value / grid)
    curves = fit.samples[:, :1] * (1 + fit.samples[:, 1:] / grid)
    series["fit_low"], series["fit_high"] = np.quantile(curves, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
  return series


def _never_reached(fit: CriticalBatchSize) -> str:
  if not fit.excluded:
    return ""
  return (
    f"batch size {_listed(fit.excluded)} is left out, because not every seed reached the target or only one was run"
  )


def _listed(sizes: Sequence[int]) -> str:
  return ", ".join(str(size) for size in sizes)


GENERALIZATION = unjudged(
  "generalizes",
  statement="Small batches generalise better, at equal epochs and at equal steps",
  source="Keskar et al. (2017); Shallue et al. (2019) for the two budgets",
  expected="above 0",
  unit="test accuracy, smallest third of batch sizes minus largest third",
)


def judge_generalizes(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether test accuracy is higher for small batches, in each of the two budgets.

  Mean over the smallest third of the batch sizes minus mean over the largest third (at least one each), trials at the tuned rates over
  the final seeds. The interval covers the seeds, by Welch's formula; it is for these batch sizes, rates and test examples, and does not
  cover the choice of the test examples.

  Rule in each budget: holds if the interval lies above 0; fails if it lies below `LEAST_ACCURACY`; else inconclusive. The claim is
  made for both budgets: it holds if it holds in both and fails if it fails in one. `measured` is the number of the budget that decides
  (its unit names it); the reading tells both.

  Series: budget, batch_size, seed, test_accuracy: one entry for each trial and budget.
  """
  rows = _probe_points(study, records, "test", "test_accuracy")
  series = columns("budget batch_size seed test_accuracy", rows)
  contrasts = {
    budget: _thirds([(size, value) for name, size, _, value in rows if name == budget]) for budget in BUDGETS
  }
  verdicts = {budget: positive(contrast, least=LEAST_ACCURACY) for budget, contrast in contrasts.items()}
  outcome = {
    "holds": "small batches do better",
    "fails": "small batches do not do better",
    "inconclusive": "the interval decides nothing",
  }
  clauses = {
    budget: f"at equal {budget} the difference is {in_words(contrasts[budget], 'z.4f')}, so {outcome[verdicts[budget]]}"
    if np.isfinite(contrasts[budget].value)
    else f"at equal {budget} there are not two batch sizes with two complete seeds each"
    for budget in BUDGETS
  }
  reading = (
    "Test accuracy of the smallest third of batch sizes minus that of the largest third: "
    f"{clauses['epochs']}; {clauses['steps']}. {_agreement(verdicts, 'that small batches generalise better')}"
  )
  return Finding(_claim_of_budgets(GENERALIZATION, contrasts, verdicts, rows), series, reading)


def _probe_points(study: dict, records: Sequence[Record], probe: str, field: str) -> list[tuple[str, int, int, float]]:
  """Returns (budget, batch size, seed, value) of the last row of a probe for the final trials of both budgets."""
  found = (
    (budget, batch_size(r), r.trial["seed"], last_probe_value(r, probe, field))
    for budget in BUDGETS
    for r in final_records(study, records, budget)
  )
  return [(budget, size, seed, value) for budget, size, seed, value in found if value is not None]


def _thirds(points: Sequence[tuple[int, float]]) -> Interval:
  """Compares the smallest third of batch sizes with the largest third; batch sizes with one seed are left out."""
  groups: dict[int, list[float]] = {}
  for size, value in points:
    groups.setdefault(size, []).append(value)
  sizes = sorted(size for size, values in groups.items() if len(values) >= 2)
  if len(sizes) < 2:
    return UNKNOWN
  third = max(1, len(sizes) // 3)
  return welch([np.array(groups[s]) for s in sizes[:third]], [np.array(groups[s]) for s in sizes[-third:]])


def _slope_of_means(points: Sequence[tuple[int, float]]) -> Interval:
  """Fits the log-log slope through the geometric means at each batch size; unknown with fewer than three batch sizes."""
  sizes = sorted({size for size, _ in points})
  if len(sizes) < 3:
    return UNKNOWN
  means = [np.exp(np.mean([np.log(value) for at, value in points if at == size])) for size in sizes]
  return loglog_slope(np.array(sizes), np.array(means))


def _claim_of_budgets(
  claim: Claim, contrasts: dict[str, Interval], verdicts: dict[str, Verdict], rows: Sequence[tuple]
) -> Claim:
  """Fills a claim made for both budgets with the number that decides it: of a budget where it fails, else is open, else of epochs.

  Unchanged where a budget has no number.
  """
  if not all(np.isfinite(contrast.value) for contrast in contrasts.values()):
    return claim
  verdict = conjunction(*verdicts.values())
  decisive = next(budget for budget in BUDGETS if verdicts[budget] == verdict)
  n = sum(row[0] == decisive for row in rows)
  return judged(claim._replace(unit=f"{claim.unit}, at equal {decisive}"), contrasts[decisive], n=n, verdict=verdict)


def _agreement(verdicts: dict[str, Verdict], claim: str) -> str:
  if len(set(verdicts.values())) > 1:
    return {
      "fails": f"So it depends on the budget {claim.replace('that', 'whether', 1)}, and the claim as it stands fails.",
      "inconclusive": f"Only one budget decides {claim.replace('that', 'whether', 1)}, so the claim stays open.",
    }[conjunction(*verdicts.values())]
  return {
    "holds": f"Both budgets say {claim}.",
    "fails": f"Neither budget shows {claim}.",
    "inconclusive": f"Neither budget decides {claim.replace('that', 'whether', 1)}.",
  }[verdicts["epochs"]]


FLATNESS = unjudged(
  "flat_minima",
  statement="Small batches end in flatter minima, at equal epochs and at equal steps",
  source="Keskar et al. (2017); sharpness here is the largest eigenvalue of the Hessian",
  expected="above 0",
  unit="slope of log(sharpness) against log B",
)


def judge_flat_minima(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether the largest Hessian eigenvalue at the end of training grows with batch size, in each of the two budgets.

  Slope through the geometric means over final seeds at each batch size; its interval comes from the scatter of the batch sizes about a
  straight line. Eigenvalues that are not positive, or whose residual exceeds `MAX_RESIDUAL` of them, are left out and counted. Sharpness
  of a network depends on how it is parametrised and on how far it was trained: at equal epochs large batches made fewer steps.

  Rule in each budget: holds if the interval lies above 0; fails if it lies below `LEAST_SHARPNESS_SLOPE`; else inconclusive. The claim
  is made for both budgets: it holds if it holds in both and fails if it fails in one. `measured` is the number of the budget that decides.
  Needs three batch sizes.

  Series: budget, batch_size, seed, sharpness, residual: one entry for each trial and budget, unconverged ones included.
  """
  rows = [
    (budget, batch_size(r), r.trial["seed"], sharpness, np.inf if residual is None else residual)
    for budget in BUDGETS
    for r in final_records(study, records, budget)
    for residual in (last_probe_value(r, "sharpness", "residual"),)
    if (sharpness := last_probe_value(r, "sharpness", "sharpness")) is not None
  ]
  series = columns("budget batch_size seed sharpness residual", rows)
  converged = [row for row in rows if row[3] > 0 and row[4] <= MAX_RESIDUAL * row[3]]
  slopes = {
    budget: _slope_of_means([(size, value) for name, size, _, value, _ in converged if name == budget])
    for budget in BUDGETS
  }
  verdicts = {budget: positive(slope, least=LEAST_SHARPNESS_SLOPE) for budget, slope in slopes.items()}
  outcome = {
    "holds": "small batches end flatter",
    "fails": "small batches do not end flatter",
    "inconclusive": "nothing is decided",
  }
  clauses = {
    budget: f"{in_words(slopes[budget])} at equal {budget}, so {outcome[verdicts[budget]]}"
    if np.isfinite(slopes[budget].low)
    else f"not known at equal {budget}, where fewer than three batch sizes have a converged eigenvalue"
    for budget in BUDGETS
  }
  dropped = len(rows) - len(converged)
  left_out = (
    f" ({dropped} of {len(rows)} eigenvalues are left out, with a residual above {100 * MAX_RESIDUAL:.0f} %)"
    if dropped
    else ""
  )
  reading = (
    f"The slope of log sharpness against log B is {clauses['epochs']}; it is {clauses['steps']}{left_out}. "
    f"{_agreement(verdicts, 'that small batches end in flatter minima')}"
  )
  return Finding(_claim_of_budgets(FLATNESS, slopes, verdicts, converged), series, reading)
