"""How far a study is, told from its files alone: while it runs, after a kill, on another machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsjax.records.read import Record, read_records

STATES = ("complete", "diverged", "running", "failed")


def find_records(out: Path) -> list[Record]:
  """Reads the trials of every experiment below a folder of results."""
  folders = sorted({path.parent.parent for path in out.glob("**/status.json")})
  return [record for folder in folders for record in read_records(folder)]


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
  """Counts trials by kind and batch size.

  Returns:
    One row each, ordered: kind, batch_size, trials, a count for each of `STATES`, `diverged_at` (the first and the last step at which
    one did; None without any), `examples_seen` and `wall_seconds` (of finished trials) of all together.
  """
  groups: dict[tuple[str, int], list[Record]] = {}
  for record in records:
    groups.setdefault((record.trial.get("kind", ""), record.trial["config"]["batch_size"]), []).append(record)
  rows = []
  for (kind, batch_size), group in sorted(groups.items()):
    states = [record.status.get("state") for record in group]
    steps = [step for record in group if (step := record.status.get("first_nonfinite_step")) is not None]
    rows.append(
      {
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
