"""Decoded arrays on disk, beside the prepared copy: `<data_dir>/arrays/<TFDS name>/<part>.npz`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from bsjax.data.source import DataError


def arrays_folder(root: Path, tfds_name: str) -> Path:
  """Returns where the arrays of a data set lie under `root`."""
  return root / "arrays" / tfds_name


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
  """Returns the arrays, or None if they are absent or damaged.

  `testzip` compares the CRC of every member; reading alone would miss a changed header that asks for fewer bytes.
  """
  try:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
      return {name: file[name] for name in file.files} if file.zip.testzip() is None else None
  except Exception:  # a damaged file fails in many ways, and each has the same cure: decode again
    return None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays for `read_arrays`. Raises DataError as `write_whole` does."""
  write_whole(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
  """Writes a file under another name first, so that a kill leaves either nothing or all under its own.

  Raises:
    DataError: the disk is full, or whatever else the system says; what was written of it is removed.
  """
  unfinished = path.with_name(path.name + ".unfinished")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as file:
      write(file)
    unfinished.replace(path)
  except OSError as error:
    unfinished.unlink(missing_ok=True)
    raise DataError(f"{path} cannot be written: {error}; make room, or pass another --data_dir.") from error
