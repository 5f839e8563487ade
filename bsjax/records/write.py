"""Writing a trial directory: `trial.json`, `metrics.jsonl`, `probes.jsonl`, `status.json`."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from bsjax.records.folder import write_atomically, write_json

State = Literal["running", "complete", "diverged", "failed"]
METRICS = "metrics.jsonl"
PROBES = "probes.jsonl"


def trial_id(description: Mapping[str, Any]) -> str:
  """Names a trial by the SHA-256 of its canonical JSON (16 hexadecimal digits): same trial, same folder."""
  canonical = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
  return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def create_trial(folder: Path, trial: Mapping[str, Any]) -> None:
  """Starts a trial directory anew: empty rows, status `running`, and what the trial is.

  `trial.json` is written first and the status last, so that a directory with a status is always readable.
  """
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "trial.json", trial)
  for name in (METRICS, PROBES):
    write_atomically(folder / name, "")
  set_status(folder, "running")


def set_status(
  folder: Path, state: State, *, first_nonfinite_step: int | None = None, wall_seconds: float | None = None
) -> None:
  """Replaces `status.json`."""
  write_json(
    folder / "status.json",
    {"state": state, "first_nonfinite_step": first_nonfinite_step, "wall_seconds": wall_seconds},
  )


def _json_value(value: Any) -> Any:
  """Makes a row's value strict JSON: numpy scalars become Python's, non-finite floats become null.

  A float32 is written with the fewest digits that give the same float32 back.
  """
  if hasattr(value, "item"):
    value = float(str(value)) if value.dtype.kind == "f" and value.dtype.itemsize == 4 else value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
  return "".join(
    json.dumps({name: _json_value(value) for name, value in row.items()}, allow_nan=False) + "\n" for row in rows
  )


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Appends flat rows to a `.jsonl` file and hands them to the operating system before it returns.

  A kill loses at most the rows of the call in progress and leaves at most one torn last line, which readers cut.
  """
  with open(path, "a") as handle:
    handle.write(_lines(rows))


def cut_rows(path: Path, *, last_step: int) -> None:
  """Drops the rows after `last_step` and a torn last line, so that a resumed trial writes each row once."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines(keepends=True):
    if line.endswith("\n") and json.loads(line)["step"] <= last_step:
      kept.append(line)
  write_atomically(path, "".join(kept))
