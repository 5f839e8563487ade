"""Solutions with a known answer: each measure a power of the batch size times noise, each test error a mixture of it and of noise."""

import math
import zlib

import numpy as np

from bsjax.records import Record

BATCH_SIZES = (8, 32, 128, 512)
RATE_PARTS = (0.25, 1.0)
SEEDS = (0, 1, 2, 3, 4)
LEVEL = 0.05
MEASURES = ("top_eigenvalue", "bottom_eigenvalue", "trace", "keskar_1e-3", "sam", "average")
ERROR_KINDS = {"top_eigenvalue": "residual", "bottom_eigenvalue": "residual", "trace": "sem", "average": "sem"}
RESIDUAL, SEM = 1e-3, 0.02
"""Errors of a value, relative to it."""


def make_study(*, measures=MEASURES, batch_sizes=BATCH_SIZES) -> dict:
  return {"workload": "simulated", "measures": list(measures), "batch_sizes": list(batch_sizes), "seeds": list(SEEDS)}


def solution(phase, size, part, seed, values, *, test_error, train_loss=LEVEL, state="complete", errors=None) -> Record:
  """Returns a trial of one phase that ends with `values` (measure: value, None = refused) and the given test error.

  Args:
    errors: measure: (error, kind), where it differs from the usual relative one.
  """
  step = 1000 if phase == "budget" else 400
  test = {"probe": "test", "step": step, "train_loss": train_loss, "train_accuracy": 1.0, "test_loss": 3 * test_error}
  probes = [test | {"test_accuracy": 1 - test_error}, {"probe": "distance", "step": step, "from_start": 1.0}]
  for measure, value in values.items():
    kind = ERROR_KINDS.get(measure)
    usual = None if kind is None or value is None else abs(value) * (RESIDUAL if kind == "residual" else SEM)
    error, kind = (errors or {}).get(measure, (usual, kind))
    row = {"probe": "measure", "step": step, "measure": measure, "value": value, "error": error, "error_kind": kind}
    probes.append(row | {"loss": train_loss, "grad_norm": 0.01, "num_examples": 512, "batch_norm": "none"})
  name = f"solution-{phase}-{size:05d}-{part:.4f}-{seed:03d}"
  trial = {"id": name, "kind": "solution", "phase": phase, "rate_part": part, "seed": seed}
  trial |= {"config": {"batch_size": size, "num_steps": step}, "hparams": {"learning_rate": part * math.sqrt(size)}}
  return Record(name, trial, {"state": state}, [], probes)


def rng_of(*parts) -> np.random.Generator:
  return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def solutions(
  *,
  slope=lambda measure, phase: 0.3,
  agreement=1.0,
  cell_noise=0.05,
  seed_noise=0.1,
  batch_sizes=BATCH_SIZES,
  rate_parts=RATE_PARTS,
  seeds=SEEDS,
  measures=MEASURES,
  phases=("budget", "level"),
  draw=0,
) -> list[Record]:
  """Returns solutions of every phase, batch size, rate and seed.

  log(measure) = slope log(B) - log(rate part) / 2 + noise, and log(test error) = agreement (0.3 log(B) - log(rate part) / 2) / 4 + noise:
  with `agreement` 1 what is flat by a slope of 0.3 generalises, with -1 it generalises worse, with 0 flatness says nothing. Noise is
  normal, one draw for each cell (batch size and rate) and one for each seed in it, the test error's a quarter as large. The smallest
  eigenvalue is minus such a number.

  Args:
    slope: of each measure in each phase; the rates differ in level and not in slope.
    draw: another number gives other noise.
  """
  records = []
  for phase in phases:
    for part in rate_parts:
      for size in batch_sizes:
        shared = cell_noise * rng_of(draw, phase, part, size).normal(size=len(measures) + 1)
        for seed in seeds:
          rng = rng_of(draw, phase, part, size, seed)
          noise = shared + seed_noise * rng.normal(size=len(measures) + 1)
          logs = [slope(m, phase) * math.log(size) - math.log(part) / 2 for m in measures] + noise[:-1]
          values = dict(zip(measures, np.exp(logs).tolist(), strict=True))
          if "bottom_eigenvalue" in values:
            values["bottom_eigenvalue"] *= -1
          latent = agreement * (0.3 * math.log(size) - math.log(part) / 2) + noise[-1]
          error, loss = 0.02 * math.exp(latent / 4), LEVEL * (1 - 0.1 * rng.random())
          records.append(solution(phase, size, part, seed, values, test_error=error, train_loss=loss))
  return records


def rows(records, measure, phase=None):
  """Returns the rows of one measure, for a test to change."""
  chosen = [record for record in records if phase in (None, record.trial["phase"])]
  return [row for record in chosen for row in record.probes if row.get("measure") == measure]
