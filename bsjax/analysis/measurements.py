"""The tidy table of all measurements."""

from collections.abc import Sequence
from typing import Any

from bsjax.analysis.selection import batch_size, learning_rate
from bsjax.records import Record

PROVENANCE = ("kind", "branch", "phase")


def measurements_table(records: Sequence[Record]) -> list[dict[str, Any]]:
  """Returns one flat row for each row of `probes.jsonl`, with the trial that it belongs to, ordered by trial and as written.

  Columns: id, state, kind, branch and phase (None where a trial has none), batch_size, learning_rate, seed, then those of the row.
  """
  ordered = sorted(records, key=lambda r: (r.trial["kind"], batch_size(r), learning_rate(r), r.trial["seed"], r.id))
  return [
    {
      "id": r.id,
      "state": r.status.get("state"),
      **{name: r.trial.get(name) for name in PROVENANCE},
      "batch_size": batch_size(r),
      "learning_rate": learning_rate(r),
      "seed": r.trial["seed"],
      **row,
    }
    for r in ordered
    for row in r.probes
  ]
