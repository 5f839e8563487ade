"""Records with a known answer: small worlds in which each claim is true or false by construction."""

import copy
import functools
import math

import numpy as np

from bsjax.records import Record

TRAIN_SIZE = 512
BATCH_SIZES = tuple(2**k for k in range(10))
EPOCHS = 16
STEPS = 1000
"""Not a power of two, so that no trial belongs to both budgets."""
FINAL_SEEDS = (100, 101, 102, 103, 104)
TUNING_SEEDS = (0, 1, 2)
TARGET = {"metric": "validation_accuracy", "goal": 0.95, "direction": "max"}
RATE = 0.1


def make_study(*, batch_sizes=BATCH_SIZES, rates=None, edges=None) -> dict:
  """Returns a study whose tuned rate is `rates[B]` (else `RATE`) for every choice, on the edge `edges[B]` (else none)."""
  tuned = {
    str(size): {"learning_rate": (rates or {}).get(size, RATE), "edge": (edges or {}).get(size)} for size in batch_sizes
  }
  return {
    "workload": "simulated",
    "train_size": TRAIN_SIZE,
    "target": TARGET,
    "batch_sizes": list(batch_sizes),
    "budgets": {
      "epochs": {"num_epochs": EPOCHS, "num_steps": {str(size): EPOCHS * TRAIN_SIZE // size for size in batch_sizes}},
      "steps": {"num_steps": {str(size): STEPS for size in batch_sizes}},
    },
    "tuning_seeds": list(TUNING_SEEDS),
    "final_seeds": list(FINAL_SEEDS),
    "tuned": {"epochs": tuned, "steps": tuned, "target": tuned},
  }


def longest(study: dict, size: int) -> int:
  return max(budget["num_steps"][str(size)] for budget in study["budgets"].values())


def train_record(
  size,
  num_steps,
  seed,
  *,
  rate=RATE,
  reaches=None,
  validation_loss=1.0,
  test_accuracy=None,
  sharpness=None,
  residual=0.0,
  state="complete",
) -> Record:
  """Returns a trial that passes the target first at step `reaches` (never if None) and ends with the given measurements."""
  evaluated = sorted({1, num_steps} | ({reaches - 1, reaches} if reaches else set()))
  metrics = [
    {
      "step": step,
      "examples_seen": step * size,
      "validation_loss": validation_loss,
      "validation_accuracy": 0.96 if reaches and step >= reaches else 0.9,
    }
    for step in evaluated
    if step > 0
  ]
  probes = []
  if test_accuracy is not None:
    probes.append({"probe": "test", "step": num_steps, "test_accuracy": test_accuracy})
  if sharpness is not None:
    probes.append({"probe": "sharpness", "step": num_steps, "sharpness": sharpness, "residual": residual})
  return record("train", size, num_steps, seed, rate=rate, state=state, metrics=metrics, probes=probes)


def record(kind, size, num_steps, seed, *, rate=RATE, state="complete", metrics=(), probes=()) -> Record:
  name = f"{kind}-{size:05d}-{num_steps:05d}-{rate:.6f}-{seed:03d}"
  trial = {
    "id": name,
    "kind": kind,
    "config": {
      "workload": "simulated",
      "batch_size": size,
      "num_steps": num_steps,
      "optimizer": "sgd",
      "schedule": "constant",
    },
    "hparams": {"learning_rate": rate},
    "seed": seed,
  }
  diverged = state == "diverged"
  status = {"state": state, "first_nonfinite_step": 1 if diverged else None, "wall_seconds": 1.0 + seed}
  return Record(name, trial, status, list(metrics), list(probes))


def final_trials(study, measure, *, budgets=("epochs", "steps")) -> list[Record]:
  """Returns the final trials of each budget; `measure(budget, B, seed)` gives the keywords of `train_record`."""
  return [
    train_record(size, study["budgets"][budget]["num_steps"][str(size)], seed, **measure(budget, size, seed))
    for budget in budgets
    for size in study["batch_sizes"]
    for seed in study["final_seeds"]
  ]


def target_trials(study, steps_of) -> list[Record]:
  """Returns the final trials for the target; `steps_of(B, seed)` is when they reach it, None for never."""
  return [
    train_record(size, longest(study, size), seed, reaches=steps_of(size, seed))
    for size in study["batch_sizes"]
    for seed in study["final_seeds"]
  ]


def noise_trials(**settings) -> list[Record]:
  """Returns a fresh copy of `sample_noise` for a test to change."""
  return copy.deepcopy(sample_noise(**settings))


@functools.cache
def sample_noise(
  *,
  draw="distinct",
  direction="true",
  num_samples=200,
  seeds=TUNING_SEEDS,
  checkpoints=(0, 64, 1024),
  dimension=20,
) -> list[Record]:
  """Samples minibatches of real vectors, and their exact moments; nothing here knows the predictions under test.

  Args:
    draw: "distinct" examples without replacement; "pairs", each example twice; "roots", only about sqrt(B) distinct ones.
    direction: "true" gradients, or "random" ones for the cosine.
  """
  records = []
  for seed in seeds:
    rng = np.random.default_rng(seed)
    probes = []
    for step in checkpoints:
      scale = 1.0 / (1 + step / 64)
      grads = scale * (0.4 + rng.normal(size=(TRAIN_SIZE, dimension)) * rng.uniform(0.5, 2.0, size=dimension))
      full = grads.mean(axis=0)
      trace = np.sum((grads - full) ** 2) / (TRAIN_SIZE - 1)
      probes.append(
        {
          "probe": "noise",
          "step": step,
          "grad_sq_norm": full @ full - trace / TRAIN_SIZE,
          "grad_cov_trace": trace,
          "noise_scale": trace / (full @ full - trace / TRAIN_SIZE),
          "noise_scale_ci_low": 0.9 * trace / (full @ full),
          "noise_scale_ci_high": 1.2 * trace / (full @ full),
          "num_examples": TRAIN_SIZE,
        }
      )
      for size in BATCH_SIZES:
        distinct = {"distinct": size, "pairs": max(1, size // 2), "roots": math.isqrt(size)}[draw]
        batches = np.stack([grads[rng.permutation(TRAIN_SIZE)[:distinct]].mean(axis=0) for _ in range(num_samples)])
        squares = np.sum((batches - full) ** 2, axis=1)
        pointing = batches if direction == "true" else rng.normal(size=batches.shape)
        cosines = pointing @ full / np.linalg.norm(pointing, axis=1) / np.linalg.norm(full)
        probes.append(
          {
            "probe": "minibatch",
            "step": step,
            "batch_size": size,
            "num_samples": num_samples,
            "variance": squares.mean(),
            "variance_sem": squares.std(ddof=1) / math.sqrt(num_samples),
            "cosine": cosines.mean(),
            "cosine_sem": cosines.std(ddof=1) / math.sqrt(num_samples),
          }
        )
    records.append(record("noise", 32, 1024, seed, probes=[jsonable(row) for row in probes]))
  return records


def loss_trials(study, relative_spread, *, num_rows=64, seeds=FINAL_SEEDS) -> list[Record]:
  """Returns trials whose minibatch losses have the standard deviation `relative_spread(B)` times a falling trend."""
  records = []
  for size in study["batch_sizes"]:
    num_steps = study["budgets"]["epochs"]["num_steps"][str(size)]
    every = max(1, num_steps // num_rows)
    for seed in seeds:
      rng = np.random.default_rng((size, seed))
      steps = np.arange(1, num_steps + 1)
      trend = 0.2 + 2.0 * np.exp(-10 * steps / num_steps)
      losses = trend * (1 + relative_spread(size) * rng.normal(size=num_steps))
      metrics = [
        {
          "step": int(end),
          "examples_seen": int(end) * size,
          "train_loss": losses[end - every : end].mean(),
          "minibatch_loss": losses[end - 1],
        }
        for end in range(every, num_steps + 1, every)
      ]
      records.append(record("train", size, num_steps, seed, metrics=[jsonable(row) for row in metrics]))
  return records


def timing_trials(throughput, *, batch_sizes=BATCH_SIZES, repeats=5, noise=0.02) -> list[Record]:
  """Returns step times of a machine that handles `throughput(B)` examples per second."""
  rng = np.random.default_rng(0)
  records = []
  for size in batch_sizes:
    speeds = throughput(size) * np.exp(noise * rng.normal(size=repeats))
    metrics = [
      {"repeat": i, "seconds_per_step": float(size / speed), "examples_per_second": float(speed)}
      for i, speed in enumerate(speeds)
    ]
    records.append(record("timing", size, 1, 0, metrics=metrics))
  return records


def rate_grid(study, best, *, factor=2.0, half=3, fewest=100) -> tuple[dict, list[Record]]:
  """Tunes a grid whose steps to target are lowest at `best(B)`: a parabola in log rate.

  Returns: the study with the best grid point of each batch size as its tuned rate, and the tuning trials.
  """
  records, rates = [], {}
  for size in study["batch_sizes"]:
    centre = round(math.log(best(size), factor))
    grid = [factor ** (centre + k) for k in range(-half, half + 1)]
    fewest_here = {}
    for rate in grid:
      for seed in study["tuning_seeds"]:
        steps = round(fewest * math.exp(0.3 * math.log(rate / best(size)) ** 2)) + seed - 1
        records.append(
          train_record(size, longest(study, size), seed, rate=rate, reaches=min(steps, longest(study, size)))
        )
        fewest_here[rate] = steps
    rates[size] = min(grid, key=lambda rate: fewest_here[rate])
  tuned = {str(size): {"learning_rate": rates[size], "edge": None} for size in rates}
  return {**study, "tuned": {**study["tuned"], "target": tuned}}, records


def jsonable(row: dict) -> dict:
  return {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}
