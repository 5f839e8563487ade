"""Raw files -> a prepared copy in array_record files, through TFDS; TensorFlow is imported for no data set but ImageNet.

TFDS does the same look-ups as `check_raw_files`, but takes minutes of retries to report a missing file when there is no network.
"""

import contextlib
import hashlib
import http.client
import importlib
import importlib.util
import io
import logging
import textwrap
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bsjax.data.datasets import Dataset
from bsjax.data.folders import Folders
from bsjax.data.source import DataError

_ANSWER_SECONDS = 5.0
_BLOCK_BYTES = 2**20
EXTRAS = {  # of pyproject.toml: the module that each brings, and how to get it
  "tf": ("tensorflow", "tensorflow-cpu==2.21.0"),
  "lm1b": ("sentencepiece", "sentencepiece==0.2.3"),
}
_LOGGER = logging.getLogger(__name__)


class RawFile(NamedTuple):
  """A file that a data set is prepared from, as TFDS has registered it."""

  name: str
  url: str
  num_bytes: int
  sha256: str
  by_hand: bool  # only after registering with its host


class RawFiles(NamedTuple):
  """The folder that holds most raw files of a data set, and those that it lacks."""

  folder: Path
  missing: list[RawFile]


def make_builder(dataset: Dataset, root: Path) -> Any:
  """Returns the TFDS builder of a data set whose prepared copy is, or goes, under `root`.

  Raises:
    DataError: what is there is no array_record copy, or is damaged.
  """
  try:
    return _builder_class(dataset)(data_dir=root, file_format="array_record")
  except Exception as error:  # TFDS promises no type: another format, a description that is empty or cut short
    raise DataError(
      f"{root / dataset.tfds_name} holds no array_record copy that can be read: {one_line(error)}; delete it, or pass another --data_dir."
    ) from error


def _builder_class(dataset: Dataset) -> Any:
  import tensorflow_datasets as tfds

  if not dataset.builder:
    return tfds.builder_cls(dataset.tfds_name)
  module, builder = dataset.builder.split(":")
  return getattr(importlib.import_module(f"bsjax.data.{module}"), builder)


def raw_files(dataset: Dataset) -> list[RawFile]:
  """Lists what a data set is prepared from; nothing for one that comes with the package."""
  builder = _builder_class(dataset)
  by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS is not None
  return [
    RawFile(info.filename or url.rsplit("/", 1)[1], url, int(info.size), info.checksum, by_hand)
    for url, info in (builder.url_infos or {}).items()
  ]


def find_raw_files(dataset: Dataset, folders: Sequence[Path]) -> RawFiles:
  """Looks for the raw files of a data set, by name."""
  files = raw_files(dataset)
  folder = max(folders, key=lambda folder: sum((folder / file.name).is_file() for file in files))
  return RawFiles(folder, [file for file in files if not (folder / file.name).is_file()])


def check_raw_files(dataset: Dataset, folders: Folders) -> Path:
  """Returns the folder with the raw files, once it is known that preparing from there can succeed.

  Raises:
    DataError: a file that is missing and cannot be downloaded, or has the wrong digest.
  """
  name, (folder, missing) = dataset.tfds_name, find_raw_files(dataset, folders.raw)
  found = [file for file in raw_files(dataset) if file not in missing]
  for file in found:
    _check_size(name, file, folder / file.name)
  searched = " or ".join(map(str, folders.raw))
  for file in missing:
    host = urllib.parse.urlsplit(file.url).hostname
    if file.by_hand:
      raise DataError(
        f"{name} needs {file.name}, which is not in {searched}; "
        f"get it from {host}, which asks to register, and pass --manual_dir=<its folder>."
      )
    if not folders.may_download:
      raise DataError(
        f"{name} needs {file.name}, which is not in {searched}; put it there or pass another --manual_dir."
      )
    if not _is_downloaded(file, folders.own / "downloads" / name) and not _answers(file.url):
      raise DataError(
        f"{name} needs {file.name}, which is not in {searched}, and {host} does not answer, or not with this file; "
        f"put the raw files ({', '.join(file.name for file in raw_files(dataset))}) in one folder and pass --manual_dir=<folder>."
      )
  for file in found:  # last, for it takes long
    _check_digest(name, file, folder / file.name)
  return folder


def describe_raw_files(dataset: Dataset, folders: Folders) -> str:
  """Says in one line where a data set will come from: which files, how large, found where or downloaded from which host."""
  files = raw_files(dataset)
  if not files:
    return "comes with the package"
  folder, missing = find_raw_files(dataset, folders.raw)
  found = [file for file in files if file not in missing]
  parts = [f"reads {_sizes(found)} from {folder}"] if found else []
  if missing and (missing[0].by_hand or not folders.may_download):
    parts.append(f"lacks {_sizes(missing)}")
  elif missing:
    parts.append(f"downloads {_sizes(missing)} from {urllib.parse.urlsplit(missing[0].url).hostname}")
  return " and ".join(parts)


def describe_needs(dataset: Dataset) -> str:
  """Says in a few words what preparing a data set needs that does not come with the package."""
  files = raw_files(dataset)
  needs = [f"{sum(file.num_bytes for file in files) / 1e6:,.1f} MB of raw files"] if files else []
  if files and files[0].by_hand:
    needs.append("downloaded by hand")
  if dataset.extra:
    needs.append(EXTRAS[dataset.extra][1])
  return ", ".join(needs) or "nothing"


def _sizes(files: Sequence[RawFile]) -> str:
  names = ", ".join(file.name for file in files)
  return f"{names} ({sum(file.num_bytes for file in files) / 1e6:,.1f} MB)"


def _check_size(name: str, file: RawFile, path: Path) -> None:
  """Tells at once of an unfinished download of many gigabytes."""
  found = path.stat().st_size
  if found != file.num_bytes:
    raise _wrong_file(name, file, path, f"{file.num_bytes:,} bytes with sha256 {file.sha256}", f"{found:,} bytes")


def _check_digest(name: str, file: RawFile, path: Path) -> None:
  from tensorflow_datasets.core import utils

  digest = hashlib.sha256()
  bar = utils.tqdm(total=file.num_bytes, desc=f"Checking {file.name}", unit="B", unit_scale=True, leave=False)
  try:
    with bar, path.open("rb") as handle:
      while block := handle.read(_BLOCK_BYTES):
        digest.update(block)
        bar.update(len(block))
  except OSError as error:
    raise DataError(
      f"{path} cannot be read: {one_line(error)}; make it readable, or pass another --manual_dir."
    ) from error
  if digest.hexdigest() != file.sha256:
    raise _wrong_file(name, file, path, f"sha256 {file.sha256}", f"sha256 {digest.hexdigest()}")


def _wrong_file(name: str, file: RawFile, path: Path, wanted: str, found: str) -> DataError:
  another = "" if path.parent.name == name else f", or put those of {name} into {path.parent / name}"
  return DataError(
    f"{path} is not the {file.name} of {name}: expected {wanted}, found {found}; replace or remove it{another}."
  )


def _is_downloaded(file: RawFile, folder: Path) -> bool:
  """Returns whether TFDS has this file from an earlier attempt."""
  from tensorflow_datasets.core.download import resource

  return (folder / resource.get_dl_fname(file.url, file.sha256)).is_file()


def _answers(url: str) -> bool:
  """Returns whether `url` can be had, within five seconds (in a thread, since looking up a name has no time limit)."""
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


def prepare_copy(dataset: Dataset, root: Path, folders: Folders) -> None:
  """Writes the prepared copy of a data set under `root`. TFDS renames it into place when it is whole.

  Raises:
    DataError: raw files as of `check_raw_files`; a missing extra; whatever stops TFDS, such as a full disk.
  """
  import tensorflow_datasets as tfds

  check_extra(dataset)
  config = tfds.download.DownloadConfig(manual_dir=check_raw_files(dataset, folders))
  builder = make_builder(dataset, root)
  _announce_sizes(builder, dataset)
  for path in sorted(root.joinpath(dataset.tfds_name).glob("incomplete.*")):
    _LOGGER.warning("%s is left of a preparation that was killed; delete it, unless another program is at it", path)
  try:
    builder.download_and_prepare(download_config=config)
  except Exception as error:  # TFDS promises no type: network, disk, its own
    cure = (
      "make room, or pass another --data_dir" if "No space left" in str(error) else "mend that, and it starts again"
    )
    raise DataError(f"{dataset.tfds_name} could not be prepared in {root}: {one_line(error)}; {cure}.") from error


def check_extra(dataset: Dataset) -> None:
  """Refuses to go on without an optional package that preparing a data set needs.

  Raises:
    DataError: with the command that installs it.
  """
  if not dataset.extra:
    return
  module, requirement = EXTRAS[dataset.extra]
  if importlib.util.find_spec(module) is None:
    raise DataError(
      f"{dataset.tfds_name} needs {module} to be prepared, which is not installed: pip install {requirement} "
      f"(the extra bsjax[{dataset.extra}]); once prepared it is read without."
    )


def _announce_sizes(builder: Any, dataset: Dataset) -> None:
  """Tells TFDS how many examples are to come, so that its progress bars show the time left."""
  from tensorflow_datasets.core import splits

  sizes = {part: size for part, size in dataset.parts.items() if "[" not in part}
  builder.info.set_splits(
    splits.SplitDict([splits.SplitInfo(name=part, shard_lengths=[size], num_bytes=0) for part, size in sizes.items()])
  )


@contextlib.contextmanager
def quiet(dataset: Dataset) -> Iterator[None]:
  """Keeps TFDS from printing, and from warning of what is no fault here (such as that OpenCV is not installed).

  Its progress bars stay, on standard error, but for a data set that comes with the package, which takes a second.
  """
  import absl.logging
  import tensorflow_datasets as tfds

  tfds.display_progress_bar(bool(raw_files(dataset)))
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl.logging.set_verbosity(verbosity)


def one_line(error: Exception) -> str:
  """Returns the type and the message of an error, of which the first 600 characters."""
  return textwrap.shorten(f"{type(error).__name__}: {error}", 600, placeholder=" [...]").rstrip(".")
