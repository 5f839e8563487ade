"""Meshes: which are refused, and the same numbers on one device and on eight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bsjax.train import make_mesh

ROOT = Path(__file__).parents[2]


def test_mesh_that_does_not_fit_is_refused() -> None:
  count = jax.device_count()
  with pytest.raises(
    ValueError, match=rf"trial=3 x data={count} needs {3 * count} devices, there are {count}: use fewer"
  ):
    make_mesh(trial=3, data=count)
  with pytest.raises(ValueError, match=rf"trial={count + 1} x data=1 needs {count + 1} devices, there are {count}"):
    make_mesh(trial=count + 1)
  for shape in ({"trial": 0}, {"trial": 1, "data": 0}):
    with pytest.raises(ValueError, match="wanted at least 1 device along each axis"):
      make_mesh(**shape)


ON_EIGHT_DEVICES = """
import dataclasses, json, sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests/train")
import jax, jax.numpy as jnp, numpy as np
from problems import classifier
from test_segment import hparams_of
from bsjax.records import read_record
from bsjax.train import build_segment, chunked, device_arrays, init_state, make_mesh, make_trial, run_trials
from bsjax.train.plan import Plan
from bsjax.train.trial import TrialConfig
from bsjax.types import Hparams
assert jax.device_count() == 8
out = {}
for kind in ("mlp", "mlp_bn", "cnn"):
  workload, config = classifier(kind), TrialConfig(kind, 16, 20, 2)
  for shape in ((1, 1), (1, 8), (2, 4), (8, 1), *([(4, 2)] if kind == "cnn" else [])):
    mesh = make_mesh(trial=shape[0], data=shape[1])
    seeds = jnp.arange(8, dtype=jnp.uint32)
    hparams = jax.tree.map(lambda leaf: jnp.full(8, leaf), hparams_of(0.05))
    states = jax.vmap(lambda h, s: init_state(workload, "sgd", h, s))(hparams, seeds)
    data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays, devices=mesh.shape["data"])
    inputs = states, hparams, seeds, jnp.int32(10), *data
    segment = build_segment(workload, config, 8, mesh).lower(*inputs).compile()
    _, rows = jax.block_until_ready(segment(*inputs))
    calls = [call for call in ("all-reduce", "all-gather", "all-to-all") if f"{call}(" in segment.as_text()]
    held_out = {name: np.asarray(values[:, :10]).tolist() for name, values in rows.validation.items()}
    part = jax.tree.leaves(segment.input_shardings[0])[-1].shard_shape(data[1].weight.shape)
    out[f"{kind} {shape}"] = [np.asarray(rows.train_loss[:, :10]).tolist(), calls, held_out, part]

trials = [make_trial(TrialConfig("mlp", 16, 20, 2), Hparams(0.05), seed) for seed in range(7)]
for shape in ((1, 1), (2, 1), (2, 4)):
  with tempfile.TemporaryDirectory() as folder:
    run_trials(classifier("mlp"), trials, Path(folder), mesh=make_mesh(trial=shape[0], data=shape[1]), plan=Plan(1, 2))
    records = [read_record(Path(folder) / trial.id) for trial in trials]
  out[f"pool {shape}"] = [[row["train_loss"] for row in record.metrics] for record in records]
  out[f"pool {shape} devices"] = records[0].trial["plan"]["devices"]

def noise(config, shape):
  mesh, workload = make_mesh(trial=shape[0], data=shape[1]), classifier("mlp")
  seeds = jnp.arange(2, dtype=jnp.uint32)
  hparams = jax.tree.map(lambda leaf: jnp.full(2, leaf), hparams_of(0.05))
  states = jax.vmap(lambda h, s: init_state(workload, "sgd", h, s))(hparams, seeds)
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays, devices=mesh.shape["data"])
  states, rows = jax.device_get(build_segment(workload, config, 2, mesh)(states, hparams, seeds, jnp.int32(4), *data))
  bits = [leaf.tobytes().hex() for leaf in jax.tree.leaves((states, rows.train_loss))]
  return {"noise": {name: value[:, :4].tolist() for name, value in rows.noise.items()}, "bits": bits}

logged = TrialConfig("mlp", 16, 12, 3, microbatch_size=4, noise_route="device", noise_every=2)
out["device"] = noise(logged, (2, 4))
out["device, seldom"] = noise(dataclasses.replace(logged, noise_every=12), (2, 4))
out["one device"] = noise(dataclasses.replace(logged, noise_route="microbatch"), (1, 1))
out["spread"] = noise(dataclasses.replace(logged, noise_route="microbatch"), (2, 4))
for size, shape in ((8, (2, 4)), (4, (8, 1))):
  try:
    noise(dataclasses.replace(logged, microbatch_size=size), shape)
  except ValueError as error:
    out[f"refused {size}"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_eight_devices() -> dict:
  """Forced host devices, in a process of its own; NPROC as in conftest.py, or two cores would dead-lock."""
  environment = os.environ | {
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
    "NPROC": "16",
  }
  command = ["timeout", "-s", "KILL", "240", sys.executable, "-c", ON_EIGHT_DEVICES]
  done = subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


def test_the_same_losses_on_one_device_and_on_eight(on_eight_devices: dict) -> None:
  for kind in ("mlp", "mlp_bn", "cnn"):
    losses, _, metrics, whole = on_eight_devices[f"{kind} (1, 1)"]
    one = np.asarray(losses)
    assert np.isfinite(one).all()
    for shape in ("(1, 8)", "(2, 4)", "(8, 1)", *(["(4, 2)"] if kind == "cnn" else [])):
      losses, calls, spread_metrics, part = on_eight_devices[f"{kind} {shape}"]
      np.testing.assert_allclose(losses, one, rtol=1e-5, err_msg=f"{kind} {shape}")
      for name, values in metrics.items():  # of 11 examples: not as many on every device
        np.testing.assert_allclose(spread_metrics[name], values, rtol=1e-5, err_msg=f"{kind} {shape} {name}")
      devices = int(shape[-2])
      assert (whole, part) == ([1, 11], [1, -(-11 // devices)])
      # No device computes the examples of another, in the loop over blocks of a convolution's gradient either ("cnn (4, 2)": two blocks).
      assert calls == ([] if shape == "(8, 1)" else ["all-reduce"]), (
        "a spread batch needs sums, spread trials need nothing"
      )


def test_a_pool_spreads_its_trials_over_devices(on_eight_devices: dict) -> None:
  """Seven trials in groups that take turns on one device, on two, and on two rows of four: the same losses, 20 float32 steps."""
  one = np.asarray(on_eight_devices["pool (1, 1)"])
  assert one.shape == (7, 10)
  assert len(np.unique(one[:, -1])) == 7
  for shape in ("(2, 1)", "(2, 4)"):
    np.testing.assert_allclose(on_eight_devices[f"pool {shape}"], one, rtol=1e-5, err_msg=shape)
    assert on_eight_devices[f"pool {shape} devices"] == 2


def test_noise_of_devices_is_that_of_microbatches(on_eight_devices: dict) -> None:
  """One microbatch per device, one after the other on one device, and each spread over the devices: the same numbers."""
  one = on_eight_devices["one device"]["noise"]
  assert one["noise_steps"] == [[2, 1, 2, 1]] * 2
  for route in ("device", "spread"):
    found = on_eight_devices[route]["noise"]
    assert found["noise_steps"] == one["noise_steps"]
    for name in ("small_sq_norm", "big_sq_norm"):
      # as the losses above: 12 steps of float32 training that round in another order, and squares of what they give
      np.testing.assert_allclose(found[name], one[name], rtol=2e-5, err_msg=f"{route} {name}")
  assert on_eight_devices["device"]["bits"] == on_eight_devices["device, seldom"]["bits"]


def test_device_route_wants_one_device_per_microbatch(on_eight_devices: dict) -> None:
  assert "puts 4 examples on each of 4 devices: set microbatch_size=4, it is 8" in on_eight_devices["refused 8"]
  assert "the mesh has 1 devices on its axis 'data'" in on_eight_devices["refused 4"]
