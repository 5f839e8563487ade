"""The table of data sets, against TFDS's own descriptions, the numbers of the papers, and itself."""

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest

from bsjax.data import DATASETS, DataError, load_source, split_size
from bsjax.data.datasets import find_dataset
from bsjax.data.prepare import EXTRAS, _builder_class
from bsjax.data.source import Spec

IMAGES = [name for name, dataset in DATASETS.items() if not dataset.is_text]


@pytest.mark.parametrize("name", DATASETS)
def test_examples_are_those_that_tfds_describes(name, tmp_path):
  dataset = DATASETS[name]
  features = _builder_class(dataset)(data_dir=tmp_path).info.features
  if dataset.is_text:
    assert list(features) == ["text"]
    assert dataset.num_classes - 1 <= np.iinfo(dataset.example["tokens"].dtype).max
    return
  assert features["label"].num_classes == dataset.num_labels
  shape = features["image"].shape
  assert dataset.example["image"].shape == shape or shape == (None, None, 3)
  assert (dataset.example["image"].dtype, dataset.example["label"].dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("name", DATASETS)
def test_splits_lie_in_their_parts(name):
  dataset = DATASETS[name]
  assert list(dataset.splits) == ["train", "validation", "test"]
  for split in dataset.splits.values():
    available = sum(dataset.parts[part] for part in split.parts)
    if not dataset.is_text:
      assert 0 <= split.start < split.stop <= available


def stretches(name, split):
  """The split as stretches of single parts: (part, first, one after the last)."""
  dataset = DATASETS[name]
  parts, start, stop, _ = dataset.splits[split]
  if dataset.is_text and len(parts) > 1:
    return [("text", start, stop)]
  found, offset = [], 0
  for part in parts:
    size = dataset.parts[part]
    found.append((part, max(start - offset, 0), size if stop is None else min(stop - offset, size)))
    offset += size
  return [(part, first, last) for part, first, last in found if first < last]


def overlap(some, others):
  return any(
    part == other_part and max(first, other_first) < min(last, other_last)
    for part, first, last in some
    for other_part, other_first, other_last in others
  )


@pytest.mark.parametrize("name", DATASETS)
def test_no_example_is_trained_on_and_judged_by(name):
  """Validation and test are disjoint, too, except where the name says that nothing is held out."""
  train, validation, test = (stretches(name, split) for split in ("train", "validation", "test"))
  assert not overlap(train, validation)
  assert not overlap(train, test)
  assert overlap(validation, test) == name.endswith("_all")


def test_sizes_of_the_papers():
  sizes = {name: tuple(split_size(DATASETS[name], split) for split in DATASETS[name].splits) for name in DATASETS}
  assert sizes["mnist"] == sizes["fashion_mnist"] == (55_000, 5_000, 10_000)  # Shallue et al.: the full batch is 55,000
  assert [sizes[f"mnist_{size}"][0] for size in (6875, 13750, 27500)] == [55_000 // 8, 55_000 // 4, 55_000 // 2]
  assert sizes["mnist_all"][0] == 60_000  # Keskar et al.: a tenth is 6,000
  assert sizes["cifar10_all"][0] == sizes["cifar100_all"][0] == 50_000
  assert sizes["cifar10"] == sizes["cifar100"] == (45_000, 5_000, 10_000)
  assert sizes["imagenet2012_all"] == (1_281_167, 50_000, 50_000)
  assert sizes["imagenet2012_half_images"][0] == 1_281_167 // 2
  assert sizes["imagenet2012_half_classes"] == (None, None, 25_000)
  assert sum(sizes["tiny_shakespeare"]) == 1_115_394
  domains = [sizes["tiny_shakespeare_tragedies"], sizes["tiny_shakespeare_comedies"]]
  assert sum(map(sum, domains)) == 1_115_394
  for domain in domains:
    np.testing.assert_allclose(np.array(domain) / sum(domain), [0.9, 0.05, 0.05], atol=1e-4)


def test_the_cut_of_tiny_shakespeare_is_that_of_tfds():
  """Its parts one after the other are the text, so splits of the whole text must end where the parts end."""
  text = "x" * 1_115_394
  train = int(len(text) * 0.9)
  validation = int(len(text[train:]) * 0.5)
  bounds = [(split.start, split.stop) for split in DATASETS["tiny_shakespeare"].splits.values()]
  assert bounds == [(0, train), (train, train + validation), (train + validation, len(text))]


def test_half_of_the_classes():
  dataset = DATASETS["imagenet2012_half_classes"]
  assert dataset.num_classes == 500
  assert (DATASETS["mnist_0to4"].num_classes, DATASETS["mnist_5to9"].num_classes) == (5, 5)
  for row in DATASETS.values():  # records are not renumbered
    assert not row.by_record or row.labels is None or row.labels.start == 0


def test_a_row_is_found_by_name_only():
  assert find_dataset("svhn").tfds_name == "svhn_cropped"
  with pytest.raises(DataError, match="unknown data set 'svhn_cropped'; known are .*svhn, svhn_extra"):
    find_dataset("svhn_cropped")


def test_extras_are_those_of_the_package():
  with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
  assert {name: [requirement] for name, (_, requirement) in EXTRAS.items()} == {name: extras[name] for name in EXTRAS}
  assert {dataset.extra for dataset in DATASETS.values()} == {"", *EXTRAS}


def one_number_an_image(monkeypatch, name):
  number = Spec((), np.dtype(np.int32))
  monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], example={"image": number, "label": number}))


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory):
  """Kept arrays of 60,000 and 10,000 examples whose image is their number, so that no file needs decoding."""
  from bsjax.data.arrays import write_arrays

  data_dir = tmp_path_factory.mktemp("numbers")
  for part, size in (("train", 60_000), ("test", 10_000)):
    numbers = np.arange(size, dtype=np.int32)
    write_arrays(data_dir / "arrays" / "mnist" / f"{part}.npz", {"image": numbers, "label": numbers % 10})
  return data_dir


@pytest.mark.parametrize("name", [name for name in IMAGES if name.startswith("mnist")])
def test_subsets_of_mnist_hold_the_examples_that_their_names_say(name, small_mnist, monkeypatch):
  one_number_an_image(monkeypatch, name)
  train, validation, test = (
    load_source(name, split, data_dir=small_mnist) for split in ("train", "validation", "test")
  )
  digits = {"mnist_0to4": range(5), "mnist_5to9": range(5, 10)}.get(name, range(10))
  bounds = {"mnist_all": (0, 60_000), "mnist_6875": (0, 6_875), "mnist_13750": (0, 13_750), "mnist_27500": (0, 27_500)}
  held_out = (range(10_000), 10_000) if name == "mnist_all" else (range(55_000, 60_000), 5_000)
  for source, numbers in (
    (train, range(*bounds.get(name, (0, 55_000)))),
    (validation, held_out[0]),
    (test, range(10_000)),
  ):
    expected = [number for number in numbers if number % 10 in digits]
    np.testing.assert_array_equal(source.arrays["image"], expected)
    np.testing.assert_array_equal(source.arrays["label"], [number % 10 - digits[0] for number in expected])
    assert source.name == name
  again = load_source(name, "train", data_dir=small_mnist)  # nothing was renumbered in place
  np.testing.assert_array_equal(again.arrays["label"], train.arrays["label"])


def test_parts_are_read_one_after_the_other(tmp_path, monkeypatch):
  """`svhn_extra`: the extra part, then the training part without its last 5,000."""
  from bsjax.data.arrays import write_arrays

  one_number_an_image(monkeypatch, "svhn_extra")
  for part, size in DATASETS["svhn"].parts.items():
    numbers = np.arange(size, dtype=np.int32)
    write_arrays(tmp_path / "arrays" / "svhn_cropped" / f"{part}.npz", {"image": numbers, "label": numbers % 10})
  train = load_source("svhn_extra", "train", data_dir=tmp_path).arrays["image"]
  np.testing.assert_array_equal(train, np.concatenate([np.arange(531_131), np.arange(68_257)]))
  validation = load_source("svhn_extra", "validation", data_dir=tmp_path).arrays["image"]
  np.testing.assert_array_equal(validation, np.arange(68_257, 73_257))
