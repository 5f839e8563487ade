"""Where `load_source` looks, what it refuses, and what a killed or a second process does to it."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import bsjax
from bsjax.data import DATASETS, DataError, arrays, folders, is_prepared, load, load_source, prepare_data
from tests.data.raw_files import refuse

PACKAGE_ROOT = os.path.dirname(bsjax.__path__[0])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A folder with `digits` prepared, to be copied."""
  data_dir = tmp_path_factory.mktemp("prepared")
  load_source("digits", "train", data_dir=data_dir)
  return data_dir


@pytest.fixture
def digits_dir(prepared, tmp_path):
  return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture(scope="module")
def expected(prepared):
  return load_source("digits", "train", data_dir=prepared).arrays


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(found[name], expected[name], strict=True)


def test_unknown_names_list_the_known_ones(tmp_path):
  with pytest.raises(DataError, match=r"unknown data set 'minst'; known are digits, mnist, .*, lm1b\.$"):
    load_source("minst", "train", data_dir=tmp_path)
  with pytest.raises(DataError, match=r"unknown split 'dev' of digits; known are train, validation, test\."):
    load_source("digits", "dev", data_dir=tmp_path)


# Folders.


def test_environment_names_the_folder(tmp_path, monkeypatch, expected):
  monkeypatch.setenv("BSJAX_DATA_DIR", str(tmp_path / "from_environment"))
  assert_same(load_source("digits", "train").arrays, expected)
  assert (tmp_path / "from_environment" / "digits").is_dir()


def test_read_only_folder_is_left_alone(tmp_path, monkeypatch, expected):
  monkeypatch.setattr(folders, "DEFAULT_FOLDER", str(tmp_path / "cache"))
  read_only = tmp_path / "read_only"
  read_only.mkdir(mode=0o555)
  assert_same(load_source("digits", "train", data_dir=read_only).arrays, expected)
  assert list(read_only.iterdir()) == []
  assert (tmp_path / "cache" / "digits").is_dir()


def test_prepared_copy_in_a_read_only_folder_is_used(digits_dir, tmp_path, monkeypatch, expected):
  monkeypatch.setattr(folders, "DEFAULT_FOLDER", str(tmp_path / "cache"))
  monkeypatch.setattr(load, "prepare_copy", refuse)
  shutil.rmtree(digits_dir / "arrays")
  digits_dir.chmod(0o555)
  assert_same(load_source("digits", "train", data_dir=digits_dir).arrays, expected)
  digits_dir.chmod(0o755)
  assert not (digits_dir / "arrays").exists()


def test_the_folder_that_holds_the_copy_is_returned(digits_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(folders, "DEFAULT_FOLDER", str(tmp_path / "cache"))
  digits_dir.chmod(0o555)
  assert prepare_data("digits", data_dir=digits_dir) == digits_dir
  digits_dir.chmod(0o755)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  with pytest.raises(DataError, match=r"\.lock cannot be locked: File name too long; mend that, or pass another"):
    load_source("digits", "train", data_dir=tmp_path / ("x" * 300))


def test_a_lock_of_another_user_is_taken(tmp_path, monkeypatch):
  """Who may read but not write the file can lock it."""
  (tmp_path / "lock").touch()
  real = Path.open

  def read_only(path, mode="r", *args, **kwargs):
    if mode != "r":
      raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return real(path, mode, *args, **kwargs)

  monkeypatch.setattr(Path, "open", read_only)
  with folders.locked(tmp_path / "lock"), real(tmp_path / "lock") as again, pytest.raises(BlockingIOError):
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_writable_folder_is_an_error(tmp_path, monkeypatch):
  tmp_path.joinpath("read_only").mkdir(mode=0o555)
  monkeypatch.setattr(folders, "DEFAULT_FOLDER", str(tmp_path / "read_only" / "cache"))
  with pytest.raises(DataError, match="cannot write into .*pass --data_dir=<a writable folder>"):
    load_source("digits", "train", data_dir=tmp_path / "read_only")


# Damage.


def _truncate_shard(folder):
  shard = folder / "digits-train.array_record-00000-of-00001"
  shard.write_bytes(shard.read_bytes()[:1000])


def _empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def _claim_other_format(folder):
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))


def _empty_description(folder):
  (folder / "dataset_info.json").write_text("")


@pytest.mark.parametrize("damage", [_truncate_shard, _empty, _claim_other_format, _empty_description])
def test_damaged_copy_is_an_error_in_one_line(digits_dir, damage):
  shutil.rmtree(digits_dir / "arrays")
  damage(digits_dir / "digits" / "1.0.0")
  with pytest.raises(DataError, match=r"/data/digits.*pass another --data_dir\.$") as error:
    load_source("digits", "train", data_dir=digits_dir)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [_claim_other_format, _empty_description])
def test_a_copy_that_cannot_be_read_does_not_count_as_prepared(digits_dir, damage):
  assert is_prepared("digits", data_dir=digits_dir)
  damage(digits_dir / "digits" / "1.0.0")
  assert not is_prepared("digits", data_dir=digits_dir)


def test_kept_arrays_need_neither_tfds_nor_a_writable_folder(digits_dir, monkeypatch, expected):
  monkeypatch.setattr(load, "make_builder", refuse)
  monkeypatch.setattr(folders, "is_writable", lambda folder: False)
  assert_same(load_source("digits", "train", data_dir=digits_dir).arrays, expected)


def _flip_a_pixel(content):
  return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def _claim_fewer_examples(content):
  return content.replace(b"(1024, 8, 8, 1)", b"(1023, 8, 8, 1)")


@pytest.mark.parametrize(
  "damage", [_flip_a_pixel, _claim_fewer_examples, lambda content: content[:-100], lambda content: b""]
)
def test_damaged_arrays_are_decoded_again(digits_dir, damage, expected):
  path = digits_dir / "arrays" / "digits" / "train.npz"
  whole = path.read_bytes()
  path.write_bytes(damage(whole))
  assert path.read_bytes() != whole
  assert_same(load_source("digits", "train", data_dir=digits_dir).arrays, expected)
  with zipfile.ZipFile(path) as file:
    assert file.testzip() is None  # and written anew


@pytest.mark.parametrize(
  "change",
  [
    lambda image, label: {"image": image[:100], "label": label[:100]},
    lambda image, label: {"image": image, "label": label + 55},
    lambda image, label: {"image": image[:, :7], "label": label},
    lambda image, label: {"image": image.astype(np.float64), "label": label},
    lambda image, label: {"label": label},
  ],
)
def test_kept_arrays_that_are_not_those_of_the_table_are_decoded_again(digits_dir, change, expected):
  arrays.write_arrays(digits_dir / "arrays" / "digits" / "train.npz", change(**expected))
  assert_same(load_source("digits", "train", data_dir=digits_dir).arrays, expected)


# Other processes.

_KILLED = """
import os, signal, sys
from bsjax.data import digits, load_source
generate = digits.Digits._generate_examples
def killed(self, rows):
  for i, example in enumerate(generate(self, rows)):
    if len(rows) == 387 and i == 100:  # in the last of the three splits
      os.kill(os.getpid(), signal.SIGKILL)
    yield example
digits.Digits._generate_examples = killed
load_source("digits", "train", data_dir=sys.argv[1])
"""


def test_what_a_killed_process_left_is_not_taken_for_whole(tmp_path, expected, caplog):
  result = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], cwd=PACKAGE_ROOT, timeout=120)
  assert result.returncode == -signal.SIGKILL
  (left,) = (tmp_path / "digits").iterdir()
  assert_same(load_source("digits", "train", data_dir=tmp_path).arrays, expected)
  assert f"{left} is left of a preparation that was killed" in caplog.text
  assert len(load_source("digits", "test", data_dir=tmp_path)) == 387


_COUNTED = """
import pathlib, sys, time
from bsjax.data import load, load_source
folder, name, step = pathlib.Path(sys.argv[1]), *sys.argv[2:]
real = getattr(load, step)
def counted(*args):
  (folder / f"{name}.works").touch()
  while not (folder / "go").exists():
    time.sleep(0.02)
  return real(*args)
setattr(load, step, counted)
(folder / f"{name}.started").touch()
assert len(load_source("digits", "train", data_dir=folder / "data")) == 1024
"""


def _wait_for(path):
  deadline = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < deadline, path
    time.sleep(0.02)


@pytest.mark.parametrize("step", ["prepare_copy", "_decode"])
def test_of_two_processes_one_works_and_the_other_waits(tmp_path, step):
  def start(name):
    command = [sys.executable, "-c", _COUNTED, str(tmp_path), name, step]
    return subprocess.Popen(command, cwd=PACKAGE_ROOT, stderr=subprocess.PIPE, text=True)

  first = start("first")
  _wait_for(tmp_path / "first.works")
  second = start("second")
  _wait_for(tmp_path / "second.started")
  time.sleep(1)  # without the lock it would be at work by now
  (tmp_path / "go").touch()
  said = [process.communicate(timeout=60)[1] for process in (first, second)]
  assert (first.returncode, second.returncode) == (0, 0)
  assert ["waiting for another process" in lines for lines in said] == [False, True]
  assert not (tmp_path / "second.works").exists()


def test_a_copy_is_made_once_without_arrays_too(tmp_path, monkeypatch):
  """As for a data set that is read by record. Threads do for processes here: the lock belongs to the open file."""
  digits, calls = DATASETS["digits"], []
  where = folders.find_folders("digits", tmp_path, None)
  real = load.prepare_copy

  def slow(*args):
    calls.append(args)
    time.sleep(0.5)
    real(*args)

  monkeypatch.setattr(load, "prepare_copy", slow)
  load.make_builder(digits, tmp_path)  # imports
  threads = [threading.Thread(target=load._copy, args=(digits, where)) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(calls) == 1
  assert load._copy(digits, where) == tmp_path


def test_arrays_appear_whole_or_not_at_all(tmp_path):
  def stopped(file):
    file.write(b"half of it")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    arrays.write_whole(tmp_path / "train.npz", stopped)
  assert not (tmp_path / "train.npz").exists()
