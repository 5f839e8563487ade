"""Trial directories: what is written is read back, damage is named, and nothing is ever half there."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bsjax.records import (
  RecordError,
  append_rows,
  create_trial,
  cut_rows,
  lock_folder,
  open_folder,
  read_record,
  read_records,
  set_status,
  trial_id,
  write_atomically,
)

ROOT = Path(__file__).parents[2]
TRIAL = {"kind": "train", "config": {"batch_size": 8}, "hparams": {"learning_rate": 0.1}, "seed": 3}


def make_trial(folder: Path, *, steps: int = 3, state: str = "complete") -> Path:
  create_trial(folder, TRIAL)
  append_rows(
    folder / "metrics.jsonl", [{"step": step, "loss": np.float32(0.1) * step} for step in range(1, steps + 1)]
  )
  set_status(folder, state)
  return folder


def test_round_trip(tmp_path: Path) -> None:
  folder = make_trial(tmp_path / "abc")
  append_rows(
    folder / "probes.jsonl", [{"step": 3, "probe": "test", "test_accuracy": np.float64(0.5), "n": np.int32(7)}]
  )
  record = read_record(folder)
  assert record.id == "abc"
  assert record.trial == TRIAL
  assert record.status == {"state": "complete", "first_nonfinite_step": None, "wall_seconds": None}
  assert [row["step"] for row in record.metrics] == [1, 2, 3]
  assert record.probes == [{"step": 3, "probe": "test", "test_accuracy": 0.5, "n": 7}]


def test_float32_survives_with_its_shortest_digits(tmp_path: Path) -> None:
  values = np.random.default_rng(0).standard_normal(200).astype(np.float32) * np.logspace(
    -30, 30, 200, dtype=np.float32
  )
  append_rows(tmp_path / "rows.jsonl", [{"x": value} for value in values])
  lines = (tmp_path / "rows.jsonl").read_text().splitlines()
  assert [np.float32(json.loads(line)["x"]) for line in lines] == list(values)
  append_rows(tmp_path / "one.jsonl", [{"x": np.float32(0.1)}])
  assert (tmp_path / "one.jsonl").read_text() == '{"x": 0.1}\n'


def test_non_finite_becomes_null(tmp_path: Path) -> None:
  append_rows(tmp_path / "rows.jsonl", [{"a": float("nan"), "b": np.float32("inf"), "c": -np.inf, "d": None}])
  assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"a": None, "b": None, "c": None, "d": None}


def test_trial_id_depends_on_content_not_on_order() -> None:
  assert trial_id({"a": 1, "b": {"c": 2, "d": 3}}) == trial_id({"b": {"d": 3, "c": 2}, "a": 1})
  assert trial_id({"a": 1}) != trial_id({"a": 2})


def test_torn_last_line_is_cut_while_running(tmp_path: Path) -> None:
  folder = make_trial(tmp_path / "t", state="running")
  with open(folder / "metrics.jsonl", "a") as handle:
    handle.write('{"step": 4, "lo')
  assert [row["step"] for row in read_record(folder).metrics] == [1, 2, 3]
  cut_rows(folder / "metrics.jsonl", last_step=2)
  assert [row["step"] for row in read_record(folder).metrics] == [1, 2]


@pytest.mark.parametrize("name", ["trial.json", "status.json", "metrics.jsonl"])
def test_truncated_file_of_a_finished_trial_is_named(tmp_path: Path, name: str) -> None:
  folder = make_trial(tmp_path / "t")
  content = (folder / name).read_bytes()
  (folder / name).write_bytes(content[: len(content) - 5])
  with pytest.raises(
    RecordError, match=rf"{name} is (not whole|damaged).*delete the folder .*t and run again"
  ) as caught:
    read_records(tmp_path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["trial.json", "metrics.jsonl", "probes.jsonl"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
  folder = make_trial(tmp_path / "t")
  (folder / name).unlink()
  with pytest.raises(RecordError, match=f"{name} is missing"):
    read_record(folder)


def test_damage_in_the_middle_is_never_cut(tmp_path: Path) -> None:
  folder = make_trial(tmp_path / "t", state="running")
  lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
  (folder / "metrics.jsonl").write_text(lines[0] + '{"step": \n' + lines[2])
  with pytest.raises(RecordError, match="damaged in line 2 of 3"):
    read_record(folder)


def test_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(RecordError, match="thesis.tex.*choose a new or empty folder"):
    open_folder(tmp_path, {})
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
  open_folder(tmp_path / "out", {"workload": "a", "sizes": (1, 2)})
  open_folder(tmp_path / "out", {"workload": "a", "sizes": (1, 2)})  # the same study continues
  with pytest.raises(RecordError, match=r"workload was 'a' and is now 'b'"):
    open_folder(tmp_path / "out", {"workload": "b", "sizes": (1, 2)})


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
  (tmp_path / "out").write_text("")
  with pytest.raises(RecordError, match="is a file, wanted a folder"):
    open_folder(tmp_path / "out", {})
  with pytest.raises(RecordError, match="cannot be written"):
    open_folder(tmp_path / "out" / "below", {})


def test_unknown_schema_version_is_refused(tmp_path: Path) -> None:
  open_folder(tmp_path, {})
  (tmp_path / "bsjax.json").write_text('{"schema_version": 99, "settings": {}}')
  with pytest.raises(RecordError, match="schema version 99"):
    open_folder(tmp_path, {})


HOLD = """
import sys, time
from pathlib import Path
from bsjax.records import lock_folder
with lock_folder(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
  holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RecordError, match=f"in use by process {holder.pid} on "), lock_folder(tmp_path):
      pass
  finally:
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
  with lock_folder(tmp_path):
    pass


def test_a_reader_sees_the_old_file_or_the_new(tmp_path: Path) -> None:
  path = tmp_path / "results.json"
  contents = [json.dumps([number] * 5000) for number in range(2)]
  write_atomically(path, contents[0])
  stop = threading.Event()

  def write() -> None:
    number = 0
    while not stop.is_set():
      number += 1
      write_atomically(path, contents[number % 2])

  writer = threading.Thread(target=write)
  writer.start()
  seen: set[str] = set()
  try:
    for reads in range(1_000_000):  # on a busy machine the writer may wait long for its first turn
      seen.add(path.read_text())
      if reads >= 1000 and len(seen) >= len(contents):
        break
  finally:
    stop.set()
    writer.join()
  assert seen == set(contents)
  assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
