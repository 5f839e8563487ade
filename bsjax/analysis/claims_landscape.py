"""The judge of the pictures: does the loss rise faster around large-batch solutions, on the line from a small-batch one?"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bsjax.analysis.claim import Finding, columns, in_words, judged, positive, unjudged
from bsjax.analysis.claims_gradient_noise import exponential, number_or_nan, student_interval
from bsjax.analysis.fits import Interval, welch
from bsjax.analysis.solutions import BATCH_NORM_WORDS

PATHS = {"line": "the straight line", "curve": "the curve"}
SOLUTIONS = ("small", "large")
"""Named after the batch size that trained them; on a line and on a curve x is 0 at the first and 1 at the second."""
METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
NEIGHBOURHOOD = 1 / 4
"""What counts as around a solution: a quarter of the way to the other, on both sides. The neighbourhoods of the two do not meet."""
STATISTICS_WORDS = BATCH_NORM_WORDS | {"reestimated": "batch norm: statistics re-estimated at every point"}
LEAST_LOG_FACTOR = math.log(1.1)
"""A tenth is the least difference worth the name: the contrasts in Keskar et al.'s figures are by factors."""

SHARPER_LINE = unjudged(
  "sharper_line",
  statement="On the line through a small-batch and a large-batch solution, the training loss rises faster around the large-batch one",
  source="Keskar et al. (2017), section 2.2.1, Figs. 3 and 7",
  expected="above 1",
  unit="rise of the training loss around the large-batch solution / around the small-batch one",
)


class _Rises(NamedTuple):
  """How much the training loss rises around the two solutions of each seed; NaN = not known."""

  seeds: list[int]
  small: np.ndarray
  large: np.ndarray

  @property
  def log_ratios(self) -> np.ndarray:
    """Returns f64[S], NaN for a seed without a positive rise at both ends."""
    usable = (self.small > 0) & (self.large > 0)
    return np.log(np.where(usable, self.large, np.nan)) - np.log(np.where(usable, self.small, np.nan))

  @property
  def factor(self) -> Interval:
    """Returns the geometric mean of large / small over the seeds, not known where one of them is not."""
    return exponential(student_interval(self.log_ratios))


def judge_sharper_line(study: Mapping, rows_by_landscape: Mapping[str, Sequence[Mapping]]) -> Finding:
  """Judges whether the training loss rises faster around large-batch solutions than around small-batch ones.

  The rise around a solution is the mean of loss(x) - loss(solution) over the points of the line with |x - x_solution| <=
  `NEIGHBOURHOOD`, on both sides, so that a slope through the solution cancels and curvature remains. Both solutions lie on one line:
  their neighbourhoods are equally wide in parameter space. For each seed, log(rise around large / rise around small) on the straight
  line; the mean over seeds carries Student's interval. A seed without a positive rise at both ends has no logarithm; leaving it out
  would choose by outcome, so then there is no interval and no verdict. The reading also tells the factor on the curve and along
  filter-normalised random directions.

  On the curve the neighbourhoods are equally wide only where both solutions are equally long: it leaves each one along the other, so
  the shorter one by longer steps. A rescaling of layers that leaves both functions unchanged changes the line (Dinh et al., 2017), and
  around a solution with larger weights the neighbourhood is relatively smaller (Li et al., 2018, section 5): so the random directions
  are shown beside it.

  Rule: holds if the interval of the logarithm lies above 0; fails if it lies below `LEAST_LOG_FACTOR`; else inconclusive.

  Args:
    study: its "escape" names the two batch sizes.
    rows_by_landscape: rows of "line_<seed>", "curve_<seed>", and of "random_<solution>", "random_line_<solution>",
      "trajectory_<solution>", "path_<solution>" for the solutions "small" and "large"; any of them may be missing.

  Series, with one entry per point: path ("line" or "curve"), seed, alpha, and the metrics train_loss, train_accuracy, test_loss,
  test_accuracy. For each path and seed: rise_path, rise_seed, rise_small, rise_large. For each path: factor_path, factor, factor_low,
  factor_high, factor_seeds. The planes of two random directions: plane_solution, plane_x, plane_y, plane_ before each metric; random
  lines: random_solution, random_direction, random_x, random_ before each metric; the planes through the checkpoints:
  trajectory_solution, trajectory_x, trajectory_y, trajectory_ before each metric; the checkpoints on them: checkpoint_solution,
  checkpoint_x, checkpoint_y, checkpoint_step, checkpoint_explained_x, checkpoint_explained_y. Single: small_batch_size,
  large_batch_size (NaN = not known), batch_norm (in words, "" = not known).

  Source: Keskar et al. (2017), section 2.2.1 and appendix D. They show one pair of solutions and judge by eye; the number is ours.
  """
  rises = {path: _rises(rows_by_landscape, path) for path in PATHS}
  series = _series(study, rows_by_landscape, rises)
  line = rises["line"]
  if not line.seeds:
    reading = (
      "The loss on the line between a small-batch and a large-batch solution was not computed. "
      "The lines of two seeds would decide."
    )
    return Finding(SHARPER_LINE, series, reading)
  verdict = positive(student_interval(line.log_ratios), least=LEAST_LOG_FACTOR)
  claim = judged(SHARPER_LINE, line.factor, n=len(line.seeds), verdict=verdict)
  conclusion = {
    "holds": "Large-batch solutions are sharper on this line",
    "fails": "Large-batch solutions are not sharper on this line",
    "inconclusive": "Which of the two is sharper on this line is left open",
  }[verdict]
  statistics = str(series["batch_norm"])
  remarks = [conclusion, *_reasons(line), *([statistics] if statistics else [])]
  return Finding(claim, series, f"{_measured(series, rises)}. {'; '.join(remarks)}.")


def _rises(rows_by_landscape: Mapping[str, Sequence[Mapping]], path: str) -> _Rises:
  by_seed = {}
  for name, rows in rows_by_landscape.items():
    kind, _, seed = name.rpartition("_")
    if kind == path and rows:
      x, loss = (np.array([number_or_nan(row.get(key)) for row in rows]) for key in ("x", "train_loss"))
      by_seed[int(seed)] = [rise_around(x, loss, place) for place in range(len(SOLUTIONS))]
  seeds = sorted(by_seed)
  small, large = np.array([by_seed[seed] for seed in seeds], float).reshape(-1, 2).T
  return _Rises(seeds, small, large)


def rise_around(x: np.ndarray, loss: np.ndarray, place: float) -> float:
  """Averages loss(x) - loss(place) over the points within `NEIGHBOURHOOD` of a place, the place itself left out.

  Returns: NaN where the loss is not known at the place or at one of these points, or where there is none on one of the sides.
  """
  offset = x - place
  here = np.abs(offset) < 1e-9
  near = (np.abs(offset) <= NEIGHBOURHOOD + 1e-9) & ~here
  if not (here.any() and (offset[near] < 0).any() and (offset[near] > 0).any()):
    return math.nan
  return float(np.mean(loss[near]) - np.mean(loss[here]))


def _random_factor(series: Mapping[str, np.ndarray]) -> Interval:
  """Compares the mean logarithm of the rise along random directions around one solution of each batch size."""
  logs = []
  for solution in SOLUTIONS[::-1]:
    at = series["random_solution"] == solution
    x, loss, direction = (series[f"random_{name}"][at] for name in ("x", "train_loss", "direction"))
    each = [rise_around(x[direction == d], loss[direction == d], 0.0) for d in np.unique(direction)]
    logs.append([np.log(np.where(np.array(each) > 0, each, np.nan))])
  return exponential(welch(*logs))


def _measured(series: Mapping[str, np.ndarray], rises: Mapping[str, _Rises]) -> str:
  """Says the factors: on the line, on the curve, along random directions."""
  sizes = {name: series[f"{name}_batch_size"].item() for name in SOLUTIONS}
  small, large = (f"{name}-batch" + (f" (B = {size:,.0f})" if size > 0 else "") for name, size in sizes.items())
  line = rises["line"]
  seeds = f"{len(line.seeds)} {'seed' if len(line.seeds) == 1 else 'seeds'}"
  if not np.isfinite(line.factor.value):
    return f"On the straight line the rises around {small} and {large} solutions have no ratio in all of {seeds}"
  on_line = series["path"] == "line"
  alpha, loss = series["alpha"][on_line], series["train_loss"][on_line]
  of_large, of_small = (np.mean(loss[np.isclose(alpha, place)]) for place in (1, 0))
  beside = [f"{seeds} at mean training losses {of_large:.2g} and {of_small:.2g}"]
  if np.isfinite(rises["curve"].factor.value):
    beside.append(f"on the curve {in_words(rises['curve'].factor)}")
  random = _random_factor(series)
  if np.isfinite(random.value):
    beside.append(f"along filter-normalised random directions around one solution of each {in_words(random)}")
  return (
    f"Within a quarter of the way to the other solution on the straight line, the training loss rises "
    f"{in_words(line.factor)} times as much around {large} solutions as around {small} ones ({', '.join(beside)})"
  )


def _reasons(line: _Rises) -> list[str]:
  """Says why there is no interval, if there is none."""
  lost = [seed for seed, ratio in zip(line.seeds, line.log_ratios, strict=True) if not np.isfinite(ratio)]
  if lost:
    return [f"the loss does not rise, or is not known, around a solution of seed {', '.join(map(str, lost))}"]
  return ["one seed gives no interval, two would"] if len(line.seeds) < 2 else []


def _series(
  study: Mapping, rows_by_landscape: Mapping[str, Sequence[Mapping]], rises: Mapping[str, _Rises]
) -> dict[str, np.ndarray]:
  seeds = sorted({seed for each in rises.values() for seed in each.seeds})
  metrics = " ".join(METRICS)
  series = columns(
    f"path seed alpha {metrics}",
    [
      (path, seed, *values)
      for path in PATHS
      for seed in seeds
      for values in _numbers(rows_by_landscape.get(f"{path}_{seed}", ()), ("x", *METRICS))
    ],
  )
  series |= columns(
    "rise_path rise_seed rise_small rise_large",
    [(path, *row) for path, each in rises.items() for row in zip(each.seeds, each.small, each.large, strict=True)],
  )
  series |= columns(
    "factor_path factor factor_low factor_high factor_seeds",
    [(path, *each.factor, len(each.seeds)) for path, each in rises.items() if each.seeds],
  )
  for prefix, name, keys in (
    ("plane", "random", ("x", "y", *METRICS)),
    ("random", "random_line", ("direction", "x", *METRICS)),
    ("trajectory", "trajectory", ("x", "y", *METRICS)),
    ("checkpoint", "path", ("x", "y", "step", "explained_x", "explained_y")),
  ):
    series |= columns(
      " ".join(f"{prefix}_{key}" for key in ("solution", *keys)),
      [
        (solution, *values)
        for solution in SOLUTIONS
        for values in _numbers(rows_by_landscape.get(f"{name}_{solution}", ()), keys)
      ],
    )
  statistics = {row["batch_norm"] for rows in rows_by_landscape.values() for row in rows if "batch_norm" in row}
  words = sorted(STATISTICS_WORDS.get(name, name) for name in statistics)
  sizes = study.get("escape", {})
  return series | {
    "batch_norm": np.asarray(", ".join(words)),
    **{f"{name}_batch_size": np.asarray(number_or_nan(sizes.get(name)), float) for name in SOLUTIONS},
  }


def _numbers(rows: Iterable[Mapping], keys: Sequence[str]) -> list[tuple[float, ...]]:
  """Reads columns of rows as numbers, NaN for what is null or missing."""
  return [tuple(number_or_nan(row.get(key)) for key in keys) for row in rows]
