"""Batch-size schedules: the published counts of updates, stages that go on where others ended, and batches chosen on the way."""

import doctest
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.study import stages as module
from bsjax.study.stages import (
  SEEDS_APART,
  Stage,
  growth_stages,
  join_stages,
  listed,
  noise_batch_size,
  num_steps_of,
  run_stages,
)
from bsjax.train import make_mesh
from bsjax.types import Hparams
from bsjax.workloads import load_workload


@pytest.mark.parametrize(("batch_size", "updates"), [(640, 6405), (128, 29139), (3200, 2304)])
def test_counts_of_updates_are_those_of_smith_et_al(batch_size, updates):
  """CIFAR-10, 200 epochs, steps at 60, 120 and 160, batches up to 5,120: their schedules, to the rounding of each stage."""
  stages = growth_stages(batch_size, factor=5, at_epochs=(60, 120, 160), num_epochs=200, largest=5120)
  assert sum(num_steps_of(stage, 50_000) for stage in stages) == pytest.approx(updates, abs=3)


def test_rate_over_batch_size_falls_by_the_factor_at_every_epoch_named():
  stages = growth_stages(4, factor=3, at_epochs=(1, 2, 3.5), num_epochs=5, largest=40)
  assert [stage.batch_size for stage in stages] == [4, 12, 36, 40]
  ratios = np.array([stage.rate_factor / stage.batch_size for stage in stages])
  np.testing.assert_allclose(ratios[1:] / ratios[:-1], 1 / 3, rtol=1e-12)
  assert [stage.num_epochs for stage in stages] == [1, 1, 1.5, 1.5]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"at_epochs": (2, 1)}, r"at_epochs=\[2, 1\]: wanted ascending epochs between 0 and num_epochs=4"),
    ({"at_epochs": (4,)}, r"at_epochs=\[4\]: wanted ascending epochs"),
    ({"at_epochs": (0,)}, r"at_epochs=\[0\]: wanted ascending epochs"),
    ({"num_epochs": math.inf}, "num_epochs=inf"),
    ({"factor": 1.0}, "factor=1, wanted a finite number above 1"),
    ({"batch_size": 100}, "batch_size=100, wanted 1 to largest=64"),
  ],
)
def test_bad_schedules_are_named(changes, message):
  options = {"batch_size": 8, "factor": 2.0, "at_epochs": (1,), "num_epochs": 4, "largest": 64} | changes
  with pytest.raises(ValueError, match=message):
    growth_stages(**options)


def run(folder, next_stage, rate=0.3, **options):
  folder.mkdir(exist_ok=True)
  workload = load_workload("quadratic")
  hparams = Hparams(rate)
  return run_stages(workload, next_stage, hparams, 5, folder, mesh=make_mesh(data=1), optimizer="momentum", **options)


def test_joined_rows_count_on():
  """Steps, examples and tokens of a second stage begin where those of the first ended."""

  def stage(batch_size, steps):
    rows = [{"step": k, "examples_seen": batch_size * k, "tokens_seen": 4 * batch_size * k, "loss": 1} for k in steps]
    return SimpleNamespace(trial={"config": {"batch_size": batch_size}}, metrics=rows)

  rows = join_stages([stage(8, (2, 4)), stage(16, (1, 3)), stage(2, (5,))])
  counts = [tuple(row.values()) for row in rows]
  assert counts == [
    (2, 16, 64, 1, 8),
    (4, 32, 128, 1, 8),
    (5, 48, 192, 1, 16),
    (7, 80, 320, 1, 16),
    (12, 90, 360, 1, 2),
  ]


STAGES = [Stage(8, 1.0, 1.0), Stage(16, 1.0, 1.0), Stage(16, 0.5, 0.5)]


def test_each_stage_goes_on_where_the_one_before_ended(tmp_path):
  records = run(tmp_path, listed(STAGES))
  assert [record.trial["config"]["batch_size"] for record in records] == [8, 16, 16]
  assert [record.trial["hparams"]["learning_rate"] for record in records] == [0.3, 0.3, 0.15]
  assert [record.trial["seed"] for record in records] == [5, 5 + SEEDS_APART, 5 + 2 * SEEDS_APART]
  assert [record.trial["config"].get("parent") for record in records] == [None, records[0].id, records[1].id]
  assert [record.metrics[-1]["step"] for record in records] == [64, 32, 16]
  rows = join_stages(records)
  assert [rows[-1][name] for name in ("step", "examples_seen", "batch_size")] == [112, 512 + 512 + 256, 16]
  assert "tokens_seen" not in rows[0].keys() | records[0].metrics[0].keys()  # no text
  steps = [row["step"] for row in rows]
  assert steps == sorted({*steps})
  # From 1/2 tr(H) it falls to the noise of its rate over batch size, and does not begin anew with a stage.
  losses = [row["validation_loss"] for row in rows]
  assert losses[0] > 10 * losses[len(records[0].metrics)]
  times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json*")}
  assert run(tmp_path, listed(STAGES)) == records
  assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_stage_that_diverges_is_the_last(tmp_path):
  records = run(tmp_path, listed(STAGES), rate=200.0)
  assert [record.status["state"] for record in records] == ["diverged"]
  assert len(join_stages(records)) == len(records[0].metrics)


def test_the_next_batch_may_be_chosen_by_what_was_measured(tmp_path):
  """A probe at the end of each stage; the batch size doubles as long as it finds the parameters moving."""
  found = []

  def probe(trial, state):
    found.append(float(jnp.sum(state.params["w"] ** 2)))
    return [{"probe": "size", "step": int(state.step), "value": found[-1]}]

  def next_stage(records):
    if len(records) == 3:
      return None
    size = 8 if not records else records[-1].trial["config"]["batch_size"] * 2
    assert all(record.probes[-1]["value"] == value for record, value in zip(records, found, strict=True))
    return Stage(size, 1.0, 0.5)

  records = run(tmp_path, next_stage, probe=probe, probes=("size",))
  assert [record.trial["config"]["batch_size"] for record in records] == [8, 16, 32]
  assert [record.probes[-1]["step"] for record in records] == [32, 16, 8]
  assert len(found) == 3


def test_batch_size_from_the_noise_scale():
  choose = lambda noise, r=4.0: noise_batch_size(noise, exchange_rate=r, smallest=8, largest=512)  # noqa: E731
  assert choose(2500.0) == 100
  assert choose(2500.0, 16.0) == 200
  assert (choose(0.0), choose(math.nan), choose(1e9), choose(math.inf)) == (8, 8, 512, 512)
  with pytest.raises(ValueError, match="exchange_rate=0"):
    choose(1.0, 0)


def test_docstring_examples():
  failed, tried = doctest.testmod(module)
  assert tried > 0
  assert failed == 0
