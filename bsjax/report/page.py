"""What every page of the laboratory is made of: claims with verdicts, figures with readings, facts, and the files beside it."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from bsjax.analysis import Claim, Finding
from bsjax.figures import FIGURES, FURTHER_FIGURES, save_figure
from bsjax.records import write_atomically
from bsjax.report.numbers import format_interval, format_number, is_missing
from bsjax.report.words import EXPLANATIONS, TITLES

VERDICT_MARKS = {"holds": "✓", "fails": "✗", "inconclusive": "?"}

_ENVIRONMENT = jinja2.Environment(
  loader=jinja2.PackageLoader("bsjax.report", "."),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(number=format_number)


def render_page(
  template: str,
  *,
  findings: Sequence[Finding],
  figures: Mapping[str, bytes],
  fixed: Sequence[tuple[str, str]],
  environment: Mapping[str, Any],
  **texts: Any,
) -> str:
  """Render a template that extends `base.html.jinja` as one HTML document.

  Args:
    findings: one per claim, in the order of the page.
    figures: names of figures to the bytes of a PNG: those of `FIGURES` are called like their claim, those of `FURTHER_FIGURES` stand below
      them; a claim without any is shown without a figure.
    fixed: names and sentences: what was held fixed.
    environment: names and values for the last table (versions, device); `command_line` is shown by itself.
    texts: what the template needs beyond the base.

  Returns: the document. It needs no network and no script: images are data URIs, and a content policy forbids the rest.
  Holds: every string that comes from outside is escaped.
  """
  facts = dict(environment)
  command_line = facts.pop("command_line", "")
  return _ENVIRONMENT.get_template(template).render(
    claims=[_claim_row(finding.claim) for finding in findings],
    tally=_tally([finding.claim.verdict for finding in findings]),
    sections=[_section(finding, figures) for finding in findings],
    fixed=fixed,
    facts={str(name).replace("_", " "): value for name, value in facts.items()},
    command_line=command_line,
    **texts,
  )


def _claim_row(claim: Claim) -> dict[str, Any]:
  return {
    "id": claim.id,
    "statement": claim.statement,
    "source": claim.source,
    "expected": format_number(claim.expected, missing="–"),
    "measured": format_number(claim.measured, missing="not measured"),
    "interval": format_interval(claim.ci_low, claim.ci_high),
    "unit": claim.unit,
    "n": format_number(claim.n, missing="–"),
    "verdict": claim.verdict,
    "mark": VERDICT_MARKS[claim.verdict],
  }


def _tally(verdicts: Sequence[str]) -> str:
  """Count the verdicts in words: `5 of 8 claims hold, 1 fails, 2 are inconclusive`."""
  holds, fails, open_ = (verdicts.count(verdict) for verdict in ("holds", "fails", "inconclusive"))
  return (
    f"{holds} of {len(verdicts)} claims {'holds' if holds == 1 else 'hold'}, {fails} {'fails' if fails == 1 else 'fail'}, "
    f"{open_} {'is' if open_ == 1 else 'are'} inconclusive"
  )


def _section(finding: Finding, figures: Mapping[str, bytes]) -> dict[str, Any]:
  claim = finding.claim
  names = (claim.id, *FURTHER_FIGURES.get(claim.id, ()))
  return {
    **_claim_row(claim),
    "title": TITLES.get(claim.id, claim.id),
    "explanation": EXPLANATIONS.get(claim.id, ""),
    "reading": finding.reading,
    "images": [
      "data:image/png;base64," + base64.b64encode(figures[name]).decode("ascii") for name in names if name in figures
    ],
  }


def split_sizes(study: Mapping[str, Any]) -> str:
  """Write the sizes of the three splits: `1,024 train examples, 256 validation examples, ...`."""
  return ", ".join(f"{study[f'{split}_size']:,} {split} examples" for split in ("train", "validation", "test"))


def write_page(
  out_dir: str | Path,
  *,
  findings: Sequence[Finding],
  rows: Sequence[Mapping[str, Any]],
  render: Callable[[Mapping[str, bytes]], str],
) -> Path:
  """Write `report.html`, `claims.json`, `results.csv` and `figures/<name>.png|pdf` into `out_dir`.

  Args:
    rows: the tidy table that becomes `results.csv`.
    render: makes the page from the PNG of every figure.

  Returns: the path of `report.html`, which is written last: where it is, the rest is too.
  Holds: each file is replaced whole, so that a kill at any moment leaves the old or the new one.
  """
  out_dir = Path(out_dir)
  pngs = {}
  for finding in findings:
    claim_id = finding.claim.id
    for name, draw in {claim_id: FIGURES[claim_id], **FURTHER_FIGURES.get(claim_id, {})}.items():
      png_path, _ = save_figure(draw(finding), out_dir / "figures", name)
      pngs[name] = png_path.read_bytes()
  write_atomically(out_dir / "claims.json", claims_json([finding.claim for finding in findings]))
  write_atomically(out_dir / "results.csv", rows_csv(rows))
  write_atomically(out_dir / "report.html", render(pngs))
  return out_dir / "report.html"


def claims_json(claims: Sequence[Claim]) -> str:
  """Write claims as strict JSON: a list of objects with the fields of `Claim`; a non-finite number becomes null."""
  return (
    json.dumps(
      [{name: _plain(value) for name, value in claim._asdict().items()} for claim in claims], indent=2, allow_nan=False
    )
    + "\n"
  )


def _plain(value: Any) -> Any:
  """Turn a NumPy scalar into Python's, and a non-finite number into None."""
  value = value.item() if hasattr(value, "item") else value
  return None if isinstance(value, float) and not math.isfinite(value) else value


def rows_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Write rows as CSV; the columns are all keys in order of first appearance, and a missing value is an empty cell."""
  columns = list(dict.fromkeys(name for row in rows for name in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
  writer.writeheader()
  writer.writerows({name: "" if is_missing(value) else value for name, value in row.items()} for row in rows)
  return text.getvalue()
