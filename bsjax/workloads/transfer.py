"""Pairs of tasks: one to pre-train on, another to fine-tune on, and a start from what was learned."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.data import Source
from bsjax.models import Model, mlp
from bsjax.types import Key, Params, Variables
from bsjax.workloads.classification import classification
from bsjax.workloads.splits import DataOptions
from bsjax.workloads.workload import Preset, Target, Workload


class Transfer(NamedTuple):
  """Two workloads with the same network, but for its head.

  `head` names the entries of the parameters that belong to the first task alone and start anew in the second; none where both tasks have
  the same outputs, as in text.
  """

  pretrain: Workload
  finetune: Workload
  head: tuple[str, ...]


def with_classes(workload: Workload, name: str, classes: Collection[int]) -> Workload:
  """Keeps the examples of some classes, in all three splits, and numbers these classes from 0 in ascending order."""
  kept = np.array(sorted(classes))

  def keep(source: Source) -> Source:
    labels = source.arrays["label"]
    rows = np.flatnonzero(np.isin(labels, kept))
    arrays = source.fetch(rows)
    return Source(
      source.name, source.split, arrays | {"label": np.searchsorted(kept, arrays["label"]).astype(labels.dtype)}
    )

  train, validation, test = (
    keep(split.first(len(split))) for split in (workload.train, workload.validation, workload.test)
  )
  return dataclasses.replace(workload, name=name, train=train, validation=validation, test=test)


def start_from(pretrained: Variables, workload: Workload, head: Collection[str], name: str) -> Workload:
  """Builds the workload whose training starts from pre-trained variables.

  Args:
    pretrained: of one or several trained networks, stacked on a leading axis; a seed starts from one of them, drawn at random, so that
      seeds differ in their pre-training, too.
    head: entries of the parameters that start anew.
    name: of the new workload: it must tell what it starts from, since the ids of trials depend on it.
  """
  count = len(jax.tree.leaves(pretrained.params)[0])

  def init(key: Key) -> Variables:
    which = jax.random.randint(jax.random.fold_in(key, 1), (), 0, count)
    taken = jax.tree.map(lambda array: jnp.asarray(array)[which], pretrained)
    fresh: Mapping[str, Params] = workload.init(key).params
    return Variables({part: fresh[part] if part in head else taken.params[part] for part in fresh}, taken.model_state)

  return dataclasses.replace(workload, name=name, init=jax.jit(init))


def _halves(name: str, whole: Callable[[], Workload], head: str) -> Transfer:
  """Builds the transfer from the first five of ten classes to the other five."""
  workload = whole()
  first, second = (with_classes(workload, f"{name}_{part[0]}to{part[-1]}", part) for part in (range(5), range(5, 10)))
  return Transfer(first, second, (head,))


def _digits(model: Model, **data: Unpack[DataOptions]) -> Workload:
  return classification(
    "digits",
    "digits",
    model,
    pixel_max=16.0,
    target=Target("validation_accuracy", 0.95, "max"),
    preset=Preset((8, 32, 128, 256), 0.2, reference_batch_size=8, num_epochs=32),
    **data,
  )


def digits(**data: Unpack[DataOptions]) -> Transfer:
  """The digits 0 to 4, then 5 to 9: a 64-64-5 perceptron, about 500 examples of each."""
  return _halves("digits", lambda: _digits(mlp((8, 8, 1), (64,), 5), **data), "Dense_1")


def mnist(**data: Unpack[DataOptions]) -> Transfer:
  """MNIST's digits 0 to 4, then 5 to 9: a 784-128-128-5 perceptron, about 27,000 examples of each."""
  preset = Preset((32, 128, 512, 2048), 0.1, num_epochs=2)
  target = Target("validation_accuracy", 0.95, "max")
  model = mlp((28, 28, 1), (128, 128), 5)
  return _halves(
    "mnist", lambda: classification("mnist", "mnist", model, target=target, preset=preset, **data), "Dense_2"
  )


TRANSFERS: dict[str, Callable[..., Transfer]] = {function.__name__: function for function in (digits, mnist)}
