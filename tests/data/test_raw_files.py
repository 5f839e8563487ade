"""Raw files: where they are looked for, what is told of missing, wrong and unreadable ones, and what is downloaded."""

import dataclasses
import errno
import hashlib
import http.server
import socket
import threading
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from bsjax.data import DATASETS, DataError, folders, is_prepared, load_source, prepare, text
from tests.data.raw_files import refuse


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
