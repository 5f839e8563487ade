"""Load a data set by name into host memory.

`load_source` goes through TFDS for every data set alike: raw files, checked by their digests -> a prepared copy in
array_record files -> `tfds.data_source` -> arrays. TensorFlow is never imported. The arrays are also kept beside the
prepared copy, because decoding 60,000 PNG images takes seconds and reading them back a tenth of one.

Where things are looked for and put:

- `data_dir`: the argument, else `$BSJAX_DATA_DIR`, else `~/.cache/bsjax/data`. Prepared copies are read from here, and
  written here if the folder is writable (by its mode, too: nothing is written into a folder marked read-only, not even by
  root), else into `~/.cache/bsjax/data`.
- raw files: `manual_dir` alone if it is given, else `data_dir` and `<data_dir>/downloads/manual`; in each first a subfolder
  named after the data set (Fashion-MNIST's files have the names of MNIST's). If they are in none of these and no
  `manual_dir` is given, TFDS downloads them, provided that their host answers.
"""

import contextlib
import fcntl
import hashlib
import http.client
import importlib
import io
import logging
import os
import pathlib
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np

from bsjax.data.source import Source

PathLike = str | os.PathLike[str]

# 55,000 to train on, as in Shallue et al. (2019).
_SHALLUE_SPLITS = {"train": "train[:55000]", "validation": "train[55000:]", "test": "test"}
_SPLITS = {
  "digits": {"train": "train", "validation": "validation", "test": "test"},
  "fashion_mnist": _SHALLUE_SPLITS,
  "mnist": _SHALLUE_SPLITS,
}
_BUILDERS = {
  "digits": ("bsjax.data.digits", "Digits"),
  "fashion_mnist": ("bsjax.data.mnist", "FashionMnist"),
  "mnist": ("bsjax.data.mnist", "Mnist"),
}
_DEFAULT_FOLDER = "~/.cache/bsjax/data"
_ANSWER_SECONDS = 5.0
_LOGGER = logging.getLogger(__name__)


class DataError(ValueError):
  """Says in one line why a data set could not be loaded, and what to do."""


def load_source(
  name: str, split: str, *, data_dir: PathLike | None = None, manual_dir: PathLike | None = None
) -> Source:
  """Load one split of a data set, preparing it first if need be.

  Args:
    name: `digits` (1,024 / 386 / 387 examples of 8x8x1, values 0..16; needs no files), `mnist` or `fashion_mnist`
      (55,000 / 5,000 / 10,000 of 28x28x1, values 0..255).
    split: `train`, `validation` or `test`.
    data_dir: where prepared copies are, or go; see the top of this file.
    manual_dir: the folder that holds the raw files, or one that holds a folder `<name>` with them.

  Returns:
    The split, whole.

  Raises:
    DataError: unknown name or split; a raw file that is missing while its host does not answer within 5 s; a raw file with
      the wrong digest; a prepared copy that is damaged; no writable folder.

  Holds: what was prepared only in part, by a process that was killed, is never taken for whole; of two processes that
  prepare the same data set, the second waits for the first.
  """
  if name not in _SPLITS:
    raise DataError(f"unknown data set {name!r}; known are {', '.join(sorted(_SPLITS))}.")
  if split not in _SPLITS[name]:
    raise DataError(f"unknown split {split!r} of {name}; known are {', '.join(_SPLITS[name])}.")

  given = _absolute(data_dir or os.environ.get("BSJAX_DATA_DIR") or _DEFAULT_FOLDER)
  own = given if _is_writable(given) else _absolute(_DEFAULT_FOLDER)
  arrays = _read_decoded(given, name, split) or _read_decoded(own, name, split)
  if arrays is None:
    if not _is_writable(own):
      raise DataError(f"cannot write into {given} or {own} to prepare {name}; pass --data_dir=<a writable folder>.")
    with _locked(own / f"{name}.lock"):
      arrays = _read_decoded(own, name, split)  # whoever held the lock may just have written it
      if arrays is None:
        root = given if _builder(name, given).data_path.exists() else own
        if not _builder(name, root).data_path.exists():
          _prepare(name, root, _raw_folders(name, [given, own], manual_dir), may_download=manual_dir is None)
        arrays = _decode(name, split, root)
        _write_decoded(own, name, split, arrays)
  return Source(name, split, arrays)


def _raw_folders(name: str, roots: list[pathlib.Path], manual_dir: PathLike | None) -> list[pathlib.Path]:
  """Return where raw files are looked for, in order."""
  if manual_dir is not None:
    parents = [_absolute(manual_dir)]
  else:
    parents = [folder for root in roots for folder in (root, root / "downloads" / "manual")]
  return list(dict.fromkeys(folder for parent in parents for folder in (parent / name, parent)))


def _absolute(path: PathLike) -> pathlib.Path:
  return pathlib.Path(path).expanduser().absolute()


def _is_writable(folder: pathlib.Path) -> bool:
  """Return whether files may be put into `folder`, made if need be. A mode without any write bit binds root, too."""
  nearest = next(path for path in (folder, *folder.parents) if path.exists())
  return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) and bool(nearest.stat().st_mode & 0o222)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Hold an exclusive lock on `path`, waiting for it. The system lets go of it when the process ends, however it ends."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


# Through TFDS: raw files -> prepared copy -> arrays.


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keep TFDS from printing, and from warning of what is no fault here (such as that OpenCV is not installed)."""
  import absl.logging
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl.logging.set_verbosity(verbosity)


def _builder(name: str, root: pathlib.Path) -> Any:
  module, builder = _BUILDERS[name]
  try:
    return getattr(importlib.import_module(module), builder)(data_dir=root, file_format="array_record")
  except ValueError as error:
    raise DataError(
      f"{root / name} holds no array_record copy: {_one_line(error)}; pass another --data_dir."
    ) from error


def _prepare(name: str, root: pathlib.Path, raw_folders: list[pathlib.Path], *, may_download: bool) -> None:
  """Write the prepared copy of a data set under `root`. TFDS renames it into place when it is whole."""
  import tensorflow_datasets as tfds

  raw_folder = _check_raw_files(name, raw_folders, may_download=may_download)
  config = tfds.download.DownloadConfig(manual_dir=raw_folder)
  _LOGGER.info("preparing %s in %s", name, root)
  try:
    with _quiet():
      _builder(name, root).download_and_prepare(download_config=config)
  except Exception as error:  # TFDS promises no type: network, disk, its own
    raise DataError(f"{name} could not be prepared in {root}: {_one_line(error)}") from error


def _check_raw_files(name: str, folders: list[pathlib.Path], *, may_download: bool) -> pathlib.Path:
  """Return the one of `folders` that holds most raw files, once it is known that preparing from there can succeed.

  TFDS does the same look-ups, but takes minutes of retries to report a missing file when there is no network.
  """
  import tensorflow_datasets as tfds

  infos = {info.filename: (url, info.checksum) for url, info in (tfds.builder_cls(name).url_infos or {}).items()}
  folder = max(folders, key=lambda folder: sum((folder / file).is_file() for file in infos))
  for file, (url, expected) in infos.items():
    path = folder / file
    if path.is_file():
      found = hashlib.sha256(path.read_bytes()).hexdigest()
      if found != expected:
        raise DataError(
          f"{path} is not the {file} of {name}: expected sha256 {expected}, found {found}; replace or remove it."
        )
    elif not may_download:
      raise DataError(
        f"{name} needs {file}, which is not in {_listed(folders)}; put it there or pass another --manual_dir."
      )
    elif not _answers(url):
      raise DataError(
        f"{name} needs {file}, which is not in {_listed(folders)}, and {urllib.parse.urlsplit(url).hostname} does not answer; "
        f"put the raw files ({', '.join(infos)}) in one folder and pass --manual_dir=<folder>."
      )
  return folder


def _answers(url: str) -> bool:
  """Return whether `url` can be had, within five seconds (in a thread, since looking up a name has no time limit)."""
  answers: list[bool] = []

  def ask() -> None:
    with (
      contextlib.suppress(OSError, http.client.HTTPException),
      urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER_SECONDS),
    ):
      answers.append(True)

  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(_ANSWER_SECONDS)
  return bool(answers)


def _decode(name: str, split: str, root: pathlib.Path) -> dict[str, np.ndarray]:
  """Read one split of the prepared copy under `root` through `tfds.data_source`."""
  import tensorflow_datasets as tfds

  folder = _builder(name, root).data_path
  try:
    with _quiet():
      examples = tfds.data_source(name, split=_SPLITS[name][split], data_dir=root, download=False)
      rows = examples.__getitems__(range(len(examples)))
    return {
      "image": np.stack([row["image"] for row in rows]),
      "label": np.array([row["label"] for row in rows], np.int32),
    }
  except Exception as error:  # TFDS promises no type: a truncated file, a missing one, another format
    raise DataError(f"{folder} cannot be read: {_one_line(error)}; delete it, or pass another --data_dir.") from error


def _listed(folders: list[pathlib.Path]) -> str:
  return " or ".join(str(folder) for folder in folders)


def _one_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0].strip()


# Decoded arrays, beside the prepared copy.


def _decoded_path(root: pathlib.Path, name: str, split: str) -> pathlib.Path:
  return root / "decoded" / name / f"{split}.npz"


def _read_decoded(root: pathlib.Path, name: str, split: str) -> dict[str, np.ndarray] | None:
  """Return the arrays, or None if they are absent or damaged.

  `testzip` compares the CRC of every member; reading alone would miss a changed header that asks for fewer bytes.
  """
  try:
    with _decoded_path(root, name, split).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
      return {"image": file["image"], "label": file["label"]} if file.zip.testzip() is None else None
  except Exception:  # a damaged file fails in many ways, and each has the same cure: decode again
    return None


def _write_decoded(root: pathlib.Path, name: str, split: str, arrays: dict[str, np.ndarray]) -> None:
  """Write the arrays under another name first, so that a kill leaves either nothing or all under theirs."""
  path = _decoded_path(root, name, split)
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix(".unfinished.npz")
  np.savez(unfinished, image=arrays["image"], label=arrays["label"])
  unfinished.replace(path)
