"""The 1,797 handwritten digits of 8x8 pixels that need no download: a TFDS builder named `digits`.

Importing this module registers the builder, so that `tfds.data_source("digits", ...)` finds it by name like any other.
The pixels are those of the test part of "Optical Recognition of Handwritten Digits" (see README.md beside this file).
"""

import gzip
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

_PATH = pathlib.Path(__file__).with_name("digits.csv.gz")
_SPLIT_SIZES = {"train": 1024, "validation": 386, "test": 387}
_CITATION = """@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}"""


class Digits(tfds.core.GeneratorBasedBuilder):
  """Builds `digits`: `image` u8[8, 8, 1] with values 0..16 (pixels set in a 4x4 block) and `label` 0..9."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Handwritten digits, 8x8 pixels of 0..16 (E. Alpaydin and C. Kaynak, 1998), split at random, once for all.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="bytes"),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
      citation=_CITATION,
      license="CC BY 4.0",
      disable_shuffling=True,  # the order is that of the hashes, for ever
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager
    generators, start = {}, 0
    order = _hashed_order(sum(_SPLIT_SIZES.values()))
    for split, size in _SPLIT_SIZES.items():
      generators[split] = self._generate_examples(order[start : start + size])
      start += size
    return generators

  def _generate_examples(self, rows: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    table = np.loadtxt(gzip.decompress(_PATH.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.uint8)
    for key, row in enumerate(rows):
      yield key, {"image": table[row, :-1].reshape(8, 8, 1), "label": int(table[row, -1])}


def _hashed_order(num_examples: int) -> list[int]:
  """Return the rows sorted by the sha256 of `digits/<row>`: as good as random, and the same everywhere for ever."""
  return sorted(range(num_examples), key=lambda row: hashlib.sha256(f"digits/{row}".encode()).digest())
