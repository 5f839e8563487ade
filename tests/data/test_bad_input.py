"""Copies that are not what the table says, full disks, and processes that are killed: a clear line each, and no half of a data set."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bsjax.data import DATASETS, DataError, arrays, load_source, prepare
from tests.data.raw_files import small_table, write_raw_files

REPOSITORY = Path(__file__).parents[2]


def prepare_images(root, *, sizes, num_classes=10, labels=range(10)):
  """Writes what could pass for a copy of CIFAR-10, with images of this size and these labels."""
  features = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(*sizes, 3)),
    "label": tfds.features.ClassLabel(num_classes=num_classes),
  }

  class Impostor(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(30), "test": self._generate_examples(12)}

    def _generate_examples(self, count):
      for number in range(count):
        image = Image.fromarray(np.zeros((*sizes, 3), np.uint8))
        yield number, {"id": str(number), "image": image, "label": labels[number % len(labels)]}

  with prepare.quiet(DATASETS["cifar10"]):
    Impostor(data_dir=root, file_format="array_record").download_and_prepare()


@pytest.fixture
def raw(tmp_path, monkeypatch):
  """Small raw files of CIFAR-10, and the table to match."""
  write_raw_files("cifar10", tmp_path / "raw")
  small_table(monkeypatch, "cifar10", tmp_path / "raw")
  return tmp_path / "raw"


@pytest.mark.parametrize(
  ("copy", "message"),
  [
    ({"sizes": (32, 32), "num_classes": 12, "labels": [3, 11]}, r"example \d+ of train has label 11, wanted 0\.\.9"),
    ({"sizes": (28, 28)}, r"example 0 of train has image of shape \(28, 28, 3\), wanted \(32, 32, 3\)"),
  ],
)
def test_a_copy_with_other_labels_or_sizes_is_refused(raw, tmp_path, copy, message):
  prepare_images(tmp_path / "data", **copy)
  with pytest.raises(DataError, match=f"/data/cifar10/3.0.2: {message}; delete the copy and prepare it again"):
    load_source("cifar10", "train", data_dir=tmp_path / "data")
  assert not (tmp_path / "data" / "arrays").exists()


def test_a_copy_with_fewer_examples_is_refused(raw, tmp_path, monkeypatch):
  prepare_images(tmp_path / "data", sizes=(32, 32))
  monkeypatch.setitem(DATASETS["cifar10"].parts, "train", 31)
  with pytest.raises(DataError, match="cifar10/3.0.2 holds 30 examples in train, wanted 31; delete it and prepare"):
    load_source("cifar10", "train", data_dir=tmp_path / "data")


def test_a_split_without_examples_is_refused(raw, tmp_path, monkeypatch):
  """No example of these labels: what a wrong row of the table, or a strange copy, would lead to."""
  prepare_images(tmp_path / "data", sizes=(32, 32), labels=[7])
  small_table(monkeypatch, "cifar10", raw, labels=range(5))
  with pytest.raises(DataError, match=r"split 'test' of cifar10 holds no example\."):
    load_source("cifar10", "test", data_dir=tmp_path / "data")


def test_flipped_bytes_of_a_record_are_an_error(raw, tmp_path):
  load_source("cifar10", "test", data_dir=tmp_path, manual_dir=raw)
  shutil.rmtree(tmp_path / "arrays")
  shard = tmp_path / "cifar10" / "3.0.2" / "cifar10-test.array_record-00000-of-00001"
  content = bytearray(shard.read_bytes())
  content[10_000] ^= 1
  shard.write_bytes(content)
  with pytest.raises(DataError, match=r"cifar10/3\.0\.2 cannot be read: .*[Cc]orrupted.*; delete it") as error:
    load_source("cifar10", "test", data_dir=tmp_path)
  assert "\n" not in str(error.value)


# A disk that fills up.

_LIMITED = """
import resource, sys
from bsjax.data import DataError, load_source
import tensorflow_datasets, bsjax.data.digits
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow beyond it; the system refuses as it does on a full disk
try:
  load_source("digits", "train", data_dir=sys.argv[1])
except DataError as error:
  print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing_half_done(tmp_path):
  """The first shard, written by code that is not Python, is larger than a file may be."""
  command = [sys.executable, "-c", _LIMITED, str(tmp_path)]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) == 1
  assert done.stdout.startswith(f"digits could not be prepared in {tmp_path}: ")
  assert "File too large" in done.stdout
  assert not list((tmp_path / "digits").iterdir())
  assert len(load_source("digits", "train", data_dir=tmp_path)) == 1024


def test_no_space_left_while_the_arrays_are_written(raw, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(arrays.np, "savez", full)
  with pytest.raises(DataError, match=r"train\.npz cannot be written: .*No space left on device; make room"):
    load_source("cifar10", "train", data_dir=tmp_path, manual_dir=raw)
  assert not list((tmp_path / "arrays" / "cifar10").iterdir())


# Killed processes.

_KILLED = """
import os, pathlib, signal, sys
import pytest
from bsjax.data import cifar, load_source
from tests.data.raw_files import small_table

folder = pathlib.Path(sys.argv[1])
generate = cifar.Cifar10._generate_examples

def killed(self, prefix, batches):
  for number, example in enumerate(generate(self, prefix, batches)):
    if prefix == "test_" and number == 5:  # in the last of the two parts
      os.kill(os.getpid(), signal.SIGKILL)
    yield example

cifar.Cifar10._generate_examples = killed
small_table(pytest.MonkeyPatch(), "cifar10", folder / "raw")
load_source("cifar10", "train", data_dir=folder / "data", manual_dir=folder / "raw")
"""


def test_what_a_killed_process_left_is_not_taken_for_whole(raw, tmp_path):
  killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], cwd=REPOSITORY, timeout=120)
  assert killed.returncode == -signal.SIGKILL
  assert list((tmp_path / "data" / "cifar10").iterdir())  # it did leave something
  after, untouched = (
    {split: load_source("cifar10", split, data_dir=folder, manual_dir=raw) for split in ("train", "test")}
    for folder in (tmp_path / "data", tmp_path / "other")
  )
  assert (len(after["train"]), len(after["test"])) == (25, 12)
  for split, source in after.items():
    for name, array in source.arrays.items():
      np.testing.assert_array_equal(array, untouched[split].arrays[name])
  assert os.listdir(tmp_path / "data" / "arrays" / "cifar10") == os.listdir(tmp_path / "other" / "arrays" / "cifar10")
