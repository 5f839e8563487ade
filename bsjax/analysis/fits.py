"""Fits with intervals: power laws, the curve of steps against batch size, the knee of a throughput curve."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
RESAMPLING_SEED = 0
MIN_BATCH_SIZES = 4
"""Two parameters through three points leave one degree of freedom: too little to see whether a curve bends."""
SEARCH_FACTOR = 16.0
"""B_crit is sought up to this factor outside the batch sizes tested. There the bend changes the steps by 1/16 = 6 % at the last batch
size, less than the spacing of evaluations resolves: an optimum or an interval that reaches it is no measurement."""
KNEE_SHARE = 0.8
"""The knee is where throughput first reaches this share of the highest measured: what lies beyond gains at most a quarter."""


class Interval(NamedTuple):
  """An estimate with the ends of its 95 % interval; NaN stands for what could not be determined."""

  value: float
  low: float
  high: float


UNKNOWN = Interval(np.nan, np.nan, np.nan)


class CriticalBatchSize(NamedTuple):
  """The fit S = S_min (1 + B_crit / B), or the reason why there is none.

  `critical` and `s_min` are NaN exactly when `reason` is not empty. `samples` holds the resampled fits, f64[R, 2] with columns
  (S_min, B_crit), for the band around the curve. `misfit` is the root mean square of log(measured / fitted) over the batch sizes.
  """

  critical: Interval
  s_min: Interval
  reason: str
  used: tuple[int, ...]
  excluded: tuple[int, ...]
  misfit: float
  samples: np.ndarray


class StepsFit(NamedTuple):
  """Parameters of S = S_min (1 + B_crit / B)."""

  s_min: float
  critical_batch_size: float


def loglog_slope(x: np.ndarray, y: np.ndarray, *, relative_sem: np.ndarray | None = None) -> Interval:
  """Fits log y = a + slope * log x by ordinary least squares.

  Args:
    x, y: positive, f64[n]. Pairs that are not finite and positive are left out.
    relative_sem: standard error of each y divided by y. If given, the interval is these errors carried through the fit (normal
      quantile); the points still weigh alike, since a heavy-tailed estimate that came out low also came out with a small error.
      If not, the interval comes from the scatter about the line (Student's t, n - 2 degrees of freedom), so curvature widens it.

  Returns: the slope; NaN with fewer than two different x, no interval with fewer than three points unless errors are given.
  """
  x, y = np.asarray(x, float), np.asarray(y, float)
  keep = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
  if relative_sem is not None:
    relative_sem = np.asarray(relative_sem, float)
    keep &= np.isfinite(relative_sem)
    relative_sem = relative_sem[keep]
  u, v = np.log(x[keep]), np.log(y[keep])
  if len(np.unique(u)) < 2:
    return UNKNOWN
  lever = (u - u.mean()) / np.sum((u - u.mean()) ** 2)
  slope = float(lever @ v)
  if relative_sem is not None:
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(lever**2 @ relative_sem**2)
  elif len(u) > 2:
    residuals = v - v.mean() - slope * (u - u.mean())
    variance = residuals @ residuals / (len(u) - 2) / np.sum((u - u.mean()) ** 2)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(u) - 2) * np.sqrt(variance)
  else:
    half = np.nan
  return Interval(slope, float(slope - half), float(slope + half))


def bootstrap_slope(x: np.ndarray, y: np.ndarray) -> Interval:
  """Fits the log-log slope through the geometric means at each x; the interval resamples the repeats (seeds) within each x.

  For a curve that is not a straight line this is the slope of its best line over these very x, and the interval tells how well the
  repeats determine that slope, not how straight the curve is. No interval if some x has fewer than two repeats.
  """
  x, y = np.asarray(x, float), np.asarray(y, float)
  keep = np.isfinite(y) & (y > 0)
  sizes = np.unique(x[keep])
  if len(sizes) < 2:
    return UNKNOWN
  groups = [np.log(y[keep & (x == size)]) for size in sizes]
  u = np.log(sizes)
  lever = (u - u.mean()) / np.sum((u - u.mean()) ** 2)
  value = float(lever @ [g.mean() for g in groups])
  if min(map(len, groups)) < 2:
    return Interval(value, np.nan, np.nan)
  return percentiles(value, resampled_means(groups) @ lever)


def resampled_means(groups: Sequence[np.ndarray]) -> np.ndarray:
  """Draws bootstrap means of each group, independently: f64[R, number of groups], the same numbers at every call.

  A mean of n values drawn from n values varies too little by the factor sqrt((n - 1) / n), a tenth at five seeds; the deviations are
  stretched by its inverse. Each group needs two values.
  """
  rng = np.random.default_rng(RESAMPLING_SEED)
  columns = []
  for group in groups:
    drawn = group[rng.integers(len(group), size=(NUM_RESAMPLES, len(group)))].mean(axis=1)
    columns.append(group.mean() + np.sqrt(len(group) / (len(group) - 1)) * (drawn - group.mean()))
  return np.stack(columns, axis=1)


def fit_steps(batch_sizes: np.ndarray, steps: np.ndarray) -> StepsFit:
  """Fits S = S_min (1 + B_crit / B) by least squares on log S, one residual for each point.

  Equivalent to (S / S_min - 1)(E / E_min - 1) = 1 with E = B S and B_crit = E_min / S_min. For a given B_crit the best log S_min is a
  mean, so one dimension is searched: log B_crit, on a grid that is refined about its best point to 1e-6. B_crit is sought within
  `SEARCH_FACTOR` of the batch sizes tested; a value at that border means that the points do not determine it.

  Source: McCandlish et al. (2018), Eqs. 2.11-2.12 and appendix A.3 (a fit in log space; which residual is not said there).
  """
  log_s_min, log_critical = _fit_log_steps(
    np.log(np.asarray(batch_sizes, float)), np.log(np.asarray(steps, float))[None]
  )
  return StepsFit(float(np.exp(log_s_min[0])), float(np.exp(log_critical[0])))


def _fit_log_steps(log_b: np.ndarray, log_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Fits many curves at once: log_s f64[R, n] -> log S_min f64[R], log B_crit f64[R]."""

  def refine(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    misfit = log_s[:, None, :] - np.log1p(np.exp(grid[:, :, None] - log_b))
    log_s_min = misfit.mean(axis=2)
    best = np.argmin(np.sum((misfit - log_s_min[:, :, None]) ** 2, axis=2), axis=1)[:, None]
    grids = np.broadcast_to(grid, log_s_min.shape)
    return np.take_along_axis(log_s_min, best, 1)[:, 0], np.take_along_axis(grids, best, 1)[:, 0]

  low, high = log_b.min() - np.log(SEARCH_FACTOR), log_b.max() + np.log(SEARCH_FACTOR)
  spacing = (high - low) / 64
  log_s_min, log_critical = refine(np.linspace(low, high, 65)[None])
  while spacing > 1e-6:
    around = log_critical[:, None] + np.linspace(-spacing, spacing, 17)
    log_s_min, log_critical = refine(np.clip(around, low, high))
    spacing /= 8
  return log_s_min, log_critical


def bootstrap_critical_batch_size(batch_sizes: np.ndarray, steps: np.ndarray) -> CriticalBatchSize:
  """Fits the steps to target of many seeds and batch sizes; the interval resamples the seeds within each batch size.

  The fit goes through the geometric mean over seeds at each batch size; interval = percentiles of `NUM_RESAMPLES` resampled fits from
  a generator with a fixed seed. Where the means lie farther from the curve than their seeds explain, as with rates tuned on a coarse
  grid, that excess variance, misfit^2 n / (n - 2) - mean variance of a mean, is added to every resampled mean as normal noise.

  Args:
    batch_sizes, steps: f64[n], one entry for each trial; NaN steps for a seed that never reached the target.

  Holds: a batch size where a seed never reached the target, or with fewer than two seeds, is excluded and reported; averaging the
    lucky seeds would bend the curve. Refused, with the reason in words, are: fewer than `MIN_BATCH_SIZES` batch sizes; a curve that
    does not bend (perfect scaling to the end, B_crit beyond the range); a curve that does not fall (B_crit below the range).
  """
  batch_sizes, steps = np.asarray(batch_sizes, float), np.asarray(steps, float)
  used: list[int] = []
  excluded: list[int] = []
  groups = []
  for size in np.unique(batch_sizes):
    group = steps[batch_sizes == size]
    whole = len(group) >= 2 and bool(np.all(np.isfinite(group) & (group > 0)))
    (used if whole else excluded).append(int(size))
    if whole:
      groups.append(np.log(group))

  if len(used) < MIN_BATCH_SIZES:
    reason = f"only {len(used)} batch sizes have two or more seeds that all reached the target, and {MIN_BATCH_SIZES} are needed"
    return CriticalBatchSize(UNKNOWN, UNKNOWN, reason, tuple(used), tuple(excluded), np.nan, np.empty((0, 2)))
  means = np.array([g.mean() for g in groups])
  explained = float(np.mean([g.var(ddof=1) / len(g) for g in groups]))
  return fit_critical_batch_size(used, means, resampled_means(groups), explained=explained, excluded=excluded)


def fit_critical_batch_size(
  batch_sizes: Sequence[int],
  log_steps: np.ndarray,
  resampled: np.ndarray,
  *,
  explained: float,
  excluded: Sequence[int] = (),
) -> CriticalBatchSize:
  """Fits one number of steps for each batch size; the interval comes from resampled curves and from the scatter about the fit.

  Args:
    batch_sizes: n, rising.
    log_steps: f64[n].
    resampled: f64[R, n], other values that log_steps might have had.
    explained: mean variance of log_steps that the resampled curves account for. What the scatter about the fit has beyond it,
      misfit^2 n / (n - 2) - explained, is added to them as normal noise.
    excluded: batch sizes to report as left out.

  Holds: refuses what `bootstrap_critical_batch_size` refuses.
  """

  def refused(reason: str) -> CriticalBatchSize:
    return CriticalBatchSize(UNKNOWN, UNKNOWN, reason, tuple(batch_sizes), tuple(excluded), np.nan, np.empty((0, 2)))

  count = len(batch_sizes)
  if count < MIN_BATCH_SIZES:
    return refused(f"only {count} batch sizes are usable, and {MIN_BATCH_SIZES} are needed")
  log_b = np.log(batch_sizes)
  point = np.stack(_fit_log_steps(log_b, log_steps[None]), axis=1)[0]
  misfit = float(np.sqrt(np.mean((log_steps - point[0] - np.log1p(np.exp(point[1] - log_b))) ** 2)))
  excess = max(0.0, misfit**2 * count / (count - 2) - explained)
  noise = np.random.default_rng(RESAMPLING_SEED + 1).normal(size=resampled.shape)
  samples = np.exp(np.stack(_fit_log_steps(log_b, resampled + np.sqrt(excess) * noise), axis=1))
  s_min, critical = (percentiles(float(np.exp(point[i])), samples[:, i]) for i in (0, 1))
  near = 1.01
  if critical.low <= near * batch_sizes[0] / SEARCH_FACTOR:
    return refused(
      f"the steps do not fall in proportion to the batch size anywhere from {batch_sizes[0]} to {batch_sizes[-1]}"
    )
  if critical.high >= batch_sizes[-1] * SEARCH_FACTOR / near:
    return refused(f"the curve shows no clear bend up to batch size {batch_sizes[-1]}")
  return CriticalBatchSize(critical, s_min, "", tuple(batch_sizes), tuple(excluded), misfit, samples)


def percentiles(value: float, samples: np.ndarray) -> Interval:
  """Returns the value with the middle `CONFIDENCE` of its samples, f64[R]; infinite samples count as large."""
  method: Literal["linear", "inverted_cdf"] = "linear" if np.isfinite(samples).all() else "inverted_cdf"
  low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method=method)
  return Interval(value, float(low), float(high))


def knee(batch_sizes: np.ndarray, throughput: np.ndarray) -> int | None:
  """Finds the smallest batch size whose throughput is at least `KNEE_SHARE` of the highest: there the hardware saturates.

  Args:
    batch_sizes, throughput: f64[n], rising in batch size. Throughput may fall again beyond the knee, as caches overflow.

  Returns: the batch size, possibly the smallest; None if that is the largest one measured, so that no saturation was seen.
  """
  reached = batch_sizes[throughput >= KNEE_SHARE * np.max(throughput)]
  return int(reached[0]) if len(batch_sizes) > 1 and reached[0] < batch_sizes[-1] else None


def vertex(x: Sequence[float], y: Sequence[float]) -> float | None:
  """Returns where the parabola through three points is lowest, or None if it does not turn between the outer two."""
  curvature, linear, _ = np.polyfit(x, y, 2)
  if curvature <= 0:
    return None
  lowest = -linear / (2 * curvature)
  return float(lowest) if min(x) <= lowest <= max(x) else None


def welch(small: Sequence[np.ndarray], large: Sequence[np.ndarray]) -> Interval:
  """Estimates the mean over the groups in `small` minus the mean over those in `large`, groups weighing alike.

  Each group holds the seeds of one batch size. Standard errors come from the seeds within each group, with the
  Welch-Satterthwaite degrees of freedom; groups of fewer than two seeds are left out. The interval is for these very batch sizes.
  """
  sides = [[np.asarray(g, float) for g in side if len(g) >= 2] for side in (small, large)]
  if not all(sides):
    return UNKNOWN
  means = [np.mean([g.mean() for g in side]) for side in sides]
  variances = np.concatenate([[g.var(ddof=1) / len(g) / len(side) ** 2 for g in side] for side in sides])
  freedoms = np.concatenate([[len(g) - 1 for g in side] for side in sides])
  value, variance = float(means[0] - means[1]), variances.sum()
  if variance == 0:
    return Interval(value, value, value)
  freedom = variance**2 / np.sum(variances**2 / freedoms)
  half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance)
  return Interval(value, float(value - half), float(value + half))
