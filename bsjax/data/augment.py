"""Random changes of one training image, as pure functions of a key.

An `Augment` maps `(key, image f32[H, W, C])` to an image, so that a batch is augmented by `augment_batch` inside the training step, with
keys from the step's own key: resuming draws the same. Probes and evaluations never augment.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bsjax.types import Array, Key

Augment = Callable[[Key, Array], Array]
CROP_ATTEMPTS = 10


def augment_batch(augment: Augment, key: Key, images: Array) -> Array:
  """Augments `images` f[B, H, W, C], the one at position i by the i-th of `split(key, B)`."""
  return jax.vmap(augment)(jax.random.split(key, len(images)), images)


def chain(*augments: Augment) -> Augment:
  """Builds the augmentation that applies `augments` one after the other, each with a key of its own."""

  def augment(key: Key, image: Array) -> Array:
    for position, each in enumerate(augments):
      image = each(jax.random.fold_in(key, position), image)
    return image

  return augment


def flip(key: Key, image: Array) -> Array:
  """Mirrors an image left to right with probability 1/2."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def shifted_crop(padding: int) -> Augment:
  """Builds the crop of CIFAR: pads by `padding` zeros on every side and cuts the old size out, at each of the (2 padding + 1)^2 places
  alike.

  Source: He et al. (2016), section 4.2, with padding 4.
  """

  def augment(key: Key, image: Array) -> Array:
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

  return augment


def rotated_shift(*, max_degrees: float = 10.0, max_shift: float = 0.2) -> Augment:
  """Builds Keskar et al.'s rotation and translation: by an angle uniform in +- `max_degrees` around the centre, and by a part of height and
  of width, each uniform in +- `max_shift`.

      out[i, j] = image[ R(angle) ((i, j) - centre - shift) + centre ],    bilinear; beyond the border, the nearest pixel

  Source: Keskar et al. (2017), appendix E.1, who flip too (`flip`) and do not say what fills the border; the nearest pixel is the default
  of the library that their code uses.
  """

  def augment(key: Key, image: Array) -> Array:
    height, width, _ = image.shape
    angle_key, shift_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, minval=-max_degrees, maxval=max_degrees) * math.pi / 180
    shift = jax.random.uniform(shift_key, (2,), minval=-max_shift, maxval=max_shift) * jnp.array([height, width])
    middle = jnp.array([height - 1, width - 1]) / 2
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    row, column = rows - middle[0] - shift[0], columns - middle[1] - shift[1]
    places = [
      jnp.cos(angle) * row + jnp.sin(angle) * column + middle[0],
      jnp.cos(angle) * column - jnp.sin(angle) * row + middle[1],
    ]
    sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=places, order=1, mode="nearest")
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

  return augment


def scaled_crop(
  size: int, *, area: tuple[float, float] = (0.08, 1.0), aspect: tuple[float, float] = (3 / 4, 4 / 3)
) -> Augment:
  """Builds Goyal et al.'s scale and aspect-ratio augmentation: a random part of the image, resized to `size` x `size`.

  The part has a share of the area uniform in `area` and width / height uniform in `aspect`, upright or on its side with probability 1/2;
  of ten draws the first that fits is taken, at a place uniform among those where it fits, and the largest central square if none does.
  Resized linearly, with an antialiasing kernel where that shrinks.

  Source: Goyal et al. (2017), section 5.1, after Szegedy et al. (2015). Their code rounds the part to pixels and resizes by cubic kernels.
  """

  def augment(key: Key, image: Array) -> Array:
    height, width, channels = image.shape
    area_key, aspect_key, side_key, place_key = jax.random.split(key, 4)
    share = jax.random.uniform(area_key, (CROP_ATTEMPTS,), minval=area[0], maxval=area[1]) * height * width
    ratio = jax.random.uniform(aspect_key, (CROP_ATTEMPTS,), minval=aspect[0], maxval=aspect[1])
    ratio = jnp.where(jax.random.bernoulli(side_key, shape=(CROP_ATTEMPTS,)), 1 / ratio, ratio)
    parts = jnp.stack([jnp.sqrt(share / ratio), jnp.sqrt(share * ratio)], axis=1)  # heights, widths
    whole = jnp.array([height, width], jnp.float32)
    fits = jnp.all(parts <= whole, axis=1)
    part = jnp.where(jnp.any(fits), parts[jnp.argmax(fits)], jnp.min(whole))
    random_place = jax.random.uniform(place_key, (2,)) * (whole - part)
    place = jnp.where(jnp.any(fits), random_place, (whole - part) / 2)
    scale = size / part
    return jax.image.scale_and_translate(
      image, (size, size, channels), (0, 1), scale, -place * scale, method="linear", antialias=True
    )

  return augment


def center_crop(image: Array, size: int) -> Array:
  """Cuts the central `size` x `size` pixels out of `f[H, W, C]`: what an evaluation sees where training sees random crops."""
  top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
  return image[top : top + size, left : left + size]
