"""SVHN, cropped to 32x32, as TFDS defines it, prepared from the three .mat files without TensorFlow (see `mnist.py`)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.svhn_cropped.svhn_cropped_dataset_builder import URL
from tensorflow_datasets.datasets.svhn_cropped.svhn_cropped_dataset_builder import Builder as Stock

with tfds.core.registered.skip_registration():

  class SvhnCropped(Stock):
    """Builds `svhn_cropped`: parts `train`, `test` and `extra`. Holds one file at a time in memory, up to 1.6 GB."""

    name = "svhn_cropped"
    url_infos = Stock.url_infos
    pkg_dir_path = Stock._get_pkg_dir_path()

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
      paths = dl_manager.download({split: f"{URL}{split}_32x32.mat" for split in ("train", "test", "extra")})
      return {split: self._generate_examples(f"{split}_", path) for split, path in paths.items()}

    def _generate_examples(self, prefix: str, path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
      data = scipy.io.loadmat(path)
      for index, (image, label) in enumerate(zip(np.moveaxis(data["X"], -1, 0), data["y"][:, 0], strict=True)):
        if not 1 <= label <= 10:
          raise ValueError(f"label {label} of example {index} in {path}, wanted 1..10")
        yield index, {"id": f"{prefix}{index:06d}", "image": Image.fromarray(image), "label": int(label) % 10}
