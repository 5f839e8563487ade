"""Fake twins: what a reader of the spec alone would expect, and no file touched."""

import numpy as np
import pytest

from bsjax.data import DATASETS, DataError, load, load_source

LENGTH = 10


def fake(name, split):
  return load_source(name, split, fake=True, length=LENGTH if DATASETS[name].is_text else None)


@pytest.mark.parametrize("name", DATASETS)
def test_shapes_types_and_ranges_are_those_of_the_data_set(name):
  dataset = DATASETS[name]
  for split, size in (("train", 64), ("validation", 32), ("test", 32)):
    source = fake(name, split)
    assert (source.name, source.split, len(source)) == (f"fake_{name}", split, size)
    assert source.arrays.keys() == dataset.example.keys()
    for array, spec in dataset.example.items():
      shape = (LENGTH + 1,) if dataset.is_text else spec.shape
      assert (source.spec[array].shape, source.spec[array].dtype) == (shape, spec.dtype)
      bound = dataset.pixel_max + 1 if array == "image" else dataset.num_classes
      assert source.arrays[array].max() < bound
      # The largest of n uniform draws falls short of 0.7 times the bound with probability 0.7**n: below 1e-4 for n = 32.
      assert source.arrays[array].max() >= 0.7 * (bound - 1)


def test_no_file_is_touched(monkeypatch, tmp_path):
  def refuse(*args, **kwargs):
    raise AssertionError("not to be called")

  monkeypatch.setattr(load, "find_folders", refuse)
  monkeypatch.setattr("pathlib.Path.open", refuse)
  assert len(load_source("imagenet2012", "train", fake=True, data_dir=tmp_path / "none")) == 64


def test_the_same_each_time_and_different_from_its_neighbours():
  tokens = fake("lm1b", "train").arrays["tokens"]
  np.testing.assert_array_equal(tokens, fake("lm1b", "train").arrays["tokens"])
  assert not np.array_equal(tokens[:32], fake("lm1b", "test").arrays["tokens"])
  images = fake("cifar10", "train").arrays["image"]
  assert not np.array_equal(images, fake("cifar100", "train").arrays["image"])


def test_length_is_for_texts_and_for_all_of_them():
  for options in ({}, {"fake": True}):
    with pytest.raises(DataError, match=r"lm1b is a text: pass length="):
      load_source("lm1b", "train", **options)
    with pytest.raises(DataError, match=r"length=10 given, but mnist is no text; leave it out"):
      load_source("mnist", "train", length=10, **options)
  with pytest.raises(DataError, match="length=0, wanted at least 1"):
    load_source("lm1b", "train", fake=True, length=0)
