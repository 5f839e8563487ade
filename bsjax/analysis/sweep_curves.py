"""The curve of steps to result against batch size: perfect scaling, the fitted bend, and where each regime begins and ends."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from bsjax.analysis.finite_trials import MIN_REACHED, resample_minimum
from bsjax.analysis.fits import (
  NUM_RESAMPLES,
  RESAMPLING_SEED,
  UNKNOWN,
  CriticalBatchSize,
  Interval,
  fit_critical_batch_size,
  percentiles,
)
from bsjax.analysis.steps_to_result import sweep_trials
from bsjax.records import Record

Regime = Literal["perfect scaling", "diminishing returns", "maximal data parallelism"]
REGIMES: tuple[Regime, ...] = ("perfect scaling", "diminishing returns", "maximal data parallelism")
OVERHEAD = 0.2
"""Perfect scaling ends where this share more examples are needed than at the smallest batch size; the plateau begins where this share
more steps are needed than at the best batch size. On S = S_min (1 + B_crit / B) that is from B_crit / 5 to 5 B_crit."""


class SweepCurve(NamedTuple):
  """Steps to result at the batch sizes of a sweep that reached the goal, and what follows from them.

  `steps` f64[n] are the fewest of all trials; `perfect` f64[n] is the line of perfect scaling through the smallest batch size. `fit` is
  S = S_min (1 + B_crit / B), with E_min = S_min B_crit in `e_min`. `perfect_until` is the batch size at which the examples needed exceed
  those of perfect scaling by `OVERHEAD`, interpolated in log-log; `fit_perfect_until` is the same from the fit, measured from B -> 0.
  `max_useful` is the smallest batch size tested whose steps are within `OVERHEAD` of the fewest. Both are infinite where the batch sizes
  tested end before they show it. `regime` names the regime of each batch size, and `regime_share` f64[n] the share of the resampled
  curves that agree. `samples` f64[R, n] are these curves, `reasons` says why batch sizes are missing.
  """

  batch_sizes: np.ndarray
  steps: np.ndarray
  perfect: np.ndarray
  fit: CriticalBatchSize
  e_min: Interval
  perfect_until: Interval
  fit_perfect_until: Interval
  max_useful: Interval
  regime: tuple[Regime, ...]
  regime_share: np.ndarray
  samples: np.ndarray
  reasons: dict[int, str]


def steps_by_batch_size(study: dict, records: Sequence[Record]) -> dict[int, np.ndarray]:
  """Returns the steps to the target of every trial of the sweep, f64[n] for each batch size.

  NaN for complete trials that did not reach it and for incomplete and infeasible ones: these were drawn too, and count among the trials.
  """
  return {
    size: np.array(
      [
        t.steps if t.state == "complete" and t.steps is not None else np.nan for t in sweep_trials(study, records, size)
      ],
      float,
    )
    for size in sorted(int(size) for size in study["sweep"])
  }


def fit_sweep(steps: Mapping[int, np.ndarray]) -> SweepCurve:
  """Fits the fewest steps at each batch size, with intervals from a bootstrap over trials.

  A trial is one draw of hyperparameters and seed, so resampling trials resamples both. At each batch size, independently, the spread of
  the minimum over n trials is taken from the minima over halves of them (`resample_minimum`): the ordinary bootstrap of a minimum is
  inconsistent. What the points scatter about the fit beyond that is added to the fit's intervals.

  The intervals are for the curve of minima over n trials: for the steps that a sweep of this size finds on average. `tuning_bias` says
  how far that lies above what more trials would find. A bias that is equal at all batch sizes leaves the critical batch size as it is.

  Coverage measured on simulated sweeps with a known answer (300 each, 11 batch sizes, a bowl in log steps over the tuned hyperparameters,
  times lognormal luck; `tests/analysis/simulate_sweep.py`), promised are 95 %:

  ```
  trials  tuned  luck    critical  s_min  e_min  perfect_until  max_useful   width (high / low of critical)
    64      1    0         100 %   100 %  100 %     100 %         100 %       1.05
    64      1    0.1        95      95     95        91            98         1.25
    64      1    0.3        92      92     93        90            98         1.75
    64      2    0         100     100     99        98           100         1.64
    64      2    0.1        99      99     99        98           100         1.73
    64      2    0.3        96      96     96        94            99         2.35
    64      3    0.1        98      99     99        96           100         3.29
    64      3    0.3        97      98     98        94           100         3.97
    16      1    0.1       100     100     99        99           100         1.82
    16      2    0.1        99     100     99        97           100         4.87
    16      2    0.3        99      98     99        95           100         6.09
  ```

  Where the bowl is not equally narrow at all batch sizes, the bias bends the curve and coverage is lost: with a curvature twice as
  large at B 1024 as at B 1, critical 97 % and e_min 95 %; 6 times as large, 92 % and 72 % (64 trials, 2 tuned, luck 0.1).

  Args:
    steps: for each batch size f64[n], one entry for each trial drawn; not finite where it did not reach the goal.

  Holds: batch sizes with fewer than `MIN_REACHED` trials that reached the goal are left out, with the reason. The fit is refused, with
    its reason, where `fit_critical_batch_size` refuses it; the other fields stand.

  Source: McCandlish et al. (2018), Eqs. 2.11-2.12 and appendix A.3 (fit in log space, errors from the fit; here from trials); Shallue et
    al. (2019) (perfect scaling through the smallest batch size, maximum useful batch size: the plateau's beginning, for which no formula
    is given); Zhang et al. (2025) (overhead of 20 %).
  """
  reasons, sizes = {}, []
  for size in sorted(steps):
    reached = int(np.isfinite(steps[size]).sum())
    if reached >= MIN_REACHED:
      sizes.append(size)
    else:
      reasons[size] = f"{reached} of {len(steps[size])} trials reached the goal, and {MIN_REACHED} are needed"
  rng = np.random.default_rng(RESAMPLING_SEED)
  log_steps, columns = np.empty(len(sizes)), np.empty((NUM_RESAMPLES, len(sizes)))
  for i, size in enumerate(sizes):
    logs = np.log(np.asarray(steps[size], float))
    log_steps[i] = np.nanmin(logs)
    columns[:, i] = resample_minimum(logs, NUM_RESAMPLES, rng)
  fit = fit_critical_batch_size(
    sizes, log_steps, columns, explained=float(columns.var(axis=0).mean()) if sizes else 0.0
  )
  e_min = fit_until = UNKNOWN
  if not fit.reason:
    e_min = percentiles(fit.s_min.value * fit.critical.value, fit.samples.prod(axis=1))
    fit_until = Interval(*(OVERHEAD * x for x in fit.critical))
  batch_sizes = np.array(sizes, int)
  until, useful = _ends(batch_sizes, log_steps[None])
  sampled_until, sampled_useful = _ends(batch_sizes, columns)
  regime = _regimes(batch_sizes, until, useful)[0]
  agrees = _regimes(batch_sizes, sampled_until, sampled_useful) == regime
  return SweepCurve(
    batch_sizes,
    np.exp(log_steps),
    np.exp(log_steps[:1]) * batch_sizes[:1] / batch_sizes,
    fit,
    e_min,
    percentiles(float(until[0]), sampled_until) if sizes else UNKNOWN,
    fit_until,
    percentiles(float(useful[0]), sampled_useful) if sizes else UNKNOWN,
    tuple(REGIMES[i] for i in regime),
    agrees.mean(axis=0),
    np.exp(columns),
    reasons,
  )


def _ends(sizes: np.ndarray, log_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Finds where perfect scaling ends and the plateau begins on each curve: log_s f64[R, n] -> two batch sizes, f64[R]."""
  if not len(sizes):
    return np.full(len(log_s), np.inf), np.full(len(log_s), np.inf)
  tolerance, log_b, end = np.log1p(OVERHEAD), np.log(sizes), len(sizes) - 1
  overhead = log_s + log_b - (log_s + log_b)[:, :1]
  last = end - np.argmax(overhead[:, ::-1] <= tolerance, axis=1)  # from the next one on, all lie above
  following = np.minimum(last + 1, end)
  below, above = (np.take_along_axis(overhead, i[:, None], 1)[:, 0] for i in (last, following))
  share = (tolerance - below) / np.where(above > tolerance, above - below, 1.0)
  until = np.exp(log_b[last] + share * (log_b[following] - log_b[last]))
  first = np.argmax(log_s - log_s.min(axis=1, keepdims=True) <= tolerance, axis=1)
  return np.where(last == end, np.inf, until), np.where(first == end, np.inf, sizes[first])


def _regimes(sizes: np.ndarray, until: np.ndarray, useful: np.ndarray) -> np.ndarray:
  """Returns the index in `REGIMES` of each batch size, i64[R, n], from where the first ends and the last begins."""
  return np.where(sizes <= until[:, None], 0, np.where(sizes >= useful[:, None], 2, 1))
