"""How far a study is, told from its files alone: while it runs, after a kill, on another machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bsjax.records.read import Record, read_records

STATES = ("complete", "diverged", "running", "failed")


def find_records(out: Path) -> dict[str, list[Record]]:
  """Reads the trials of every part of a study below its folder: by the path of the part, such as "steps_to_result/sgd"."""
  folders = sorted({path.parent.parent for path in out.glob("**/status.json")})
  return {folder.relative_to(out).as_posix(): read_records(folder) for folder in folders}


def summarise(parts: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
  """Counts trials by part, kind and batch size.

  Returns:
    One row each, ordered: part, kind, batch_size, trials, a count for each of `STATES`, `diverged_at` (the first and the last step at which
    one did; None without any), `examples_seen` and `wall_seconds` (of finished trials) of all together.
  """
  groups: dict[tuple[str, str, int], list[Record]] = {}
  for part, records in parts.items():
    for record in records:
      key = part, record.trial.get("kind", ""), record.trial["config"]["batch_size"]
      groups.setdefault(key, []).append(record)
  rows = []
  for (part, kind, batch_size), group in sorted(groups.items()):
    states = [record.status.get("state") for record in group]
    steps = [step for record in group if (step := record.status.get("first_nonfinite_step")) is not None]
    rows.append(
      {
        "part": part,
        "kind": kind,
        "batch_size": batch_size,
        "trials": len(group),
        **{state: states.count(state) for state in STATES},
        "diverged_at": (min(steps), max(steps)) if steps else None,
        "examples_seen": sum(
          record.metrics[-1]["examples_seen"]
          for record in group
          if record.metrics and "examples_seen" in record.metrics[-1]
        ),
        "wall_seconds": sum(record.status.get("wall_seconds") or 0 for record in group),
      }
    )
  return rows
