"""Reading trial directories, for people and programs that have no accelerator and no JAX."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bsjax.records.folder import RecordError, read_json
from bsjax.records.write import METRICS, PROBES


class Record(NamedTuple):
  """What one trial left: `trial` (config, hparams, seed, provenance), `status`, and its rows in the order written."""

  id: str
  trial: dict[str, Any]
  status: dict[str, Any]
  metrics: list[dict[str, Any]]
  probes: list[dict[str, Any]]


def _read_rows(path: Path, *, running: bool) -> list[dict[str, Any]]:
  """Reads rows; a torn last line is a kill's trace while `running` and damage afterwards."""
  if not path.exists():
    raise RecordError(f"{path} is missing: delete the folder {path.parent} and run again to compute it anew")
  rows = []
  lines = path.read_text(errors="replace").splitlines(keepends=True)
  for number, line in enumerate(lines, start=1):
    torn = not line.endswith("\n")
    if torn and running and number == len(lines):
      break
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      torn = True
    if torn:
      raise RecordError(
        f"{path} is damaged in line {number} of {len(lines)}: delete the folder {path.parent} and run again to compute it anew"
      )
  return rows


def read_record(folder: Path) -> Record:
  """Reads one trial directory.

  Raises:
    RecordError: a file is missing, truncated or garbled; the message names it and says how to compute it anew.
  """
  status = read_json(folder / "status.json")
  running = status.get("state") == "running"
  return Record(
    id=folder.name,
    trial=read_json(folder / "trial.json"),
    status=status,
    metrics=_read_rows(folder / METRICS, running=running),
    probes=_read_rows(folder / PROBES, running=running),
  )


def read_records(folder: Path) -> list[Record]:
  """Reads every trial directory below `folder`, ordered by id; a folder without `status.json` was never begun."""
  return [read_record(path.parent) for path in sorted(folder.glob("*/status.json"))]
