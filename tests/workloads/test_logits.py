"""A classifier from its logits, against the cross-entropy in float64 and against a loop over examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.data import Source
from bsjax.types import Variables
from bsjax.workloads import Preset, Target, check_workload, workload_from_logits

DRAW = np.random.default_rng(0)
SOURCE = Source("made_up", "train", {"x": DRAW.normal(size=(6, 4)).astype(np.float32), "label": DRAW.integers(0, 3, 6)})
OPTIONS = dict.fromkeys(("train", "validation", "test"), SOURCE) | {
  "target": Target("validation_accuracy", 0.9, "max"),
  "preset": Preset(batch_sizes=(1, 2), base_learning_rate=0.1),
}


def init(key):
  return Variables({"w": jax.random.normal(key, (4, 3))}, {})


def logits(params, model_state, example):
  return example["x"] @ params["w"]


def cross_entropies(w: np.ndarray) -> np.ndarray:
  z = SOURCE.arrays["x"].astype(np.float64) @ np.asarray(w, np.float64)
  return np.log(np.exp(z).sum(axis=1)) - z[np.arange(6), SOURCE.arrays["label"]]


def test_loss_and_metrics_are_those_of_softmax_cross_entropy() -> None:
  workload = check_workload(workload_from_logits("linear", init, logits, **OPTIONS), "test")
  variables = workload.init(jax.random.key(0))
  expected = cross_entropies(variables.params["w"])
  # float32 losses of size one: a few roundings of 6e-8
  np.testing.assert_allclose(
    workload.train_loss(*variables, SOURCE.arrays, jax.random.key(1))[0], expected.mean(), rtol=1e-6
  )
  metrics = jax.vmap(workload.example_metrics, (None, None, 0))(*variables, SOURCE.arrays)
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
  predicted = (SOURCE.arrays["x"] @ np.asarray(variables.params["w"])).argmax(axis=1)
  np.testing.assert_array_equal(metrics["accuracy"], predicted == SOURCE.arrays["label"])
  assert 0 < np.mean(metrics["accuracy"]) < 1
  in_parts = jax.vmap(lambda e: workload.output_loss(workload.example_outputs(*variables, e), e))(SOURCE.arrays)  # type: ignore[misc]
  np.testing.assert_allclose(in_parts, expected, rtol=1e-6)


def test_training_takes_the_logits_of_the_batch_where_they_are_given() -> None:
  def batch_logits(params, model_state, batch, key):
    return 2 * batch["x"] @ params["w"], {"count": model_state["count"] + 1}

  workload = workload_from_logits(
    "stateful",
    lambda key: Variables(init(key).params, {"count": jnp.zeros(())}),
    logits,
    batch_logits=batch_logits,
    batch_norm="running",
    **OPTIONS,
  )
  assert workload.batch_norm == "running"
  variables = workload.init(jax.random.key(0))
  loss, state = workload.train_loss(*variables, SOURCE.arrays, jax.random.key(1))
  assert float(state["count"]) == 1
  np.testing.assert_allclose(loss, cross_entropies(2 * variables.params["w"]).mean(), rtol=1e-6)
  example = {name: array[0] for name, array in SOURCE.arrays.items()}
  assert float(workload.example_loss(*variables, example)) == pytest.approx(cross_entropies(variables.params["w"])[0])
