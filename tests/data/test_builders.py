"""The builders without TensorFlow against the stock ones, whose own code runs here on a stand-in for TensorFlow's file functions."""

import gzip
import inspect
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from bsjax.data import DATASETS, load_source, read
from bsjax.data.prepare import _builder_class
from tests.data.raw_files import NUM_TEST, NUM_TRAIN, small_table, stock_tensorflow, write_raw_files

NAMES = ("mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn", "tiny_shakespeare", "lm1b")


class Downloads:
  """What a builder sees of TFDS's download manager: files in a folder, unpacked beside themselves if asked."""

  def __init__(self, folder: Path) -> None:
    self.folder = folder

  def download(self, urls: Any) -> Any:
    if isinstance(urls, str):
      return self.folder / urls.rsplit("/", 1)[1]
    pairs = urls.items() if isinstance(urls, dict) else enumerate(urls)
    found = {key: self.download(url) for key, url in pairs}
    return found if isinstance(urls, dict) else list(found.values())

  def extract(self, path: Path) -> Path:
    unpacked = path.with_name(path.name + ".unpacked")
    if path.name.endswith(".tar.gz"):
      with tarfile.open(path) as archive:
        archive.extractall(unpacked, filter="data")
    else:
      unpacked.write_bytes(gzip.decompress(path.read_bytes()))
    return unpacked

  def download_and_extract(self, urls: Any) -> Any:
    if isinstance(urls, dict):
      return {key: self.extract(self.download(url)) for key, url in urls.items()}
    return self.extract(self.download(urls))


def plain(example: dict[str, Any]) -> dict[str, Any]:
  return {name: value if isinstance(value, str) else np.asarray(value).tolist() for name, value in example.items()}


def examples_of(builder: Any, folder: Path) -> dict[str, list[Any]]:
  """All (key, example) pairs by split, in the order in which the builder gives them."""
  splits = builder._split_generators(Downloads(folder))
  if not isinstance(splits, dict):
    splits = {str(split.name): builder._generate_examples(**split.gen_kwargs) for split in splits}
  return {split: [(key, plain(example)) for key, example in examples] for split, examples in splits.items()}


def shaped(examples: list[Any]) -> list[Any]:
  """Grey images without the axis of their one colour, which an image of PIL has not."""
  for _, example in examples:
    if "image" in example and np.ndim(example["image"]) == 3 and np.shape(example["image"])[-1] == 1:
      example["image"] = np.squeeze(example["image"], -1).tolist()
  return examples


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_examples_are_those_of_the_stock_builder(name, tmp_path, monkeypatch):
  """TFDS orders examples by a hash of their keys, so equal keys and examples are an equal prepared copy, order included."""
  dataset = DATASETS[name]
  stock, ours = tfds.builder_cls(dataset.tfds_name), _builder_class(dataset)
  module = inspect.getmodule(stock)
  monkeypatch.setattr(module, "tf", stock_tensorflow())
  if "mnist" in name:  # the stock code is told how many examples the raw files have
    monkeypatch.setattr(module, "_TRAIN_EXAMPLES", NUM_TRAIN)
    monkeypatch.setattr(module, "_TEST_EXAMPLES", NUM_TEST)
  write_raw_files(dataset.tfds_name, tmp_path)
  expected = examples_of(stock(data_dir=tmp_path / "stock"), tmp_path)
  builder = ours(data_dir=tmp_path / "ours")
  found = examples_of(builder, tmp_path)
  assert found.keys() == expected.keys()
  for split, examples in expected.items():
    assert len(examples) > 0
    assert sorted(found[split], key=str) == sorted(shaped(examples), key=str)
  assert (builder.name, builder.version) == (stock.name, stock.VERSION)
  assert builder.url_infos == stock.url_infos is not None
  assert str(builder.info.features) == str(stock(data_dir=tmp_path / "stock").info.features)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_what_was_prepared_is_read_by_the_stock_builder(name, tmp_path, monkeypatch):
  tfds_name = DATASETS[name].tfds_name
  write_raw_files(tfds_name, tmp_path / "raw")
  small_table(monkeypatch, name, tmp_path / "raw")
  monkeypatch.setattr(read, "_CHUNK", 7)  # so that these few are read in several goes
  length = 10 if DATASETS[name].is_text else None
  train, validation, test = (
    load_source(name, split, data_dir=tmp_path, manual_dir=tmp_path / "raw", length=length)
    for split in ("train", "validation", "test")
  )
  stock = {
    part: tfds.data_source(tfds_name, split=part, data_dir=tmp_path, download=False) for part in ("train", "test")
  }
  if length:
    text = np.frombuffer(stock["train"][0]["text"], np.uint8)
    np.testing.assert_array_equal(train.arrays["tokens"][:, :-1].reshape(-1), text[: len(train) * length])
    return
  for name_of_array in ("image", "label"):
    for part, arrays in (("train", (train, validation)), ("test", (test,))):
      expected = np.stack([example[name_of_array] for example in stock[part]])
      found = np.concatenate([source.arrays[name_of_array] for source in arrays])
      np.testing.assert_array_equal(found, expected)
      assert found.dtype == DATASETS[name].example[name_of_array].dtype


def test_order_of_a_prepared_copy_is_one_of_hashes(tmp_path, monkeypatch):
  """So that a held-out stretch is as good as random: the raw labels are 0, 1, 2, ... and the prepared ones are not."""
  write_raw_files("cifar10", tmp_path / "raw")
  small_table(monkeypatch, "cifar10", tmp_path / "raw")
  test = load_source("cifar10", "test", data_dir=tmp_path, manual_dir=tmp_path / "raw")
  raw = [(9 + number) % 10 for number in range(12)]
  assert sorted(test.arrays["label"]) == sorted(raw)
  assert test.arrays["label"].tolist() != raw


def test_svhn_labels_out_of_range_are_refused(tmp_path):
  import scipy.io

  from bsjax.data.svhn import SvhnCropped

  labels = np.array([[1], [11]], np.uint8)
  scipy.io.savemat(tmp_path / "bad.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": labels})
  examples = SvhnCropped(data_dir=tmp_path)._generate_examples("train_", tmp_path / "bad.mat")
  with pytest.raises(ValueError, match=r"label 11 of example 1 in .*bad\.mat, wanted 1\.\.10"):
    list(examples)


def test_stock_builders_stay_registered():
  for dataset in {dataset.tfds_name: dataset for dataset in DATASETS.values() if dataset.builder}.values():
    ours = _builder_class(dataset)
    assert ours.name == dataset.tfds_name
    if dataset.tfds_name != "digits":
      stock = tfds.builder_cls(dataset.tfds_name)
      assert stock.__module__.startswith("tensorflow_datasets.")
      assert issubclass(ours, stock)
