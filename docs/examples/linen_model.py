"""Your own model in Flax linen: a perceptron with one hidden layer on the embedded digits.

python -m experiments.doctor --workload=docs/examples/linen_model.py:make_workload
"""

import jax.numpy as jnp
from flax import linen as nn

from bsjax.data import load_source
from bsjax.types import Variables
from bsjax.workloads import Preset, Target, workload_from_logits


class Network(nn.Module):
  @nn.compact
  def __call__(self, image):
    hidden = nn.relu(nn.Dense(32)(image.reshape(-1) / 16.0))
    return nn.Dense(10)(hidden)


def init(key):
  return Variables(Network().init(key, jnp.zeros((8, 8, 1)))["params"], model_state={})


def logits(params, model_state, example):
  return Network().apply({"params": params}, example["image"])


def make_workload():
  return workload_from_logits(
    "my_linen_model",
    init,
    logits,
    **{split: load_source("digits", split) for split in ("train", "validation", "test")},
    target=Target("validation_accuracy", 0.93, "max"),
    preset=Preset(batch_sizes=(1, 8, 64, 512), base_learning_rate=0.2, num_epochs=8, num_steps=256),
  )
