"""Your own model in Equinox (pip install equinox): a perceptron with one hidden layer on the embedded digits.

python -m experiments.doctor --workload=docs/examples/equinox_model.py:make_workload
"""

import equinox as eqx
import jax

from bsjax.data import load_source
from bsjax.types import Variables
from bsjax.workloads import Preset, Target, workload_from_logits


def network(key):
  return eqx.nn.MLP(in_size=64, out_size=10, width_size=32, depth=1, key=key)


_, STATIC = eqx.partition(network(jax.random.key(0)), eqx.is_array)  # activations and the like: the same for every key


def init(key):
  return Variables(eqx.filter(network(key), eqx.is_array), model_state={})


def logits(params, model_state, example):
  return eqx.combine(params, STATIC)(example["image"].reshape(-1) / 16.0)


def make_workload():
  return workload_from_logits(
    "my_equinox_model",
    init,
    logits,
    **{split: load_source("digits", split) for split in ("train", "validation", "test")},
    target=Target("validation_accuracy", 0.93, "max"),
    preset=Preset(batch_sizes=(1, 8, 64, 512), base_learning_rate=0.2, num_epochs=8, num_steps=256),
  )
