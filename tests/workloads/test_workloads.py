"""Workloads by name and from a user's file, and the quadratic against its closed form."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.workloads import WORKLOADS, load_workload, num_params
from bsjax.workloads.quadratic import SPECTRUM

ROOT = Path(__file__).parents[2]
MNIST = ROOT.parent / "shared" / "data" / "mnist"


def test_unknown_name_lists_the_known_ones() -> None:
  with pytest.raises(
    ValueError,
    match="'digits_mpl' is unknown.*digits_mlp, digits_cnn, digits_vit, mnist_mlp, .*, quadratic; or path/to/file.py:function",
  ):
    load_workload("digits_mpl")


def test_the_issue_s_workloads_are_there() -> None:
  assert {"digits_mlp", "digits_cnn", "digits_vit", "mnist_mlp", "mnist_f1", "quadratic"} <= WORKLOADS.keys()
  assert {"mnist_f1_ghost", "mnist_simple_cnn", "mnist_simple_cnn_narrow"} <= WORKLOADS.keys()


@pytest.mark.parametrize(
  ("name", "expected"), [("digits_mlp", 64 * 64 + 64 + 64 * 10 + 10), ("digits_vit", 18_090), ("quadratic", 16)]
)
def test_parameters_and_splits(name: str, expected: int) -> None:
  workload = load_workload(name)
  assert num_params(workload) == expected
  sizes = [len(split) for split in (workload.train, workload.validation, workload.test)]
  assert sizes == ([512] * 3 if name == "quadratic" else [1024, 386, 387])


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn", "digits_vit"])
def test_loss_of_an_untrained_classifier_is_near_log_10(name: str) -> None:
  """At random weights no class is favoured much: mean cross-entropy near log(10), far from 0 and from 10."""
  workload = load_workload(name)
  variables = workload.init(jax.random.key(0))
  batch = {key: jnp.asarray(array[:256]) for key, array in workload.train.arrays.items()}
  loss, _ = workload.train_loss(variables.params, variables.model_state, batch, jax.random.key(1))
  examples = jax.vmap(workload.example_loss, (None, None, 0))(variables.params, variables.model_state, batch)
  np.testing.assert_allclose(loss, np.mean(np.asarray(examples, np.float64)), rtol=1e-5)
  assert abs(float(loss) - np.log(10)) < 0.7
  metrics = jax.vmap(workload.example_metrics, (None, None, 0))(variables.params, variables.model_state, batch)
  np.testing.assert_array_equal(metrics["loss"], examples)
  assert set(np.unique(metrics["accuracy"])) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["digits_mlp", "quadratic"])
def test_init_is_a_pure_function_of_the_key(name: str) -> None:
  workload = load_workload(name)
  for a, b in zip(*(jax.tree.leaves(workload.init(jax.random.key(3))) for _ in range(2)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_quadratic_is_its_closed_form() -> None:
  """G = H w, H = diag(SPECTRUM), tr(Sigma) = sum h^2 Var(c), by automatic differentiation and by numpy."""
  workload = load_workload("quadratic")
  params = {"w": jnp.linspace(-1, 1, 16)}
  centers = workload.train.arrays["center"].astype(np.float64)
  grads = jax.vmap(jax.grad(workload.example_loss), (None, None, 0))(
    params, {}, {"center": jnp.asarray(centers, jnp.float32)}
  )["w"]
  # centres are shifted to mean zero in float64 and stored in float32: 512 roundings of numbers of size one
  np.testing.assert_allclose(
    np.mean(np.asarray(grads, np.float64), axis=0), SPECTRUM * np.linspace(-1, 1, 16), atol=1e-6
  )
  trace = np.asarray(grads, np.float64).var(axis=0, ddof=1).sum()
  np.testing.assert_allclose(trace, (SPECTRUM**2 * centers.var(axis=0, ddof=1)).sum(), rtol=1e-5)
  example = {"center": jnp.zeros(16)}
  hessian = jax.hessian(lambda w: workload.example_loss({"w": w}, {}, example))(params["w"])
  np.testing.assert_allclose(hessian, np.diag(SPECTRUM), atol=1e-6)


def test_the_documented_example_works() -> None:
  workload = load_workload(f"{ROOT / 'docs' / 'examples' / 'my_model.py'}:make_workload")
  assert workload.name == "my_softmax_regression"
  assert num_params(workload) == 650


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"the raw MNIST files are not at {MNIST}")
def test_mnist_through_tfds_s_own_builder(tmp_path: Path) -> None:
  """The same path as digits; F1 has the parameters of Keskar et al.'s Table 1."""
  workload = load_workload("mnist_f1", data_dir=str(tmp_path), manual_dir=str(MNIST))
  assert num_params(workload) == 1_462_794
  assert [len(split) for split in (workload.train, workload.validation, workload.test)] == [55_000, 5_000, 10_000]
  assert workload.batch_norm == "running"
