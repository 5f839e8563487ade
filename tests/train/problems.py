"""Small problems that the training tests share; made once, so that programs are compiled once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsjax.data import Source
from bsjax.models import cnn, mlp
from bsjax.types import Array, Batch, Example, Key, Metrics, ModelState, Params, Variables
from bsjax.workloads import Preset, Target, Workload, load_workload

PRESET = Preset(batch_sizes=(2, 4), base_learning_rate=0.1)


def _source(split: str, seed: int, count: int, shape: tuple[int, ...]) -> Source:
  draw = np.random.default_rng(seed)
  label = draw.integers(0, 3, count).astype(np.int32)
  image = draw.normal(size=(count, *shape)) + label.reshape(-1, *[1] * len(shape))
  return Source("made_up", split, {"image": image.astype(np.float32), "label": label})


@functools.cache
def quadratic() -> Workload:
  return load_workload("quadratic")


@functools.cache
def classifier(kind: str) -> Workload:
  """A tiny classifier on made-up images: `mlp`, `mlp_bn` (batch norm) or `cnn`; 37 training examples, 11 to validate."""
  shape = (6, 6, 1)
  model = {
    "mlp": lambda: mlp(shape, (7,), 3),
    "mlp_bn": lambda: mlp(shape, (7, 5), 3, batch_norm="running"),
    "cnn": lambda: cnn(shape, 3),
  }[kind]()

  def example_logits(params: Params, model_state: ModelState, example: Example) -> Array:
    return model.apply(params, model_state, example["image"][None], train=False)[0][0]

  def example_loss(params: Params, model_state: ModelState, example: Example) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(
      example_logits(params, model_state, example), example["label"]
    )

  def example_metrics(params: Params, model_state: ModelState, example: Example) -> Metrics:
    hit = jnp.argmax(example_logits(params, model_state, example)) == example["label"]
    return {"loss": example_loss(params, model_state, example), "accuracy": hit.astype(jnp.float32)}

  def train_loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> tuple[Array, ModelState]:
    logits, new_state = model.apply(params, model_state, batch["image"], train=True)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])), new_state

  return Workload(
    name=kind,
    init=jax.jit(model.init),
    example_loss=example_loss,
    train_loss=train_loss,
    example_metrics=example_metrics,
    train=_source("train", 0, 37, shape),
    validation=_source("validation", 1, 11, shape),
    test=_source("test", 2, 11, shape),
    target=Target("validation_accuracy", 0.8, "max"),
    preset=PRESET,
    batch_norm="running" if kind == "mlp_bn" else "none",
  )


def in_float64(workload: Workload) -> Workload:
  """The same problem with float64 parameters, model state and images; for use under `jax.enable_x64`."""

  def double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype("float64") if leaf.dtype == "float32" else leaf, tree)

  def double_source(source: Source) -> Source:
    return dataclasses.replace(source, arrays=double(dict(source.arrays)))

  return dataclasses.replace(
    workload,
    init=lambda key: Variables(*double(tuple(workload.init(key)))),
    train=double_source(workload.train),
    validation=double_source(workload.validation),
  )
