"""Judges of what a minibatch is: its gradient's variance, its gradient's direction, and the wobble of its loss."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bsjax.analysis.claim import Finding, Verdict, columns, every, in_words, inside, judged, negated, positive, unjudged
from bsjax.analysis.fits import Interval, loglog_slope
from bsjax.analysis.selection import batch_size, final_records, is_number, of_kind, probe_rows
from bsjax.records import Record

SLOPE_TOLERANCE = 0.05
"""An exponent off by 0.05 misjudges the variance by 3.5 % when the batch size doubles, and by 40 % over three decades."""
LEVEL_TOLERANCE = 0.1
"""The level of a variance is the square of a step's noise: 10 % in it is 5 % in the noise."""
LEAST_RISE = 0.05
"""A cosine that rises by less than this over all batch sizes is called flat."""
GAP_HOLDS, GAP_FAILS = 0.1, 0.2
"""Root mean square distance between measured and predicted cosines. The prediction replaces the mean of a ratio by the ratio of means,
which costs a few hundredths for gradients in many directions, so 0.1 is agreement; 0.2 is a fifth of the whole scale."""
TREND_FRACTION = 1 / 8
"""Length of the moving mean as a part of the run: long against the noise, short against the second half of a run."""
MIN_ROWS = 4
LEAST_SPREAD_SLOPE = 0.05
"""Steepness below which the spread does not depend on batch size; independent sampling gives -0.5."""


class _Point(NamedTuple):
  """One measured batch size at one checkpoint of one seed, with the moments measured there."""

  step: int
  batch_size: int
  num_examples: int
  row: dict
  noise: dict


def _minibatch_points(records: Sequence[Record]) -> list[_Point]:
  """Pairs the minibatch rows with the noise row of the same checkpoint; rows without one are left out."""
  points = []
  for record in of_kind(records, "noise"):
    noise = {row["step"]: row for row in probe_rows(record, "noise") if is_number(row.get("grad_cov_trace"))}
    for row in probe_rows(record, "minibatch"):
      if row["step"] in noise:
        moments = noise[row["step"]]
        points.append(_Point(row["step"], row["batch_size"], moments["num_examples"], row, moments))
  return points


VARIANCE = unjudged(
  "variance_inverse_b",
  statement="The variance of the minibatch gradient falls in proportion to 1/B",
  source="McCandlish et al. (2018), Eqs. 2.1-2.3, footnote 6",
  expected="-1",
  unit="slope of log(variance / (1 - B/N)) against log B",
)


def judge_variance_inverse_b(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether E|g_B - G|^2 = tr(Sigma) (1/B - 1/N), in slope and in level.

  For every checkpoint and seed the measured variance is divided by the prediction from all per-example gradients; the ratios are
  averaged over checkpoints and seeds before a logarithm is taken, which would bias noisy small batches down. The slope is -1 plus that
  of the log ratio against log B, the level the mean ratio; their intervals carry the standard errors of the sampled minibatches.

  Rule: holds if both the slope's interval lies within -1 +- `SLOPE_TOLERANCE` and the level's within 1 +- `LEVEL_TOLERANCE`; fails if
  either lies outside; else inconclusive. B = N, where both sides are zero, is left out. Needs two batch sizes.

  Series: step, batch_size, variance, variance_sem, predicted: one entry for each checkpoint, seed and batch size.
  """
  del study
  points = [
    p for p in _minibatch_points(records) if is_number(p.row.get("variance")) and is_number(p.row.get("variance_sem"))
  ]
  rows = [
    (
      p.step,
      p.batch_size,
      p.row["variance"],
      p.row["variance_sem"],
      p.noise["grad_cov_trace"] * (1 / p.batch_size - 1 / p.num_examples),
    )
    for p in points
  ]
  series = columns("step batch_size variance variance_sem predicted", rows)
  usable = (series["variance"] > 0) & (series["predicted"] > 0)
  sizes = np.unique(series["batch_size"][usable])
  if len(sizes) < 2:
    reading = (
      f"The variance of minibatch gradients was measured at {len(sizes)} batch sizes below the size of the training set, and a slope "
      "needs at least two. Measure more batch sizes to judge the claim."
    )
    return Finding(VARIANCE, series, reading)

  ratios, sems = [], []
  for size in sizes:
    at = usable & (series["batch_size"] == size)
    ratios.append(np.mean(series["variance"][at] / series["predicted"][at]))
    sems.append(np.sqrt(np.sum((series["variance_sem"][at] / series["predicted"][at]) ** 2)) / at.sum())
  ratio, sem = np.array(ratios), np.array(sems)
  excess = loglog_slope(sizes, ratio, relative_sem=sem / ratio)
  slope = Interval(*(bound - 1 for bound in excess))
  half = 1.96 * np.sqrt(np.sum(sem**2)) / len(sizes)
  level = Interval(ratio.mean(), ratio.mean() - half, ratio.mean() + half)
  verdict = every(
    inside(slope, -1 - SLOPE_TOLERANCE, -1 + SLOPE_TOLERANCE), inside(level, 1 - LEVEL_TOLERANCE, 1 + LEVEL_TOLERANCE)
  )
  conclusion = {
    "holds": "Both agree with sampling theory, so noise at one batch size tells the noise at every other.",
    "fails": "At least one disagrees with sampling theory by more than the tolerance.",
    "inconclusive": "The intervals are too wide, or too near the edge of the tolerance, to tell agreement from disagreement.",
  }[verdict]
  reading = (
    f"The variance falls as B to the power {in_words(slope, 'z.3f')}, where theory says -1, and its level is {in_words(level, 'z.3f')} "
    f"times what all per-example gradients predict. {conclusion}"
  )
  return Finding(judged(VARIANCE, slope, n=int(usable.sum()), verdict=verdict), series, reading)


DIRECTION = unjudged(
  "direction_stable",
  statement="The larger the batch, the nearer its gradient points along the true gradient, as the noise scale predicts",
  source="McCandlish et al. (2018), Eqs. 2.9-2.10",
  expected="above 0",
  unit="rise of the cosine from the smallest to the largest batch below N",
)


def predicted_cosine(noise: dict, size: int) -> float:
  """Returns 1 / sqrt(1 + tr(Sigma)/|G|^2 (1/B - 1/N)): |G| over the root mean square norm of a minibatch gradient.

  |G|^2 here is that of the whole training set, from which the minibatches are drawn: the bias-corrected `grad_sq_norm` + tr(Sigma)/N.
  """
  num_examples, trace = noise["num_examples"], noise["grad_cov_trace"]
  full_sq_norm = noise["grad_sq_norm"] + trace / num_examples if is_number(noise.get("grad_sq_norm")) else math.nan
  if not full_sq_norm > 0:
    return math.nan
  return 1 / math.sqrt(1 + trace / full_sq_norm * max(0.0, 1 / size - 1 / num_examples))


def judge_direction_stable(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether the cosine between minibatch and full gradient rises with B, along the curve of `predicted_cosine`.

  Rise: mean cosine (over checkpoints and seeds) at the largest batch size below N minus that at the smallest, with the standard errors
  of the sampled minibatches. Gap: root mean square of measured minus predicted over all points with B < N.

  Rule: the rise holds if its interval lies above 0 and fails if that lies below `LEAST_RISE`; the gap holds up to `GAP_HOLDS` and fails
  above `GAP_FAILS`. The claim holds if both hold, fails if one fails, else inconclusive. Needs two batch sizes below N.

  Series: step, batch_size, cosine, cosine_sem, predicted: one entry for each checkpoint, seed and batch size.
  """
  del study
  points = [
    p for p in _minibatch_points(records) if is_number(p.row.get("cosine")) and is_number(p.row.get("cosine_sem"))
  ]
  rows = [
    (p.step, p.batch_size, p.row["cosine"], p.row["cosine_sem"], predicted_cosine(p.noise, p.batch_size))
    for p in points
  ]
  series = columns("step batch_size cosine cosine_sem predicted", rows)
  usable = np.array([p.batch_size < p.num_examples for p in points], bool)
  sizes = np.unique(series["batch_size"][usable])
  if len(sizes) < 2:
    reading = (
      f"The direction of minibatch gradients was measured at {len(sizes)} batch sizes below the size of the training set, and a rise "
      "needs at least two. Measure more batch sizes to judge the claim."
    )
    return Finding(DIRECTION, series, reading)

  ends, variances = [], []
  for size in (sizes[0], sizes[-1]):
    at = usable & (series["batch_size"] == size)
    ends.append(series["cosine"][at].mean())
    variances.append(np.sum(series["cosine_sem"][at] ** 2) / at.sum() ** 2)
  half = 1.96 * math.sqrt(sum(variances))
  rise = Interval(ends[1] - ends[0], ends[1] - ends[0] - half, ends[1] - ends[0] + half)
  gaps = (series["cosine"] - series["predicted"])[usable]
  gaps = gaps[np.isfinite(gaps)]
  gap = float(np.sqrt(np.mean(gaps**2))) if len(gaps) else math.nan
  follows: Verdict = "holds" if gap <= GAP_HOLDS else "fails" if gap > GAP_FAILS else "inconclusive"
  verdict = every(positive(rise, least=LEAST_RISE), follows)
  prediction = (
    {
      "holds": f"The noise scale predicts this curve to {gap:.2f} in cosine (root mean square)",
      "fails": f"The noise scale does not predict this curve: it is off by {gap:.2f} in cosine (root mean square)",
      "inconclusive": f"The noise scale predicts this curve only roughly, to {gap:.2f} in cosine (root mean square)",
    }[follows]
    if len(gaps)
    else "No prediction could be made, because no gradient norm was measured"
  )
  reading = (
    f"The cosine between minibatch and full gradient goes from {ends[0]:.2f} at batch size {int(sizes[0])} to {ends[1]:.2f} at "
    f"{int(sizes[-1])}, a change of {in_words(rise)}. {prediction}{_noise_scale_remark(points)}."
  )
  return Finding(judged(DIRECTION, rise, n=int(usable.sum()), verdict=verdict), series, reading)


def _noise_scale_remark(points: Sequence[_Point]) -> str:
  """Says at which checkpoints the noise scale of the distribution could not be identified; nothing if at none."""
  refused = sorted({p.step for p in points if not is_number(p.noise.get("noise_scale"))})
  if not refused:
    return ""
  steps = ", ".join(str(step) for step in refused)
  return (
    f", taking the training set as all there is; as an estimate for unseen data the noise scale is not identifiable for at least one "
    f"seed at step {steps}, where the gradient is lost in its own sampling error"
  )


OSCILLATION = unjudged(
  "oscillation",
  statement="The training loss of small batches oscillates more around its trend",
  source="sampling error of a mean: standard deviation proportional to B^(-1/2)",
  expected="below 0 (independent sampling: -0.5)",
  unit="slope of log(relative spread of the minibatch loss) against log B",
)


class _LossCurve(NamedTuple):
  """The minibatch losses of one trial and their trend, f64[rows]; `half_width` is half the moving mean's length in examples."""

  examples: np.ndarray
  loss: np.ndarray
  trend: np.ndarray
  half_width: float


def loss_curve(record: Record) -> _LossCurve | None:
  """Reads the minibatch losses of a trial and their trend, a moving mean centred on each row.

  The logged `train_loss` is a mean over all steps since the row before, so its sum over examples is known at every row; the trend at e
  examples is (sum up to e + w) - (sum up to e - w), over 2w, with w = `TREND_FRACTION` / 2 of the run: the same number of examples
  at every batch size. Nearer than w to an end, w shrinks to keep the mean centred, and the last row has no trend (NaN).
  """
  rows = [
    row
    for row in record.metrics
    if is_number(row.get("train_loss")) and is_number(row.get("minibatch_loss")) and row.get("examples_seen", 0) > 0
  ]
  if len(rows) < MIN_ROWS:
    return None
  examples = np.array([row["examples_seen"] for row in rows], float)
  edges = np.concatenate([[0.0], examples])
  sums = np.concatenate([[0.0], np.cumsum([row["train_loss"] for row in rows] * np.diff(edges))])
  half_width = TREND_FRACTION / 2 * examples[-1]
  w = np.minimum(half_width, np.minimum(examples, examples[-1] - examples))
  covered = w > 0
  trend = np.full_like(examples, np.nan)
  high, low = np.interp(examples + w, edges, sums), np.interp(examples - w, edges, sums)
  trend[covered] = (high - low)[covered] / (2 * w[covered])
  return _LossCurve(examples, np.array([row["minibatch_loss"] for row in rows]), trend, half_width)


def loss_spread(record: Record) -> float | None:
  """Returns the standard deviation of (minibatch loss - trend) / trend over the second half of a trial.

  The first half is left out because the loss falls too fast there to have a level. A moving mean over n minibatches contains the one at
  its centre, which takes the part 1/n off the variance; this is given back. None with fewer than `MIN_ROWS` rows or n < 2.
  """
  curve = loss_curve(record)
  if curve is None:
    return None
  end = curve.examples[-1]
  n = 2 * curve.half_width / batch_size(record)
  late = (curve.examples > end / 2) & (curve.examples <= end - curve.half_width) & (curve.trend > 0)
  if late.sum() < MIN_ROWS or n < 2:
    return None
  relative = (curve.loss[late] - curve.trend[late]) / curve.trend[late]
  return float(np.sqrt(np.mean(relative**2) / (1 - 1 / n)))


def judge_oscillation(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether the loss of single minibatches wobbles more around its trend when they are small.

  `loss_spread` of the trials at equal epochs with tuned rates, averaged over final seeds; the slope's interval comes from the scatter of
  the batch sizes about a straight line in log-log. The spread is relative to the loss, which itself ends lower for some batch sizes.

  Rule: holds if the interval lies below 0; fails if it lies above -`LEAST_SPREAD_SLOPE`; else inconclusive. Needs three batch sizes.

  Series: batch_size, spread, spread_sem (over seeds; NaN with one); and the curves of one seed at the smallest, a middle and the largest
  batch size: curve_batch_size, curve_examples, curve_loss, curve_trend (flat; trend NaN at the last row).
  """
  measured = [(r, loss_spread(r)) for r in final_records(study, records, "epochs")]
  spreads: dict[int, list[float]] = {}
  example: dict[int, Record] = {}
  for record, spread in measured:
    if spread is not None and spread > 0:
      spreads.setdefault(batch_size(record), []).append(spread)
      example.setdefault(batch_size(record), record)
  sizes = sorted(spreads)
  rows = [
    (
      size,
      np.mean(spreads[size]),
      np.std(spreads[size], ddof=1) / math.sqrt(len(spreads[size])) if len(spreads[size]) > 1 else np.nan,
    )
    for size in sizes
  ]
  curves = []
  for size in sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}) if sizes else ():
    curve = loss_curve(example[size])
    if curve is not None:
      curves += [(size, e, loss, trend) for e, loss, trend in zip(curve.examples, curve.loss, curve.trend, strict=True)]
  series = columns("batch_size spread spread_sem", rows) | columns(
    "curve_batch_size curve_examples curve_loss curve_trend", curves
  )
  if len(sizes) < 3:
    reading = (
      f"The spread of the training loss could be measured at {len(sizes)} batch sizes, and a slope with an interval needs at least three. "
      "More complete trials, or more logged rows in each, would decide."
    )
    return Finding(OSCILLATION, series, reading)
  slope = loglog_slope(series["batch_size"], series["spread"])
  verdict = positive(negated(slope), least=LEAST_SPREAD_SLOPE)
  conclusion = {
    "holds": "Smaller batches oscillate more.",
    "fails": "Smaller batches do not oscillate more.",
    "inconclusive": "The interval leaves open whether smaller batches oscillate more.",
  }[verdict]
  reading = (
    f"Around its trend the loss of a single minibatch spreads by {100 * series['spread'][0]:.3g} % at batch size {sizes[0]} and by "
    f"{100 * series['spread'][-1]:.3g} % at {sizes[-1]}, a slope of {in_words(slope)} where independent sampling gives -0.5. {conclusion}"
  )
  n = sum(map(len, spreads.values()))
  return Finding(judged(OSCILLATION, slope, n=n, verdict=verdict), series, reading)
