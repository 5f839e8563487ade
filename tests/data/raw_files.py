"""Small raw files in the formats of the real ones, and the table and digests that go with them."""

import dataclasses
import gzip
import hashlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.io

from bsjax.data.datasets import DATASETS, Split
from bsjax.data.prepare import _builder_class

NUM_TRAIN, NUM_TEST, NUM_EXTRA = 30, 12, 7
CIFAR_CLASSES = {"cifar10": (10,), "cifar100": (20, 100)}
SHAKESPEARE = "".join(f"Line {number} of a play.\n" for number in range(100))
SENTENCES = {
  "training-monolingual.tokenized.shuffled/news.en-00001-of-00100": [f"The {n} cats sat ." for n in range(300)],
  "training-monolingual.tokenized.shuffled/news.en-00002-of-00100": [
    "A d\u00f6g  ran \u00bd a mile .  ",
    "A dog ran .",
  ],
  "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": [f"{n} dogs slept ." for n in range(8)],
  "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050": ["The end ."],
}


def random_images(seed: int, count: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def write_mnist(folder: Path) -> None:
  for prefix, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
    images, labels = random_images(count, count, 28, 28), np.arange(count, dtype=np.uint8) % 10
    for kind, array, magic in (("images-idx3", images, 2051), ("labels-idx1", labels, 2049)):
      header = np.array([magic, *array.shape], ">i4").tobytes()
      (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


def write_tar(path: Path, contents: dict[str, bytes]) -> None:
  with tarfile.open(path, "w:gz") as archive:
    for name, content in contents.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def cifar_rows(seed: int, count: int, classes: tuple[int, ...]) -> bytes:
  labels = np.stack([np.arange(seed, seed + count, dtype=np.uint8) % size for size in classes], axis=1)
  return np.concatenate([labels, random_images(seed, count, 3072)], axis=1).tobytes()


def write_cifar(folder: Path, name: str) -> None:
  classes = CIFAR_CLASSES[name]
  if name == "cifar10":
    prefix, batch = "cifar-10-batches-bin/", NUM_TRAIN // 5
    contents = {f"data_batch_{number}.bin": cifar_rows(number, batch, classes) for number in range(1, 6)}
    contents |= {"test_batch.bin": cifar_rows(9, NUM_TEST, classes)}
    names = {"batches.meta.txt": 10}
  else:
    prefix = "cifar-100-binary/"
    contents = {"train.bin": cifar_rows(1, NUM_TRAIN, classes), "test.bin": cifar_rows(9, NUM_TEST, classes)}
    names = {"coarse_label_names.txt": 20, "fine_label_names.txt": 100}
  contents |= {file: "".join(f"class{n}\n" for n in range(size)).encode() + b"\n" for file, size in names.items()}
  write_tar(folder / f"cifar-{name[5:]}-binary.tar.gz", {prefix + file: content for file, content in contents.items()})


def write_svhn(folder: Path) -> None:
  for part, count in (("train", NUM_TRAIN), ("test", NUM_TEST), ("extra", NUM_EXTRA)):
    images = np.moveaxis(random_images(count, count, 32, 32, 3), 0, -1)
    labels = 1 + np.arange(count, dtype=np.uint8)[:, None] % 10
    scipy.io.savemat(folder / f"{part}_32x32.mat", {"X": images, "y": labels}, do_compression=True)


def write_lm1b(folder: Path) -> None:
  top = "1-billion-word-language-modeling-benchmark-r13output"
  contents = {f"{top}/{file}": "".join(f"{line}\n" for line in lines).encode() for file, lines in SENTENCES.items()}
  write_tar(folder / f"{top}.tar.gz", contents | {f"{top}/README": b"not a sentence\n"})


def write_raw_files(name: str, folder: Path) -> None:
  """Writes the raw files of a data set, by its TFDS name."""
  folder.mkdir(parents=True, exist_ok=True)
  if name in ("mnist", "fashion_mnist", "kmnist"):
    write_mnist(folder)
  elif name in CIFAR_CLASSES:
    write_cifar(folder, name)
  elif name == "svhn_cropped":
    write_svhn(folder)
  elif name == "tiny_shakespeare":
    (folder / "input.txt").write_text(SHAKESPEARE)
  elif name == "lm1b":
    write_lm1b(folder)


def small_table(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, **changes: Any) -> None:
  """Makes the data set `name` of the table one of the raw files in `folder`: their digests, their numbers of examples."""
  dataset = DATASETS[name]
  builder = _builder_class(dataset)
  sizes = {"train": NUM_TRAIN, "test": NUM_TEST, "extra": NUM_EXTRA}
  if dataset.tfds_name == "tiny_shakespeare":
    parts, length = dict(dataset.parts), len(SHAKESPEARE)
    first, second = int(length * 0.9), int(length * 0.9) + int((length - int(length * 0.9)) * 0.5)
    bounds = {"train": (0, first), "validation": (first, second), "test": (second, length)}
    splits = {split: Split(tuple(parts), *bound) for split, bound in bounds.items()}
  elif dataset.tfds_name == "lm1b":
    parts = {"train": 302, "test[:4]": 4, "test[4:]": 5}
    splits = {"train": Split(("train",)), "validation": Split(("test[:4]",)), "test": Split(("test[4:]",))}
  else:
    parts = {part: sizes[part] for part in dataset.parts}
    held_out = {"train": Split(("train",), 0, 25), "validation": Split(("train",), 25, 30)}
    splits = held_out | {"test": Split(("test",), 0, NUM_TEST)}
  row = dataclasses.replace(dataset, **{"parts": parts, "splits": splits, **changes})
  monkeypatch.setitem(DATASETS, name, row)
  monkeypatch.setattr(builder, "url_infos", {url: _registered(folder, url) for url in builder.url_infos})


def _registered(folder: Path, url: str) -> Any:
  import tensorflow_datasets as tfds

  file = url.rsplit("/", 1)[1]
  content = (folder / file).read_bytes()
  checksum = hashlib.sha256(content).hexdigest()
  return tfds.core.download.checksums.UrlInfo(tfds.core.utils.Size(len(content)), checksum, file)


def stock_tensorflow() -> Any:
  """The few functions of TensorFlow by which stock builders read files."""
  import glob
  import os

  gfile = SimpleNamespace(GFile=open, glob=glob.glob, isdir=os.path.isdir)
  return SimpleNamespace(io=SimpleNamespace(gfile=gfile))


def refuse(*args: Any, **kwargs: Any) -> None:
  """Stands in for what must not be called."""
  raise AssertionError("not to be called")
