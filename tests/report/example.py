"""A study that never ran: fabricated findings with the shapes of a real one, one claim failing and one inconclusive.

The numbers follow the theory where a claim holds, so that the page can be read and judged by eye.
`python -m tests.report.example OUT` writes the whole report into the directory OUT.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bsjax.analysis import Advice, Claim, Finding
from bsjax.report import write_report

BATCH_SIZES = 2 ** np.arange(0, 11)
SEEDS = np.arange(3)
NUM_EXAMPLES = 1257
S_MIN, B_CRIT = 38.0, 46.0


def make_claim(claim_id: str, **changes: Any) -> Claim:
  """Return a claim that holds, with everything that the page shows."""
  fields: dict[str, Any] = {
    "id": claim_id,
    "statement": f"statement of {claim_id}",
    "source": "article, section 2",
    "expected": "-1",
    "measured": -1.0,
    "ci_low": -1.02,
    "ci_high": -0.98,
    "unit": "slope",
    "n": 99,
    "verdict": "holds",
    "figure": f"figures/{claim_id}.png",
  }
  return Claim(**{**fields, **changes})


def make_findings() -> list[Finding]:
  """Return one finding per claim: `generalizes` fails, `flat_minima` is inconclusive, the others hold."""
  rng = np.random.default_rng(0)
  return [
    _variance_inverse_b(rng),
    _direction_stable(rng),
    _oscillation(rng),
    _more_steps(rng),
    _generalizes(rng),
    _flat_minima(rng),
    _throughput(rng),
    _linear_scaling(rng),
  ]


def _checkpoint_points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return step, batch size and sigma^2 of every (checkpoint, seed, batch size)."""
  step, _, batch_size = (grid.ravel() for grid in np.meshgrid([0, 100, 400], SEEDS, BATCH_SIZES, indexing="ij"))
  return step, batch_size, np.select([step == 0, step == 100], [9.0, 4.0], 0.7)


def _variance_inverse_b(rng: np.random.Generator) -> Finding:
  step, batch_size, sigma_sq = _checkpoint_points()
  predicted = sigma_sq / batch_size * (NUM_EXAMPLES - batch_size) / (NUM_EXAMPLES - 1)
  sem = 0.05 * predicted
  series = {
    "step": step,
    "batch_size": batch_size,
    "variance": predicted + sem * rng.normal(size=len(step)),
    "variance_sem": sem,
    "predicted": predicted,
  }
  claim = make_claim(
    "variance_inverse_b",
    statement="The variance of the minibatch gradient is σ²/B.",
    expected="slope −1 in log-log",
    measured=-0.996,
    ci_low=-1.008,
    ci_high=-0.985,
    unit="slope of log variance against log B",
  )
  reading = (
    "The variance falls with slope −0.996 [−1.01, −0.985], as σ²/B says, at every one of the 3 checkpoints. "
    "Its level agrees with the prediction to within 2 %, once the finite data set is corrected for."
  )
  return Finding(claim, series, reading)


def _direction_stable(rng: np.random.Generator) -> Finding:
  step, batch_size, sigma_sq = _checkpoint_points()
  noise_scale = np.select([step == 0, step == 100], [6.0, 60.0], 900.0)
  predicted = 1 / np.sqrt(1 + noise_scale / batch_size)
  del sigma_sq
  series = {
    "step": step,
    "batch_size": batch_size,
    "cosine": np.minimum(predicted + 0.015 * rng.normal(size=len(step)), 1.0),
    "cosine_sem": np.full(len(step), 0.012),
    "predicted": predicted,
  }
  claim = make_claim(
    "direction_stable",
    statement="Large batches point along the true gradient.",
    expected="rises with B",
    measured=0.41,
    ci_low=0.385,
    ci_high=0.433,
    unit="gain in cosine from the smallest to the largest B",
  )
  reading = (
    "The cosine with the full gradient rises from 0.20 at B = 1 to 0.97 at B = 1,024, averaged over checkpoints. "
    "The noise scale alone predicts it to within 0.02."
  )
  return Finding(claim, series, reading)


def _oscillation(rng: np.random.Generator) -> Finding:
  series: dict[str, np.ndarray] = {
    "batch_size": BATCH_SIZES,
    "spread": 0.4 / np.sqrt(BATCH_SIZES) * np.exp(0.1 * rng.normal(size=len(BATCH_SIZES))),
    "spread_sem": 0.04 / np.sqrt(BATCH_SIZES),
  }
  curves: dict[str, list[np.ndarray]] = {"batch_size": [], "examples": [], "loss": [], "trend": []}
  for size in (4, 32, 256):
    examples = np.arange(size, 12_000, max(size, 24))
    trend = 2.3 * np.exp(-examples / (2500 + 12 * size)) + 0.08
    curves["batch_size"].append(np.full(len(examples), size))
    curves["examples"].append(examples)
    curves["trend"].append(trend)
    curves["loss"].append(trend * np.exp(rng.normal(size=len(examples)) / np.sqrt(size)))
  series.update({f"curve_{name}": np.concatenate(parts) for name, parts in curves.items()})
  claim = make_claim(
    "oscillation",
    statement="Small batches oscillate more.",
    expected="slope below 0",
    measured=-0.49,
    ci_low=-0.53,
    ci_high=-0.45,
    unit="slope of log spread against log B",
    n=33,
  )
  reading = (
    "The spread of the loss around its trend falls with slope −0.490 [−0.530, −0.450] in log-log. "
    "At B = 1 the loss of one step is off by 0.4 nats, at B = 1,024 by 0.01."
  )
  return Finding(claim, series, reading)


def _more_steps(rng: np.random.Generator) -> Finding:
  batch_size, seed = (grid.ravel() for grid in np.meshgrid(BATCH_SIZES, SEEDS, indexing="ij"))
  steps = np.round(S_MIN * (1 + B_CRIT / batch_size) * np.exp(0.1 * rng.normal(size=len(batch_size))))
  steps[(batch_size == 1024) & (seed > 0)] = np.nan
  fit_batch_size = np.geomspace(1, 1024, 60)
  fit = S_MIN * (1 + B_CRIT / fit_batch_size)
  series = {
    "batch_size": batch_size,
    "seed": seed,
    "steps": steps,
    "fit_batch_size": fit_batch_size,
    "fit_steps": fit,
    "perfect_steps": S_MIN * (1 + B_CRIT) / fit_batch_size,
    "fit_low": 0.92 * fit,
    "fit_high": 1.09 * fit,
    "s_min": np.asarray(S_MIN),
    "critical_batch_size": np.asarray(B_CRIT),
    "critical_low": np.asarray(39.0),
    "critical_high": np.asarray(55.2),
  }
  claim = make_claim(
    "more_steps",
    statement="Small batches need more updates.",
    expected="more than 1",
    measured=45.2,
    ci_low=41.0,
    ci_high=49.9,
    unit="steps at the smallest B / steps at the largest B",
    n=31,
  )
  reading = (
    "Going from B = 1 to B = 1,024 divides the steps to target by 45.2 [41.0, 49.9], where perfect scaling would divide them by 1,024. "
    "The fit puts the critical batch size at 46 [39.0, 55.2] examples."
  )
  return Finding(claim, series, reading)


def _two_budgets() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  budget, batch_size, seed = np.meshgrid(["epochs", "steps"], BATCH_SIZES, SEEDS, indexing="ij")
  return budget.ravel(), batch_size.ravel(), seed.ravel()


def _generalizes(rng: np.random.Generator) -> Finding:
  budget, batch_size, seed = _two_budgets()
  drop = np.where(budget == "epochs", 0.00003 * batch_size, -0.004 * np.log2(batch_size))
  series = {
    "budget": budget,
    "batch_size": batch_size,
    "seed": seed,
    "test_accuracy": np.minimum(0.945 - drop + 0.004 * rng.normal(size=len(drop)), 1.0),
  }
  claim = make_claim(
    "generalizes",
    statement="Small batches generalise better.",
    expected="above 0 at both budgets",
    measured=-0.012,
    ci_low=-0.019,
    ci_high=-0.004,
    unit="accuracy, small minus large B, equal steps",
    n=66,
    verdict="fails",
  )
  reading = (
    "At equal steps the smallest batches score 0.0120 lower [−0.0190, −0.00400] than the largest, so the claim fails on this data. "
    "At equal epochs the largest batch loses 0.03, because it makes fewer updates."
  )
  return Finding(claim, series, reading)


def _flat_minima(rng: np.random.Generator) -> Finding:
  budget, batch_size, seed = _two_budgets()
  sharpness = (
    14 * batch_size**0.08 * np.exp(0.35 * rng.normal(size=len(budget))) * np.where(budget == "epochs", 1.0, 1.7)
  )
  series = {
    "budget": budget,
    "batch_size": batch_size,
    "seed": seed,
    "sharpness": sharpness,
    "residual": 2e-4 * sharpness,
  }
  claim = make_claim(
    "flat_minima",
    statement="Small batches end in flatter minima.",
    expected="slope above 0",
    measured=0.06,
    ci_low=-0.02,
    ci_high=0.15,
    unit="slope of log sharpness against log B",
    n=66,
    verdict="inconclusive",
  )
  reading = (
    "Sharpness grows with slope 0.0600 [−0.0200, 0.150] in log-log, and the interval holds 0: these 3 seeds cannot decide. "
    "The Lanczos residual is at most 0.0002 of the eigenvalue, so it is the seeds that differ."
  )
  return Finding(claim, series, reading)


def _throughput(rng: np.random.Generator) -> Finding:
  batch_size, repeat = (grid.ravel() for grid in np.meshgrid(BATCH_SIZES, np.arange(5), indexing="ij"))
  seconds = (6e-5 + 1.1e-6 * batch_size) * np.exp(0.05 * np.abs(rng.normal(size=len(batch_size))))
  series = {
    "batch_size": batch_size,
    "repeat": repeat,
    "examples_per_second": batch_size / seconds,
    "seconds_per_step": seconds,
    "knee": np.asarray(64.0),
  }
  claim = make_claim(
    "throughput",
    statement="Examples per second grow almost linearly until the hardware saturates.",
    expected="slope near 1 below the knee",
    measured=0.91,
    ci_low=0.88,
    ci_high=0.94,
    unit="slope of log throughput below the knee",
    n=55,
  )
  reading = (
    "Below the knee at B = 64, examples per second grow with slope 0.910 [0.880, 0.940]. "
    "Beyond it a larger batch costs proportionally more time per step, up to 860,000 examples per second."
  )
  return Finding(claim, series, reading)


def _linear_scaling(rng: np.random.Generator) -> Finding:
  grid = 2.0 ** np.arange(-9, 4)
  grid_batch_size, grid_rate = (array.ravel() for array in np.meshgrid(BATCH_SIZES, grid, indexing="ij"))
  best = np.minimum(0.004 * BATCH_SIZES, 0.5)
  distance = np.log2(grid_rate / np.repeat(best, len(grid)))
  score = np.round(
    S_MIN
    * (1 + B_CRIT / grid_batch_size)
    * np.exp2(0.5 * np.abs(distance))
    * np.exp(0.03 * rng.normal(size=len(distance)))
  )
  score[distance > 2.5] = np.nan
  tuned = np.exp2(np.clip(np.round(np.log2(best)), -9, 3))
  series = {
    "batch_size": BATCH_SIZES,
    "learning_rate": tuned,
    "edge": BATCH_SIZES == 1024,
    "grid_batch_size": grid_batch_size,
    "grid_learning_rate": grid_rate,
    "grid_score": score,
    "rule_batch_size": BATCH_SIZES,
    "linear": tuned[5] * BATCH_SIZES / 32,
    "sqrt": tuned[5] * np.sqrt(BATCH_SIZES / 32),
    "slope": np.asarray(0.97),
  }
  claim = make_claim(
    "linear_scaling",
    statement="The best learning rate grows in proportion to B.",
    expected="slope 1 in log-log",
    measured=0.97,
    ci_low=0.88,
    ci_high=1.06,
    unit="slope of log rate against log B, up to B = 128",
    n=8,
  )
  reading = (
    "Up to B = 128 the best rate grows with slope 0.970 [0.880, 1.06], as the linear rule says. "
    "Beyond that it stays near 0.5, and at B = 1,024 it lies on the edge of its grid."
  )
  return Finding(claim, series, reading)


def make_advice(**changes: Any) -> Advice:
  """Return the advice that fits the findings: B = 32, below the critical batch size of 46."""
  table = [
    {
      "batch_size": int(size),
      "learning_rate": float(min(0.004 * size, 0.5)),
      "steps": S_MIN * (1 + B_CRIT / size) if size < 1024 else None,
      "examples": S_MIN * (size + B_CRIT) if size < 1024 else None,
      "seconds": S_MIN * (1 + B_CRIT / size) * (6e-5 + 1.1e-6 * size) if size < 1024 else None,
      "test_accuracy": 0.945 - 0.00003 * size,
      "edge": "high" if size == 1024 else None,
    }
    for size in BATCH_SIZES
  ]
  fields: dict[str, Any] = {
    "noise_scale_start": (6.02, 5.1, 7.2),
    "noise_scale_end": (903.0, 640.0, 1380.0),
    "critical_batch_size": (B_CRIT, 39.0, 55.2),
    "batch_size": 32,
    "learning_rate": 0.128,
    "reason": "It is the largest power of two below the critical batch size: it costs 1.7 times the fewest examples and 2.4 times the "
    "fewest steps, and every larger batch buys its steps with more than as many extra examples.",
    "table": table,
  }
  return Advice(**{**fields, **changes})


def make_study(**changes: Any) -> dict[str, Any]:
  """Return the study's summary as the experiment hands it to the report."""
  study: dict[str, Any] = {
    "workload": "digits_mlp",
    "dataset": "digits",
    "train_size": NUM_EXAMPLES,
    "validation_size": 180,
    "test_size": 360,
    "num_params": 4810,
    "batch_norm": "none",
    "target": {"metric": "validation_accuracy", "goal": 0.95, "direction": "max"},
    "batch_sizes": [int(size) for size in BATCH_SIZES],
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "budgets": {
      "epochs": {
        "num_epochs": 20.0,
        "num_steps": {str(size): -(-20 * NUM_EXAMPLES // int(size)) for size in BATCH_SIZES},
      },
      "steps": {"num_steps": {str(size): 800 for size in BATCH_SIZES}},
    },
    "tuning_seeds": [0],
    "final_seeds": [0, 1, 2],
    "reference_batch_size": 32,
    "counts": {"complete": 204, "diverged": 9},
  }
  return {**study, **changes}


def make_environment() -> dict[str, Any]:
  """Return the names and values of the page's last table."""
  return {
    "bsjax": "0.1.0",
    "python": "3.11.9",
    "jax": "0.10.2",
    "device": "cpu",
    "device_count": 1,
    "finished": "2026-01-31 12:00 UTC",
    "command_line": "python -m experiments.batch_size_study --workload=digits_mlp --out=runs/demo",
  }


def make_rows() -> list[dict[str, Any]]:
  """Return two trials of the tidy table, one of which has no steps to target."""
  return [
    {
      "trial": "a1",
      "batch_size": 1,
      "learning_rate": 0.004,
      "seed": 0,
      "steps_to_target": 1786,
      "test_accuracy": 0.945,
    },
    {
      "trial": "b2",
      "batch_size": 1024,
      "learning_rate": 0.5,
      "seed": 1,
      "steps_to_target": None,
      "test_accuracy": float("nan"),
    },
  ]


if __name__ == "__main__":
  print(
    write_report(
      sys.argv[1],
      study=make_study(),
      findings=make_findings(),
      advice=make_advice(),
      environment=make_environment(),
      rows=make_rows(),
    )
  )
