"""tiny_shakespeare and LM1B as TFDS defines them, prepared without TensorFlow (see `mnist.py`)."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.lm1b.lm1b_dataset_builder import Builder as StockLm1b
from tensorflow_datasets.datasets.tiny_shakespeare.tiny_shakespeare_dataset_builder import Builder as StockShakespeare

_LM1B_FILES = {
  "train": "*/training-monolingual.tokenized.shuffled/news.en-*",
  "test": "*/heldout-monolingual.tokenized.shuffled/news.en.heldout-*",
}

with tfds.core.registered.skip_registration():

  class TinyShakespeare(StockShakespeare):
    """Builds `tiny_shakespeare`: one record for each part; the first 90 % of the text, half of the rest, and the rest."""

    name = "tiny_shakespeare"
    url_infos = StockShakespeare.url_infos
    pkg_dir_path = StockShakespeare._get_pkg_dir_path()

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
      (url,) = self.url_infos
      text = Path(dl_manager.download(url)).read_bytes().decode()
      train, rest = _cut(text, 0.9)
      validation, test = _cut(rest, 0.5)
      parts = {"train": train, "validation": validation, "test": test}
      return {split: self._generate_examples(split, part) for split, part in parts.items()}

    def _generate_examples(self, split: str, text: str) -> Iterator[tuple[str, dict[str, str]]]:
      yield split, {"text": text}

  class Lm1b(StockLm1b):
    """Builds `lm1b`: one record for each sentence, read from the archive without unpacking it."""

    name = "lm1b"
    url_infos = StockLm1b.url_infos
    pkg_dir_path = StockLm1b._get_pkg_dir_path()

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
      (url,) = self.url_infos
      path = dl_manager.download(url)
      return {split: self._generate_examples(path, pattern) for split, pattern in _LM1B_FILES.items()}

    def _generate_examples(self, path: Any, pattern: str) -> Iterator[tuple[str, dict[str, str]]]:
      with tarfile.open(path, "r:gz") as archive:
        for member in archive:
          file = PurePosixPath(member.name)
          if member.isfile() and file.match(pattern):
            content = archive.extractfile(member)
            assert content is not None  # it is a file
            for number, line in enumerate(io.TextIOWrapper(content, "utf-8")):
              yield f"{file.name}_{number}", {"text": line.strip()}


def _cut(text: str, fraction: float) -> tuple[str, str]:
  length = int(len(text) * fraction)
  return text[:length], text[length:]
