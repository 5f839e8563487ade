"""MNIST from its four raw files, if this machine has them, and the reader of such files on ones made here."""

import gzip
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from bsjax.data import load_source

REPOSITORY = pathlib.Path(__file__).parents[2]
RAW = pathlib.Path(os.environ.get("BSJAX_RAW_DATA", REPOSITORY.parent / "shared" / "data")) / "mnist"

# Run apart from the tests, so that nothing else has imported anything yet. To this process TensorFlow looks installed (TFDS
# may ask), but an import of it is noted and fails.
PREPARE = """
import importlib.abc, importlib.util, sys

imported = []

class Decoy(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  def find_spec(self, name, path=None, target=None):
    return importlib.util.spec_from_loader(name, self) if name.split(".")[0] == "tensorflow" else None

  def exec_module(self, module):
    imported.append(module.__name__)
    raise ImportError("TensorFlow is imported")

sys.meta_path.insert(0, Decoy())
from bsjax.data import load_source
assert "tensorflow_datasets" not in sys.modules  # importing bsjax.data is quick
name, data_dir, manual_dir = sys.argv[1:]
for split in ("validation", "test"):
  load_source(name, split, data_dir=data_dir, manual_dir=manual_dir)
assert "tensorflow_datasets" in sys.modules
assert not imported, imported
"""


def prepare(name, data_dir, manual_dir):
  command = [sys.executable, "-W", "error", "-c", PREPARE, name, str(data_dir), str(manual_dir)]
  result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr
  assert result.stdout + result.stderr == ""  # TFDS is kept quiet


def test_digits_are_prepared_without_tensorflow(tmp_path):
  prepare("digits", tmp_path, tmp_path)


def read_raw(images, labels):
  """One row per example, pixels and label, read without the code under test."""
  pixels, label = (gzip.decompress(path.read_bytes()) for path in (images, labels))
  return np.column_stack([np.frombuffer(pixels[16:], np.uint8).reshape(-1, 784), np.frombuffer(label[8:], np.uint8)])


def rows(source):
  return np.column_stack([source.arrays["image"].reshape(-1, 784), source.arrays["label"].astype(np.uint8)])


@pytest.mark.skipif(
  not RAW.is_dir(), reason=f"the raw files of MNIST are not in {RAW}; set BSJAX_RAW_DATA to their parent folder"
)
def test_mnist_holds_the_raw_examples_and_needs_no_tensorflow(tmp_path):
  prepare("mnist", tmp_path, RAW)
  test, validation = (load_source("mnist", split, data_dir=tmp_path) for split in ("test", "validation"))
  raw_test = read_raw(RAW / "t10k-images-idx3-ubyte.gz", RAW / "t10k-labels-idx1-ubyte.gz")
  raw_train = read_raw(RAW / "train-images-idx3-ubyte.gz", RAW / "train-labels-idx1-ubyte.gz")
  # TFDS has an order of its own: compare as sets.
  assert len(test) == 10_000
  assert {row.tobytes() for row in rows(test)} == {row.tobytes() for row in raw_test}
  assert len(validation) == 5_000
  assert {row.tobytes() for row in rows(validation)} <= {row.tobytes() for row in raw_train}

  import tensorflow_datasets as tfds

  # The stock builder reads what ours prepared. Its order is known: these are the first labels of every copy TFDS ever made.
  examples = tfds.data_source("mnist", split="train", data_dir=tmp_path, download=False)
  assert len(examples) == 60_000
  assert [examples[i]["label"] for i in range(5)] == [4, 1, 0, 7, 8]
  assert examples[55_000]["label"] == validation.arrays["label"][0]
  np.testing.assert_array_equal(examples[55_000]["image"], validation.arrays["image"][0])


@pytest.mark.parametrize("builder", ["Mnist", "FashionMnist"])
def test_examples_are_read_from_idx_files(tmp_path, builder):
  from bsjax.data import mnist

  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 256, (3, 28, 28), np.uint8), np.array([7, 0, 9], np.uint8)
  sizes = [np.array(shape, ">i4").tobytes() for shape in ([2051, 3, 28, 28], [2049, 3])]
  paths = [tmp_path / "images.gz", tmp_path / "labels.gz"]
  for path, size, content in zip(paths, sizes, (images, labels), strict=True):
    path.write_bytes(gzip.compress(size + content.tobytes()))
  examples = list(getattr(mnist, builder)(data_dir=tmp_path)._generate_examples(*paths))
  assert [key for key, _ in examples] == [0, 1, 2]
  np.testing.assert_array_equal([np.asarray(example["image"]) for _, example in examples], images)
  assert [example["label"] for _, example in examples] == [7, 0, 9]


def test_stock_builders_stay_registered():
  import tensorflow_datasets as tfds

  import bsjax.data.mnist

  for name in ("mnist", "fashion_mnist", "kmnist", "cifar10"):
    assert tfds.builder_cls(name).__module__.startswith("tensorflow_datasets.")
  assert bsjax.data.mnist.Mnist.name == "mnist"
