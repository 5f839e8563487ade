"""Where data sets are looked for and put.

- `data_dir`: the argument, else `$BSJAX_DATA_DIR`, else `~/.cache/bsjax/data`. Prepared copies are read from here, and
  written here if the folder is writable (by its mode, too: nothing is written into a folder marked read-only, not even by
  root), else into `~/.cache/bsjax/data`.
- raw files: `manual_dir` alone if it is given, else `data_dir` and `<data_dir>/downloads/manual`; in each first a subfolder
  named after the data set (Fashion-MNIST's files have the names of MNIST's). If they are in none of these and no
  `manual_dir` is given, TFDS downloads them, provided that their host answers.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from bsjax.data.source import DataError

PathLike = str | os.PathLike[str]

DEFAULT_FOLDER = "~/.cache/bsjax/data"
_LOGGER = logging.getLogger(__name__)


class Folders(NamedTuple):
  """Of one call: `given` is read first; `own` is written (the same folder, if it may be); `raw` are searched for raw files, in order."""

  given: Path
  own: Path
  raw: tuple[Path, ...]
  may_download: bool


def find_folders(tfds_name: str, data_dir: PathLike | None, manual_dir: PathLike | None) -> Folders:
  """Decides where a data set is read, written, and its raw files looked for."""
  given = _absolute(data_dir or os.environ.get("BSJAX_DATA_DIR") or DEFAULT_FOLDER)
  own = given if is_writable(given) else _absolute(DEFAULT_FOLDER)
  if manual_dir is not None:
    parents = [_absolute(manual_dir)]
  else:
    parents = [folder for root in (given, own) for folder in (root, root / "downloads" / "manual")]
  raw = dict.fromkeys(folder for parent in parents for folder in (parent / tfds_name, parent))
  return Folders(given, own, tuple(raw), may_download=manual_dir is None)


def is_writable(folder: Path) -> bool:
  """Returns whether files may be put into `folder`, made if need be. A mode without any write bit binds root, too."""
  nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # no for what may not be seen
  return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) and bool(nearest.stat().st_mode & 0o222)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds an exclusive lock on `path`, waiting for it. The system lets go of it when the process ends, however it ends.

  Raises:
    DataError: the file cannot be made or locked.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _open_for_all(path)
  except OSError as error:
    raise _not_locked(path, error) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _LOGGER.warning("waiting for another process, which holds %s", path)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      raise _not_locked(path, error) from error
    yield


def _open_for_all(path: Path) -> IO[str]:
  """Opens a file to lock it; for reading only, which most file systems accept, where it is another user's."""
  try:
    return path.open("a")
  except PermissionError:
    return path.open()


def _not_locked(path: Path, error: OSError) -> DataError:
  return DataError(f"{path} cannot be locked: {error.strerror}; mend that, or pass another --data_dir.")


def _absolute(path: PathLike) -> Path:
  return Path(path).expanduser().absolute()
