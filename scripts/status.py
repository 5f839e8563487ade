"""How far is a study?

  python -m scripts.status runs/steps_to_result

Counts its trials by part, kind and batch size, from the files alone: nothing is computed, no accelerator is touched, and it may
run beside the study, after a kill, or on another machine.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bsjax.records import RecordError
from bsjax.records.summary import find_records, summarise

HEADER = (
  "part",
  "kind",
  "batch size",
  "trials",
  "complete",
  "diverged",
  "at step",
  "running",
  "failed",
  "examples",
  "seconds",
)


def table(out: Path) -> str:
  """Returns the table as text, with a line of totals.

  Raises:
    RecordError: no trials below the folder, or a damaged one.
  """
  rows = summarise(find_records(out))
  if not rows:
    raise RecordError(f"{out} holds no trials: give the --out of a study that was started")
  lines = [HEADER, *(_cells(row) for row in rows)]
  sums = {
    name: sum(row[name] for row in rows)
    for name in rows[0]
    if name not in ("part", "kind", "batch_size", "diverged_at")
  }
  lines.append(_cells({"part": "all", "kind": "", "batch_size": None, "diverged_at": None} | sums))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if number < 2 else cell.rjust(width)
      for number, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )


def _cells(row: dict) -> tuple[str, ...]:
  diverged_at = row["diverged_at"]
  span = "" if diverged_at is None else "-".join(f"{step:,}" for step in sorted({*diverged_at}))
  size = "" if row["batch_size"] is None else f"{row['batch_size']:,}"
  counts = [f"{row[name]:,}" for name in ("trials", "complete", "diverged")]
  return (
    row["part"],
    row["kind"],
    size,
    *counts,
    span,
    f"{row['running']:,}",
    f"{row['failed']:,}",
    f"{row['examples_seen']:,}",
    f"{row['wall_seconds']:,.0f}",
  )


def main(arguments: Sequence[str]) -> int:
  """Prints the table of one folder; returns the exit code."""
  if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
    print((__doc__ or "").strip())
    return 0 if arguments and arguments[0] in ("-h", "--help") else 2
  try:
    print(table(Path(arguments[0])))
  except RecordError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
