"""Two workloads that no table holds: an autoencoder, and a stand-in for the licensed speech of F2."""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.data import Source
from bsjax.models import autoencoder, f2
from bsjax.types import Array, Batch, Example, Key, Metrics, ModelState, Params
from bsjax.workloads.logits import workload_from_logits
from bsjax.workloads.splits import DataOptions, load_splits
from bsjax.workloads.workload import Preset, Target, Workload, fake_preset

SVHN_IMAGE = (32, 32, 3)
AUTOENCODER = Preset(tuple(2**k for k in range(3, 11)), 0.1, reference_batch_size=64, num_epochs=20, num_steps=10_000)
FEATURES, CLASSES = 360, 1973
"""Of TIMIT as Keskar et al. (2017) prepared it: features of a frame, and states."""
FRAMES = {"train": 32_768, "validation": 4_096, "test": 4_096}
CENTRE_STD = 0.2
"""Spread of the classes' centres, in deviations of the noise: the nearest centre is then the right one for 61 % of the test frames, near
the 64 % that they report of F2 on TIMIT."""


def svhn_autoencoder(**data: Unpack[DataOptions]) -> Workload:
  """McCandlish et al. (2018): an autoencoder of InfoGAN's networks on SVHN, mean squared error of pixels in [0, 1].

  Batch norm: evaluated with running averages.
  """
  model = autoencoder(SVHN_IMAGE)

  def scaled(images: Array) -> Array:
    return images.astype(jnp.float32) / 255.0

  def example_outputs(params: Params, model_state: ModelState, example: Example) -> Array:
    return model.apply(params, model_state, scaled(example["image"])[None], train=False)[0][0]

  def output_loss(outputs: Array, example: Example) -> Array:
    return jnp.mean((outputs - scaled(example["image"])) ** 2)

  def example_loss(params: Params, model_state: ModelState, example: Example) -> Array:
    return output_loss(example_outputs(params, model_state, example), example)

  def example_metrics(params: Params, model_state: ModelState, example: Example) -> Metrics:
    return {"loss": example_loss(params, model_state, example)}

  def train_loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> tuple[Array, ModelState]:
    images = scaled(batch["image"])
    outputs, new_model_state = model.apply(params, model_state, images, train=True, key=key)
    return jnp.mean((outputs - images) ** 2), new_model_state

  train, validation, test = load_splits("svhn", **data)
  return Workload(
    name="fake_svhn_autoencoder" if data.get("fake_data") else "svhn_autoencoder",
    init=jax.jit(model.init),
    example_loss=example_loss,
    train_loss=train_loss,
    example_metrics=example_metrics,
    train=train,
    validation=validation,
    test=test,
    target=Target("validation_loss", 0.004, "min"),
    preset=fake_preset(AUTOENCODER) if data.get("fake_data") else AUTOENCODER,
    batch_norm="running",
    example_outputs=example_outputs,
    output_loss=output_loss,
  )


def f2_substitute(**data: Unpack[DataOptions]) -> Workload:
  """Keskar et al. (2017), F2, on a substitute for TIMIT, which is licensed: made-up frames around 1,973 random centres; P = 2,780,085.

  A frame of class c is m_c + z, with z ~ N(0, I) and the centres' entries ~ `CENTRE_STD` N(0, 1). Numbers on it say nothing of speech.
  Batch norm: evaluated with running averages, as `mnist_f1`. Needs no files.
  """
  del data  # made here
  model = f2((FEATURES,), CLASSES, batch_norm="running")
  train, validation, test = (_frames(split, seed) for seed, split in enumerate(FRAMES))
  return workload_from_logits(
    "f2_substitute",
    model.init,
    lambda params, state, example: model.apply(params, state, example["frame"][None], train=False)[0][0],
    train=train,
    validation=validation,
    test=test,
    target=Target("validation_accuracy", 0.5, "max"),
    preset=Preset((256, 1024, 4096), 0.05, reference_batch_size=256, num_epochs=20, num_steps=2560),
    batch_logits=lambda params, state, batch, key: model.apply(params, state, batch["frame"], train=True, key=key),
    batch_norm="running",
  )


def _frames(split: str, seed: int) -> Source:
  centres = CENTRE_STD * np.random.default_rng(0).standard_normal((CLASSES, FEATURES), np.float32)
  draw = np.random.default_rng((1, seed))
  labels = draw.integers(0, CLASSES, FRAMES[split], np.int32)
  frames = centres[labels] + draw.standard_normal((FRAMES[split], FEATURES), np.float32)
  return Source("f2_substitute", split, {"frame": frames, "label": labels})
