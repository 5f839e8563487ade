"""Your own model in Flax nnx, here with batch norm: a perceptron with one hidden layer on the embedded digits.

python -m experiments.doctor --workload=docs/examples/nnx_model.py:make_workload
"""

from flax import nnx

from bsjax.data import load_source
from bsjax.types import Variables
from bsjax.workloads import Preset, Target, workload_from_logits


def network(rngs):
  first, norm, last = nnx.Linear(64, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)
  return nnx.Sequential(first, norm, nnx.relu, last)


def init(key):
  _, params, statistics = nnx.split(network(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
  return Variables(nnx.to_pure_dict(params), nnx.to_pure_dict(statistics))


def apply(params, statistics, batch, train):
  model = nnx.merge(GRAPH, params, statistics)  # from plain arrays, so new: it may change inside jax.grad
  model.set_attributes(use_running_average=not train)
  return model(batch["image"].reshape(-1, 64) / 16.0), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


GRAPH, *_ = nnx.split(network(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)  # what is no array: the same for every key
PRESET = Preset(batch_sizes=(8, 64, 512), base_learning_rate=0.2, num_epochs=8, num_steps=256)


def make_workload():
  logits = lambda params, statistics, example: apply(params, statistics, example, train=False)[0][0]  # noqa: E731
  train = lambda params, statistics, batch, key: apply(params, statistics, batch, train=True)  # noqa: E731
  more = {split: load_source("digits", split) for split in ("train", "validation", "test")}
  more |= {"batch_logits": train, "batch_norm": "running", "target": Target("validation_accuracy", 0.93, "max")}
  return workload_from_logits("my_nnx_model", init, logits, preset=PRESET, **more)
