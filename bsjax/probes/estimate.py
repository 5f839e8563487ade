"""From the gradient moments of N examples to estimates with intervals, or a refusal. Plain numpy on the host, float64."""

import math
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtrit

NORMAL_QUANTILE = 1.959963984540054
"""The standard normal stays within +- this number with probability 0.95."""
LEAST_TAIL = 2.866515718791933e-07
"""A denominator counts as different from 0 where chance alone would make it so large once in 3.5 million times: 5 standard errors, and
more from few examples. At 1.96 a zero gradient would pass once in 40 times, and any number given for it is wrong."""

Verdict = Literal["identified", "unidentifiable"]


class Estimate(NamedTuple):
  """A number with its 95 % interval, or a refusal. Python numbers, never NaN: ready for a record."""

  value: float | None
  """None, as are the ends of the interval, where `verdict` is "unidentifiable"."""
  ci_low: float | None
  ci_high: float | None
  n_examples: int
  """How many examples (or replicates) this comes from."""
  verdict: Verdict
  n_needed: int | None
  """Where a noise scale is unidentifiable: at least about so many examples are needed, see `noise_statistics`. None elsewhere, and
  where nothing can be said."""


class NoiseStatistics(NamedTuple):
  """What N examples say about the gradient of their distribution and its noise."""

  loss: float
  grad_cov_trace: Estimate
  """tr(Sigma), unbiased."""
  grad_sq_norm: Estimate
  """|G|^2 of the distribution, unbiased. Given whatever it is: value and interval may be negative."""
  noise_scale: Estimate
  """tr(Sigma) / |G|^2 of the distribution, in examples."""
  signal_to_noise: Estimate
  """|G|^2 / tr(Sigma). Given also where it may be 0 and its inverse, the noise scale, is refused: its upper end then still bounds
  the noise scale from below."""
  dataset_grad_sq_norm: float
  """|G|^2 of these N examples, exact."""
  dataset_noise_scale: float | None
  """tr(Sigma) / |G|^2 of these N examples, exact; None where their gradient is 0 or not finite."""


def noise_statistics(
  *,
  loss: float,
  mean_grad_sq_norm: float,
  deviations: np.ndarray,
  projections: np.ndarray,
  counts: np.ndarray | None = None,
) -> NoiseStatistics:
  """Estimate the noise scale, with an interval, or refuse.

  Let g_i be the gradients of N examples drawn independently from a distribution, and G their mean. Then

      T = sum_i |g_i - G|^2 / (N - 1)      is unbiased for tr(Sigma),
      Q = |G|^2 - T / N                    is unbiased for the distribution's |G|^2, since E|G|^2 exceeds it by tr(Sigma)/N,
      T / Q                                estimates the noise scale tr(Sigma) / |G|^2, in examples.

  Errors. Leave out each example in turn, which moves the mean to G - d_i / (N - 1) with d_i = g_i - G, and compute T_i and Q_i:

      V_xy = ((N - 1) / N) sum_i (x_i - mean x) (y_i - mean y)          for x, y in {T, Q}

  This jackknife finds Var(T), but overstates Var(Q): the truth is 4 G'Sigma G / N + 2 tr(Sigma^2) / N^2, and V_QQ has the expectation
  4 G'Sigma G / N + 4 tr(Sigma^2) / N^2. From deviations and projections alone the two terms cannot be told apart. They are split as
  |G|^2 : tr(Sigma) / N, as they are where the noise along the gradient is the noise along its own average direction,
  G'Sigma G / |G|^2 = tr(Sigma^2) / tr(Sigma), so with x = max(Q, 0) N / T

      Var(Q) ~ V_QQ (1 + 2 x) / (2 + 2 x),

  between half the jackknife's value, where noise is all there is, and the whole of it. (V_TQ takes the square root of the factor.)

  Interval. Fieller's: every r for which T - r Q is compatible with 0, that is (T - r Q)^2 <= t^2 (V_TT - 2 r V_TQ + r^2 V_QQ), with t
  Student's quantile for N - 1 degrees.

  Refusal. A noise scale is given where Q > t' sqrt(V_QQ), with t' Student's quantile at `LEAST_TAIL`: 5 standard errors for large N.
  Else no finite noise scale can be excluded and none is returned, but what is needed: `n_needed` is the smallest N at which half of all
  draws would be identified if the distribution's |G|^2 were the upper end of its interval. So it is the least that is worth trying:
  where |G|^2 is smaller, more is needed. None where that end is not positive.

  Where the N examples are all there is (a training set, of which batches are drawn without replacement), G is the gradient itself and
  needs no correction: `dataset_grad_sq_norm` and `dataset_noise_scale` = T / |G|^2 are exact, and predict the noise of a batch exactly,
  E|g_B - G|^2 = T (1/B - 1/N). The two ratios answer different questions, and part where N is not large against the noise scale.
  Where the parameters were fitted to these very examples, the g_i are not independent draws, and only the data set's ratio means what it
  says: near a minimum of the training loss it grows without bound.

  Args:
    loss: mean loss of the N examples, handed on.
    mean_grad_sq_norm: |G|^2, not corrected.
    deviations: |g_i - G|^2, f[N].
    projections: (g_i - G) . G, f[N].
    counts: how often each example occurs in the data set, f[N], summing to its size; once by default.

  Holds:
    Coverage, measured on problems whose noise scale is known (docs/noise_coverage.md): where all draws are identified, 94 to 97 % of
    the intervals hold the truth; at a zero gradient, and at one of half a standard error, none of 168,000 draws got a number.
    At the border, where half of all draws are identified, those are the ones that overestimate |G|^2: 90 to 98 %, and at most about
    1 - 0.025 / p where a share p is identified.
    Where the interval ends: gradients whose squared norms have no variance, so that tr(Sigma) is underestimated in most draws
    (Student's t with 3 degrees: 78 % at a noise scale of 10, 89 % at 100, 95 % from 1,000); noise in two or three directions with
    the gradient outside of them (tr(Sigma)^2 / tr(Sigma^2) = 2.5: from 90 % where most draws are identified, from 79 % at the border).
    Nothing in the moments tells these apart. The signal-to-noise ratio of a gradient lost in noise is covered in 87 to 98 %, with noise
    in so few directions in 81 %.
    Zero noise (equal examples) is a noise scale of exactly 0 and no signal-to-noise ratio. A zero gradient, an empty group or
    one whose gradients are all 0 is unidentifiable. Anything not finite makes every estimate unidentifiable.

  Raises:
    ValueError: fewer than 3 examples.

  Source: McCandlish et al. (2018), equations 2.9 and, for two batch sizes 1 and N, A.2; footnote 6 for 1/B - 1/N. Efron and Stein
  (1981) for the jackknife and its bias; Hoeffding (1948) for the variance of Q, a U-statistic; Fieller (1954) for the ratio. The
  split of the variance is ours.
  """
  deviations, projections = np.asarray(deviations, np.float64), np.asarray(projections, np.float64)
  weights = np.ones_like(deviations) if counts is None else np.asarray(counts, np.float64)
  mean_sq_norm, n = float(mean_grad_sq_norm), round(weights.sum())
  if n < 3:
    raise ValueError(f"{n} examples are too few to leave one out; give at least 3.")
  with np.errstate(invalid="ignore", over="ignore"):
    total = weights @ deviations
    trace = float(total / (n - 1))
    sq_norm = mean_sq_norm - trace / n
    traces = (total - deviations * n / (n - 1)) / (n - 2)
    sq_norms = mean_sq_norm - 2 * projections / (n - 1) + deviations / (n - 1) ** 2 - traces / (n - 1)
    traces, sq_norms = traces - weights @ traces / n, sq_norms - weights @ sq_norms / n
    products = (weights @ traces**2, weights @ (traces * sq_norms), weights @ sq_norms**2)
    var_trace, cov, jackknife = (float(product * (n - 1) / n) for product in products)
  statistics = NoiseStatistics(
    float(loss),
    *(_refused(n), _refused(n), _refused(n), _refused(n)),
    dataset_grad_sq_norm=mean_sq_norm,
    dataset_noise_scale=trace / mean_sq_norm if 0 < mean_sq_norm < math.inf and math.isfinite(trace) else None,
  )
  if not all(map(math.isfinite, (trace, sq_norm, var_trace, cov, jackknife))):
    return statistics

  share = _variance_share(sq_norm, trace, n)
  var_sq_norm, cov = share * jackknife, math.sqrt(share) * cov
  grad_sq_norm = around(sq_norm, var_sq_norm, n)
  noise_scale = ratio_estimate(trace, sq_norm, var_trace, cov, var_sq_norm, n)
  if noise_scale.ci_low is None:
    noise_scale = noise_scale._replace(n_needed=_examples_needed(grad_sq_norm, trace, jackknife))
  else:
    noise_scale = noise_scale._replace(ci_low=max(noise_scale.ci_low, 0.0))
  return statistics._replace(
    grad_cov_trace=around(trace, var_trace, n),
    grad_sq_norm=grad_sq_norm,
    noise_scale=noise_scale,
    signal_to_noise=ratio_estimate(sq_norm, trace, var_sq_norm, cov, var_trace, n, least_tail=0.025),
  )


def ratio_of_means(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
  """Estimate E[x] / E[y] from R independent pairs (x_r, y_r), with an interval, or refuse.

  mean(x) / mean(y), with the interval and the refusal of `ratio_estimate`. Never the mean of the ratios x_r / y_r: it is far off where
  y_r varies, and has no expectation at all where y_r may come near 0.

  Args:
    numerators, denominators: x and y, f[R]; successive values of a training run are not independent.

  Returns:
    `n_examples` counts the replicates. Unidentifiable with fewer than 2 of them, or where any is not finite.
  """
  x, y = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
  n = x.size
  if n < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
    return _refused(n)
  (var_x, cov), (_, var_y) = np.cov(x, y) / n
  return ratio_estimate(float(x.mean()), float(y.mean()), float(var_x), float(cov), float(var_y), n)


def ratio_estimate(
  x: float, y: float, var_x: float, cov: float, var_y: float, n: int, *, least_tail: float = LEAST_TAIL
) -> Estimate:
  """Estimate x / y from two noisy numbers, with Fieller's 95 % interval, or refuse.

  Args:
    x, y: the estimates.
    var_x, cov, var_y: their variances and covariance, estimated with n - 1 degrees of freedom.
    n: examples or replicates behind them.
    least_tail: y counts as positive where Student's tail beyond y / sqrt(var_y) is smaller. At 0.025 the interval is
      merely bounded, which is enough where y is known to be positive.
  """
  if not (y > 0 and y > -stdtrit(n - 1, least_tail) * math.sqrt(var_y)):
    return _refused(n)
  low, high = fieller_interval(x, y, var_x, cov, var_y, quantile=-float(stdtrit(n - 1, 0.025)))
  return Estimate(float(x / y), low, high, n, "identified", None)


def fieller_interval(
  x: float, y: float, var_x: float, cov: float, var_y: float, *, quantile: float = NORMAL_QUANTILE
) -> tuple[float, float]:
  """Bound the ratio x/y of two estimates, given that y differs from 0 by more than `quantile` standard errors.

  With z = `quantile`, the bounds solve (y^2 - z^2 var_y) r^2 - 2 (x y - z^2 cov) r + (x^2 - z^2 var_x) = 0.

  Source: Fieller (1954).
  """
  z_sq = quantile**2
  a, b, c = y * y - z_sq * var_y, x * y - z_sq * cov, x * x - z_sq * var_x
  root = math.sqrt(max(b * b - a * c, 0.0))
  return float((b - root) / a), float((b + root) / a)


def expected_sq_norm(
  grad_sq_norm: float, grad_cov_trace: float, batch_size: int, population: int | None = None
) -> float:
  """Predict the mean squared norm of a batch's gradient.

      E|G_B|^2 = |G|^2 + tr(Sigma) / B                         for examples drawn independently,
      E|G_B|^2 = |G|^2 + tr(Sigma) (1/B - 1/N)                 for B different examples out of N = `population`

  Args:
    grad_sq_norm: |G|^2 of the distribution; of the N examples themselves (`dataset_grad_sq_norm`) where `population` is given.
    grad_cov_trace: tr(Sigma), unbiased.
    batch_size: B, at most `population`; numbers or arrays.

  Source: McCandlish et al. (2018), equations 2.2 and A.1, and footnote 6 for the finite population.
  """
  return grad_sq_norm + grad_cov_trace * (1 / batch_size - (1 / population if population else 0.0))


def flat_row(statistics: NoiseStatistics) -> dict[str, float | int | str | None]:
  """Lay the statistics out as one flat row of a record; `verdict` and `examples_needed` are the noise scale's."""
  noise_scale = statistics.noise_scale
  row: dict[str, float | int | str | None] = {"num_examples": noise_scale.n_examples, "loss": statistics.loss}
  for name in ("grad_cov_trace", "grad_sq_norm", "noise_scale", "signal_to_noise"):
    estimate: Estimate = getattr(statistics, name)
    row |= {name: estimate.value, f"{name}_ci_low": estimate.ci_low, f"{name}_ci_high": estimate.ci_high}
  return row | {
    "verdict": noise_scale.verdict,
    "examples_needed": noise_scale.n_needed,
    "dataset_grad_sq_norm": statistics.dataset_grad_sq_norm,
    "dataset_noise_scale": statistics.dataset_noise_scale,
  }


def _variance_share(sq_norm: float, trace: float, n: int) -> float:
  """Returns Var(Q) / E[V_QQ] = (x + 1/2) / (x + 1), with x = |G|^2 : tr(Sigma)/N; 1 where both are 0."""
  signal, noise = max(sq_norm, 0.0), max(trace, 0.0) / n
  return (signal + noise / 2) / (signal + noise) if signal + noise > 0 else 1.0


def _examples_needed(grad_sq_norm: Estimate, trace: float, jackknife: float) -> int | None:
  """Finds the smallest N' at which |G|^2 is `LEAST_TAIL` away from 0 if it is the upper end of its interval.

  At other N', V_QQ = 4 k (|G|^2 + tr(Sigma)/N') / N', with k = tr(Sigma^2)/tr(Sigma) as these examples show it.
  """
  sq_norm, value, n = grad_sq_norm.ci_high, grad_sq_norm.value, grad_sq_norm.n_examples
  if sq_norm is None or value is None or sq_norm <= 0 or trace <= 0:
    return None
  along = jackknife * n / (4 * (max(value, 0.0) + trace / n))

  def enough(m: int) -> bool:
    variance = _variance_share(sq_norm, trace, m) * 4 * along * (sq_norm + trace / m) / m
    return sq_norm >= -stdtrit(m - 1, LEAST_TAIL) * math.sqrt(variance)

  low, high = n, 2 * n
  while not enough(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if enough(middle) else (middle, high)
  return high


def around(value: float, var: float, n: int) -> Estimate:
  """Give a number its 95 % interval: Student's, for a variance known from n numbers."""
  half = -float(stdtrit(n - 1, 0.025)) * math.sqrt(var)
  return Estimate(value, value - half, value + half, n, "identified", None)


def _refused(n: int) -> Estimate:
  return Estimate(None, None, None, n, "unidentifiable", None)
