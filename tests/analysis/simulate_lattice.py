"""Lattices of learning rates with a known answer: as records, and the study that goes with them."""

import math

import numpy as np

from bsjax.analysis import regret as module
from bsjax.analysis.regret import mean_regret, measure_regrets, read_lattice
from bsjax.records import Record

BASE, FACTOR = 0.1, 4
TARGET = {"metric": "validation_accuracy", "goal": 0.95, "direction": "max"}
SIZES = (1, 4, 16, 64, 256)
CURVATURE = 0.5
"""log steps = CURVATURE (log of rate / best rate)^2 above the fewest."""
FEWEST = 200_000
"""Steps are whole numbers: at so many, rounding changes a logarithm by at most 2.5e-6."""
ROUNDING = 1e-5


def power_law(exponent):
  """Returns the place of the best rate at a batch size, in steps of the lattice, where the best rate is BASE b^exponent."""
  return lambda size: 2 * exponent * math.log2(size)


SQUARE_ROOT = power_law(0.5)


def bent(critical):
  """Returns the same where the best rate is BASE b, and BASE critical above the critical batch size."""
  return lambda size: 2 * math.log2(min(size, critical))


def noise_limited(scale):
  """Returns the same where the best rate is 4 BASE / (1 + scale / b)."""
  return lambda size: 2 * math.log2(4 / (1 + scale / size))


def excess(place, k):
  """Returns log(steps / fewest) at rate number k where the best is at `place`; too large a rate, 3 times the best, diverges."""
  x = (k - place) * math.log(2) / 2
  return CURVATURE * x**2 if x < math.log(3) else math.inf


def regret(place, k):
  """Returns what rate number k costs, exactly, where `place` is a place of the lattice."""
  return min(math.exp(excess(place, k)), FACTOR)


def simulate(
  place=SQUARE_ROOT, *, noise=0.0, seeds=4, sizes=SIZES, optimizers=("sgd",), scales=None, seed=0, curvature=None
):
  """Returns a study and its records; steps carry lognormal luck of size `noise`, `scales` gives measured noise scales by batch size."""
  rng = np.random.default_rng(seed)
  records, lattices = [], {}
  for optimizer in optimizers:
    lattices[optimizer] = {}
    for size in sizes:
      middle = round(place(size))
      first, last = middle - 6, middle + 6
      lattices[optimizer][str(size)] = {
        "first": first,
        "last": last,
        "eval_every": 10,
        "best_learning_rate": BASE * 2 ** (middle / 2),
        "open": [],
        "reason": "",
      }
      for k in range(first, last + 1):
        log_excess = excess(place(size), k) if curvature is None else curvature
        for number in range(seeds):
          steps = FEWEST * math.exp(log_excess + noise * rng.normal()) if math.isfinite(log_excess) else math.inf
          records.append(lattice_record(optimizer, size, BASE * 2 ** (k / 2), number, steps))
      if scales and size in scales:
        records.append(noise_record(optimizer, size, scales[size]))
  study = {
    "workload": "simulated",
    "dataset": "nothing",
    "train_size": 1024,
    "validation_size": 256,
    "test_size": 256,
    "num_params": 10,
    "target": TARGET,
    "batch_sizes": list(sizes),
    "optimizers": list(optimizers),
    "seeds": list(range(seeds)),
    "reference_batch_size": sizes[1],
    "momentum": 0.9,
    "base_rates": dict.fromkeys(optimizers, BASE),
    "quantisation": 0.02,
    "give_up_factor": FACTOR,
    "lattices": lattices,
    "adam_sqrt_skipped": {},
    "counts": {"complete": len(records), "diverged": 0},
  }
  return study, records


def lattice_record(optimizer, size, rate, seed, steps, *, kind="lattice", num_steps=10**9, every=10):
  """A trial that arrives after so many steps, or diverges if they are infinite."""
  diverged = math.isinf(steps)
  rows = [{"step": 1, "validation_accuracy": 0.1}]
  if not diverged:
    rows.append({"step": round(steps), "validation_accuracy": 0.96})
  return Record(
    f"{kind}-{optimizer}-{size}-{rate:.5g}-{seed}-{num_steps}",
    {
      "kind": kind,
      "config": {"optimizer": optimizer, "batch_size": size, "num_steps": num_steps, "eval_every": every},
      "hparams": {"learning_rate": rate},
      "seed": seed,
    },
    {"state": "diverged", "first_nonfinite_step": 1} if diverged else {"state": "complete"},
    rows,
    [],
  )


def noise_record(optimizer, size, scale):
  """A trial whose measured noise scales have the geometric mean `scale`; a refused one and a layer's beside them."""
  rows = [{"probe": "noise", "step": 1, "group": "all", "noise_scale": x} for x in (scale / 2, None, scale * 2)]
  rows.append({"probe": "noise", "step": 1, "group": "dense", "noise_scale": 1e6})
  record = lattice_record(optimizer, size, BASE, 0, FEWEST, kind="lattice_noise")
  return record._replace(probes=rows)


def expected_regrets(monkeypatch, num_worlds, **world):
  """Returns the mean log regret of all rules and pairs over many worlds, f64[Q, S, S]: what the measurement estimates."""
  with monkeypatch.context() as patch:
    patch.setattr(module, "NUM_DRAWS", 0)
    return np.mean(
      [
        measure_regrets(read_lattice(*simulate(seed=10_000 + k, **world), "sgd"), {}).held_out[0].mean(axis=0)
        for k in range(num_worlds)
      ],
      axis=0,
    )


def coverage(monkeypatch, *, num_worlds, num_truths, pair=(1, 3), **world):
  """Measures how often intervals hold the regret to expect: of the mean over all pairs, and of one pair, for none, sqrt, linear."""
  truth = expected_regrets(monkeypatch, num_truths, **world)
  size = truth.shape[1]
  masks = {"mean": ~np.eye(size, dtype=bool), "pair": np.zeros((size, size), bool)}
  masks["pair"][pair] = True
  held = {name: [] for name in masks}
  for seed in range(num_worlds):
    regrets = measure_regrets(read_lattice(*simulate(seed=seed, **world), "sgd"), {})
    for name, mask in masks.items():
      intervals = [mean_regret(regrets, rule, mask)[0] for rule in ("none", "sqrt", "linear")]
      expected = [math.exp(truth[at][mask].mean()) for at in range(3)]
      held[name].append([i.low - 1e-9 <= e <= i.high + 1e-9 for i, e in zip(intervals, expected, strict=True)])
  return {name: np.mean(found, axis=0) for name, found in held.items()}
