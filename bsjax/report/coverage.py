"""What the page of the coverage of intervals says: its answer, a table by problem and regime, and how the draws were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bsjax.analysis import Finding
from bsjax.analysis.claims_coverage import JUDGED, binomial_interval
from bsjax.report.experiment import Page, Table


def coverage_page(finding: Finding, rows: Sequence[Mapping[str, Any]]) -> Page:
  """Compose the page from the judged claim and the rows of `coverage_rows`, at least one."""
  return Page(
    title="Coverage of noise-scale intervals",
    question="Do the intervals of the gradient noise scale hold the truth as often as they say?",
    lead="Data sets were drawn from problems whose noise scale is known exactly, from hopelessly few examples to ample ones, and from the "
    "same problems without any gradient. For each the noise scale was estimated with its 95 % interval, or refused.",
    answer=finding.reading,
    tables=[_table(rows)],
    fixed=[
      ("Data sets", f"{rows[0]['num_draws']:,} for each problem, noise scale and number of examples"),
      ("Claim", f"judged on {', '.join(JUDGED)}; other problems show where the intervals end"),
      ("Regimes", "by the distance of |G|^2 from 0 in standard errors; borderline ones are reported, not judged"),
    ],
  )


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
  groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault((row["problem"], row["regime"]), []).append(row)
  lines = []
  for (problem, regime), cells in groups.items():
    given, covered = (sum(cell[name] for cell in cells) for name in ("given", "covered"))
    draws = sum(cell["num_draws"] for cell in cells)
    low_high = binomial_interval(covered, given)
    coverage = tuple(100 * x for x in low_high) if given else None
    lines.append((problem, regime, len(cells), draws, 100 * given / draws, coverage))
  return Table(
    "All noise scales of a problem together: how often an interval is given, and how often a given interval holds the truth, with its "
    "binomial 95 % interval. results.csv has a row for each noise scale and number of examples.",
    ("Problem", "Regime", "Sizes", "Draws", "Given, %", "Holds the truth, %"),
    lines,
  )
