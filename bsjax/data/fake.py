"""Fake twins: random data of the shapes, types and ranges of a data set, without a file."""

import zlib

import numpy as np

from bsjax.data.datasets import find_dataset
from bsjax.data.source import Source

FAKE_SIZES = {"train": 64, "validation": 32, "test": 32}


def fake_source(name: str, split: str, *, length: int | None) -> Source:
  """Makes the fake twin of one split: 64 examples to train on, 32 to validate and to test.

  Pixels, labels and tokens are drawn uniformly and independently, so there is nothing to learn but by heart. The same arguments give
  the same arrays on every machine. The name says that they are fake.

  Args:
    length: in a text, L of `tokens` of shape `[N, L + 1]`.
  """
  dataset, size = find_dataset(name), FAKE_SIZES[split]
  rng = np.random.default_rng(zlib.crc32(f"{name}/{split}".encode()))
  arrays = {}
  for array, spec in dataset.example.items():
    shape = spec.shape if length is None else (length + 1,)
    bound = dataset.pixel_max + 1 if array == "image" else dataset.num_classes
    arrays[array] = rng.integers(0, bound, (size, *shape), spec.dtype)
  return Source(f"fake_{name}", split, arrays)
