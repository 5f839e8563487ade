"""MNIST from its four raw files, if this machine has them."""

import gzip
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from bsjax.data import DATASETS, load_source, split_size

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
load_source(name, "test", data_dir=data_dir, manual_dir=manual_dir)
assert "tensorflow_datasets" in sys.modules
assert not imported, imported
"""


def prepare(name, data_dir, manual_dir):
  command = [sys.executable, "-W", "error", "-c", PREPARE, name, str(data_dir), str(manual_dir)]
  result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr
  assert result.stdout == ""  # TFDS is kept quiet
  return result.stderr


def test_digits_are_prepared_without_tensorflow(tmp_path):
  assert prepare("digits", tmp_path, tmp_path) == ""  # nothing to wait for


def read_raw(images, labels):
  """The bytes of each example, pixels and label, read without the code under test."""
  pixels, label = (gzip.decompress(path.read_bytes()) for path in (images, labels))
  return rows(np.frombuffer(pixels[16:], np.uint8), np.frombuffer(label[8:], np.uint8))


def rows(images, labels):
  return [row.tobytes() for row in np.column_stack([images.reshape(-1, 784), labels.astype(np.uint8)])]


@pytest.mark.skipif(
  not RAW.is_dir(), reason=f"the raw files of MNIST are not in {RAW}; set BSJAX_RAW_DATA to their parent folder"
)
def test_mnist_holds_the_raw_examples_and_needs_no_tensorflow(tmp_path):
  bars = re.split(r"[\r\n]+", prepare("mnist", tmp_path, RAW))
  assert {"Checking", "Generating", "Decoding"} <= {line.split()[0] for line in bars if line.strip()}
  test = load_source("mnist", "test", data_dir=tmp_path).arrays
  raw_test = read_raw(RAW / "t10k-images-idx3-ubyte.gz", RAW / "t10k-labels-idx1-ubyte.gz")
  raw_train = read_raw(RAW / "train-images-idx3-ubyte.gz", RAW / "train-labels-idx1-ubyte.gz")
  # TFDS has an order of its own: compare without it.
  assert sorted(rows(test["image"], test["label"])) == sorted(raw_test)

  import tensorflow_datasets as tfds

  # The stock builder reads what ours prepared. Its order is known: these are the first labels of every copy TFDS ever made.
  examples = tfds.data_source("mnist", split="train", data_dir=tmp_path, download=False)
  assert len(examples) == 60_000
  some = examples.__getitems__(range(0, 60_000, 20))
  assert [examples[i]["label"] for i in range(5)] == [4, 1, 0, 7, 8]
  pixels, labels = (np.stack([example[name] for example in some]) for name in ("image", "label"))
  assert set(rows(pixels, labels)) <= set(raw_train)

  # The table's numbers of the ten digits, which it cannot know without the files.
  unread = tfds.data_source(
    "mnist", split="train", data_dir=tmp_path, download=False, decoders={"image": tfds.decode.SkipDecoding()}
  )
  all_labels = np.array([example["label"] for example in unread.__getitems__(range(60_000))])
  for name, digits in (("mnist_0to4", range(5)), ("mnist_5to9", range(5, 10))):
    for split, split_labels in (
      ("train", all_labels[:55_000]),
      ("validation", all_labels[55_000:]),
      ("test", test["label"]),
    ):
      assert split_size(DATASETS[name], split) == np.isin(split_labels, digits).sum()
