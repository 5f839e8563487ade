"""A classifier from the function that makes it one: the logits of an example."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from bsjax.data import RecordSource, Source
from bsjax.types import Array, Batch, Example, Key, Metrics, ModelState, Params, Variables
from bsjax.workloads.workload import BatchNorm, Preset, Target, Workload, mean_train_loss

Smoothing = Literal["szegedy", "shallue"]
"""Where label smoothing puts its weight s, of C classes. "szegedy" (Szegedy et al., 2016): s / C on every class, the label's included, so
that the label keeps 1 - s + s / C. "shallue" (Shallue et al., 2019): s / (C - 1) on every other class, so that it keeps 1 - s."""


def cross_entropy(logits: Array, label: Array, smoothing: float = 0.0, convention: Smoothing = "szegedy") -> Array:
  """Computes the softmax cross-entropy, in nats, with integer labels that may be smoothed.

      - sum_c q_c log softmax(logits)_c,        q the smoothed label (`Smoothing`)

  `f32[..., C], i32[...] -> f32[...]`. A label of C or more gives NaN.
  """
  plain = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  if smoothing == 0.0:
    return plain
  classes = logits.shape[-1]
  other = smoothing / (classes if convention == "szegedy" else classes - 1)  # what a class gets that is not the label
  uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
  return (1 - classes * other) * plain + classes * other * uniform


def workload_from_logits(
  name: str,
  init: Callable[[Key], Variables],
  example_logits: Callable[[Params, ModelState, Example], Array],
  *,
  train: Source | RecordSource,
  validation: Source | RecordSource,
  test: Source | RecordSource,
  target: Target,
  preset: Preset,
  batch_logits: Callable[[Params, ModelState, Batch, Key], tuple[Array, ModelState]] | None = None,
  batch_norm: BatchNorm = "none",
  label_smoothing: float = 0.0,
  smoothing: Smoothing = "szegedy",
) -> Workload:
  """Builds a classifier whose loss is the mean `cross_entropy` over integer labels.

  Args:
    init: `key -> Variables(params, model_state)`, a pure function; it is compiled here.
    example_logits: `(params, model_state, example) -> f[C]`, one example in inference mode; it scales its own inputs.
    train, validation, test: examples with a `label` in 0 ... C-1.
    target: of `validation_loss` or `validation_accuracy`.
    batch_logits: `(params, model_state, batch, key) -> (f[B, C], new model_state)` in training mode, for a model with batch norm or
      dropout; without it training uses `example_logits` too.
    batch_norm: which statistics `example_logits` normalises with.
    label_smoothing: of the loss that is trained and probed; metrics are without.
    smoothing: its convention.

  Returns:
    A workload whose loss is also known in the two parts that the Gauss-Newton matrix needs.
  """

  def output_loss(logits: Array, example: Example) -> Array:
    return cross_entropy(logits, example["label"], label_smoothing, smoothing)

  def example_loss(params: Params, model_state: ModelState, example: Example) -> Array:
    return output_loss(example_logits(params, model_state, example), example)

  def example_metrics(params: Params, model_state: ModelState, example: Example) -> Metrics:
    logits = example_logits(params, model_state, example)
    hit = jnp.argmax(logits) == example["label"]
    return {"loss": cross_entropy(logits, example["label"]), "accuracy": hit.astype(jnp.float32)}

  def batch_loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> tuple[Array, ModelState]:
    assert batch_logits is not None  # else this function is not used
    logits, new_model_state = batch_logits(params, model_state, batch, key)
    return jnp.mean(cross_entropy(logits, batch["label"], label_smoothing, smoothing)), new_model_state

  return Workload(
    name=name,
    init=jax.jit(init),
    example_loss=example_loss,
    train_loss=mean_train_loss(example_loss) if batch_logits is None else batch_loss,
    example_metrics=example_metrics,
    train=train,
    validation=validation,
    test=test,
    target=target,
    preset=preset,
    batch_norm=batch_norm,
    example_outputs=example_logits,
    output_loss=output_loss,
  )
