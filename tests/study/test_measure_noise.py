"""Rows of the noise probes on the quadratic, where everything has a closed form, and on a network."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.study import measure_noise
from bsjax.study.measure_noise import NoiseMeasurements, route_population
from bsjax.train import TrainState, TrialConfig, init_state, make_mesh, make_trial
from bsjax.types import Hparams
from bsjax.workloads import load_workload
from bsjax.workloads.quadratic import SPECTRUM

ROOT = Path(__file__).parents[2]
PROBES = ("noise", "hessian_noise", "adam_noise", "routes")
CONFIG = TrialConfig("quadratic", 8, 4, 4, optimizer="adamw", probes=PROBES, probe_steps=(4,))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
  workload = load_workload("quadratic")
  trial = make_trial(CONFIG, Hparams(0.1), 0)
  state = init_state(workload, "adamw", Hparams(*map(jnp.float32, trial.hparams)), jnp.uint32(0))
  moment = jnp.asarray(np.arange(1.0, 17.0) ** 2, jnp.float32)
  opt_state = jax.tree_util.tree_map_with_path(
    lambda path, leaf: moment if ".nu" in jax.tree_util.keystr(path) else leaf, state.opt_state
  )
  state = TrainState(jnp.int32(4), state.params, {}, opt_state)
  return NoiseMeasurements(workload, make_mesh())(trial, state)


def truth() -> tuple[np.ndarray, np.ndarray]:
  """The gradient at w = 1 and the covariance of the per-example gradients, f64."""
  centers = load_workload("quadratic").train.arrays["center"].astype(np.float64)
  grads = SPECTRUM * (1 - centers)
  return grads.mean(0), np.cov(grads.T)


def of(rows: list[dict], probe: str) -> list[dict]:
  return [row for row in rows if row["probe"] == probe]


def test_noise_rows(rows: list[dict]) -> None:
  mean, cov = truth()
  total, layer = of(rows, "noise")
  assert (total["group"], layer["group"]) == ("all", "w")
  assert total["step"] == 4
  assert total["num_examples"] == 512
  assert total["num_nonfinite"] == 0
  assert total["first_nonfinite"] is None
  np.testing.assert_allclose(total["grad_cov_trace"], np.trace(cov), rtol=1e-5)
  np.testing.assert_allclose(total["dataset_grad_sq_norm"], mean @ mean, rtol=1e-5)
  np.testing.assert_allclose(total["noise_scale"], np.trace(cov) / (mean @ mean - np.trace(cov) / 512), rtol=1e-5)
  assert total | {"group": "w", "norms_by": "sum"} == layer


def test_hessian_row(rows: list[dict]) -> None:
  mean, cov = truth()
  (row,) = of(rows, "hessian_noise")
  assert row["route"] == "exact"  # 16 parameters
  np.testing.assert_allclose(row["grad_curvature"], mean @ (SPECTRUM * mean), rtol=1e-5)
  np.testing.assert_allclose(row["hessian_cov_trace"], np.trace(SPECTRUM[:, None] * cov), rtol=1e-4)
  np.testing.assert_allclose(row["max_learning_rate"], mean @ mean / (mean @ (SPECTRUM * mean)), rtol=1e-5)
  assert row["hessian_noise_scale_ci_low"] < row["hessian_noise_scale"] < row["hessian_noise_scale_ci_high"]


def test_adam_row(rows: list[dict]) -> None:
  mean, cov = truth()
  (row,) = of(rows, "adam_noise")
  metric = 1 / np.arange(1.0, 17.0)
  trace = np.sum(metric * np.diag(cov))
  np.testing.assert_allclose(row["adam_noise_scale"], trace / (np.sum(metric * mean**2) - trace / 512), rtol=1e-4)


def test_routes_agree(rows: list[dict]) -> None:
  exact, ghost, microbatch = of(rows, "route")
  assert [row["route"] for row in (exact, ghost, microbatch)] == ["exact", "ghost", "microbatch"]
  for name in ("grad_cov_trace", "grad_sq_norm"):
    np.testing.assert_allclose(ghost[name], exact[name], rtol=1e-5)
    # 4 standard errors of 64 batches.
    assert abs(microbatch[name] - exact[name]) < 4 * microbatch[f"{name}_sem"]
    assert 0 < microbatch[f"{name}_sem"] < 0.5 * exact[name]


def test_an_optimizer_without_second_moment_has_no_adam_row() -> None:
  workload = load_workload("quadratic")
  trial = make_trial(dataclasses.replace(CONFIG, optimizer="sgd", probes=("adam_noise",)), Hparams(0.1), 0)
  state = init_state(workload, "sgd", Hparams(*map(jnp.float32, trial.hparams)), jnp.uint32(0))
  assert NoiseMeasurements(workload, make_mesh())(trial, state) == []


def test_big_models_compare_routes_on_fewer_examples() -> None:
  workload = load_workload("quadratic")
  assert route_population(workload) == 512
  big = dataclasses.replace(
    workload, init=lambda key: workload.init(key)._replace(params={"w": jnp.zeros((2000, 10_000))})
  )
  assert route_population(big) == 200  # 4e9 numbers / 2e7 parameters


def test_batch_norm_in_training_mode_is_refused() -> None:
  workload = dataclasses.replace(load_workload("quadratic"), batch_norm="ghost")
  with pytest.raises(ValueError, match=r"batch_norm='ghost'.*use batch_norm='running'"):
    NoiseMeasurements(workload, make_mesh())


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from bsjax.study import measure_noise
from bsjax.study import measure_noise
from bsjax.study.measure_noise import NoiseMeasurements
from bsjax.train import TrialConfig, init_state, make_mesh, make_trial
from bsjax.types import Hparams
from bsjax.workloads import load_workload

measure_noise.route_population = lambda workload: 512
mesh = make_mesh(data=4)
for name in ("digits_mlp", "digits_cnn", "digits_vit", "quadratic"):
  workload = load_workload(name)
  trial = make_trial(TrialConfig(name, 8, 4, 4, probes=("routes",), probe_steps=(0,)), Hparams(0.1), 3)
  state = init_state(workload, "sgd", Hparams(*map(jnp.float32, trial.hparams)), jnp.uint32(3))
  rows = NoiseMeasurements(workload, mesh)(trial, state)
  print("ROWS", json.dumps([name, rows], default=float))
"""
WORKLOADS = ("digits_mlp", "digits_cnn", "digits_vit", "quadratic")


@pytest.fixture(scope="module")
def route_rows() -> dict[str, dict[str, dict]]:
  """All four routes on every workload with data that ship with the project, on four (fake) devices in a process of their own."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
  }
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=500, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr
  found = [json.loads(line.removeprefix("ROWS ")) for line in done.stdout.splitlines() if line.startswith("ROWS ")]
  return {name: {row["route"]: row for row in rows} for name, rows in found}


@pytest.mark.parametrize("name", WORKLOADS)
def test_four_routes_agree_on_every_workload(route_rows: dict, name: str) -> None:
  rows = route_rows[name]
  assert list(rows) == ["exact", "ghost", "microbatch", "device"]
  for quantity in ("grad_cov_trace", "grad_sq_norm"):
    exact = rows["exact"][quantity]
    # Float32 sums over 512 examples; |G|^2 - tr(Sigma)/N is a difference, but of numbers of one size.
    np.testing.assert_allclose(rows["ghost"][quantity], exact, rtol=1e-5)
    for route in ("microbatch", "device"):
      # 4 standard errors of 64 batches, known to 9 %: a false alarm in about 1 of 10,000.
      assert abs(rows[route][quantity] - exact) < 4 * rows[route][f"{quantity}_sem"], (route, quantity)
      assert rows[route][f"{quantity}_sem"] < 0.3 * rows["exact"]["grad_cov_trace"]


def test_the_first_examples_are_measured_where_not_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(measure_noise, "examples_that_fit", lambda source: min(len(source), 100))
  workload = load_workload("quadratic")
  measurements = NoiseMeasurements(workload, make_mesh())
  np.testing.assert_array_equal(measurements.examples["center"], workload.train.arrays["center"][:100])
  assert measurements.num_examples == route_population(workload) == 100
