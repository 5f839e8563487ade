"""MNIST, Fashion-MNIST and KMNIST as TFDS defines them, prepared without TensorFlow.

The stock builders unpack the raw files and encode the images with TensorFlow, though nothing in the result needs it. The
builders here keep the stock name, version, features, addresses and digests, and write the same examples in the same order;
so what they prepared is read by the stock builder.
"""

import gzip
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import KMNIST, MNIST, FashionMNIST

_FILES = {
  "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
  "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_IMAGES_HEADER, _LABELS_HEADER = 16, 8  # bytes: a magic number, then one 32-bit size per axis


class _WithoutTensorFlow:
  """Replaces the two methods of a stock MNIST-like builder that need TensorFlow."""

  URL: str

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    paths = dl_manager.download({split: [self.URL + file for file in files] for split, files in _FILES.items()})
    return {split: self._generate_examples(*pair) for split, pair in paths.items()}

  def _generate_examples(self, images_path: Any, labels_path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    images = _read_gzip(images_path, _IMAGES_HEADER).reshape(-1, 28, 28)
    labels = _read_gzip(labels_path, _LABELS_HEADER)
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield key, {"image": Image.fromarray(image), "label": int(label)}


def _read_gzip(path: Any, header: int) -> np.ndarray:
  return np.frombuffer(gzip.decompress(pathlib.Path(path).read_bytes()), np.uint8, offset=header)


# The stock builders keep their place under these names. They are imported above, because TFDS imports them late, and what is
# first imported inside the `with` would never be registered. A subclass elsewhere would not find the digests by itself.
with tfds.core.registered.skip_registration():

  class Mnist(_WithoutTensorFlow, MNIST):
    """Builds `mnist`."""

    name = "mnist"
    url_infos = MNIST.url_infos

  class FashionMnist(_WithoutTensorFlow, FashionMNIST):
    """Builds `fashion_mnist`."""

    name = "fashion_mnist"
    url_infos = FashionMNIST.url_infos

  class Kmnist(_WithoutTensorFlow, KMNIST):
    """Builds `kmnist`."""

    name = "kmnist"
    url_infos = KMNIST.url_infos
