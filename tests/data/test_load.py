"""Where `load_source` looks, what it refuses, and what a killed or a second process does to it."""

import dataclasses
import errno
import fcntl
import hashlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

import bsjax
from bsjax.data import DATASETS, DataError, arrays, folders, is_prepared, load, load_source, prepare, prepare_data, text

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


def refuse(*args, **kwargs):
  raise AssertionError("not to be called")


def test_unknown_names_list_the_known_ones(tmp_path):
  with pytest.raises(DataError, match=r"unknown data set 'minst'; known are digits, mnist, .*, lm1b\.$"):
    load_source("minst", "train", data_dir=tmp_path)
  with pytest.raises(DataError, match=r"unknown split 'dev' of digits; known are train, validation, test\."):
    load_source("digits", "dev", data_dir=tmp_path)


# Raw files.


def test_missing_raw_file_without_a_network_fails_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, "_answers", lambda url: False)
  with pytest.raises(DataError) as error:
    load_source("mnist", "train", data_dir=tmp_path)
  message = str(error.value)
  for part in (
    "t10k-images-idx3-ubyte.gz",
    f"{tmp_path}/downloads/manual",
    "storage.googleapis.com does not answer",
    "--manual_dir",
  ):
    assert part in message
  assert "\n" not in message


def test_a_given_manual_dir_is_not_replaced_by_a_download(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, "_answers", refuse)
  with pytest.raises(DataError, match="which is not in .*/raw/mnist or .*/raw; put it there"):
    load_source("mnist", "train", data_dir=tmp_path, manual_dir=tmp_path / "raw")


@pytest.mark.parametrize(("content", "what"), [(b"not MNIST", "bytes"), (b"0" * 4542, "sha256")])
def test_wrong_file_names_what_was_expected_and_found(tmp_path, monkeypatch, content, what):
  """Of another size, and of the right size with other bytes: 4,542 is that of the file."""
  monkeypatch.setattr(prepare, "_answers", lambda url: True)
  path = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
  path.parent.mkdir()
  path.write_bytes(content)
  digest = "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
  expected, found = {
    "bytes": (f"4,542 bytes with sha256 {digest}", "9 bytes"),
    "sha256": (f"sha256 {digest}", f"sha256 {hashlib.sha256(content).hexdigest()}"),
  }[what]
  with pytest.raises(DataError, match=f"{path} .* expected {expected}, found {found}; replace or remove it"):
    load_source("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
  ("given_as", "place"),
  [
    ("data_dir", "."),
    ("data_dir", "letters"),
    ("data_dir", "downloads/manual"),
    ("data_dir", "downloads/manual/letters"),
    ("manual_dir", "."),
    ("manual_dir", "letters"),
  ],
)
def test_raw_files_are_found(tmp_path, monkeypatch, given_as, place):
  contents = {"a.gz": b"a", "b.gz": b"b"}
  files = [
    prepare.RawFile(file, f"http://host/{file}", len(content), hashlib.sha256(content).hexdigest(), by_hand=False)
    for file, content in contents.items()
  ]
  monkeypatch.setattr(prepare, "raw_files", lambda dataset: files)
  letters = dataclasses.replace(DATASETS["mnist"], tfds_name="letters")
  (tmp_path / "a.gz").write_bytes(b"a")  # a part of the files elsewhere is passed over
  folder = tmp_path / "given" / place
  folder.mkdir(parents=True)
  for file, content in contents.items():
    (folder / file).write_bytes(content)
  manual_dir = tmp_path / "given" if given_as == "manual_dir" else None
  monkeypatch.setattr(folders, "is_writable", lambda folder: False)  # so that two folders are searched
  monkeypatch.setattr(folders, "DEFAULT_FOLDER", str(tmp_path / "given"))
  found = folders.find_folders("letters", tmp_path, manual_dir)
  assert prepare.check_raw_files(letters, found) == folder


def test_a_missing_file_is_told_before_others_are_read(tmp_path, monkeypatch):
  """Reading ImageNet's takes many minutes. A file of another size is told first of all: looking costs nothing."""
  monkeypatch.setattr(prepare, "_check_digest", refuse)
  (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"0" * 4542)
  with pytest.raises(DataError, match="needs t10k-images-idx3-ubyte.gz, which is not in"):
    load_source("mnist", "train", data_dir=tmp_path, manual_dir=tmp_path)
  (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"0")
  with pytest.raises(DataError, match="found 1 bytes; replace or remove it, or put those of mnist into .*/mnist"):
    load_source("mnist", "train", data_dir=tmp_path, manual_dir=tmp_path)


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
  (tmp_path / "input.txt").write_bytes(b"0" * 1_115_394)
  real = Path.open

  def denied(path, *args, **kwargs):
    if path.name == "input.txt":
      raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return real(path, *args, **kwargs)

  monkeypatch.setattr(Path, "open", denied)
  with pytest.raises(DataError, match="input.txt cannot be read: PermissionError: .*; make it readable, or pass"):
    load_source("tiny_shakespeare", "train", data_dir=tmp_path, length=4)


@pytest.fixture
def serve(monkeypatch):
  """Makes a server on this machine that of tiny_shakespeare; it serves other bytes than those that are registered, if told so."""
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  servers = []

  def start(registered, served):
    class Handler(_Handler):
      def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(served)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    servers.append(server)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    info = tfds.core.download.checksums.UrlInfo(
      tfds.core.utils.Size(len(registered)), hashlib.sha256(registered).hexdigest(), "input.txt"
    )
    urls = {f"http://127.0.0.1:{server.server_port}/there": info}
    monkeypatch.setattr(text.TinyShakespeare, "url_infos", urls)

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


def test_a_download_of_other_bytes_tells_both_digests(serve, tmp_path):
  registered, served = b"Speak, speak.", b"Speak; speak."
  serve(registered, served)
  digests = [hashlib.sha256(content).hexdigest() for content in (registered, served)]
  with pytest.raises(DataError, match="wrong checksum.*{}.*{}.*; mend that".format(*digests)) as error:
    load_source("tiny_shakespeare", "train", data_dir=tmp_path, length=1)
  assert "\n" not in str(error.value)
  assert not is_prepared("tiny_shakespeare", data_dir=tmp_path)


def test_what_was_downloaded_is_not_asked_for_again(serve, tmp_path, monkeypatch):
  content = b"Speak, speak."
  serve(content, content)
  with monkeypatch.context() as stopped:
    stopped.setattr(text.TinyShakespeare, "_generate_examples", refuse)  # after the download
    with pytest.raises(DataError, match="not to be called"):
      load_source("tiny_shakespeare", "train", data_dir=tmp_path, length=1)
  monkeypatch.setattr(prepare, "_answers", refuse)
  assert load_source("tiny_shakespeare", "train", data_dir=tmp_path, length=1).name == "tiny_shakespeare"


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_HEAD(self):
    self.send_response(200 if self.path == "/there" else 404)
    self.end_headers()

  def log_message(self, *args):
    pass


def test_answers_asks_the_host(monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    host = f"http://127.0.0.1:{server.server_port}"
    answers = [prepare._answers(f"{host}/{path}") for path in ("there", "gone")]
    server.shutdown()
    thread.join()
  assert answers == [True, False]
  assert not prepare._answers(f"{host}/there")  # closed by now


def test_answers_gives_up_on_a_silent_host(monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  monkeypatch.setattr(prepare, "_ANSWER_SECONDS", 0.2)
  with socket.create_server(("127.0.0.1", 0)) as server:
    start = time.monotonic()
    assert not prepare._answers(f"http://127.0.0.1:{server.getsockname()[1]}/there")
    assert time.monotonic() - start < 5  # without the limit it would wait for ever


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
