"""Image classification: a data set and a network become a `Workload`."""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.data import Augment, augment_batch, center_crop
from bsjax.models import Model
from bsjax.types import Array, Batch, Example, Key, ModelState, Params
from bsjax.workloads.logits import Smoothing, workload_from_logits
from bsjax.workloads.splits import DataOptions, load_splits
from bsjax.workloads.workload import BatchNorm, Preset, Target, Workload, fake_preset


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

  def batch_logits(params: Params, model_state: ModelState, batch: Batch, key: Key) -> tuple[Array, ModelState]:
    images = scaled(batch["image"])
    if augment is not None:
      images = augment_batch(augment, jax.random.fold_in(key, 1), images)
    return model.apply(params, model_state, standardised(images), train=True, key=key)

  train, validation, test = load_splits(dataset, **data)
  trains_otherwise = batch_norm != "none" or dropout or augment is not None
  return workload_from_logits(
    f"fake_{name}" if data.get("fake_data") else name,
    model.init,
    example_logits,
    train=train,
    validation=validation,
    test=test,
    target=target,
    preset=fake_preset(preset) if data.get("fake_data") else preset,
    batch_logits=batch_logits if trains_otherwise else None,
    batch_norm=batch_norm,
    label_smoothing=label_smoothing,
    smoothing=smoothing,
  )
