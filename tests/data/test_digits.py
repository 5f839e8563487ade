"""The digits that come with the package, against scikit-learn and against digests noted when they were first built."""

import hashlib

import numpy as np
import pytest

from bsjax.data import DATASETS, load_source

SHA256 = {  # of the image bytes followed by the label bytes. A change here changes every result on `digits`: never update it.
  "train": "5d71b6be6a12950676a6f170ef7970c0dbd22d4d86d1220a97af92d2cc28b7d4",
  "validation": "80fa6b3a3e2f0f028d5e9086e2303dbf2d8819fcdd0558d5ea45033ec074b983",
  "test": "c8a09b2fb1b6399769bce757aace0a24db4872a16a7f35b3151e33654689ced1",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("data")
  return {split: load_source("digits", split, data_dir=data_dir) for split in SHA256}


def test_shapes_and_types(sources):
  for split, size in {"train": 1024, "validation": 386, "test": 387}.items():
    source = sources[split]
    image, label = source.arrays["image"], source.arrays["label"]
    assert (source.name, source.split, len(source)) == ("digits", split, size)
    assert (image.shape, image.dtype) == ((size, 8, 8, 1), np.uint8)
    assert (label.shape, label.dtype) == ((size,), np.int32)
    assert (image.min(), image.max()) == (0, 16) == (0, DATASETS["digits"].pixel_max)


@pytest.mark.parametrize("split", SHA256)
def test_content_never_changes(sources, split):
  image, label = sources[split].arrays["image"], sources[split].arrays["label"]
  assert hashlib.sha256(image.tobytes() + label.astype("<i4").tobytes()).hexdigest() == SHA256[split]


def test_equals_scikit_learn_in_the_documented_order(sources):
  datasets = pytest.importorskip("sklearn.datasets")
  digits = datasets.load_digits()
  order = sorted(range(1797), key=lambda i: hashlib.sha256(f"digits/{i}".encode()).hexdigest())
  image = np.concatenate([sources[split].arrays["image"] for split in SHA256])
  label = np.concatenate([sources[split].arrays["label"] for split in SHA256])
  np.testing.assert_array_equal(image[..., 0], digits.images[order])
  np.testing.assert_array_equal(label, digits.target[order])


def test_is_read_by_tfds_under_its_name(tmp_path):
  import tensorflow_datasets as tfds

  source = load_source("digits", "validation", data_dir=tmp_path)
  examples = tfds.data_source("digits", split="validation", data_dir=tmp_path, download=False)
  np.testing.assert_array_equal(examples[7]["image"], source.arrays["image"][7])
  assert tfds.builder("digits", data_dir=tmp_path).info.redistribution_info.license == "CC BY 4.0"
