"""Write the page of an experiment with one question: the answer, tables, claims with verdicts, figures, what was held fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bsjax.analysis import Finding
from bsjax.report.numbers import format_interval, format_number
from bsjax.report.page import render_page, write_page


class Table(NamedTuple):
  """A table of the page. A cell is a number, a text, None (shown as a dash), or `(value, low, high)` with its interval."""

  caption: str
  header: Sequence[str]
  rows: Sequence[Sequence[Any]]


class Page(NamedTuple):
  """What the page of an experiment says beside its claims.

  `question` is the heading and `title` its short form in the browser's tab; `lead` says what was done, `answer` in a sentence or two
  what came out; `fixed` names what was the same throughout.
  """

  title: str
  question: str
  lead: str
  answer: str
  tables: Sequence[Table]
  fixed: Sequence[tuple[str, str]]


def render_experiment(
  page: Page, *, findings: Sequence[Finding], environment: Mapping[str, Any], figures: Mapping[str, bytes]
) -> str:
  """Render the page as one HTML document; see `render_page`."""
  return render_page(
    "experiment.html.jinja",
    findings=findings,
    figures=figures,
    fixed=page.fixed,
    environment=environment,
    title=page.title,
    question=page.question,
    lead=page.lead,
    answer=page.answer,
    tables=[table._asdict() | {"rows": [[_cell(cell) for cell in row] for row in table.rows]} for table in page.tables],
  )


def _cell(cell: Any) -> tuple[str, str]:
  """Turn a cell into the text of its value and of its interval."""
  value, *ends = cell if isinstance(cell, (tuple, list)) else (cell,)
  return format_number(value, missing="–"), format_interval(*ends) if ends else ""


def write_experiment(
  out_dir: str | Path,
  page: Page,
  *,
  findings: Sequence[Finding],
  environment: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
) -> Path:
  """Write the page and the files beside it, as `write_page` does; `rows` is the tidy table of all measurements."""
  return write_page(
    out_dir,
    findings=findings,
    rows=rows,
    render=lambda figures: render_experiment(page, findings=findings, environment=environment, figures=figures),
  )
