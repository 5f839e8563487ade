"""Your own model in plain JAX, the whole contract spelled out: a softmax regression on the embedded digits.

python -m experiments.doctor --workload=docs/examples/my_model.py:make_workload
"""

import jax
import jax.numpy as jnp
import optax

from bsjax.data import load_source
from bsjax.types import Variables
from bsjax.workloads import Preset, Target, Workload, mean_train_loss


def init(key):
  return Variables(params={"w": 0.01 * jax.random.normal(key, (64, 10)), "b": jnp.zeros(10)}, model_state={})


def logits(params, example):
  return example["image"].reshape(-1) / 16.0 @ params["w"] + params["b"]


def example_loss(params, model_state, example):
  return optax.softmax_cross_entropy_with_integer_labels(logits(params, example), example["label"])


def example_metrics(params, model_state, example):
  hit = jnp.argmax(logits(params, example)) == example["label"]
  return {"loss": example_loss(params, model_state, example), "accuracy": hit.astype(jnp.float32)}


def make_workload():
  splits = {split: load_source("digits", split) for split in ("train", "validation", "test")}
  target = Target("validation_accuracy", 0.93, "max")
  preset = Preset(batch_sizes=(1, 8, 64, 512), base_learning_rate=0.2, num_epochs=8, num_steps=256)
  functions = {"example_loss": example_loss, "train_loss": mean_train_loss(example_loss)}
  functions |= {"init": init, "example_metrics": example_metrics}
  return Workload(name="my_softmax_regression", target=target, preset=preset, **functions, **splits)
