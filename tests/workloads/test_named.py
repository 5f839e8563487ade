"""Every named workload: its parameters are those of its description, and on fake data it trains, is probed and evaluated."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import gradient_noise
from bsjax.train import chunked, evaluate
from bsjax.workloads import WORKLOADS, load_workload, num_params
from bsjax.workloads.text import TEXTS
from bsjax.workloads.vision import RECIPES

DOCS = Path(__file__).parents[2] / "docs" / "workloads.md"
TRAINED = ("mnist_f1_ghost", "mnist_lenet", "cifar10_resnet8", "svhn_autoencoder", "shakespeare_lstm")
"""One of each kind, small enough for a test; the command in docs/workloads.md runs any."""
OF_THE_PAPERS = {
  "mnist_f1": 1_462_794,
  "f2_substitute": 2_780_085,
  "cifar10_c1": 1_757_834,
  "cifar10_c2": 14_991_946,
  "imagenet_resnet50": 25_557_032,
  "imagenet_vgg11": 132_863_336,
}


@pytest.mark.parametrize("name", [name for name in WORKLOADS if not name.startswith("mnist_fc")])
def test_parameters_are_those_of_the_description(name):
  """Shapes only: nothing is computed, and `load_workload` has checked the shapes of losses and metrics."""
  workload = load_workload(name, fake_data=True)
  about = (RECIPES | TEXTS)[name].about if name in RECIPES | TEXTS else ""
  for count in re.findall(r"P = ([\d,]+)", about):
    assert num_params(workload) == int(count.replace(",", ""))
  if name in OF_THE_PAPERS:
    assert num_params(workload) == OF_THE_PAPERS[name]
  made = name in ("quadratic", "f2_substitute")
  assert workload.name == (name if made else f"fake_{name}")
  assert max(workload.preset.batch_sizes) <= len(workload.train)


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_a_probe_and_an_evaluation_on_fake_data(name):
  workload = load_workload(name, fake_data=True)
  variables = workload.init(jax.random.key(0))
  batch = {key: jnp.asarray(array) for key, array in workload.train.first(4).arrays.items()}

  @jax.jit
  def run(variables, batch, validation):
    (loss, state), grads = jax.value_and_grad(workload.train_loss, has_aux=True)(*variables, batch, jax.random.key(1))
    params = jax.tree.map(lambda p, g: p - 0.01 * g, variables.params, grads)
    return loss, params, evaluate(workload.example_metrics, params, state, validation), state

  loss, params, metrics, state = run(variables, batch, chunked(workload.validation.first(8).arrays))
  assert np.isfinite([float(loss), *map(float, metrics.values())]).all()
  assert jax.tree.structure(state) == jax.tree.structure(variables.model_state)
  noise = gradient_noise(lambda params, example: workload.example_loss(params, state, example), params, batch)
  assert noise.total.grad_cov_trace.value > 0


def test_the_page_of_workloads_lists_every_one():
  lines = DOCS.read_text().splitlines()
  for name in WORKLOADS:
    if not name.startswith("mnist_fc"):
      assert sum(line.startswith(f"| `{name}` ") for line in lines) == 1, name
  for name, recipe in (RECIPES | TEXTS).items():
    if not name.startswith("mnist_fc"):
      (line,) = [line for line in lines if line.startswith(f"| `{name}` ")]
      assert recipe.about.replace("|", "\\|") in line
