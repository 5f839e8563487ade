"""The command that prepares data sets: what it says, what it returns, and what it leaves behind."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bsjax.data import DATASETS, load_source, prepare
from scripts import prepare_data as command
from scripts.prepare_data import main
from tests.data.raw_files import small_table, write_raw_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def raw(tmp_path, monkeypatch):
  write_raw_files("cifar10", tmp_path / "raw" / "cifar10")
  small_table(monkeypatch, "cifar10", tmp_path / "raw" / "cifar10")
  return tmp_path / "raw"


def test_prepares_all_that_loading_reads(raw, tmp_path, capsys, monkeypatch):
  data_dir = tmp_path / "data"
  assert main(["cifar10", f"--data_dir={data_dir}", f"--manual_dir={raw}"]) == 0
  out, err = capsys.readouterr()
  first, last = out.splitlines()
  assert first.startswith(f"cifar10: reads cifar-10-binary.tar.gz (0.1 MB) from {raw}/cifar10; goes to {data_dir}")
  assert last.startswith(f"cifar10: ready in {data_dir} after ")
  assert re.search(
    r"Generating train examples\.\.\.: +\d+%\|.*/30 \[", err
  )  # out of a known number, so that the time left is told

  monkeypatch.setattr("bsjax.data.load.make_builder", None)  # nothing is left to do
  assert {split: len(load_source("cifar10", split, data_dir=data_dir)) for split in DATASETS["cifar10"].splits} == {
    "train": 25,
    "validation": 5,
    "test": 12,
  }


def test_a_second_time_it_reads_what_is_there(raw, tmp_path, capsys):
  arguments = ["cifar10", f"--data_dir={tmp_path}", f"--manual_dir={raw}"]
  assert main(arguments) == 0
  written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cifar10").rglob("*")}
  capsys.readouterr()
  assert main([*arguments[:2], "--manual_dir=/nowhere"]) == 0
  assert capsys.readouterr().out.startswith(f"cifar10: reads the prepared copy in {tmp_path}/cifar10; ")
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cifar10").rglob("*")} == written


@pytest.mark.parametrize(
  ("name", "answers", "expected"),
  [
    ("digits", False, "comes with the package"),
    ("kmnist", True, r"downloads t10k-images-idx3-ubyte.gz, .* (21.2 MB) from codh.rois.ac.jp"),
    ("kmnist", False, r"lacks t10k-images-idx3-ubyte.gz, .* (21.2 MB)"),
    ("imagenet2012", True, r"lacks ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar (154,642.4 MB)"),
  ],
)
def test_says_beforehand_what_it_will_fetch(tmp_path, name, answers, expected):
  manual_dir = None if answers else tmp_path
  line = command.describe_data(name, data_dir=tmp_path, manual_dir=manual_dir)
  start, _, end = expected.partition(" .* ")
  assert line.startswith(f"{name}: {start}")
  assert line.endswith(f"{end}; goes to {tmp_path}")


def test_lists_all_data_sets(raw, tmp_path, capsys):
  assert main(["cifar10", f"--data_dir={tmp_path}", f"--manual_dir={raw}"]) == 0
  capsys.readouterr()
  assert main(["--list", f"--data_dir={tmp_path}"]) == 0
  header, *lines = capsys.readouterr().out.splitlines()
  assert header.split() == list(command.HEADER)
  assert [line.split()[0] for line in lines] == list(DATASETS)
  cells = {line.split()[0]: line.split() for line in lines}
  assert cells["digits"] == ["digits", "1,024", "386", "387", "no", "nothing"]
  assert cells["cifar10"][:5] == ["cifar10", "25", "5", "12", "yes"]
  assert cells["mnist"] == ["mnist", "55,000", "5,000", "10,000", "no", *["11.6", "MB", "of", "raw", "files"]]
  assert cells["imagenet2012"][5:] == [
    "154,642.4",
    "MB",
    "of",
    "raw",
    "files,",
    "downloaded",
    "by",
    "hand,",
    "tensorflow-cpu==2.21.0",
  ]
  assert cells["imagenet2012_half_classes"][1:5] == ["not", "known", "not", "known"]
  assert "1,003,854 tokens" in lines[list(DATASETS).index("tiny_shakespeare")]


def test_bad_calls_are_one_line(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(prepare, "_answers", lambda url: False)
  (tmp_path / "input.txt").write_text("not Shakespeare")
  data_dir = f"--data_dir={tmp_path}"
  for arguments, message in (
    ([], "0 names of data sets given, wanted one, or --list alone"),
    (["mnist", "digits"], "2 names of data sets given"),
    (["mnist", "--list"], "1 names of data sets given"),
    (["minst"], "unknown data set 'minst'; known are digits,"),
    (["--date_dir=x", "mnist"], "Unknown command line flag 'date_dir'"),
    (["mnist", data_dir], "does not answer, or not with this file; put the raw files (t10k-images-idx3-ubyte.gz, "),
    (
      ["tiny_shakespeare", data_dir],
      f"{tmp_path}/input.txt is not the input.txt of tiny_shakespeare: expected 1,115,394",
    ),
  ):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_interrupted(monkeypatch, capsys):
  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(command, "prepare_data", interrupt)
  assert main(["digits"]) == 130
  assert "the same command starts it again" in capsys.readouterr().err


def test_exit_codes_are_those_of_the_experiments():
  """By the text, since the import that the script spares itself would be the slowest part of this test."""
  line = f"EXIT_BAD_INPUT, EXIT_INTERRUPTED = {command.EXIT_BAD_INPUT}, {command.EXIT_INTERRUPTED}\n"
  assert line in (ROOT / "bsjax" / "study" / "command.py").read_text()


def test_runs_as_a_module():
  done = subprocess.run(
    [sys.executable, "-m", "scripts.prepare_data", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert "python -m scripts.prepare_data NAME" in done.stdout
