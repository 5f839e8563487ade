"""What a classification workload does to labels and pixels, in training and in what probes see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.data import flip
from bsjax.models import Model, mlp
from bsjax.types import Variables
from bsjax.workloads import Preset, Target
from bsjax.workloads.classification import classification
from bsjax.workloads.logits import cross_entropy

KEY = jax.random.key(0)
TARGET, PRESET = Target("validation_accuracy", 0.9, "max"), Preset((8,), 0.1)


def by_hand(logits, label, weights_of_label):
  """Minus sum of q log softmax, in float64."""
  logits = logits.astype(np.float64)
  log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  return -(weights_of_label(label, logits.shape[-1]) * log_probabilities).sum(axis=-1)


def szegedy(label, classes, s=0.1):
  return (1 - s) * np.eye(classes)[label] + s / classes


def shallue(label, classes, s=0.1):
  return np.where(np.eye(classes)[label] == 1, 1 - s, s / (classes - 1))


@pytest.mark.parametrize("convention", [szegedy, shallue])
def test_smoothed_labels_weigh_as_the_papers_say(convention):
  rng = np.random.default_rng(0)
  logits, label = rng.normal(size=(6, 5)).astype(np.float32), rng.integers(0, 5, 6)
  found = cross_entropy(jnp.asarray(logits), jnp.asarray(label), 0.1, convention.__name__)
  np.testing.assert_allclose(found, by_hand(logits, label, convention), rtol=2e-6)


def test_the_two_conventions_agree_without_smoothing_and_differ_with():
  logits, label = jnp.arange(5.0), jnp.asarray(1)
  plain = by_hand(np.arange(5.0), 1, lambda label, classes: np.eye(classes)[label])
  assert float(cross_entropy(logits, label)) == pytest.approx(float(plain), rel=1e-6)
  assert float(cross_entropy(logits, label, 0.1, "szegedy")) != pytest.approx(
    float(cross_entropy(logits, label, 0.1, "shallue")), rel=1e-4
  )


def test_a_label_beyond_the_classes_is_never_a_plausible_loss():
  assert np.isnan(cross_entropy(jnp.zeros(5), jnp.asarray(5)))


def sum_model() -> Model:
  """Two logits: the sum of all pixels and 0; the left half of the pixels counts threefold, so that a mirrored image differs."""

  def apply(params, model_state, images, *, train, key=None):
    weights = jnp.where(jnp.arange(images.shape[2]) < images.shape[2] // 2, 3.0, 1.0)[:, None]
    total = params["w"] * jnp.sum(images * weights, axis=(1, 2, 3))
    del train, key
    return jnp.stack([total, jnp.zeros_like(total)], axis=1), model_state

  return Model(lambda key: Variables({"w": jnp.float32(1)}, {}), apply)


def make(**options):
  return classification("made_up", "digits", sum_model(), target=TARGET, preset=PRESET, pixel_max=16.0, **options)


def first_logit(workload, example):
  return float(workload.example_outputs({"w": jnp.float32(1)}, {}, example)[0])


@pytest.fixture(scope="module")
def example():
  return {name: array[3] for name, array in make().train.arrays.items()} | {"label": np.int32(0)}


def weighted(pixels):
  return float(
    (pixels.astype(np.float64) * np.where(np.arange(pixels.shape[1]) < pixels.shape[1] // 2, 3.0, 1.0)[:, None]).sum()
  )


def test_pixels_are_scaled_then_cropped_then_standardised(example):
  image = example["image"] / 16.0
  assert first_logit(make(), example) == pytest.approx(weighted(image), rel=1e-5)
  assert first_logit(make(standardise=((0.25,), (0.5,))), example) == pytest.approx(
    weighted((image - 0.25) / 0.5), rel=1e-5
  )
  assert first_logit(make(crop=4), example) == pytest.approx(weighted(image[2:6, 2:6]), rel=1e-5)


def test_training_augments_by_its_key_and_probes_do_not(example):
  workload = make(augment=flip)
  batch = {name: jnp.asarray(array)[None] for name, array in example.items()}
  params = {"w": jnp.float32(0.01)}
  losses = {float(workload.train_loss(params, {}, batch, jax.random.key(seed))[0]) for seed in range(12)}
  plain, mirrored = (
    float(cross_entropy(jnp.array([0.01 * weighted(pixels / 16.0), 0.0]), 0))
    for pixels in (example["image"], example["image"][:, ::-1])
  )
  assert sorted(losses) == pytest.approx(sorted([plain, mirrored]), rel=1e-5)
  assert float(workload.example_loss(params, {}, example)) == pytest.approx(plain, rel=1e-5)
  darkened = make(augment=lambda key, image: image / 2)  # whatever the key
  losses = [darkened.example_loss(params, {}, example), darkened.example_metrics(params, {}, example)["loss"]]
  assert losses == pytest.approx([plain, plain], rel=1e-5)


def test_smoothing_is_in_the_loss_and_not_in_the_metrics(example):
  params = {"w": jnp.float32(0.1)}
  smoothed, plain = make(label_smoothing=0.2), make()
  assert float(smoothed.example_loss(params, {}, example)) > float(plain.example_loss(params, {}, example))
  assert smoothed.example_metrics(params, {}, example) == plain.example_metrics(params, {}, example)
  batch = {name: jnp.asarray(array)[None] for name, array in example.items()}
  for workload in (smoothed, make(label_smoothing=0.2, augment=lambda key, image: image)):
    loss, _ = workload.train_loss(params, {}, batch, KEY)
    assert float(loss) == pytest.approx(float(smoothed.example_loss(params, {}, example)), rel=1e-6)


def test_without_batch_norm_dropout_and_augmentation_training_is_the_mean_of_example_losses():
  workload = classification("plain", "digits", mlp((8, 8, 1), (4,), 10), target=TARGET, preset=PRESET, pixel_max=16.0)
  variables = workload.init(KEY)
  batch = {name: jnp.asarray(array) for name, array in workload.train.first(8).arrays.items()}
  loss, _ = workload.train_loss(variables.params, {}, batch, KEY)
  each = jax.vmap(workload.example_loss, in_axes=(None, None, 0))(variables.params, {}, batch)
  np.testing.assert_array_equal(loss, jnp.mean(each))
