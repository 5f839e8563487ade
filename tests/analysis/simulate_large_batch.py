"""Studies of large batches with a known answer: records of arms whose mean errors are given, and pairs of arms for coverage."""

import math
import zlib

import numpy as np

from bsjax.records import Record

SIZES, REFERENCE, TRAIN_SIZE, TEST_SIZE = (64, 256, 1024), 32, 1024, 500
SEEDS = tuple(range(1000, 1008))
ARMS = (
  "momentum_constant",
  "momentum_warmup",
  "momentum_cosine",
  "momentum_warmup_cosine",
  "lars_warmup_cosine",
  "lamb_warmup_cosine",
  "adamw_warmup_cosine",
)
RECIPES = ("rule_constant", "rule_warmup")
BASELINE = "momentum_constant"
EPOCHS = 4
ERRORS = {
  "momentum_constant": 6.0,
  "momentum_warmup": 5.0,
  "momentum_cosine": 5.5,
  "momentum_warmup_cosine": 4.0,
  "lars_warmup_cosine": 4.5,
  "lamb_warmup_cosine": 3.0,
  "adamw_warmup_cosine": 4.2,
  "rule_constant": 9.0,
  "rule_warmup": 7.0,
}
"""Mean test errors in percent, at every batch size."""
BASELINE_ERROR = 2.0
SEARCHED = (0.05, 0.5, 10.0)
"""The rates of every search; the last one diverges, the middle one is chosen."""


def record(kind, arm, size, seed, *, rate=0.5, loss=0.1, error=None, state="complete", accuracy=True) -> Record:
  """Returns a trial whose validation loss falls in a straight line to `loss`; the test error is in percent, or a loss."""
  name = f"{kind}-{arm}-{size:05d}-{rate:g}-{seed}"
  steps = EPOCHS * TRAIN_SIZE // size
  rows = [
    {
      "step": step,
      "examples_seen": step * size,
      "validation_loss": loss * (3 - 2 * step / steps),
      "validation_accuracy": step / steps,
    }
    for step in (steps // 2, steps)
  ]
  probes = []
  if kind == "final" and state == "complete":
    values = {"test_loss": error / 100, "test_accuracy": 1 - error / 100} if accuracy else {"test_loss": error}
    probes = [{"probe": "test", "step": steps, **values}]
  trial = {
    "id": name,
    "kind": kind,
    "arm": arm,
    "seed": seed,
    "config": {"batch_size": size, "num_steps": steps},
    "hparams": {"learning_rate": rate},
  }
  return Record(name, trial, {"state": state}, rows if state == "complete" else rows[:1], probes)


def world(
  *,
  errors=ERRORS,
  spread=0.1,
  sizes=SIZES,
  arms=ARMS,
  seeds=SEEDS,
  losses=None,
  diverged=None,
  failed=(),
  accuracy=True,
) -> tuple[dict, list[Record]]:
  """Returns the description and the records of a study.

  Args:
    errors: by arm, or by (arm, batch size), which comes first.
    spread: standard deviation of an error over seeds; half of its variance is common to all arms of a seed.
    losses: mean validation losses of the repeats by arm, in the order of `errors` by default.
    diverged: number of final seeds that diverged, by (arm, batch size).
    failed: pairs (arm, batch size) all of whose trials diverged.
    accuracy: whether the workload has one; else `errors` are test losses.
  """
  losses, diverged = losses or {}, diverged or {}
  records: list[Record] = []

  def entry(arm, size, mean) -> dict:
    lost = (arm, size) in failed
    finals = []
    for number, seed in enumerate([] if lost else seeds):
      luck = _luck(seed) + _luck(arm, size, seed)
      state = "diverged" if number < diverged.get((arm, size), 0) else "complete"
      finals.append(
        record(
          "final",
          arm,
          size,
          seed,
          loss=1e-4 * size,
          error=mean + spread * luck / math.sqrt(2),
          state=state,
          accuracy=accuracy,
        )
      )
    for seed, rate in enumerate([] if arm in RECIPES else SEARCHED):
      state, loss = "diverged" if lost or rate > 5 else "complete", 0.1 + abs(math.log(rate / 0.5))
      records.append(record("search", arm, size, seed, rate=rate, loss=loss, state=state))
    records.extend(finals)
    return {
      "num_steps": EPOCHS * TRAIN_SIZE // size,
      "num_trials": 3,
      "num_diverged": 3 if lost else 1,
      "space": {},
      "point": None if lost else {"learning_rate": 0.5},
      "edges": {},
      "validation_loss": None if lost else losses.get(arm, mean),
      "final": [r.id for r in finals],
    }

  tuned = {str(REFERENCE): {BASELINE: entry(BASELINE, REFERENCE, errors.get((BASELINE, REFERENCE), BASELINE_ERROR))}}
  for size in sizes:
    known = (*arms, *RECIPES) if (BASELINE, REFERENCE) not in failed else arms
    tuned[str(size)] = {arm: entry(arm, size, errors.get((arm, size), errors[arm])) for arm in known}
  study = {
    "workload": "simulated",
    "dataset": "made_up",
    "train_size": TRAIN_SIZE,
    "validation_size": 200,
    "test_size": TEST_SIZE,
    "num_params": 100,
    "target": {"metric": "validation_accuracy", "goal": 0.9, "direction": "max"},
    "batch_sizes": list(sizes),
    "reference_batch_size": REFERENCE,
    "baseline": BASELINE,
    "arms": {arm: {"optimizer": arm.split("_")[0], "weight_decay": 0.01 if arm[0] == "a" else 1e-4} for arm in arms},
    "num_epochs": EPOCHS,
    "momentum": 0.9,
    "num_trials": 3,
    "repeats": [4, 3],
    "final_seeds": list(seeds),
    "tuned": tuned,
    "counts": {"complete": 90, "diverged": 7},
  }
  return study, records


def _luck(*parts) -> float:
  return float(np.random.default_rng(zlib.crc32(repr(parts).encode())).normal())


ERROR_RATES, LOG_SPREAD, EXAMPLES = (0.04, 0.035), 0.15, 517


def draw_pair(rng, *, num_seeds, common) -> tuple[np.ndarray, np.ndarray]:
  """Draws the test errors in percent of two arms: error rates that vary over seeds, counted on a test set.

  Args:
    common: the share of the variance of log error rates that both arms of a seed have in common.
  """
  together = rng.normal(size=num_seeds)
  luck = [math.sqrt(common) * together + math.sqrt(1 - common) * rng.normal(size=num_seeds) for _ in ERROR_RATES]
  rates = [mean * np.exp(LOG_SPREAD * z - LOG_SPREAD**2 / 2) for mean, z in zip(ERROR_RATES, luck, strict=True)]
  first, second = (100 * rng.binomial(EXAMPLES, rate) / EXAMPLES for rate in rates)
  return first, second
