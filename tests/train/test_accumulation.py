"""Accumulated gradients and the noise logged from them: the same training, its norms, its refusals, its ids."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from problems import classifier, quadratic
from test_pool import contents, run, trials_of
from test_segment import plain_loop, relative_difference, run_segment

from bsjax.probes.per_example import per_example_grads
from bsjax.records import read_record
from bsjax.train import TrainState, TrialConfig, build_segment, make_mesh, make_step, make_trial
from bsjax.types import Batch, Hparams
from bsjax.workloads import Workload

ROOT = Path(__file__).parents[2]
CONFIG = TrialConfig("mlp", 12, 24, 6, optimizer="momentum", microbatch_size=3)
LOGGED = dataclasses.replace(CONFIG, noise_route="microbatch", noise_every=4)


def workload_of(kind: str) -> Workload:
  return quadratic() if kind == "quadratic" else classifier(kind)


@pytest.mark.parametrize(
  ("kind", "size", "optimizer"),
  [
    ("mlp", 3, "momentum"),
    ("cnn", 3, "momentum"),
    ("quadratic", 4, "momentum"),
    ("quadratic", 12, "momentum"),
    ("mlp", 3, "sam"),  # whose second gradient is accumulated too
  ],
)
def test_accumulated_step_is_the_large_step(kind: str, size: int, optimizer: str) -> None:
  workload, config = workload_of(kind), dataclasses.replace(CONFIG, optimizer=optimizer)
  whole, whole_rows = run_segment(workload, dataclasses.replace(config, microbatch_size=0), [0.05], num_rows=4)
  parts, rows = run_segment(workload, dataclasses.replace(config, microbatch_size=size), [0.05], num_rows=4)
  # as for a segment against a plain loop: 24 steps round differently
  assert relative_difference(parts.params, whole.params) < 1e-5
  np.testing.assert_allclose(rows.train_loss[0, :4], whole_rows.train_loss[0, :4], rtol=1e-5)
  assert rows.noise == {}


BITS = {"mlp": ([0.05], 1), "mlp, lanes": ([0.1, 0.05], 4), "cnn": ([0.05], 4), "quadratic": ([0.05], 1)}


def same_bits(case: str) -> bool:
  """Whether training without and with logged noise ends in the same state, with the same rows."""
  (rates, every), workload = BITS[case], workload_of(case.partition(",")[0])
  plain = run_segment(workload, CONFIG, rates, num_rows=4)
  state, rows = run_segment(workload, dataclasses.replace(LOGGED, noise_every=every), rates, num_rows=4)
  assert set(rows.noise) == {"small_sq_norm", "big_sq_norm", "noise_steps"}
  leaves = (jax.tree.leaves((state, rows._replace(noise={}))), jax.tree.leaves(plain))
  return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*leaves, strict=True))


def test_logging_changes_no_bit() -> None:
  """Under the compiler options that users have: two programs need not round alike, and in a hurry these two do not."""
  program = (
    "import json; from test_accumulation import BITS, same_bits; print(json.dumps({c: same_bits(c) for c in BITS}))"
  )
  environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'train'}"}
  command = [sys.executable, "-c", program]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
  assert done.returncode == 0, done.stderr[-2000:]
  assert json.loads(done.stdout) == dict.fromkeys(BITS, True)


@pytest.mark.parametrize("rates", [[0.05], [0.1, 0.05]], ids=["alone", "lanes"])
def test_logged_norms_are_those_of_the_examples(rates: list[float]) -> None:
  """Every fourth step of 24, in rows of six; each norm from all per-example gradients of the batch, in float64."""
  workload, steps = classifier("mlp"), {}

  def look(state: TrainState, batch: Batch) -> None:
    if int(state.step) % 4 == 0:
      grads = per_example_grads(lambda p, example: workload.example_loss(p, {}, example), state.params, batch)
      flat = np.concatenate([np.asarray(leaf, np.float64).reshape(12, -1) for leaf in jax.tree.leaves(grads)], axis=1)
      groups = flat.reshape(4, 3, -1).mean(axis=1)
      steps[int(state.step)] = np.mean(np.sum(groups**2, axis=1)), np.sum(flat.mean(axis=0) ** 2)

  lane = rates.index(0.05)
  _, rows = run_segment(workload, LOGGED, rates, num_rows=4, seeds=list(range(len(rates))))
  plain_loop(workload, dataclasses.replace(CONFIG, microbatch_size=0), 0.05, lane, 24, look=look)
  assert rows.noise["noise_steps"][lane, :4].tolist() == [2, 1, 2, 1]
  expected = [np.mean([steps[step] for step in group], axis=0) for group in ((0, 4), (8,), (12, 16), (20,))]
  found = np.stack([rows.noise["small_sq_norm"][lane, :4], rows.noise["big_sq_norm"][lane, :4]], axis=1)
  # parameters agree to 1e-5 (above), and a squared norm moves by twice what the gradient does
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_rows_on_disk(tmp_path: Path) -> None:
  """Columns only where asked for; a row without a logged step says so, and has no number."""
  config = TrialConfig("quadratic", 8, 16, 4, microbatch_size=2, noise_route="microbatch", noise_every=8)
  plain = dataclasses.replace(config, noise_route="", noise_every=0)
  for each in (config, plain):
    run(tmp_path, [make_trial(each, Hparams(0.1), 0)])
  rows = read_record(tmp_path / make_trial(config, Hparams(0.1), 0).id).metrics
  plain_rows = read_record(tmp_path / make_trial(plain, Hparams(0.1), 0).id).metrics
  assert [row["noise_steps"] for row in rows] == [1, 0, 1, 0]
  for row in rows:
    norms = row["small_sq_norm"], row["big_sq_norm"]
    assert norms == (None, None) if row["noise_steps"] == 0 else norms[0] > norms[1] > 0  # convexity
  added = {"small_sq_norm", "big_sq_norm", "noise_steps"}
  assert [{name: row[name] for name in row if name not in added} for row in rows] == plain_rows
  assert (
    json.loads((tmp_path / make_trial(config, Hparams(0.1), 0).id / "trial.json").read_text())["config"][
      "microbatch_size"
    ]
    == 2
  )


def test_diverged_neighbour_leaves_logged_rows_alone(tmp_path: Path) -> None:
  config = TrialConfig("quadratic", 8, 600, 4, microbatch_size=2, noise_route="microbatch", noise_every=3)
  calm, wild = trials_of(config, rates=(0.1,), seeds=range(2)), make_trial(config, Hparams(200.0), 0)
  run(tmp_path / "both", [wild, *calm])
  run(tmp_path / "calm", calm)
  record = read_record(tmp_path / "both" / wild.id)
  assert record.status["state"] == "diverged"
  assert all(np.isfinite(row["small_sq_norm"]) for row in record.metrics)
  both = contents(tmp_path / "both")
  assert {name: both[name] for name in contents(tmp_path / "calm")} == contents(tmp_path / "calm")


def test_batch_norm_is_refused() -> None:
  with pytest.raises(ValueError, match="carries state .batch norm 'running'.*microbatch_size=0"):
    build_segment(classifier("mlp_bn"), dataclasses.replace(CONFIG, workload="mlp_bn"), 1, make_mesh(data=1))


def test_device_route_is_refused_on_one_device() -> None:
  config = dataclasses.replace(LOGGED, noise_route="device")
  with pytest.raises(ValueError, match="the mesh has 1 devices on its axis 'data' for a batch of 12"):
    build_segment(classifier("mlp"), config, 1, make_mesh(data=1))
  with pytest.raises(ValueError, match="noise_route='device' needs a mesh"):
    make_step(classifier("mlp"), config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"microbatch_size": 5}, "microbatch_size=5 does not divide batch_size=12"),
    ({"microbatch_size": -3}, "microbatch_size=-3 does not divide"),
    ({"noise_route": "ghost"}, "noise_route='ghost' is unknown: use one of '', 'microbatch', 'device'"),
    ({"noise_route": ""}, "noise_route='' with noise_every=4: set both"),
    ({"noise_every": 0}, "noise_route='microbatch' with noise_every=0: set both"),
    ({"noise_every": -1}, "noise_every=-1"),
    ({"microbatch_size": 0}, "batch of 12, got microbatch_size=0"),
    ({"microbatch_size": 12}, "batch of 12, got microbatch_size=12"),
  ],
)
def test_bad_config_is_refused(changes: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(LOGGED, **changes)


def test_ids_do_not_change() -> None:
  """What has its default is left out, so that new options change none. Another id here means that all records are computed anew."""
  plain = TrialConfig("quadratic", 8, 600, 4)
  full = TrialConfig("quadratic", 8, 600, 4, "adamw", "cosine", "gradual", probes=("norm",), probe_steps=(0, 600))
  assert make_trial(plain, Hparams(0.1), 0).id == "096f99fc6df481cb"
  assert make_trial(full, Hparams(0.1, warmup_steps=5), 3).id == "b839eb93784cb25b"
  other = [dataclasses.replace(plain, microbatch_size=4), dataclasses.replace(plain, parent="096f99fc6df481cb")]
  other += [dataclasses.replace(other[0], noise_route="microbatch", noise_every=every) for every in (1, 2)]
  assert len({make_trial(config, Hparams(0.1), 0).id for config in (plain, *other)}) == 5
