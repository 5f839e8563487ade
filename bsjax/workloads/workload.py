"""`Workload`: a model, its data, its loss and its target, as one frozen value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from bsjax.data import RecordSource, Source
from bsjax.types import Array, Batch, Example, Key, Metrics, ModelState, Params, Variables

BatchNorm = Literal["none", "running", "batch", "ghost"]
"""Which statistics `example_loss` normalises with: "batch" and "ghost" are those of whatever batch is given, so that the loss of one
example is not defined: such a workload can be trained, and per-example probes refuse it."""


class Target(NamedTuple):
  """What "steps to target" means: the first evaluation at which `metric` reaches `goal`."""

  metric: str
  goal: float
  direction: Literal["max", "min"]

  def is_reached(self, value: float) -> bool:
    """Tells whether a value of the metric is at the goal or beyond; one that is not a number never is."""
    return value >= self.goal if self.direction == "max" else value <= self.goal


class Preset(NamedTuple):
  """What a study of this workload asks for when no flag says otherwise."""

  batch_sizes: tuple[int, ...]
  base_learning_rate: float
  """A guess of the best rate at `reference_batch_size`; the grid is centred on it and widened from there."""
  reference_batch_size: int = 32
  num_epochs: float = 16
  num_steps: int = 1024
  num_rates: int = 5
  tuning_seeds: int = 3
  final_seeds: int = 5
  train_loss: float = 0.1
  """What "at equal training loss" means: solutions are compared where they first reach it."""


def fake_preset(preset: Preset) -> Preset:
  """Shrinks a preset to what fake data can serve: a few steps at small batch sizes, to see that everything runs."""
  return preset._replace(
    batch_sizes=(4, 8, 16),
    reference_batch_size=8,
    num_epochs=1,
    num_steps=8,
    num_rates=3,
    tuning_seeds=1,
    final_seeds=3,
  )


@dataclass(frozen=True, eq=False)
class Workload:
  """Everything training and probes need to know of a problem.

  Attributes:
    init: `key -> Variables`, a pure function.
    example_loss: loss of one example in inference mode (no dropout, running batch-norm statistics): what probes see.
    train_loss: `(params, model_state, batch, key) -> (mean loss of the batch, new model_state)` in training mode.
    example_metrics: `(params, model_state, example) -> {"loss": ..., "accuracy": ...}` of one example, in inference mode;
      summed and counted over a data set, divided once.
    train, validation, test: the data. The target is tested on `validation`; `test` is looked at once, at the end.
    batch_norm: which statistics `example_loss` uses; written in every record.
    example_outputs, output_loss: `example_loss` in two parts, `(params, model_state, example) -> outputs` and `(outputs, example) ->
      loss`, for the Gauss-Newton matrix; without both it is not measured.
    tokens_per_example: predictions in one example of a text, the same in all; 0 where examples are no text. Rows of records then
      count `tokens_seen` beside `examples_seen`.
  """

  name: str
  init: Callable[[Key], Variables]
  example_loss: Callable[[Params, ModelState, Example], Array]
  train_loss: Callable[[Params, ModelState, Batch, Key], tuple[Array, ModelState]]
  example_metrics: Callable[[Params, ModelState, Example], Metrics]
  train: Source | RecordSource
  validation: Source | RecordSource
  test: Source | RecordSource
  target: Target
  preset: Preset
  batch_norm: BatchNorm = "none"
  example_outputs: Callable[[Params, ModelState, Example], Array] | None = None
  output_loss: Callable[[Array, Example], Array] | None = None
  tokens_per_example: int = 0


def mean_train_loss(
  example_loss: Callable[[Params, ModelState, Example], Array],
) -> Callable[[Params, ModelState, Batch, Key], tuple[Array, ModelState]]:
  """Derives `train_loss` for a model without batch norm and dropout: the vmapped mean of `example_loss`."""

  def train_loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> tuple[Array, ModelState]:
    del key  # nothing random in this loss
    losses = jax.vmap(example_loss, in_axes=(None, None, 0))(params, model_state, batch)
    return jnp.mean(losses), model_state

  return train_loss


def num_params(workload: Workload) -> int:
  """Counts the trainable parameters, P, without computing any."""
  shapes = jax.eval_shape(workload.init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
