"""Augmentations against their definition, and the distribution of what they draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from bsjax.data.augment import augment_batch, center_crop, chain, flip, rotated_shift, scaled_crop, shifted_crop

KEYS = jax.random.split(jax.random.key(0), 400)
IMAGE = np.random.default_rng(0).uniform(0.5, 1.5, (8, 12, 3)).astype(np.float32)


def drawn(augment, image, keys=KEYS):
  return np.asarray(jax.jit(jax.vmap(augment, in_axes=(0, None)))(keys, jnp.asarray(image)))


def share_is_near(hits, probability):
  """Within four standard deviations of a binomial share."""
  return abs(np.mean(hits) - probability) < 4 * (probability * (1 - probability) / len(hits)) ** 0.5


def test_flip_mirrors_columns_half_of_the_time():
  images = drawn(flip, IMAGE)
  mirrored = (images == IMAGE[:, ::-1]).all(axis=(1, 2, 3))
  assert (mirrored | (images == IMAGE).all(axis=(1, 2, 3))).all()
  assert share_is_near(mirrored, 0.5)


def test_shifted_crop_cuts_every_place_alike():
  padded = np.pad(IMAGE, ((1, 1), (1, 1), (0, 0)))
  places = {(top, left): padded[top : top + 8, left : left + 12] for top in range(3) for left in range(3)}
  images = drawn(shifted_crop(1), IMAGE)
  hits = np.array([(images == place).all(axis=(1, 2, 3)) for place in places.values()])
  assert (hits.sum(axis=0) == 1).all()
  assert all(share_is_near(row, 1 / 9) for row in hits)


@pytest.mark.parametrize(("max_degrees", "max_shift"), [(30.0, 0.0), (0.0, 0.4)])
def test_rotated_shift_is_scipys(max_degrees, max_shift):
  """The drawn angle or shift is read off the key as the function draws it; the resampling is SciPy's, in float64."""
  angle_key, shift_key = jax.random.split(KEYS[3])
  angle = np.deg2rad(float(jax.random.uniform(angle_key, minval=-max_degrees, maxval=max_degrees)))
  shift = np.asarray(jax.random.uniform(shift_key, (2,), minval=-max_shift, maxval=max_shift), np.float64) * [8, 12]
  turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
  middle = np.array([3.5, 5.5])
  offset = middle - turn @ (middle + shift)
  expected = np.stack(
    [
      scipy.ndimage.affine_transform(IMAGE[..., c].astype(np.float64), turn, offset, order=1, mode="nearest")
      for c in range(3)
    ],
    axis=-1,
  )
  found = drawn(rotated_shift(max_degrees=max_degrees, max_shift=max_shift), IMAGE, KEYS[3:4])[0]
  np.testing.assert_allclose(found, expected, atol=2e-5)
  assert np.abs(found - IMAGE).max() > 0.1


def test_rotated_shift_draws_the_whole_range():
  """The centre of mass of one bright pixel moves by up to 0.25 of 8 rows and of 12 columns, uniformly."""
  image = np.zeros((8, 12, 1), np.float32)
  image[3:5, 5:7] = 0.25
  images = drawn(rotated_shift(max_degrees=0.0, max_shift=0.25), image)[..., 0].astype(np.float64)
  rows = (images.sum(axis=2) @ np.arange(8)) - 3.5
  columns = (images.sum(axis=1) @ np.arange(12)) - 5.5
  for moved, reach in ((rows, 2.0), (columns, 3.0)):
    assert np.abs(moved).max() < reach + 1e-4
    assert np.std(moved) == pytest.approx(reach / 3**0.5, rel=0.1)
  assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2


def corners_of(images):
  """The part of the plane u(i, j) = i, v(i, j) = j that each crop covers, read off a linear image: (top, left, height, width)."""
  size = images.shape[1]
  step = (
    np.diff(images[:, 1:-1, 1:-1], axis=1).mean(axis=(1, 2))[:, 0],
    np.diff(images[:, 1:-1, 1:-1], axis=2).mean(axis=(1, 2))[:, 1],
  )
  middle = images.mean(axis=(1, 2)) + 0.5
  heights, widths = step[0] * size, step[1] * size
  return middle[:, 0] - heights / 2, middle[:, 1] - widths / 2, heights, widths


@functools.cache
def plane_crops():
  rows, columns = np.meshgrid(np.arange(48.0), np.arange(64.0), indexing="ij")
  plane = np.stack([rows, columns], axis=-1).astype(np.float32)
  # enlarging: nothing but the outermost pixels see the border, where linear interpolation is flat
  return corners_of(drawn(scaled_crop(96, area=(0.2, 0.8)), plane).astype(np.float64))


def test_scaled_crop_has_the_areas_and_shapes_that_it_names():
  _, _, heights, widths = plane_crops()
  areas, ratios = heights * widths / (48 * 64), widths / heights
  assert areas.min() > 0.17
  assert areas.max() < 0.85
  assert np.mean(areas) == pytest.approx(0.5, abs=0.05)
  assert ratios.min() > 0.7
  assert ratios.max() < 1.43
  assert (ratios < 1).mean() == pytest.approx(0.5, abs=0.12)


def test_scaled_crop_lies_inside_and_everywhere():
  tops, lefts, heights, widths = plane_crops()
  for start, length, whole in ((tops, heights, 48), (lefts, widths, 64)):
    assert start.min() > -0.7
    assert (start + length).max() < whole + 0.7
    place = start / (whole - length)
    assert np.mean(place) == pytest.approx(0.5, abs=0.06)
    assert np.std(place) == pytest.approx(12**-0.5, abs=0.05)


def test_scaled_crop_that_never_fits_is_the_central_square():
  """No part of 90 to 100 % of a long strip has an aspect near 1."""
  strip = np.random.default_rng(1).uniform(size=(4, 40, 1)).astype(np.float32)
  images = drawn(scaled_crop(4, area=(0.9, 1.0)), strip, KEYS[:3])
  np.testing.assert_allclose(images, np.broadcast_to(strip[:, 18:22], images.shape), atol=1e-6)


def test_a_batch_has_a_key_for_each_image_and_a_chain_for_each_step():
  images = jnp.broadcast_to(jnp.asarray(IMAGE), (16, *IMAGE.shape))
  once = augment_batch(shifted_crop(2), KEYS[0], images)
  np.testing.assert_array_equal(once, augment_batch(shifted_crop(2), KEYS[0], images))
  assert len({image.tobytes() for image in np.asarray(once)}) > 8
  both = drawn(chain(flip, flip), IMAGE)  # with one key for both, nothing would ever be mirrored
  assert share_is_near((both == IMAGE[:, ::-1]).all(axis=(1, 2, 3)), 0.5)


def test_center_crop_is_central():
  np.testing.assert_array_equal(center_crop(jnp.asarray(IMAGE), 4), IMAGE[2:6, 4:8])
