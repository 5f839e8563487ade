"""A prepared copy -> arrays, or records that are decoded when they are asked for; each example is checked against the table."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bsjax.data.datasets import Dataset
from bsjax.data.prepare import make_builder, one_line
from bsjax.data.source import DataError, Spec

_CHUNK = 1_000  # records in memory beside the arrays


@dataclass(frozen=True, eq=False)
class Records:
  """Records of one part of a prepared copy: those at `positions`, i64[N]. What cannot be read raises DataError."""

  folder: Path
  data_source: Any
  positions: np.ndarray

  def __len__(self) -> int:
    return len(self.positions)

  def __getitems__(self, indices: Sequence[int], /) -> Sequence[Any]:
    try:
      return self.data_source.__getitems__(self.positions[list(indices)].tolist())
    except Exception as error:  # TFDS promises no type: a truncated file, flipped bits, a damaged image
      raise DataError(f"{self.folder} cannot be read: {_damage(error)}") from error


def open_records(dataset: Dataset, part: str, root: Path, *, encoded: bool = False) -> Records:
  """Opens one official part (or a stretch of it, in TFDS's notation) of the prepared copy under `root`.

  Args:
    encoded: leaves images as the bytes of their files.

  Raises:
    DataError: the copy is damaged, lacks a file or the end of one, or holds another number of records than the table says.
  """
  import tensorflow_datasets as tfds

  builder = make_builder(dataset, root)
  folder = Path(builder.data_path)
  try:
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    data_source = builder.as_data_source(split=part, decoders=decoders)
    _check_files(builder.info.splits[part.split("[")[0]])
  except Exception as error:  # as above
    raise DataError(f"{folder} cannot be read: {_damage(error)}") from error
  found, wanted = len(data_source), dataset.parts.get(part, len(data_source))
  if found != wanted:
    raise DataError(f"{folder} holds {found:,} examples in {part}, wanted {wanted:,}; delete it and prepare it again.")
  return Records(folder, data_source, np.arange(found))


def _check_files(part: Any) -> None:
  """Compares the number of records that the end of each file tells with the one that TFDS wrote down when the copy was whole."""
  from array_record.python.array_record_module import ArrayRecordReader

  for path, wanted in zip(part.filepaths, part.shard_lengths, strict=True):
    try:
      reader = ArrayRecordReader(str(path))
      found = reader.num_records()
      reader.close()
    except Exception as error:  # array_record promises no type, and names no file that is cut short
      raise ValueError(f"{path.name}: {error}") from error
    if found != wanted:
      raise ValueError(f"{path.name} holds {found:,} records of {wanted:,}")


def _damage(error: Exception) -> str:
  return f"{one_line(error)}; delete it, or pass another --data_dir."


def read_images(dataset: Dataset, part: str, root: Path) -> dict[str, np.ndarray]:
  """Decodes one part into arrays: `image` (unless the data set is read by record) and `label`, in TFDS's order.

  Raises:
    DataError: a damaged copy; an image of another size, or a label out of range.
  """
  records = open_records(dataset, part, root, encoded=dataset.by_record)
  num_examples = len(records)
  names = ["label"] if dataset.by_record else list(dataset.example)
  arrays = {name: np.empty((num_examples, *dataset.example[name].shape), dataset.example[name].dtype) for name in names}
  for start, rows in _chunks(records, f"Decoding {part}"):
    for index, row in enumerate(rows, start):
      for name, array in arrays.items():
        array[index] = _checked(row[name], dataset, name, f"{records.folder}: example {index} of {part}")
  return arrays


def read_texts(dataset: Dataset, part: str, root: Path) -> Iterator[list[bytes]]:
  """Reads the texts of one part, some thousand at a time."""
  records = open_records(dataset, part, root)
  for _, rows in _chunks(records, f"Reading {part}"):
    yield [row["text"] for row in rows]


def _chunks(records: Records, description: str) -> Iterator[tuple[int, Sequence[Any]]]:
  from tensorflow_datasets.core import utils

  for start in utils.tqdm(range(0, len(records), _CHUNK), desc=description, unit_scale=_CHUNK, leave=False):
    yield start, records.__getitems__(range(start, min(start + _CHUNK, len(records))))


def are_as_promised(arrays: Mapping[str, np.ndarray], dataset: Dataset, part: str) -> bool:
  """Returns whether decoded arrays of a part are what the table says: names, shapes, dtypes, and, but for a text, length and labels."""
  promised = {"label": dataset.example["label"]} if dataset.by_record else dataset.example
  found = {name: Spec(array.shape[1:], array.dtype) for name, array in arrays.items()}
  if found != promised or dataset.is_text:
    return found == promised
  labels = arrays["label"]
  return all(len(array) == dataset.parts[part] for array in arrays.values()) and bool(
    ((labels >= 0) & (labels < dataset.num_labels)).all()
  )


def decode_photo(record: Mapping[str, Any], dataset: Dataset, folder: Path) -> dict[str, np.ndarray]:
  """Decodes a photograph: the shorter side becomes that of `dataset.example["image"]` (bilinear, antialiased), and the middle is cut out.

  Raises:
    DataError: not a readable image, or a label out of range.
  """
  from PIL import Image

  origin = f"{folder}: {record['file_name'].decode()}"
  height, width, _ = dataset.example["image"].shape
  try:
    photo = Image.open(io.BytesIO(record["image"])).convert("RGB")
  except Exception as error:  # PIL promises no type
    raise DataError(f"{origin} cannot be decoded: {_damage(error)}") from error
  scale = max(height / photo.height, width / photo.width)
  photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BILINEAR)
  left, top = (photo.width - width) // 2, (photo.height - height) // 2
  image = np.asarray(photo.crop((left, top, left + width, top + height)))
  example = {"image": image, "label": np.int32(record["label"])}
  return {name: np.asarray(_checked(value, dataset, name, origin)) for name, value in example.items()}


def _checked(value: Any, dataset: Dataset, name: str, origin: str) -> np.ndarray:
  """Returns one array of an example, if it is what the table promises."""
  array, wanted = np.asarray(value), dataset.example[name]
  if array.shape != wanted.shape:
    raise DataError(
      f"{origin} has {name} of shape {array.shape}, wanted {wanted.shape}; delete the copy and prepare it again."
    )
  if name == "label" and not 0 <= array < dataset.num_labels:
    raise DataError(
      f"{origin} has label {array}, wanted 0..{dataset.num_labels - 1}; delete the copy and prepare it again."
    )
  return array
