"""Sweeps with a known answer: as steps of trials, and as records."""

import itertools
import math

import numpy as np
from scipy import stats

from bsjax.analysis import fits
from bsjax.analysis.sweep_curves import fit_sweep
from bsjax.records import Record

S_MIN, CRITICAL = 500.0, 64.0
SIZES = tuple(2**k for k in range(11))
CURVATURE = 4.0
"""Log steps at the corner of the search, in one hyperparameter: the search spans [-1, 1] about the best point."""
REACH = 8.0
"""Trials that need more than this factor times the fewest steps possible never reach the goal."""

TARGET = {"metric": "validation_accuracy", "goal": 0.97, "direction": "max"}
FINAL_SEEDS = (1000, 1001, 1002, 1003)
TRAIN_SHARE, TRAIN_GOAL = 0.8, 0.6
"""The training loss falls in a straight line and passes this goal at this share of the steps to the target."""


def hyperbola(size):
  return S_MIN * (1 + CRITICAL / size)


def simulate_steps(rng, *, num_trials=64, num_tuned=2, noise=0.0, sizes=SIZES, narrowing=0.0) -> dict[int, np.ndarray]:
  """Draws trials of a bowl in log steps with `num_tuned` hyperparameters, times lognormal luck; NaN = never reached the goal.

  The curvature grows with the batch size as 1 + narrowing * log2(B / 64) / 4.
  """
  steps = {}
  for size in sizes:
    points = rng.uniform(-1, 1, size=(num_trials, num_tuned))
    curvature = CURVATURE * (1 + narrowing * math.log2(size / 64) / 4)
    excess = curvature * (points**2).sum(axis=1) + noise * rng.normal(size=num_trials)
    steps[size] = hyperbola(size) * np.where(excess < math.log(REACH), np.exp(excess), np.nan)
  return steps


def expected_log_excess(*, num_trials, num_tuned, noise) -> float:
  """Returns the mean of log(fewest steps of a sweep / hyperbola), from 20 000 sweeps: known to 1 % of its spread."""
  rng = np.random.default_rng(99)
  fewest = [
    (
      CURVATURE * (rng.uniform(-1, 1, (n, num_trials, num_tuned)) ** 2).sum(2)
      + noise * rng.normal(size=(n, num_trials))
    ).min(1)
    for n in [1000] * 20
  ]
  return float(np.mean(fewest))


def chord_end(overhead=0.2, sizes=SIZES) -> float:
  """Returns where the exact curve's examples exceed the smallest batch size's by 20 %, interpolated in log-log between the sizes."""
  logs = np.log([hyperbola(b) * b / hyperbola(sizes[0]) / sizes[0] for b in sizes])
  return float(np.exp(np.interp(np.log1p(overhead), logs, np.log(sizes))))


def covered(interval, truth) -> bool:
  return interval.low <= truth <= interval.high


def coverage(num_sweeps, *, seed=1, **world) -> dict[str, float]:
  """Measures how often each interval of `fit_sweep` holds the truth, the fit's S_min and E_min being those of sweeps of this size."""
  rng = np.random.default_rng(seed)
  bias = expected_log_excess(**{k: v for k, v in world.items() if k != "narrowing"})
  s_min = S_MIN * math.exp(bias)
  curves = [fit_sweep(simulate_steps(rng, **world)) for _ in range(num_sweeps)]
  fitted = [curve for curve in curves if not curve.fit.reason]
  return {
    "fitted": len(fitted),
    "critical": np.mean([covered(c.fit.critical, CRITICAL) for c in fitted]),
    "s_min": np.mean([covered(c.fit.s_min, s_min) for c in fitted]),
    "e_min": np.mean([covered(c.e_min, s_min * CRITICAL) for c in fitted]),
    "perfect_until": np.mean([covered(c.perfect_until, chord_end()) for c in curves]),
    "max_useful": np.mean([covered(c.max_useful, 256) for c in curves]),  # 1.25 S_min there, 1.0625 S_min at 1024
    "width": np.median([c.fit.critical.high / c.fit.critical.low for c in fitted]),
  }


def print_coverage_table(num_sweeps=300) -> None:
  """Prints the coverage in worlds of different kinds: the table in the docstring of `fit_sweep`. Takes minutes."""
  worlds = itertools.chain(
    itertools.product((64,), (1, 2, 3), (0.0, 0.1, 0.3), (0.0,)),
    itertools.product((16,), (1, 2), (0.0, 0.1, 0.3), (0.0,)),
    itertools.product((64,), (2,), (0.1,), (0.25, 0.5)),
  )
  for num_trials, num_tuned, noise, narrowing in worlds:
    world = {"num_trials": num_trials, "num_tuned": num_tuned, "noise": noise, "narrowing": narrowing}
    print(world, {name: round(float(x), 3) for name, x in coverage(num_sweeps, **world).items()}, flush=True)


def binomial_bounds(count, probability=fits.CONFIDENCE):
  """Returns bounds that a count of successes leaves once in 1000."""
  return stats.binom.ppf([0.0005, 0.9995], count, probability)


def make_study(sizes=(1, 4, 16, 64), *, num_steps, every, num_trials, optimizer="momentum", edges=None) -> dict:
  """Returns the study of a sweep; `num_steps` and `every` are functions of the batch size."""
  return {
    "target": TARGET,
    "train_size": 1024,
    "batch_sizes": list(sizes),
    "optimizer": optimizer,
    "sweep": {
      str(size): {
        "num_steps": num_steps(size),
        "eval_every": every(size),
        "num_trials": num_trials,
        "edges": (edges or {}).get(size, {}),
        "space": {"learning_rate": {"scale": "log", "low": 1e-3, "high": 1.0}},
      }
      for size in sizes
    },
    "final_seeds": list(FINAL_SEEDS),
  }


def trial_record(
  study,
  size,
  seed,
  needs,
  *,
  kind="sweep",
  num_steps=None,
  state="complete",
  stops=True,
  rate=0.1,
  momentum=0.9,
  every=None,
) -> Record:
  """Returns a trial that passes the target at its first look from step `needs` on (never if infinite).

  Validation accuracy rises as 1 - (1 - goal) sqrt(needs / step). The training loss falls as 1 - 0.5 step / needs.

  Args:
    num_steps: where the trial is cut; default all steps of the budget.
    state: "diverged" leaves rows up to half of the steps; "running" the same, if the goal does not end it before.
    stops: at the target.
  """
  entry = study["sweep"][str(size)]
  every = every or entry["eval_every"]
  num_steps = num_steps or entry["num_steps"]
  goal = TARGET["goal"]
  end = num_steps if state == "complete" else num_steps // 2
  metrics = []
  for step in range(every, end + 1, every):
    share = step / needs
    metrics.append(
      {
        "step": step,
        "examples_seen": step * size,
        "train_loss": 1 - (1 - TRAIN_GOAL) / TRAIN_SHARE * (step - every / 2) / needs,
        "validation_accuracy": 1 - (1 - goal) / math.sqrt(share) if share > 0 else 0.5,
      }
    )
    if stops and share >= 1:
      break
  trial = {
    "kind": kind,
    "config": {"batch_size": size, "num_steps": num_steps, "eval_every": every, "stop_at_target": stops},
    "hparams": {"learning_rate": rate, "momentum": momentum},
    "seed": seed,
  }
  diverged_at = end + 1 if state == "diverged" else None
  status = {"state": state, "first_nonfinite_step": diverged_at, "wall_seconds": 1.0}
  return Record(f"{kind}-{size:05d}-{seed:04d}-{num_steps:06d}-{every}", trial, status, metrics, [])


def sweep_of(study, needs, *, diverged=(), give_up=None, **settings) -> list[Record]:
  """Returns the trials of a sweep: `needs[B]` is f64[n]; `diverged` holds pairs (B, point).

  With `give_up`, each trial is cut at this factor times the fewest steps found by the trials before it, as a sweep cuts its own.
  """
  records = []
  for size, values in needs.items():
    entry = study["sweep"][str(size)]
    fewest = math.inf
    for point, value in enumerate(values):
      most = (
        entry["num_steps"]
        if give_up is None or fewest == math.inf
        else min(entry["num_steps"], math.ceil(give_up * fewest))
      )
      state = "diverged" if (size, point) in diverged else "complete"
      record = trial_record(study, size, point, float(value), num_steps=most, state=state, **settings)
      last = record.metrics[-1] if record.metrics else None
      if state == "complete" and last and last["validation_accuracy"] >= TARGET["goal"]:
        fewest = min(fewest, last["step"])
      records.append(record)
  return records
