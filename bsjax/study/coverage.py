"""How often do the intervals of the gradient noise hold the truth? Draws from problems whose noise scale is known, and the table."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import chdtri, expit, stdtrit
from tqdm import tqdm

from bsjax.analysis.claims_coverage import COVERAGE_KIND, coverage_rows, judge_coverage
from bsjax.probes.estimate import LEAST_TAIL, NoiseStatistics, noise_statistics
from bsjax.records import (
  Record,
  append_rows,
  create_trial,
  read_record,
  set_status,
  trial_id,
  write_atomically,
)
from bsjax.report import coverage_page, write_experiment
from bsjax.types import Array, Example, Params

NOISE_SCALES = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
HOPELESS, BORDERLINE, CLEAR, AMPLE, ZERO = "hopeless", "borderline", "clear", "ample", "zero gradient"
HOPELESS_ERRORS = 0.5
"""How many standard errors of its estimate the true |G|^2 is from 0 where nothing can be said about the noise scale."""
ABOVE_BORDER = {BORDERLINE: 0.0, CLEAR: 4.0, AMPLE: 16.0}
"""How many it lies above the border of refusal, which for large N is 5 standard errors above 0."""
ZERO_EXAMPLES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
"""Data set sizes at which a gradient of exactly 0 is to be refused."""
NUM_SUPPORT = 2048
"""Different examples of a problem."""
FEWEST_EXAMPLES = 3
POPULATION_SEED, DRAW_SEED = 0, 1
"""What the examples of a problem are made from, and what the data sets are drawn with."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A distribution of examples with finitely many different ones, and a loss at fixed parameters: its gradient noise is known exactly."""

  loss_fn: Callable[[Params, Example], Array]
  params: np.ndarray
  """f64[P]."""
  examples: Any
  """A pytree with leading axis M."""
  probabilities: np.ndarray
  """How likely each of them is, f64[M]."""
  grads: np.ndarray
  """The gradients of their losses, in closed form, f64[M, P]."""

  @functools.cached_property
  def sq_norms(self) -> np.ndarray:
    return np.einsum("mp,mp->m", self.grads, self.grads)


class Truth(NamedTuple):
  """Exact sums over the distribution of a problem."""

  grad_sq_norm: float
  """|G|^2."""
  grad_cov_trace: float
  """tr(Sigma)."""
  along: float
  """G'Sigma G."""
  cov_sq_norm: float
  """tr(Sigma^2)."""

  @property
  def noise_scale(self) -> float:
    return self.grad_cov_trace / self.grad_sq_norm if self.grad_sq_norm else math.inf


class Cell(NamedTuple):
  """One line of the table: a problem at one noise scale and one data set size, drawn `num_draws` times."""

  problem: str
  noise_scale: float
  """inf where the gradient is 0."""
  regime: str
  num_examples: int
  num_draws: int

  @property
  def description(self) -> dict[str, Any]:
    """What the records name it by."""
    noise_scale = None if math.isinf(self.noise_scale) else self.noise_scale
    return {"kind": COVERAGE_KIND} | self._asdict() | {"noise_scale": noise_scale}


def linear_loss(params: Params, example: Example) -> Array:
  """w'x: its gradient is the example itself, so the noise is what the examples are drawn from."""
  return jnp.vdot(params, example["x"])


def logistic_loss(params: Params, example: Example) -> Array:
  """log(1 + exp(w'x)) - y w'x, for a label y of 0 or 1: its gradient is (sigmoid(w'x) - y) x."""
  logit = jnp.vdot(params, example["x"])
  return jax.nn.softplus(logit) - example["y"] * logit


def _linear_problem(
  centred: np.ndarray, probabilities: np.ndarray, direction: np.ndarray, noise_scale: float
) -> Problem:
  """Moves centred examples along a unit vector until tr(Sigma) / |G|^2 is the noise scale."""
  trace = probabilities @ np.sum(centred**2, axis=1)
  x = centred + direction * math.sqrt(trace / noise_scale)
  return Problem(linear_loss, np.zeros(x.shape[1]), {"x": x}, probabilities, x)


@functools.cache
def _normal(num_params: int) -> np.ndarray:
  x = np.random.default_rng(POPULATION_SEED).standard_normal((NUM_SUPPORT, num_params))
  return x - x.mean(0)


def _random_direction(num_params: int) -> np.ndarray:
  direction = np.random.default_rng(POPULATION_SEED + 1).standard_normal(num_params)
  return direction / np.linalg.norm(direction)


def _gaussian(noise_scale: float, *, scales: np.ndarray, direction: np.ndarray) -> Problem:
  """Draws x from a normal distribution with standard deviations `scales` along the axes: 2,048 vectors, equally likely."""
  return _linear_problem(_normal(scales.size) * scales, np.full(NUM_SUPPORT, 1 / NUM_SUPPORT), direction, noise_scale)


def _student_t(noise_scale: float, *, degrees: int, num_params: int = 30, num_strata: int = 42) -> Problem:
  """Draws x from a multivariate Student t: a normal vector divided by sqrt(chi^2 / degrees), and its mirror image.

  Stratum s holds the values of chi^2 between its quantiles 2^-(s+1) and 2^-s, so that the tail goes on, in ever less likely
  examples, to a probability of 2^-42: farther than all draws together reach.
  """
  per_stratum = NUM_SUPPORT // num_strata // 2
  edges = np.append(0.5 ** np.arange(num_strata), 0.0)
  inner = (np.arange(per_stratum) + 0.5) / per_stratum
  quantiles = (edges[1:, None] + (edges[:-1] - edges[1:])[:, None] * inner).ravel()
  weights = np.repeat((edges[:-1] - edges[1:]) / per_stratum, per_stratum)
  normal = np.random.default_rng(POPULATION_SEED).standard_normal((quantiles.size, num_params))
  half = normal / np.sqrt(chdtri(degrees, 1 - quantiles) / degrees)[:, None]
  x, probabilities = np.concatenate([half, -half]), np.concatenate([weights, weights]) / 2
  return _linear_problem(x, probabilities, _random_direction(num_params), noise_scale)


def _logistic(noise_scale: float, *, num_params: int = 20) -> Problem:
  """Logistic regression on the straight line from its optimum w_true to 0 and beyond: w = (1 - t) w_true.

  1,024 feature vectors: a constant 1, and normal features with variances 1, 1/2, 1/3, ...; each with label 1 at probability
  sigmoid(w_true'x) and else 0, with weights w_true of 1, 1, 1/sqrt(2), 1/sqrt(3), ... At w_true the gradient is 0; t is such that
  tr(Sigma) / |G|^2 is the noise scale.
  """
  scales = np.maximum(np.arange(num_params), 1) ** -0.5
  x = np.random.default_rng(POPULATION_SEED).standard_normal((NUM_SUPPORT // 2, num_params)) * scales
  x[:, 0] = 1
  true_params = scales
  positive = expit(x @ true_params)
  features, labels = np.concatenate([x, x]), np.repeat([1.0, 0.0], x.shape[0])
  probabilities = np.concatenate([positive, 1 - positive]) / x.shape[0]

  def at(t: float) -> Problem:
    params = (1 - t) * true_params
    grads = (expit(features @ params) - labels)[:, None] * features
    return Problem(logistic_loss, params, {"x": features, "y": labels}, probabilities, grads)

  if math.isinf(noise_scale):
    return at(0.0)
  low, high = 0.0, 16.0
  if truth_of(at(high)).noise_scale > noise_scale:
    raise ValueError(f"noise_scale={noise_scale} is below what this logistic regression has anywhere; use 10 or more")
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if truth_of(at(middle)).noise_scale > noise_scale else (low, middle)
  return at(high)


PROBLEMS: dict[str, Callable[[float], Problem]] = {
  "linear_gaussian": functools.partial(_gaussian, scales=np.ones(100), direction=_random_direction(100)),
  "linear_decaying": functools.partial(_gaussian, scales=np.arange(1, 101) ** -0.5, direction=_random_direction(100)),
  "logistic": _logistic,
  "student_t": functools.partial(_student_t, degrees=5),
  "student_t3": functools.partial(_student_t, degrees=3),
  "steep": functools.partial(_gaussian, scales=1 / np.arange(1, 101), direction=_random_direction(100)),
  "spiked": functools.partial(_gaussian, scales=np.append(math.sqrt(6), np.ones(199)), direction=np.eye(200)[0]),
}
"""From a noise scale (inf: no gradient) to a problem that has it. linear_gaussian: 100 directions of equal noise. linear_decaying: 100,
with variances 1/k, the gradient anywhere. logistic: logistic regression. student_t: 5 degrees of freedom in 30 directions, so that the
squared norm of a gradient has a variance and no third moment. Where the interval ends: student_t3, 3 degrees, where it has no variance
either; steep, variances 1/k^2; spiked, the gradient along the one of 200 directions that has 6 times the variance."""


def truth_of(problem: Problem) -> Truth:
  """Sums over the distribution: exact, in float64."""
  mean = problem.probabilities @ problem.grads
  centred = problem.grads - mean
  cov = (centred * problem.probabilities[:, None]).T @ centred
  return Truth(float(mean @ mean), float(np.trace(cov)), float(mean @ cov @ mean), float(np.sum(cov**2)))


def draw_statistics(problem: Problem, num_examples: int, rng: np.random.Generator) -> NoiseStatistics:
  """Draws a data set of N examples and measures its gradient noise.

  N independent draws from finitely many different examples are one multinomial draw of how often each occurs, and the moments of
  N gradients are those of the different ones with these counts: exact, at a cost that does not grow with N.
  """
  counts = rng.multinomial(num_examples, problem.probabilities)
  mean = counts @ problem.grads / num_examples
  along = problem.grads @ mean
  return noise_statistics(
    loss=0.0,
    mean_grad_sq_norm=mean @ mean,
    deviations=problem.sq_norms - 2 * along + mean @ mean,
    projections=along - mean @ mean,
    counts=counts,
  )


def border(truth: Truth, standard_errors: float) -> int:
  """Finds the smallest N at which |G|^2 lies so many standard errors of its estimate above the border of refusal."""
  return _smallest(truth, lambda n: standard_errors - float(stdtrit(n - 1, LEAST_TAIL)))


def _smallest(truth: Truth, wanted: Callable[[int], float]) -> int:
  """Finds the smallest N at which |G|^2 is as many standard errors as wanted.

  The variance of its estimate is 4 G'Sigma G / N + 2 tr(Sigma^2) / (N (N - 1)).
  """

  def enough(n: int) -> bool:
    sem = math.sqrt(4 * truth.along / n + 2 * truth.cov_sq_norm / (n * (n - 1)))
    return truth.grad_sq_norm >= wanted(n) * sem

  low, high = FEWEST_EXAMPLES - 1, FEWEST_EXAMPLES
  while not enough(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if enough(middle) else (middle, high)
  return high


def make_cells(problems: Sequence[str], noise_scales: Sequence[float], num_draws: int) -> list[Cell]:
  """Lists the lines of the table: each problem at each noise scale, from hopeless to ample, and without a gradient."""
  cells = []
  for name in problems:
    for noise_scale in noise_scales:
      truth = truth_of(PROBLEMS[name](noise_scale))
      sizes = {HOPELESS: _smallest(truth, lambda n: HOPELESS_ERRORS)}
      sizes |= {regime: border(truth, distance) for regime, distance in ABOVE_BORDER.items()}
      cells += [Cell(name, noise_scale, regime, num_examples, num_draws) for regime, num_examples in sizes.items()]
    cells += [Cell(name, math.inf, ZERO, num_examples, num_draws) for num_examples in ZERO_EXAMPLES]
  return cells


def measure_cell(cell: Cell, seed: int) -> dict[str, Any]:
  """Draws a cell and counts: how often an interval was given, and how often it lay around, above or below the truth."""
  problem = PROBLEMS[cell.problem](cell.noise_scale)
  truth = truth_of(problem)
  rng = np.random.default_rng((DRAW_SEED, seed))
  counts = dict.fromkeys(("given", "covered", "too_high", "too_low", "signal_given", "signal_covered"), 0)
  widths = []
  for _ in range(cell.num_draws):
    statistics = draw_statistics(problem, cell.num_examples, rng)
    _, low, high, *_ = statistics.noise_scale
    if low is not None and high is not None:
      counts["given"] += 1
      counts["covered"] += low <= truth.noise_scale <= high
      counts["too_high"] += low > truth.noise_scale
      counts["too_low"] += high < truth.noise_scale
      widths.append(high / low if low > 0 else math.inf)
    _, low, high, *_ = statistics.signal_to_noise
    if low is not None and high is not None:
      counts["signal_given"] += 1
      counts["signal_covered"] += low <= truth.grad_sq_norm / truth.grad_cov_trace <= high
  return {
    "probe": "coverage",
    "step": 0,
    "effective_dimension": truth.grad_cov_trace**2 / truth.cov_sq_norm,
    **counts,
    "median_ci_ratio": float(np.median(widths)) if widths else None,
  }


def run_coverage(cells: Sequence[Cell], out: Path, *, environment: dict[str, Any]) -> Path:
  """Draws what is missing of the cells and writes the report; returns its path.

  Args:
    cells: the lines of the table.
    out: a folder claimed by `open_folder`; each cell is a record below `out/noise_coverage/`, results beside it.
    environment: versions, code revision and command line, kept in every record.

  Holds: a cell's draws depend on its description alone, so an interrupted run continues to the same table.
  """
  folder = out / "noise_coverage"
  folder.mkdir(exist_ok=True)
  records = []
  with tqdm(
    total=sum(map(_cost, cells)),
    mininterval=0.5 if sys.stderr.isatty() else 10.0,
    bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} gone, about {remaining} left",
  ) as bar:
    for cell in cells:
      bar.set_description_str(cell.problem)
      records.append(_recorded(cell, folder, environment))
      bar.update(_cost(cell))
  return report_coverage(records, out, environment=environment)


def report_coverage(records: Sequence[Record], out: Path, *, environment: dict[str, Any]) -> Path:
  """Judges the records and writes report.html, claims.json, results.csv, figures, and the whole table as coverage.md."""
  rows, finding = coverage_rows(records), judge_coverage({}, records)
  write_atomically(out / "coverage.md", f"{finding.reading}\n\n{markdown_table(rows)}")
  return write_experiment(out, coverage_page(finding, rows), findings=[finding], environment=environment, rows=rows)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
  """Writes the rows as a Markdown table: shares in percent, with the 95 % interval of the coverage."""
  header = "problem, noise scale, regime, N, interval given, holds the truth, too high / too low, ratio of ends, signal-to-noise holds"
  lines = [f"| {' | '.join(header.split(', '))} |", "|---" * len(header.split(", ")) + "|"]
  for row in rows:
    cells = [
      row["problem"],
      "none" if row["noise_scale"] is None else f"{row['noise_scale']:,.0f}",
      row["regime"],
      f"{row['num_examples']:,}",
      f"{100 * row['share_given']:.1f} %",
      "–"
      if row["coverage"] is None
      else f"{100 * row['coverage']:.1f} % [{100 * row['coverage_ci_low']:.1f}, {100 * row['coverage_ci_high']:.1f}]",
      f"{row['too_high']} / {row['too_low']}" if row["given"] else "–",
      f"{row['median_ci_ratio']:.2f}" if row["median_ci_ratio"] is not None else "–",
      f"{100 * row['signal_coverage']:.1f} %" if row["signal_coverage"] is not None else "–",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _cost(cell: Cell) -> float:
  """Estimates the time of a cell in arbitrary units: some numbers per draw, and the gradients that occur in it."""
  return cell.num_draws * (NUM_SUPPORT / 2 + min(cell.num_examples, NUM_SUPPORT))


def _recorded(cell: Cell, folder: Path, environment: dict[str, Any]) -> Record:
  """Returns the record of a cell, made first if it is not complete."""
  name = trial_id(cell.description)
  path = folder / name
  if not (path / "status.json").exists() or read_record(path).status["state"] != "complete":
    create_trial(path, {"id": name} | cell.description | environment)
    append_rows(path / "probes.jsonl", [measure_cell(cell, seed=int(name, 16))])
    set_status(path, "complete")
  return read_record(path)
