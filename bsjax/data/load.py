"""Load a data set by name: raw files, checked by their digests -> a prepared copy in array_record files -> arrays or records.

Every data set goes through TFDS alike. The arrays of an official part are also kept beside the prepared copy, because decoding
60,000 PNG images takes seconds and reading them back a tenth of one; splits and subsets are cut from these arrays. Where all
this lies is told in `folders.py`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from bsjax.data import bpe
from bsjax.data.arrays import arrays_folder, read_arrays, write_arrays, write_whole
from bsjax.data.datasets import Dataset, Split, find_dataset
from bsjax.data.fake import fake_source
from bsjax.data.folders import Folders, PathLike, find_folders, is_writable, locked
from bsjax.data.prepare import check_extra, describe_raw_files, make_builder, prepare_copy, quiet
from bsjax.data.read import are_as_promised, decode_photo, open_records, read_images, read_texts
from bsjax.data.source import DataError, RecordSource, Source

AnySource = TypeVar("AnySource", Source, RecordSource)


def load_source(
  name: str,
  split: str,
  *,
  data_dir: PathLike | None = None,
  manual_dir: PathLike | None = None,
  fake: bool = False,
  length: int | None = None,
) -> Source | RecordSource:
  """Loads one split of a data set, preparing it first if need be.

  Args:
    name: one of `DATASETS`.
    split: `train`, `validation` or `test`.
    data_dir: where prepared copies are, or go; see `folders.py`.
    manual_dir: the folder that holds the raw files, or one that holds a folder with them, named as TFDS names the data set.
    fake: returns random data of the same shapes instead (`fake_source`) and touches no file.
    length: of a text, and only of a text: L, the number of predictions in one example.

  Returns:
    Images: `image` u8[N, H, W, C] and `label` i32[N], in memory; ImageNet record by record. Texts: `tokens` u8 or u16 of shape
    [N, L + 1]. Block n holds tokens n L .. n L + L, so the last token of a block is also the first of the next; every token but the
    very first is predicted exactly once, by those before it in its block. What is left at the end (fewer than L predictions) is dropped.

  Raises:
    DataError: unknown name or split; a raw file that is missing while its host does not answer within 5 s; a raw file with
      the wrong digest; a prepared copy that is damaged, copied in part or not what the table says; an empty split; no writable
      folder; a full disk.

  Holds: what was prepared only in part, by a process that was killed, is never taken for whole; of two processes that
  prepare the same data set, the second waits for the first, and says so. Preparing shows its progress on standard error.
  """
  dataset = find_dataset(name)
  if split not in dataset.splits:
    raise DataError(f"unknown split {split!r} of {name}; known are {', '.join(dataset.splits)}.")
  if dataset.is_text != (length is not None):
    raise DataError(
      f"{name} is a text: pass length=<tokens to predict in one example>."
      if dataset.is_text
      else f"length={length} given, but {name} is no text; leave it out."
    )
  if length is not None and length < 1:
    raise DataError(f"length={length}, wanted at least 1.")
  if fake:
    return fake_source(name, split, length=length)
  folders = find_folders(dataset.tfds_name, data_dir, manual_dir)
  wanted = dataset.splits[split]
  if dataset.by_record:
    return _not_empty(_record_source(name, split, dataset, folders))
  arrays = _select(dataset, wanted, [_part(dataset, part, folders) for part in wanted.parts])
  if length is not None:
    arrays = {"tokens": _blocks(arrays["tokens"], length)}
  source = Source(_recorded_name(name, dataset, folders), split, arrays)
  return _not_empty(source, f" of length {length}" if length else "")


def prepare_data(name: str, *, data_dir: PathLike | None = None, manual_dir: PathLike | None = None) -> Path:
  """Prepares, ahead of time, all that `load_source` needs for a data set, with progress on standard error.

  A copy that is there already is checked: files that are missing or cut short are an error.

  Returns:
    The folder that holds the prepared copy.

  Raises:
    DataError: as of `load_source`.
  """
  dataset = find_dataset(name)
  folders = find_folders(dataset.tfds_name, data_dir, manual_dir)
  for part in dataset.parts:
    if dataset.by_record:
      root = _copy(dataset, folders)
      with quiet(dataset):
        open_records(dataset, part, root)
    if not dataset.by_record or dataset.labels is not None:
      _part(dataset, part, folders)
  return _copy_root(dataset, folders) or folders.own


def describe_data(name: str, *, data_dir: PathLike | None = None, manual_dir: PathLike | None = None) -> str:
  """Says in one line what `prepare_data` will read or download, how large it is, and where the result goes."""
  dataset = find_dataset(name)
  folders = find_folders(dataset.tfds_name, data_dir, manual_dir)
  root = _copy_root(dataset, folders)
  if root is not None:
    return f"{name}: reads the prepared copy in {root / dataset.tfds_name}; arrays that it lacks go to {folders.own}"
  return f"{name}: {describe_raw_files(dataset, folders)}; goes to {folders.own}"


def is_prepared(name: str, *, data_dir: PathLike | None = None) -> bool:
  """Returns whether a prepared copy of the data set is there, in array_record files."""
  dataset = find_dataset(name)
  try:
    return _copy_root(dataset, find_folders(dataset.tfds_name, data_dir, None)) is not None
  except DataError:  # a copy in another format
    return False


# Copies and arrays.


def _copy_root(dataset: Dataset, folders: Folders) -> Path | None:
  roots = (folders.given, folders.own)
  return next((root for root in roots if make_builder(dataset, root).data_path.exists()), None)


def _copy(dataset: Dataset, folders: Folders) -> Path:
  """Returns the root of the prepared copy, which is made if need be, once for all processes."""
  root = _copy_root(dataset, folders)
  if root is None:
    _check_writable(dataset, folders)
    # a lock of its own: `_part` holds the other one
    with locked(folders.own / f"{dataset.tfds_name}.copy.lock"), quiet(dataset):
      root = _copy_root(dataset, folders)  # whoever held the lock may just have made it
      if root is None:
        root = folders.own
        prepare_copy(dataset, root, folders)
  return root


def _part(dataset: Dataset, part: str, folders: Folders) -> dict[str, np.ndarray]:
  """Returns the arrays of an official part, which are made if need be, once for all processes."""
  arrays = _kept(dataset, part, folders)
  if arrays is None:
    _check_writable(dataset, folders)
    with locked(folders.own / f"{dataset.tfds_name}.lock"):
      arrays = _kept(dataset, part, folders)  # whoever held the lock may just have written it
      if arrays is None:
        root = _copy(dataset, folders)
        with quiet(dataset):
          arrays = _decode(dataset, part, root, folders)
        write_arrays(arrays_folder(folders.own, dataset.tfds_name) / _file_name(dataset, part, folders), arrays)
  return arrays


def _check_writable(dataset: Dataset, folders: Folders) -> None:
  if not is_writable(folders.own):
    raise DataError(
      f"cannot write into {folders.given} or {folders.own} to prepare {dataset.tfds_name}; pass --data_dir=<a writable folder>."
    )


def _kept(dataset: Dataset, part: str, folders: Folders) -> dict[str, np.ndarray] | None:
  """Returns the arrays that were kept, or None where there are none, or other ones than the table promises: they are decoded again."""
  name = _file_name(dataset, part, folders)
  for root in dict.fromkeys((folders.given, folders.own)):
    arrays = read_arrays(arrays_folder(root, dataset.tfds_name) / name)
    if arrays is not None and are_as_promised(arrays, dataset, part):
      return arrays
  return None


def _decode(dataset: Dataset, part: str, root: Path, folders: Folders) -> dict[str, np.ndarray]:
  if not dataset.is_text:
    return read_images(dataset, part, root)
  if not dataset.has_subwords:
    return {"tokens": np.frombuffer(b"".join(b"".join(texts) for texts in read_texts(dataset, part, root)), np.uint8)}
  model = _vocabulary(dataset, folders)
  check_extra(dataset)
  if model is None:
    model = _vocabulary_path(folders.own, dataset)
    learned = bpe.train_bpe(read_texts(dataset, "train", root), dataset.num_labels)
    write_whole(model, lambda file: file.write(learned))
  return {"tokens": np.concatenate(list(bpe.encode_sentences(model, read_texts(dataset, part, root))))}


# The vocabulary of a text in subwords: arrays that were encoded by another one are not taken for its own.


def _vocabulary_path(root: Path, dataset: Dataset) -> Path:
  return arrays_folder(root, dataset.tfds_name) / "bpe.model"


def _vocabulary(dataset: Dataset, folders: Folders) -> Path | None:
  paths = (_vocabulary_path(root, dataset) for root in (folders.given, folders.own))
  return next((path for path in paths if path.is_file()), None)


def _file_name(dataset: Dataset, part: str, folders: Folders) -> str:
  model = _vocabulary(dataset, folders) if dataset.has_subwords else None
  return f"{part}.npz" if model is None else f"{part}_{bpe.digest(model)}.npz"


def _recorded_name(name: str, dataset: Dataset, folders: Folders) -> str:
  model = _vocabulary(dataset, folders) if dataset.has_subwords else None
  return name if model is None else f"{name}_bpe{dataset.num_labels}_{bpe.digest(model)}"


# Parts -> splits.


def _not_empty(source: AnySource, of_what: str = "") -> AnySource:
  if not len(source):
    raise DataError(f"split {source.split!r} of {source.name} holds no example{of_what}.")
  return source


def _select(dataset: Dataset, split: Split, parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Cuts a split from the arrays of its parts."""
  arrays = {}
  for name in parts[0]:
    whole = parts[0][name] if len(parts) == 1 else np.concatenate([part[name] for part in parts])
    arrays[name] = whole[split.start : split.stop]
  if dataset.labels is not None:
    positions = _labelled(arrays["label"], dataset.labels)
    arrays = {name: array[positions] for name, array in arrays.items()}
    arrays["label"] -= dataset.labels.start
  return arrays


def _labelled(labels: np.ndarray, kept: range) -> np.ndarray:
  return np.flatnonzero((labels >= kept.start) & (labels < kept.stop))


def _blocks(tokens: np.ndarray, length: int) -> np.ndarray:
  """Cuts a text into blocks of `length` + 1 tokens that share their border: a view, so that it costs no memory."""
  if len(tokens) <= length:
    return np.empty((0, length + 1), tokens.dtype)
  return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


def _record_source(name: str, split: str, dataset: Dataset, folders: Folders) -> RecordSource:
  wanted = dataset.splits[split]
  (part,) = wanted.parts
  positions = np.arange(dataset.parts[part])[wanted.start : wanted.stop]
  if dataset.labels is not None:
    labels = _part(dataset, part, folders)["label"]
    positions = positions[_labelled(labels[positions], dataset.labels)]
  root = _copy(dataset, folders)
  with quiet(dataset):
    records = dataclasses.replace(open_records(dataset, part, root, encoded=True), positions=positions)
  decode = functools.partial(decode_photo, dataset=dataset, folder=records.folder)
  return RecordSource(name, split, records, decode, dataset.example)
