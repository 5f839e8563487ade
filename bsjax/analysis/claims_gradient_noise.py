"""Judges of the gradient noise along training: does it grow, and do the normalisation layers tell it."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from bsjax.analysis.claim import (
  Finding,
  Verdict,
  columns,
  conjunction,
  every,
  in_words,
  inside,
  judged,
  positive,
  unjudged,
)
from bsjax.analysis.fits import CONFIDENCE, NUM_RESAMPLES, RESAMPLING_SEED, UNKNOWN, Interval
from bsjax.analysis.selection import batch_size, is_number, learning_rate, of_kind, probe_rows
from bsjax.records import Record

ALONG = "along"
"""The kind of the trials that are measured from their first step to their last."""
TOTAL = "all"
"""The group of the rows that hold all parameters; every other group is a layer."""
END_FRACTION = 3 / 4
"""The end of training is the mean over the checkpoints after this part of the steps: one gradient alone changes from step to step."""
LEAST_GROWTH = math.log(math.sqrt(2))
"""A noise scale that grows by less than half a doubling asks for no other batch size, where batch sizes are powers of two."""
NORM_LAYER = re.compile(r"(layer|group|rms)_?norm", re.IGNORECASE)
SLOPE_TOLERANCE = 0.25
"""An exponent off by 0.25 misjudges a noise scale that grows hundredfold by a factor of 3."""
LEAST_CORRELATION = 0.9
"""In log-log: the LayerNorms then explain four fifths of the variance of the total."""


class Quantity(NamedTuple):
  """Which squared gradient norm stands below every noise scale of a claim: its column, and words for the reading."""

  column: str
  words: str


def choose_quantity(rows: Iterable[dict]) -> Quantity:
  """Chooses the squared gradient norm for rows that are compared with each other: one for all of them.

  The norm estimated for unseen data, if every row could identify it; otherwise that of the data set itself, which is exact. The two
  differ by tr(Sigma)/N, so a mixture would show steps that are not there.
  """
  rows = list(rows)
  lost = sum(row.get("verdict") != "identified" for row in rows)
  if rows and not lost:
    return Quantity("grad_sq_norm", "as estimated for unseen data")
  return Quantity(
    "dataset_grad_sq_norm",
    f"of the training set itself (exact; {lost} of {len(rows)} measurements cannot tell it for unseen data)",
  )


def total_rows(record: Record) -> list[dict]:
  """Returns the noise rows over all parameters, in the order of steps."""
  return [row for row in probe_rows(record, "noise") if row.get("group") == TOTAL]


def smoothed_noise_scale(rows: Sequence[dict], column: str) -> float:
  """Returns mean tr(Sigma) / mean |G|^2 over rows: a ratio of smoothed parts, never a smoothed ratio. NaN without a positive one."""
  parts = [
    (row["grad_cov_trace"], row[column]) for row in rows if is_number(row["grad_cov_trace"]) and is_number(row[column])
  ]
  if not parts:
    return math.nan
  trace, sq_norm = np.mean(parts, axis=0)
  return float(trace / sq_norm) if trace > 0 and sq_norm > 0 else math.nan


def student_interval(values: Sequence[float] | np.ndarray) -> Interval:
  """Returns the mean of repeats with Student's interval; no interval for fewer than two, and NaN among them makes all unknown."""
  n = len(values)
  if n == 0 or not np.all(np.isfinite(values)):
    return UNKNOWN
  mean = float(np.mean(values))
  if n < 2:
    return Interval(mean, math.nan, math.nan)
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
  return Interval(mean, mean - half, mean + half)


def widened(interval: Interval, half: float) -> Interval:
  """Adds an independent error of half-width `half` to an interval, in quadrature."""
  below, above = (math.hypot(abs(end - interval.value), half) for end in interval[1:])
  return Interval(interval.value, interval.value - below, interval.value + above)


def exponential(interval: Interval) -> Interval:
  """Turns the interval of a logarithm into that of a factor; what float64 cannot hold is infinite."""
  with np.errstate(over="ignore"):
    return Interval(*(float(np.exp(bound)) for bound in interval))


NOISE_GROWS = unjudged(
  "noise_grows",
  statement="The gradient noise scale grows during training",
  source="McCandlish et al. (2018), section 4 and Table 1: often tenfold and more",
  expected="above 1",
  unit="noise scale at the end of training / at its start",
)


def judge_noise_grows(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether tr(Sigma)/|G|^2 is larger at the end of training than at its first step.

  For each setting (batch size, rate): the mean over seeds of log(end / start), where the end is the ratio of the means of tr(Sigma) and
  |G|^2 over the checkpoints after `END_FRACTION` of the steps. Its interval is Student's over seeds. Where the noise scale is one for
  unseen data (see `choose_quantity`), the sampling error of its two ends is added, undivided by the seeds: they measure the same examples.

  Rule, for each setting: holds if the interval of the factor lies above 1; fails if it lies below exp(`LEAST_GROWTH`); else inconclusive.
  The claim holds if it holds in every setting and fails if it fails in one; the setting that decides gives the number.

  Series, one entry for each checkpoint of each trial: batch_size, learning_rate, seed, step, examples_seen, noise_scale, low, high (NaN
  where unidentifiable), dataset_noise_scale, identified. The same with the prefix `form_` for the Hessian and Adam forms, named by
  `form`, and with the prefix `layer_` for the layers, named by `layer`. For each setting: setting_batch_size, setting_learning_rate,
  setting_seeds, the geometric means over seeds start and end, and factor, factor_low, factor_high; and quantity, the words
  for what was compared (0-d).
  """
  del study
  trials = [record for record in of_kind(records, ALONG) if len(total_rows(record)) > 1]
  quantity = choose_quantity(row for record in trials for row in _ends(record))
  growth: dict[tuple[int, float], list[tuple[float, float, float]]] = {}
  for record in trials:
    start, *late = _ends(record)
    scales = [smoothed_noise_scale(rows, quantity.column) for rows in ([start], late)]
    error = math.hypot(_log_half_width([start]), _log_half_width(late)) if quantity.column == "grad_sq_norm" else 0.0
    logs = [math.log(scale) for scale in scales]
    growth.setdefault((batch_size(record), learning_rate(record)), []).append((logs[0], logs[1], error))
  factors: dict[tuple[int, float], Interval] = {}
  verdicts: dict[tuple[int, float], Verdict] = {}
  rows = []
  for setting, trios in sorted(growth.items()):
    starts, lates, errors = np.array(trios).T
    log_factor = widened(student_interval(lates - starts), float(np.mean(errors)))
    rows.append((*setting, len(trios), *np.exp([starts.mean(), lates.mean()]), *exponential(log_factor)))
    factors[setting], verdicts[setting] = exponential(log_factor), positive(log_factor, least=LEAST_GROWTH)
  series = _growth_series(records) | columns(
    "setting_batch_size setting_learning_rate setting_seeds start end factor factor_low factor_high", rows
  )
  series["quantity"] = np.asarray(quantity.words)
  if not factors:
    return Finding(
      NOISE_GROWS,
      series,
      "No complete trial has its gradient noise measured at two steps. Measured at the first step and at the end, it would decide.",
    )
  verdict = conjunction(*verdicts.values())
  deciding = min((s for s in factors if verdicts[s] == verdict), key=lambda s: np.nan_to_num(factors[s].low))
  grown = sum(v == "holds" for v in verdicts.values())
  values = sorted(f.value for f in factors.values())
  reading = (
    f"The noise scale {quantity.words} changes by a factor of {in_words(factors[deciding], '.3g')} at {_name(deciding)}, "
    f"and by {values[0]:.3g} to {values[-1]:.3g} over all settings. It grows beyond doubt in {grown} of {len(factors)} settings."
  )
  n = sum(map(len, growth.values()))
  return Finding(judged(NOISE_GROWS, factors[deciding], n=n, verdict=verdict), series, reading)


def _name(setting: tuple[int, float]) -> str:
  return f"batch size {setting[0]} and rate {setting[1]:.3g}"


def _ends(record: Record) -> list[dict]:
  """Returns the first noise row of a trial and those of its end."""
  first, *rest = total_rows(record)
  last = rest[-1]["step"]
  return [first, *(row for row in rest if row["step"] >= END_FRACTION * last)]


def _log_half_width(rows: Sequence[dict]) -> float:
  """Returns half the length of the interval of log(noise scale), averaged over rows: the sampling error of their examples.

  Infinite where an interval begins at 0.
  """
  ends = [(row["noise_scale_ci_low"], row["noise_scale_ci_high"]) for row in rows]
  return float(np.mean([math.log(high / low) / 2 if low > 0 else math.inf for low, high in ends]))


def _growth_series(records: Sequence[Record]) -> dict[str, np.ndarray]:
  """Collects the noise scale, its other forms and its layers along training, for the figures."""
  points: list[tuple] = []
  forms: list[tuple] = []
  layers: list[tuple] = []
  for record in of_kind(records, ALONG):
    trial = (batch_size(record), learning_rate(record), record.trial["seed"])
    for row in record.probes:
      where = (*trial, row["step"], row["step"] * batch_size(record))
      if row["probe"] == "noise":
        scale = (
          *_estimate(row, "noise_scale"),
          number_or_nan(row.get("dataset_noise_scale")),
          row["verdict"] == "identified",
        )
        if row["group"] == TOTAL:
          points.append((*where, *scale))
        else:
          layers.append((*where, *scale, row["group"]))
      for form in ("hessian", "adam"):
        if row["probe"] == f"{form}_noise":
          dataset = number_or_nan(row.get(f"{form}_dataset_noise_scale"))
          forms.append((*where, *_estimate(row, f"{form}_noise_scale"), dataset, form))
  at = "batch_size learning_rate seed step examples_seen"
  scale_names = "noise_scale low high dataset_noise_scale identified"
  return (
    columns(f"{at} {scale_names}", points)
    | _prefixed("form_", columns(f"{at} value low high dataset form", forms))
    | _prefixed("layer_", columns(f"{at} {scale_names} layer", layers))
  )


def _prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Puts a prefix before every name but its own: `form_step`, `form`."""
  own = prefix.rstrip("_")
  return {name if name == own else prefix + name: array for name, array in arrays.items()}


def number_or_nan(value: object) -> float:
  """Turns what is missing into NaN."""
  return float(value) if is_number(value) else math.nan


def _estimate(row: dict, name: str) -> tuple[float, float, float]:
  """Returns value, low and high of an estimate; NaN where it is unidentifiable."""
  value, low, high = (number_or_nan(row.get(field)) for field in (name, f"{name}_ci_low", f"{name}_ci_high"))
  return value, low, high


LAYERNORM = unjudged(
  "layernorm_predicts_total",
  statement="The noise scale of the normalisation layers alone predicts the noise scale of all parameters",
  source="Gray et al. (2024)",
  expected="1",
  unit="slope of log(total noise scale) against log(that of the normalisation layers)",
)


def judge_layernorm_predicts_total(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether log(total noise scale) follows log(noise scale of the normalisation layers) over checkpoints and trials.

  The normalisation layers together have the noise scale (sum of their tr(Sigma)) / (sum of their |G|^2). Slope and correlation are
  those of ordinary least squares over all checkpoints; their intervals resample whole trials, because the checkpoints of one trial depend
  on each other. The constant factor between the two is reported and not judged: it can be measured once.

  Rule: holds if the slope's interval lies within 1 +- `SLOPE_TOLERANCE` and the correlation's above `LEAST_CORRELATION`; fails if one
  lies outside; else inconclusive. Needs three trials, and a model with layers named LayerNorm, GroupNorm or RMSNorm.

  Series: batch_size, learning_rate, seed, step, layernorm, total; and 0-d: slope, log_factor, correlation, where the fitted line is
  total = exp(log_factor) layernorm^slope.
  """
  del study
  pairs: list[tuple[Record, dict, list[dict]]] = []
  for record in of_kind(records, ALONG):
    norms: dict[int, list[dict]] = {}
    for row in probe_rows(record, "noise"):
      if NORM_LAYER.match(row["group"].rsplit("/", 1)[-1]):
        norms.setdefault(row["step"], []).append(row)
    pairs += [(record, row, norms[row["step"]]) for row in total_rows(record) if row["step"] in norms]
  quantity = choose_quantity(row for _, total, layers in pairs for row in (total, *layers))
  rows, trials = [], []
  for record, total, layers in pairs:
    whole, part = (smoothed_noise_scale(group, quantity.column) for group in ([total], layers))
    if math.isfinite(whole) and math.isfinite(part):
      rows.append((batch_size(record), learning_rate(record), record.trial["seed"], total["step"], part, whole))
      trials.append(record.id)
  series = columns("batch_size learning_rate seed step layernorm total", rows)
  fitted = dict.fromkeys(("slope", "log_factor", "correlation"), np.asarray(np.nan))
  if len(set(trials)) < 3:
    reading = (
      f"Normalisation layers were measured in {len(set(trials))} complete trials, and an interval over trials needs three. "
      "More seeds, batch sizes or rates would decide."
      if pairs
      else "The model has no layers named LayerNorm, GroupNorm or RMSNorm, so there is nothing to predict from. "
      "A transformer, such as the workload digits_vit, would decide."
    )
    return Finding(LAYERNORM, series | fitted, reading)
  x, y = np.log(series["layernorm"]), np.log(series["total"])
  slope, log_factor, correlation = _line(x, y)
  members = [np.flatnonzero(np.asarray(trials) == trial) for trial in sorted(set(trials))]
  rng = np.random.default_rng(RESAMPLING_SEED)
  samples = []
  for _ in range(NUM_RESAMPLES):
    chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
    samples.append(_line(x[chosen], y[chosen]))
  ends = np.nanquantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
  slopes, correlations = Interval(slope, *ends[:, 0]), Interval(correlation, *ends[:, 2])
  verdict = every(
    inside(slopes, 1 - SLOPE_TOLERANCE, 1 + SLOPE_TOLERANCE), inside(correlations, LEAST_CORRELATION, math.inf)
  )
  middle = float(np.exp(np.mean(y - x)))
  reading = (
    f"Over {len(rows)} checkpoints of {len(members)} trials the noise scale {quantity.words} goes as that of the normalisation layers to "
    f"the power {in_words(slopes)}, with correlation {in_words(correlations)} in log-log. It is {middle:.3g} times theirs on average."
  )
  series |= {name: np.asarray(value) for name, value in zip(fitted, (slope, log_factor, correlation), strict=True)}
  return Finding(judged(LAYERNORM, slopes, n=len(rows), verdict=verdict), series, reading)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
  """Returns slope, intercept and correlation of y on x by least squares; NaN where x or y does not vary."""
  u, v = x - x.mean(), y - y.mean()
  if not (u @ u > 0 and v @ v > 0):
    return math.nan, math.nan, math.nan
  slope = float(u @ v / (u @ u))
  return slope, float(y.mean() - slope * x.mean()), float(u @ v / math.sqrt((u @ u) * (v @ v)))
