"""Image classification: a data set and a network become a `Workload`."""

from typing import Literal, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsjax.data import Augment, augment_batch, center_crop, load_source
from bsjax.models import Model
from bsjax.types import Array, Batch, Example, Key, Metrics, ModelState, Params
from bsjax.workloads.workload import BatchNorm, Preset, Target, Workload, mean_train_loss

Smoothing = Literal["szegedy", "shallue"]
"""Where label smoothing puts its weight s, of C classes. "szegedy" (Szegedy et al., 2016): s / C on every class, the label's included, so
that the label keeps 1 - s + s / C. "shallue" (Shallue et al., 2019): s / (C - 1) on every other class, so that it keeps 1 - s."""


class DataOptions(TypedDict, total=False):
  """Where the data of a named workload come from: its own keyword arguments, all optional."""

  data_dir: str | None
  """Where prepared data sets lie, or go."""
  manual_dir: str | None
  """Where raw files lie already."""
  fake_data: bool
  """Random data of the right shapes instead, without any file."""


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


def classification(
  name: str,
  dataset: str,
  model: Model,
  *,
  target: Target,
  preset: Preset,
  pixel_max: float = 255.0,
  standardise: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
  batch_norm: BatchNorm = "none",
  dropout: bool = False,
  augment: Augment | None = None,
  crop: int | None = None,
  label_smoothing: float = 0.0,
  smoothing: Smoothing = "szegedy",
  **data: Unpack[DataOptions],
) -> Workload:
  """Builds a workload with mean softmax cross-entropy (natural logarithm) over integer labels.

  Pixels stay unsigned bytes on the device and become f32 in [0, 1] (divided by `pixel_max`) inside the loss.

  Args:
    standardise: mean and standard deviation of each channel, in [0, 1]: pixels are then taken relative to them.
    dropout: whether the model drops units out in training.
    augment: changes each training image, by the key of the step, before it is standardised; never in probes and evaluations.
    crop: side of the central square that probes and evaluations see, where `augment` makes images of another size than the data have.
    label_smoothing: of the loss that is trained and probed; metrics are without.
    smoothing: its convention.
  """

  def scaled(images: Array) -> Array:
    return images.astype(jnp.float32) / pixel_max

  def standardised(images: Array) -> Array:
    if standardise is None:
      return images
    mean, std = (np.asarray(moment, np.float32) for moment in standardise)
    return (images - mean) / std

  def example_logits(params: Params, model_state: ModelState, example: Example) -> Array:
    image = scaled(example["image"])
    seen = standardised(image if crop is None else center_crop(image, crop))
    logits, _ = model.apply(params, model_state, seen[None], train=False)
    return logits[0]

  def output_loss(logits: Array, example: Example) -> Array:
    return cross_entropy(logits, example["label"], label_smoothing, smoothing)

  def example_loss(params: Params, model_state: ModelState, example: Example) -> Array:
    return output_loss(example_logits(params, model_state, example), example)

  def example_metrics(params: Params, model_state: ModelState, example: Example) -> Metrics:
    logits = example_logits(params, model_state, example)
    return {
      "loss": cross_entropy(logits, example["label"]),
      "accuracy": (jnp.argmax(logits) == example["label"]).astype(jnp.float32),
    }

  def batch_loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> tuple[Array, ModelState]:
    images = scaled(batch["image"])
    if augment is not None:
      images = augment_batch(augment, jax.random.fold_in(key, 1), images)
    logits, new_model_state = model.apply(params, model_state, standardised(images), train=True, key=key)
    return jnp.mean(cross_entropy(logits, batch["label"], label_smoothing, smoothing)), new_model_state

  fake = data.pop("fake_data", False)
  train, validation, test = (load_source(dataset, split, **data) for split in ("train", "validation", "test"))
  derived = batch_norm == "none" and not dropout and augment is None
  return Workload(
    name=f"fake_{name}" if fake else name,
    init=jax.jit(model.init),
    example_loss=example_loss,
    train_loss=mean_train_loss(example_loss) if derived else batch_loss,
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
