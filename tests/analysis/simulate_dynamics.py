"""Records of escapes and of the edge of stability with a known answer; and a small network that is really trained."""

import functools
import math
import zlib

import numpy as np

from bsjax.analysis.claims_escape import BRANCHES
from bsjax.records import Record

TRAIN_SIZE = 4096
STUDY = {"workload": "simulated", "train_size": TRAIN_SIZE}
SIZES = {"small": 32, "large": 1024}
RATES = {"small": 0.05, "large": 0.3}
SEEDS = (1000, 1001, 1002, 1003)
ESCAPE_EXAMPLES = 32 * 4096
START = {"small": 20.0, "large": 120.0}
"""Largest Hessian eigenvalue of the two minimisers."""
FACTORS = {"large_small": 0.3, "small_large": 2.5, "large_large": 1.1, "small_small": 0.95}
"""What each branch comes to, over where it starts."""


def record(kind, size, rate, seed, num_steps, probes, *, state="complete", **provenance) -> Record:
  """Returns a trial; its id sorts by provenance, batch size, rate and seed."""
  name = "-".join(map(str, (kind, *provenance.values(), f"{size:05d}", f"{rate:.5f}", f"{seed:04d}")))
  trial = {"id": name, "kind": kind, "config": {"batch_size": size, "num_steps": num_steps}, "seed": seed}
  trial |= {"hparams": {"learning_rate": rate}, **provenance}
  return Record(name, trial, {"state": state}, [], probes)


def measure(step, name, value, *, error=None, error_kind=None) -> dict:
  """Returns a row of probe "measure"; an eigenvalue has a residual of 0.1 % of it unless told otherwise."""
  if name == "top_eigenvalue":
    error, error_kind = (1e-3 * abs(value) if error is None else error), "residual"
  row = {"probe": "measure", "step": step, "measure": name, "value": value, "error": error, "error_kind": error_kind}
  return row | {"loss": 0.1, "grad_norm": 1e-3, "num_examples": TRAIN_SIZE, "batch_norm": "none"}


def random(*parts) -> np.random.Generator:
  return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def escape_trials(
  *, factors=FACTORS, seeds=SEEDS, spread=0.1, parts=(0, 1 / 64, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
) -> list[Record]:
  """Returns the four branches of every seed, whose sharpness approaches `factors` times its start within a tenth of the stretch.

  Keskar's sharpness and the trace go as the eigenvalue's powers 2 and 1/2; a branch gains 0.01 of test accuracy where it flattens.

  Args:
    spread: standard deviation of log sharpness over branches and seeds, the same along a branch.
    parts: checkpoints, as parts of the stretch.
  """
  trials = []
  for branch in BRANCHES:
    origin, target = branch.split("_")
    size = SIZES[target]
    for seed in seeds:
      wobble, rows = spread * random(branch, seed).normal(), []
      for step in sorted({round(part * ESCAPE_EXAMPLES / size) for part in parts}):
        part = step * size / ESCAPE_EXAMPLES
        settled = 1 - math.exp(-10 * part)
        top = START[origin] * math.exp(settled * (math.log(factors[branch]) + wobble))
        accuracy = 0.9 + 0.01 * settled * (factors[branch] < 0.5)
        rows.append({"probe": "test", "step": step, "train_loss": 0.1, "train_accuracy": 1.0, "test_loss": 0.3})
        rows[-1]["test_accuracy"] = accuracy
        rows.append({"probe": "distance", "step": step, "from_start": 9.0 + part})
        rows[-1]["from_parent"] = settled * (3.0 if branch in ("large_small", "small_small") else 0.5)
        rows.append(measure(step, "top_eigenvalue", top))
        rows.append(measure(step, "trace", 30 * math.sqrt(top), error=0.1, error_kind="sem"))
        rows.append(measure(step, "keskar_1e-3", 0.01 * top**2))
      trials.append(record("escape", size, RATES[target], seed, rows[-5]["step"], rows, branch=branch, phase="during"))
  for origin in ("small", "large"):
    rows = [measure(4096, "top_eigenvalue", START[origin])]
    trials.append(record("escape", SIZES[origin], RATES[origin], SEEDS[0], 4096, rows, branch=origin, phase="before"))
  return trials


EDGE_STEPS = 2048
EDGE_SIZES = (TRAIN_SIZE // 64, TRAIN_SIZE // 8, TRAIN_SIZE)
EDGE_RATES = (0.02, 0.04, 0.08)
EDGE_CHECKPOINTS = tuple(sorted({0, *np.round(np.geomspace(1, EDGE_STEPS, 24)).astype(int).tolist()}))


def edge_trials(
  *,
  ceiling=lambda size, rate: 1.05 * (size / TRAIN_SIZE) ** 0.2,
  sizes=EDGE_SIZES,
  rates=EDGE_RATES,
  seeds=SEEDS[:3],
  spread=0.02,
  start=10.0,
  pace=1.0,
  ends=False,
  batch_sharpness=True,
) -> list[Record]:
  """Returns plain descent whose largest eigenvalue grows from `start`, by the same flow at every rate, until r meets its ceiling.

  Args:
    ceiling: r at which the growth stops.
    spread: standard deviation of log ceiling over trials; beyond 3/4 of the ceiling checkpoints scatter by as much.
    pace: the eigenvalue is start * (1 + pace * rate * step): the flow's time is rate * step.
    ends: whether r falls to a tenth of the ceiling after half the steps, as the loss nears zero.
  """
  trials = []
  for size in sizes:
    for rate in rates:
      for seed in seeds:
        rng, rows = random(size, rate, seed), []
        top_ratio = ceiling(size, rate) * math.exp(spread * rng.normal())
        for step in EDGE_CHECKPOINTS:
          free = start * (1 + pace * rate * step) * rate / 2
          ratio = min(free, top_ratio * math.exp(spread * rng.normal())) if free > 0.75 * top_ratio else free
          ratio *= 0.1 if ends and step > EDGE_STEPS / 2 else 1.0
          rows.append({"probe": "test", "step": step, "train_loss": 1 / (1 + rate * step), "test_accuracy": 0.9})
          rows.append(measure(step, "top_eigenvalue", 2 * ratio / rate))
          rows.append(measure(step, "gradient_curvature", 1.6 * ratio / rate))
          if batch_sharpness:
            at_edge = min(free * 1.3, 1.0) * math.exp(spread * rng.normal())
            rows.append(measure(step, "batch_sharpness", 2 * at_edge / rate, error=0.01, error_kind="sem"))
        trials.append(record("edge", size, rate, seed, EDGE_STEPS, rows))
  return trials


FIT_SIZE, FIT_WIDTH = 20, 12
FIT_STUDY = {"workload": "chebyshev", "train_size": FIT_SIZE}
FIT_INPUTS = np.linspace(-1, 1, FIT_SIZE)
FIT_TARGETS = np.cos(5 * np.arccos(FIT_INPUTS))
"""The fifth Chebyshev polynomial at 20 points, after the toy problem of Cohen et al. (2021), appendix."""


def fit_gradients(params, index):
  """Returns the gradients of the mean of (f - y)^2 / 2 over the examples `index` (i64[R, B]) for R networks, f64[R, P].

  f(x) = sum_k c_k tanh(a_k x + b_k) + d, with the parameters (a, b, c, d) in one row.
  """
  a, b, c = (params[:, None, k * FIT_WIDTH : (k + 1) * FIT_WIDTH] for k in range(3))
  x = FIT_INPUTS[index][..., None]
  hidden = np.tanh(a * x + b)
  error = ((hidden * c).sum(-1) + params[:, -1:] - FIT_TARGETS[index]) / index.shape[1]
  inner = error[..., None] * c * (1 - hidden**2)
  parts = (inner * x).sum(1), inner.sum(1), (error[..., None] * hidden).sum(1), error.sum(1, keepdims=True)
  return np.concatenate(parts, axis=1)


def fit_top_eigenvalue(params):
  """Returns the largest eigenvalue of the whole Hessian, by central differences of the gradient."""
  shifts = 1e-5 * np.eye(len(params))
  index = np.broadcast_to(np.arange(FIT_SIZE), (len(params), FIT_SIZE))
  hessian = (fit_gradients(params + shifts, index) - fit_gradients(params - shifts, index)) / 2e-5
  return float(np.linalg.eigvalsh(hessian)[-1])


def fit_start(seeds=SEEDS[:3]):
  scale = np.concatenate([np.full(FIT_WIDTH, 2.0), np.ones(FIT_WIDTH), np.full(FIT_WIDTH, FIT_WIDTH**-0.5), [0.0]])
  return np.stack([np.random.default_rng(seed).normal(size=3 * FIT_WIDTH + 1) * scale for seed in seeds])


def fit(params, size, rate, num_steps, checkpoints, *seed):
  """Trains R networks at once by plain gradient descent; batches are drawn without replacement, each anew.

  Returns: the parameters at the end, and the rows of each network at the checkpoints.
  """
  rng, rows = random("fit", size, rate, *seed), [[] for _ in params]
  for step in range(num_steps + 1):
    if step in checkpoints:
      for own, each in zip(rows, params, strict=True):
        own.append(measure(step, "top_eigenvalue", fit_top_eigenvalue(each)))
    if step < num_steps:
      index = rng.random((len(params), FIT_SIZE)).argsort(axis=1)[:, :size]
      params = params - rate * fit_gradients(params, index)
  return params, rows


def geometric(num_steps, count=32):
  return {0, *np.round(np.geomspace(1, num_steps, count)).astype(int).tolist()}


@functools.cache
def fitted_edge_trials(*, sizes=(2, 6, 20), rates=(0.1, 0.2, 0.3), num_steps=8000) -> list[Record]:
  """Trains the network at every batch size and rate."""
  trials = []
  for size in sizes:
    for rate in rates:
      _, rows = fit(fit_start(), size, rate, num_steps, geometric(num_steps))
      for seed, own in zip(SEEDS, rows, strict=False):
        trials.append(record("edge", size, rate, seed, num_steps, own))
  return trials


@functools.cache
def fitted_escape_trials(*, sizes=(("small", 4), ("large", 20)), rate=0.2, examples=40_000) -> list[Record]:
  """Trains the network with small and with large batches at one rate, and then on with both, for equally many examples."""
  sizes, trials = dict(sizes), []
  for origin, first in sizes.items():
    start, _ = fit(fit_start(), first, rate, 8000, set())
    for target, size in sizes.items():
      num_steps = examples // size
      _, rows = fit(start, size, rate, num_steps, geometric(num_steps, 12), origin)
      for seed, own in zip(SEEDS, rows, strict=False):
        branch = f"{origin}_{target}"
        trials.append(record("escape", size, rate, seed, num_steps, own, branch=branch, phase="during"))
  return trials
