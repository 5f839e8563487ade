"""From one trial that was compared twice, at equal training loss and at equal epochs, to one record for each comparison."""

from collections.abc import Sequence

from bsjax.records import Record

PHASES = ("level", "budget")
"""At equal training loss; at equal epochs."""


def split_phases(records: Sequence[Record]) -> list[Record]:
  """Cuts each solution into the records of its comparisons, which `trial["phase"]` names; other records pass unchanged.

  Each holds the rows measured for it and the test metrics of the same step. A solution that never reached the training loss has no
  record of phase "level", one that diverged has one of phase "budget" without rows, so that it is counted. Rows of phase "statistics",
  which compare batch-norm statistics, belong to neither.
  """
  return [part for record in records for part in _parts(record)]


def _parts(record: Record) -> list[Record]:
  if record.trial.get("kind") != "solution":
    return [record]
  parts = []
  for phase in PHASES:
    own = [row for row in record.probes if row.get("phase") == phase]
    steps = {row["step"] for row in own}
    tests = [row for row in record.probes if row["probe"] == "test" and row["step"] in steps]
    if own or (phase == "budget" and record.status.get("state") != "complete"):
      parts.append(record._replace(trial=record.trial | {"phase": phase}, probes=[*tests, *own]))
  return parts
