"""The examples of docs/examples: short, they learn, and their gradient noise can be measured."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import gradient_noise, per_example_grads
from bsjax.train import build_segment, chunked, device_arrays, init_state, make_mesh
from bsjax.train.trial import TrialConfig
from bsjax.types import Hparams
from bsjax.workloads import load_workload

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.py"))


def test_there_is_one_for_each_way_to_write_a_model() -> None:
  assert {path.stem for path in EXAMPLES} == {"my_model", "linen_model", "nnx_model", "equinox_model"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
  assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_and_is_measured(path: Path) -> None:
  workload = load_workload(f"{path}:make_workload")
  config, mesh = TrialConfig(workload.name, 32, 64, 32), make_mesh(data=1)
  states = jax.tree.map(lambda leaf: leaf[None], init_state(workload, "sgd", Hparams(0.2), jnp.uint32(0)))
  hparams = jax.tree.map(lambda value: jnp.full(1, value, jnp.float32), Hparams(0.2))
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays)
  segment = build_segment(workload, config, 1, mesh)
  states, rows = segment(states, hparams, jnp.zeros(1, jnp.uint32), jnp.int32(2), *data)
  first, second = rows.train_loss[0, :2]
  assert second < 0.75 * first
  # Guessing scores 0.1 of ten digits, with a standard error of 0.015 on 386 of them.
  assert rows.validation["accuracy"][0, 1] > 0.5
  params, model_state = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (states.params, states.model_state))
  examples = {name: array[:64] for name, array in workload.train.arrays.items()}

  def loss_fn(params, example):
    return workload.example_loss(params, model_state, example)

  noise = gradient_noise(loss_fn, params, examples)
  assert not any(route.startswith("vmap") for route in noise.routes.values())
  grads = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(per_example_grads(loss_fn, params, examples))]
  trace = sum(leaf.var(axis=0, ddof=1).sum() for leaf in grads)
  # Norms of 64 gradients in float32, by two routes: a few hundred roundings.
  np.testing.assert_allclose(noise.total.grad_cov_trace.value, trace, rtol=2e-5)
