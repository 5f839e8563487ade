"""Judges of sweeps: the three regimes of the curve of steps to result, what momentum does to it, how sensitive to the rate batch sizes
are."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bsjax.analysis.budget_curves import budget_curves
from bsjax.analysis.claim import Finding, Verdict, columns, conjunction, in_words, inside, judged, positive, unjudged
from bsjax.analysis.claims_gradient_noise import exponential
from bsjax.analysis.finite_trials import check_final_seeds
from bsjax.analysis.fits import CONFIDENCE, RESAMPLING_SEED, UNKNOWN, Interval, percentiles
from bsjax.analysis.steps_to_result import (
  StepsToResult,
  count_states,
  matching_train_goal,
  steps_to_result,
  steps_to_train_loss,
)
from bsjax.analysis.sweep_curves import OVERHEAD, SweepCurve, fit_sweep, steps_by_batch_size
from bsjax.analysis.sweep_rates import RateCurve, rate_curve
from bsjax.records import Record


class SweepRecords(NamedTuple):
  """The sweep of one optimizer: what was asked, and the records of all its trials."""

  study: dict
  records: Sequence[Record]


Sweeps = Mapping[str, SweepRecords]
"""By optimizer."""
WITH_MOMENTUM = ("momentum", "nesterov", "momentum_absorbed", "nesterov_absorbed")
LEAST_EXTENSION = math.log(1.25)
"""A critical batch size a quarter larger is the least worth the name: batch sizes are chosen by factors of two."""
NUM_BUDGETS = 4
LEAST_WIDTH_SLOPE = 0.05
"""Over a thousandfold batch size, rates that are good over a range 1.4 times as wide."""

THREE_REGIMES = unjudged(
  "three_regimes",
  statement="Twice the batch first takes half the steps, then less and less is gained, and beyond some batch size nothing",
  source="Shallue et al. (2019), section 4.1 and Fig. 1",
  expected="from 4 times the smallest batch size to a quarter of the largest",
  unit="critical batch size",
)
MOMENTUM_EXTENDS_SCALING = unjudged(
  "momentum_extends_scaling",
  statement="Momentum makes no difference at small batch sizes and extends perfect scaling to larger ones",
  source="Shallue et al. (2019), section 4.3 and Fig. 4",
  expected="above 1",
  unit="critical batch size with momentum / without",
)
LR_SENSITIVITY = unjudged(
  "lr_sensitivity",
  statement="Small batches are more sensitive to the learning rate: the range of good rates is narrower",
  source="a common rule of thumb; Marek et al. (2025), section 4, report the opposite",
  expected="above 0",
  unit="d log(width of the good rates) / d log(batch size)",
)


def judge_three_regimes(sweeps: Sweeps) -> Finding:
  """Judges whether the curve of steps to result shows perfect scaling, diminishing returns and a plateau.

  On S = S_min (1 + B_crit / B) a doubling from B takes (2 B + B_crit) / (B + B_crit) as many examples: at most 1 + `OVERHEAD` = 1.2 up to
  B = B_crit / 4; and one that ends at B saves at most the factor 1.2 from B = 4 B_crit on.

  Rule, for each optimizer: `inside` on the interval of the fitted B_crit, from 4 times the smallest batch size to a quarter of the
  largest: holds if it lies inside, so that the first doubling is nearly perfect and the last one nearly useless; fails if it lies
  outside, but beyond the upper end only if the largest batch size is the whole training set, since larger ones might show the plateau;
  else, or without a fit, inconclusive. All optimizers must agree. `measured` is B_crit of the optimizer that decides (its unit names it).

  Series, one entry for each optimizer and batch size: optimizer, batch_size, steps (Shallue's rule), steps_low, steps_high, perfect,
  regime, regime_share, train_steps (McCandlish's rule, NaN if none), final_ratio; for each trial that reached the target: trial_optimizer,
  trial_batch_size, trial_steps; states: state_optimizer, state_batch_size, reached, not_reached, incomplete, infeasible; for each
  optimizer: curve_optimizer, s_min, critical, critical_low, critical_high, perfect_until, max_useful; budget curves of the fastest
  optimizer (`budget_optimizer`, 0-d, its `budget_metric`): budget_unit, budget, budget_batch_size, budget_best, budget_reached.
  """
  curves = {name: fit_sweep(steps_by_batch_size(*sweep)) for name, sweep in sweeps.items()}
  series = _curve_series(sweeps, curves) | _budget_series(sweeps, curves)
  verdicts = {name: _regimes_seen(sweeps[name].study, curve) for name, curve in curves.items()}
  shown = [name for name, curve in curves.items() if len(curve.batch_sizes)]
  if not shown:
    return Finding(THREE_REGIMES, series, f"No batch size reached the target often enough: {_why_missing(curves)}.")
  reading = " ".join(_regimes_in_words(name, curves[name]) for name in shown) + _remark_on_trials(sweeps)
  verdict = conjunction(*verdicts.values())
  decisive = next(name for name in curves if verdicts[name] == verdict)
  critical = curves[decisive].fit.critical
  claim = THREE_REGIMES._replace(unit=f"{THREE_REGIMES.unit}, {decisive}") if len(sweeps) > 1 else THREE_REGIMES
  return Finding(judged(claim, critical, n=len(curves[decisive].batch_sizes), verdict=verdict), series, reading)


def _regimes_seen(study: dict, curve: SweepCurve) -> Verdict:
  """Tells whether the bend of a curve lies well within its batch sizes."""
  if curve.fit.reason:
    return "inconclusive"
  part = (1 - OVERHEAD) / OVERHEAD
  smallest, largest = float(curve.batch_sizes[0]), float(curve.batch_sizes[-1])
  verdict = inside(curve.fit.critical, part * smallest, largest / part)
  beyond = curve.fit.critical.low > largest / part
  return "inconclusive" if verdict == "fails" and beyond and largest < study["train_size"] else verdict


def _regimes_in_words(name: str, curve: SweepCurve) -> str:
  fit, useful = curve.fit, curve.max_useful
  last = curve.batch_sizes[-1]
  start = (
    f"{name}: the critical batch size is {in_words(fit.critical, 'z,.1f')}, so that steps fall in proportion to the batch size, within "
    f"20 % in "
    f"examples, up to {_size(curve.fit_perfect_until)}; it takes {in_words(fit.s_min, 'z,.0f')} steps at least"
    if not fit.reason
    else f"{name}: S = S_min (1 + B_crit / B) was not fitted: {fit.reason}; from point to point, steps fall in proportion up to "
    f"{_size(curve.perfect_until)}"
  )
  end = (
    f"from {_size(useful)} on no larger one of those tested saves more than 20 %"
    if math.isfinite(useful.value)
    else f"no plateau was seen up to {last:,}"
  )
  missing = f" Left out: {_missing(curve)}." if curve.reasons else ""
  return f"{start}; {end}.{missing}"


def _size(interval: Interval) -> str:
  """Writes a batch size with its interval, whose upper end may lie beyond those tested."""
  low, high = (
    (f"{end:,.3g}" if end < 100 else f"{end:,.0f}") if math.isfinite(end) else "beyond" for end in interval[1:]
  )
  value = f"{interval.value:,.3g}" if interval.value < 100 else f"{interval.value:,.0f}"
  return f"{value if math.isfinite(interval.value) else 'beyond'} [{low}, {high}]"


def _missing(curve: SweepCurve) -> str:
  return "; ".join(f"batch size {size}: {reason}" for size, reason in curve.reasons.items())


def _why_missing(curves: Mapping[str, SweepCurve]) -> str:
  return "; ".join(f"{name}, {_missing(curve)}" for name, curve in curves.items()) or "no sweep was run"


def _remark_on_trials(sweeps: Sweeps) -> str:
  """Says where a best trial sits on the edge of what was searched, and where one still runs that could be first."""
  results = [(name, result) for name, sweep in sweeps.items() for result in steps_to_result(*sweep)]
  edges = [f"{_of(name, sweeps)}batch size {r.batch_size} ({_edges(r)})" for name, r in results if r.steps and r.edges]
  still = [f"{_of(name, sweeps)}batch size {r.batch_size}" for name, r in results if r.num_open and not r.steps]
  remark = f" The best trial sits on the edge of the search at {', '.join(edges)}." if edges else ""
  return remark + (f" Unfinished: {', '.join(still)}." if still else "")


def _of(name: str, sweeps: Sweeps) -> str:
  return f"{name}, " if len(sweeps) > 1 else ""


def _edges(result: StepsToResult) -> str:
  return ", ".join(f"{side} {name}" for name, side in result.edges.items())


def _curve_series(sweeps: Sweeps, curves: Mapping[str, SweepCurve]) -> dict[str, np.ndarray]:
  points, trials, states, summary = [], [], [], []
  for name, (study, records) in sweeps.items():
    curve = curves[name]
    results = steps_to_result(study, records)
    goal = matching_train_goal(study, records)
    by_loss = {} if goal is None else {r.batch_size: r.steps for r in steps_to_train_loss(study, records, goal=goal)}
    checks = {check.batch_size: check.ratio.value for check in check_final_seeds(study, records, results)}
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    for i, size in enumerate(curve.batch_sizes.tolist()):
      low, high = np.quantile(curve.samples[:, i], ends)
      train_steps = by_loss.get(size)
      points.append(
        (
          name,
          size,
          curve.steps[i],
          low,
          high,
          curve.perfect[i],
          curve.regime[i],
          curve.regime_share[i],
          np.nan if train_steps is None else train_steps,
          checks.get(size, np.nan),
        )
      )
    for size, steps in steps_by_batch_size(study, records).items():
      trials += [(name, size, value) for value in steps[np.isfinite(steps)].tolist()]
    counted = count_states(study, records)
    for r in results:
      c = counted[r.batch_size]
      states.append((name, r.batch_size, r.num_reached, c.complete - r.num_reached, c.incomplete, c.infeasible))
    fit = curve.fit
    summary.append((name, fit.s_min.value, *fit.critical, curve.perfect_until.value, curve.max_useful.value))
  return (
    columns(
      "optimizer batch_size steps steps_low steps_high perfect regime regime_share train_steps final_ratio", points
    )
    | columns("trial_optimizer trial_batch_size trial_steps", trials)
    | columns("state_optimizer state_batch_size reached not_reached incomplete infeasible", states)
    | columns("curve_optimizer s_min critical critical_low critical_high perfect_until max_useful", summary)
  )


def _budget_series(sweeps: Sweeps, curves: Mapping[str, SweepCurve]) -> dict[str, np.ndarray]:
  """Returns step-budget and epoch-budget curves of the optimizer that needs the fewest steps at any batch size.

  The budgets of either kind are spaced evenly in log from the fewest steps (epochs) that any batch size needs to the most.
  """
  shown = [name for name, curve in curves.items() if len(curve.batch_sizes)]
  name = min(shown, key=lambda name: curves[name].steps.min(), default="")
  rows: list[tuple] = []
  if name:
    study, records = sweeps[name]
    curve = curves[name]
    steps = np.rint(curve.steps)  # they were averaged in log
    needed = {"steps": steps, "epochs": steps * curve.batch_sizes / study["train_size"]}
    for unit, needs in needed.items():
      budgets = np.geomspace(needs.min(), needs.max(), NUM_BUDGETS)
      found = budget_curves(study, records, budgets.tolist(), unit=unit)  # type: ignore[arg-type]
      rows += [
        (unit, budget, size, found.best[i, j], found.reached[i, j])
        for i, budget in enumerate(budgets)
        for j, size in enumerate(found.batch_sizes)
      ]
  metric = sweeps[name].study["target"]["metric"] if name else ""
  return columns("budget_unit budget budget_batch_size budget_best budget_reached", rows) | {
    "budget_optimizer": np.array(name),
    "budget_metric": np.array(metric),
  }


def judge_momentum_extends_scaling(sweeps: Sweeps) -> Finding:
  """Judges whether the critical batch size is larger with momentum than without.

  Compares the fits S = S_min (1 + B_crit / B) of "sgd" and of the first optimizer of `WITH_MOMENTUM` in the study; the interval of the
  ratio pairs independent resamples of both.

  Rule: `positive` on log(ratio) with `LEAST_EXTENSION`: holds if the interval lies above 1, fails if it lies below 1.25, else inconclusive.

  Series, one entry for each batch size that both reached: batch_size, ratio (steps without / with momentum), ratio_low, ratio_high; 0-d:
  critical_without, critical_with.
  """
  other = next((name for name in WITH_MOMENTUM if name in sweeps), None)
  if "sgd" not in sweeps or other is None:
    reading = f"It takes sweeps of sgd and of momentum; this study has {', '.join(sweeps) or 'none'} (--optimizers=sgd,momentum)."
    return Finding(MOMENTUM_EXTENDS_SCALING, columns("batch_size ratio ratio_low ratio_high", []), reading)
  without, with_momentum = (fit_sweep(steps_by_batch_size(*sweeps[name])) for name in ("sgd", other))
  rng = np.random.default_rng(RESAMPLING_SEED)
  shuffled = rng.permutation(len(with_momentum.samples))
  rows = []
  for i, size in enumerate(without.batch_sizes.tolist()):
    j = np.flatnonzero(with_momentum.batch_sizes == size)
    if len(j):
      samples = without.samples[:, i] / with_momentum.samples[shuffled, j[0]]
      rows.append((size, *percentiles(float(without.steps[i] / with_momentum.steps[j[0]]), samples)))
  series = columns("batch_size ratio ratio_low ratio_high", rows)
  fits = without.fit, with_momentum.fit
  series |= {
    "critical_without": np.array(fits[0].critical.value),
    "critical_with": np.array(fits[1].critical.value),
  }
  refused = [f"{name}: {fit.reason}" for name, fit in zip(("sgd", other), fits, strict=True) if fit.reason]
  ends = _ends_in_words(rows)
  if refused:
    return Finding(
      MOMENTUM_EXTENDS_SCALING, series, f"A critical batch size could not be fitted ({'; '.join(refused)}).{ends}"
    )
  logs = np.log(fits[1].samples[shuffled, 1]) - np.log(fits[0].samples[:, 1])
  log_ratio = percentiles(math.log(fits[1].critical.value / fits[0].critical.value), logs)
  claim = judged(
    MOMENTUM_EXTENDS_SCALING,
    exponential(log_ratio),
    n=len(rows),
    verdict=positive(log_ratio, least=LEAST_EXTENSION),
  )
  reading = (
    f"The critical batch size is {in_words(fits[0].critical, 'z,.1f')} without momentum and {in_words(fits[1].critical, 'z,.1f')} with it "
    f"({other}).{ends}"
  )
  return Finding(claim, series, reading)


def _ends_in_words(rows: Sequence[tuple]) -> str:
  if not rows:
    return " No batch size reached the target with both."
  first, last = rows[0], rows[-1]
  return (
    f" Without momentum it takes {in_words(Interval(*first[1:]))} times the steps at batch size {first[0]:,}, and "
    f"{in_words(Interval(*last[1:]))} times at {last[0]:,}."
  )


def judge_lr_sensitivity(sweeps: Sweeps) -> Finding:
  """Judges whether the range of good learning rates widens with the batch size.

  A rate is good if it reaches the target within twice the fewest steps of its batch size; the width is in natural units of log rate
  (`good_rate_width`; momentum, where it is searched too, enters as `effective_rate`).

  Rule: `positive` on the slope of log width against log batch size, for each optimizer: holds if its interval lies above 0, fails if it
  lies below `LEAST_WIDTH_SLOPE`, else inconclusive; all optimizers must agree. `measured` is the slope of the optimizer that decides.

  Series, one entry for each optimizer and batch size: optimizer, batch_size, best, best_low, best_high, width, width_low, width_high,
  on_edge, truncated; for each optimizer: slope_optimizer, best_slope, best_slope_low, best_slope_high, width_slope, width_slope_low,
  width_slope_high.
  """
  curves = {name: rate_curve(*sweep, effective=True) for name, sweep in sweeps.items()}
  series = columns(
    "optimizer batch_size best best_low best_high width width_low width_high on_edge truncated",
    [
      (name, p.batch_size, *p.best, *p.width, p.on_edge, p.truncated)
      for name, curve in curves.items()
      for p in curve.points
      if not p.reason
    ],
  )
  series |= columns(
    "slope_optimizer best_slope best_slope_low best_slope_high width_slope width_slope_low width_slope_high",
    [(name, *curve.best_slope, *curve.width_slope) for name, curve in curves.items()],
  )
  verdicts = {name: positive(curve.width_slope, least=LEAST_WIDTH_SLOPE) for name, curve in curves.items()}
  known = [name for name, curve in curves.items() if not curve.width_reason]
  reading = " ".join(_rates_in_words(name, curve) for name, curve in curves.items())
  if not known:
    return Finding(LR_SENSITIVITY, series, reading or "No sweep was run.")
  verdict = conjunction(*verdicts.values())
  decisive = min(known, key=lambda name: (verdicts[name] != verdict, curves[name].width_slope.value))
  claim = LR_SENSITIVITY
  if len(sweeps) > 1:
    claim = claim._replace(unit=f"{claim.unit}, {decisive}")
  count = sum(not (p.reason or p.truncated) for p in curves[decisive].points)
  return Finding(judged(claim, curves[decisive].width_slope, n=count, verdict=verdict), series, reading)


def _rates_in_words(name: str, curve: RateCurve) -> str:
  shown = [p for p in curve.points if not p.reason]
  if not shown:
    return f"{name}: no batch size has enough trials that reached the target."
  small, large = shown[0], shown[-1]

  def factor(width: Interval) -> str:
    return in_words(exponential(width), "z.1f")

  widths = (
    f"{name}: good rates span a factor {factor(small.width)} at batch size {small.batch_size:,} and "
    f"{factor(large.width)} at {large.batch_size:,}"
  )
  slope = curve.best_slope
  rule = (
    f"the best rate grows as B^{in_words(slope)}"
    + (
      f", in agreement with the {' and the '.join(curve.agrees)} rule"
      if curve.agrees
      else ", unlike a constant, square-root or linear rule"
    )
    if slope is not UNKNOWN and math.isfinite(slope.value)
    else f"the best rate has no slope: {curve.best_reason}"
  )
  width = (
    f" Its width has no slope: {curve.width_reason}."
    if curve.width_reason
    else f" Their range grows as B^{in_words(curve.width_slope, 'z.3f')}."
  )
  return f"{widths}; {rule}.{width}"
