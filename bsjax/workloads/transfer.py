"""Pairs of tasks: one to pre-train on, another to fine-tune on, and a start from what was learned."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.data import Source
from bsjax.models import language_model, mlp
from bsjax.types import Key, Params, Variables
from bsjax.workloads.classification import classification
from bsjax.workloads.splits import DataOptions
from bsjax.workloads.text import language_modelling
from bsjax.workloads.workload import Preset, Target, Workload

TARGET = Target("validation_accuracy", 0.95, "max")
SHAKESPEARE_LENGTH = 32


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


def digits(**data: Unpack[DataOptions]) -> Transfer:
  """The digits 0 to 4, then 5 to 9: a 64-64-5 perceptron, about 500 examples of each."""
  whole = classification(
    "digits",
    "digits",
    mlp((8, 8, 1), (64,), 5),
    pixel_max=16.0,
    target=TARGET,
    preset=Preset((8, 32, 128, 256), 0.2, reference_batch_size=8, num_epochs=32),
    **data,
  )
  parts = {"0to4": range(5), "5to9": range(5, 10)}
  first, second = (with_classes(whole, f"{whole.name}_{name}", part) for name, part in parts.items())
  return Transfer(first, second, ("Dense_1",))


def mnist(**data: Unpack[DataOptions]) -> Transfer:
  """MNIST's digits 0 to 4, then 5 to 9: a 784-128-128-5 perceptron, about 27,000 examples of each."""
  model, preset = mlp((28, 28, 1), (128, 128), 5), Preset((32, 128, 512, 2048), 0.1, num_epochs=2)
  first, second = (
    classification(name, name, model, target=TARGET, preset=preset, **data) for name in ("mnist_0to4", "mnist_5to9")
  )
  return Transfer(first, second, ("Dense_2",))


def shakespeare(**data: Unpack[DataOptions]) -> Transfer:
  """Bytes of Shakespeare's tragedies and histories, then of his comedies and romances: a decoder of two blocks of width 64."""
  model = language_model(256, SHAKESPEARE_LENGTH, width=64, num_heads=2)
  preset = Preset((8, 32, 128, 512), 0.3, reference_batch_size=32, num_epochs=2)
  first, second = (
    language_modelling(
      f"shakespeare_{domain}",
      f"tiny_shakespeare_{domain}",
      model,
      length=SHAKESPEARE_LENGTH,
      target=Target("validation_loss", 2.7, "min"),
      preset=preset,
      **data,
    )
    for domain in ("tragedies", "comedies")
  )
  return Transfer(first, second, ())


TRANSFERS: dict[str, Callable[..., Transfer]] = {
  function.__name__: function for function in (digits, mnist, shakespeare)
}
