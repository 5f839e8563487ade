"""CIFAR-10 and CIFAR-100 as TFDS defines them, prepared from the binary archive without TensorFlow (see `mnist.py`)."""

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar as stock

_PIXELS = (3, 32, 32)  # one colour after the other, each row by row


class _WithoutTensorFlow:
  """Replaces the two methods of a stock CIFAR builder that need TensorFlow."""

  info: Any
  _cifar_info: stock.CifarInfo

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    layout = self._cifar_info
    with tarfile.open(dl_manager.download(layout.url), "r:gz") as archive:
      contents = {
        file: archive.extractfile(layout.prefix + file).read()  # type: ignore[union-attr]
        for file in (*layout.label_files, *layout.train_files, *layout.test_files)
      }
    for key, file in zip(layout.label_keys, layout.label_files, strict=True):
      self.info.features[key].names = [name for name in contents[file].decode().split("\n") if name]
    return {
      split: self._generate_examples(f"{split}_", [contents[file] for file in files])
      for split, files in (("train", layout.train_files), ("test", layout.test_files))
    }

  def _generate_examples(self, prefix: str, batches: Sequence[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    keys = self._cifar_info.label_keys
    rows = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, len(keys) + np.prod(_PIXELS))
    for index, row in enumerate(rows):
      image = Image.fromarray(row[len(keys) :].reshape(_PIXELS).transpose(1, 2, 0))
      labels = dict(zip(keys, row[: len(keys)].tolist(), strict=True))
      yield index, {"id": f"{prefix}{index:05d}", "image": image, **labels}


with tfds.core.registered.skip_registration():

  class Cifar10(_WithoutTensorFlow, stock.Cifar10):
    """Builds `cifar10`."""

    name = "cifar10"
    url_infos = stock.Cifar10.url_infos

  class Cifar100(_WithoutTensorFlow, stock.Cifar100):
    """Builds `cifar100`."""

    name = "cifar100"
    url_infos = stock.Cifar100.url_infos
