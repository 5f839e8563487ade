"""Write the study's page: the answer first, then every claim with its number, its figure and what was held fixed."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from bsjax.analysis import Advice, Claim, Finding
from bsjax.figures import FIGURES, save_figure
from bsjax.records import write_atomically
from bsjax.report.numbers import format_interval, format_number, format_ratio, is_missing

VERDICT_MARKS = {"holds": "✓", "fails": "✗", "inconclusive": "?"}

TITLES = {
  "variance_inverse_b": "Gradient noise",
  "direction_stable": "Gradient direction",
  "oscillation": "Oscillation",
  "more_steps": "Steps to target",
  "generalizes": "Generalisation",
  "flat_minima": "Flatness",
  "throughput": "Throughput",
  "linear_scaling": "Learning rate",
}

EXPLANATIONS = {
  "variance_inverse_b": "A minibatch gradient is a noisy estimate of the gradient over all training examples; its variance is the "
  "sum, over all parameters, of its squared scatter around that full gradient.",
  "direction_stable": "The cosine is 1 where the minibatch gradient points exactly along the full gradient, and 0 where it points "
  "in an unrelated direction.",
  "oscillation": "The trend is a moving mean of the training loss; the spread is the standard deviation of a single minibatch's loss "
  "around it, as a fraction of it.",
  "more_steps": "One step is one update of the parameters. Under perfect scaling twice the batch needs half the steps; the critical "
  "batch size is where that stops, and S_min is the number of steps that no batch, however large, can go below.",
  "generalizes": "At equal epochs every batch size sees the same number of examples, so large batches make fewer updates; at equal "
  "steps every batch size makes the same number of updates, so large batches see more examples.",
  "flat_minima": "Sharpness is the largest eigenvalue of the Hessian, the curvature of the training loss in its steepest direction, "
  "at the end of training; a flat minimum has a small one. The residual says how far the eigenvalue may be off.",
  "throughput": "Throughput is how many training examples this machine processes in a second; the knee is where a larger batch stops "
  "paying for itself.",
  "linear_scaling": "The best rate is the one that reached the target in the fewest steps, refined between the points of the grid; a "
  "hollow mark lies on the edge of its grid, so that the true best may lie beyond.",
}

_ENVIRONMENT = jinja2.Environment(
  loader=jinja2.PackageLoader("bsjax.report", "."),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(number=format_number)


def render_report(
  *,
  study: Mapping[str, Any],
  findings: Sequence[Finding],
  advice: Advice,
  environment: Mapping[str, Any],
  figures: Mapping[str, bytes],
) -> str:
  """Render the page as one HTML document.

  Args:
    study: what was trained and held fixed; the keys are those of `bsjax.analysis`'s study summary.
    findings: one per claim, in the order of the page.
    advice: the answer.
    environment: names and values for the last table (versions, device); `command_line` is shown by itself.
    figures: claim id to the bytes of a PNG; a claim without one is shown without a figure.

  Returns: the document. It needs no network and no script: images are data URIs, and a content policy forbids the rest.
  Holds: every string that comes from outside is escaped.
  """
  facts = dict(environment)
  command_line = facts.pop("command_line", "")
  steps_reading = next(
    (finding.reading for finding in findings if finding.claim.id == "more_steps"), "steps were not measured."
  )
  return _ENVIRONMENT.get_template("page.html.jinja").render(
    study=study,
    headline=_headline(study, advice),
    reason=advice.reason,
    answers=_answers(advice, steps_reading),
    choices=_choices(advice),
    claims=[_claim_row(finding.claim) for finding in findings],
    tally=_tally([finding.claim.verdict for finding in findings]),
    sections=[_section(finding, figures.get(finding.claim.id)) for finding in findings],
    fixed=_held_fixed(study),
    facts={str(name).replace("_", " "): value for name, value in facts.items()},
    command_line=command_line,
  )


def _headline(study: Mapping[str, Any], advice: Advice) -> dict[str, str]:
  """Say what to use, or that this study cannot say."""
  return {
    "workload": str(study["workload"]),
    "batch_size": "" if is_missing(advice.batch_size) else format_number(advice.batch_size),
    "learning_rate": "" if is_missing(advice.learning_rate) else format_number(advice.learning_rate),
  }


def _answers(advice: Advice, steps_reading: str) -> list[dict[str, str]]:
  """Return the three numbers of the answer, each with its interval, one sentence that explains it, and why it may be missing."""
  lost = (
    "for at least one seed the gradient is smaller than its own sampling error here, or no gradient noise was measured; "
    "the second figure tells more."
  )
  in_sample = (
    ""
    if is_missing(advice.training_set_noise_scale_end)
    else " Taking the training set for all there is, where it is known exactly, it is "
    f"{format_number(advice.training_set_noise_scale_end)} examples."
  )
  rows = [
    (
      "Noise scale at the start",
      advice.noise_scale_start,
      "The noise scale is the batch size, in examples, at which the noise of a minibatch gradient is as large as the gradient itself: "
      "far below it every example adds information, far above it more examples are wasted.",
      lost,
    ),
    (
      "Noise scale at the end",
      advice.noise_scale_end,
      "The same quantity at the end of training; it usually grows, because the gradient shrinks faster than its noise."
      + in_sample,
      lost,
    ),
    (
      "Critical batch size",
      advice.critical_batch_size,
      "The batch size, in examples, at which a run takes twice the fewest possible steps and twice the fewest possible examples; beyond "
      "it, twice the batch saves far less than half the steps.",
      steps_reading,
    ),
  ]
  return [
    {
      "title": title,
      "value": format_number(value),
      "unit": "" if is_missing(value) else "examples",
      "interval": format_interval(low, high),
      "meaning": meaning,
      "why_missing": why if is_missing(value) else "",
    }
    for title, (value, low, high), meaning, why in rows
  ]


def _choices(advice: Advice) -> list[dict[str, Any]]:
  """Return the advice table as text: what each batch size costs, and how many times the cheapest that is."""
  smallest = {}
  for name in ("steps", "examples", "seconds"):
    known = [row[name] for row in advice.table if not is_missing(row[name])]
    smallest[name] = min(known) if known else None
  return [
    {
      "recommended": row["batch_size"] == advice.batch_size,
      "batch_size": format_number(row["batch_size"]),
      "learning_rate": format_number(row["learning_rate"]),
      "edge": bool(row["edge"]),
      "reached": not is_missing(row["steps"]),
      "costs": [
        (format_number(row[name], missing="not reached"), format_ratio(row[name], smallest[name]))
        for name in ("steps", "examples")
      ],
      "seconds": (format_number(row["seconds"], missing="–"), format_ratio(row["seconds"], smallest["seconds"])),
      "test_accuracy": format_number(row["test_accuracy"], missing="–"),
    }
    for row in advice.table
  ]


def _claim_row(claim: Claim) -> dict[str, Any]:
  return {
    "id": claim.id,
    "statement": claim.statement,
    "source": claim.source,
    "expected": format_number(claim.expected, missing="–"),
    "measured": format_number(claim.measured, missing="not measured"),
    "interval": format_interval(claim.ci_low, claim.ci_high),
    "unit": claim.unit,
    "n": format_number(claim.n),
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


def _section(finding: Finding, png: bytes | None) -> dict[str, Any]:
  claim = finding.claim
  return {
    **_claim_row(claim),
    "title": TITLES.get(claim.id, claim.id),
    "explanation": EXPLANATIONS.get(claim.id, ""),
    "reading": finding.reading,
    "image": "" if png is None else "data:image/png;base64," + base64.b64encode(png).decode("ascii"),
  }


def _held_fixed(study: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return what was the same for every batch size, as names and sentences."""
  target, budgets, counts = study["target"], study["budgets"], study["counts"]
  direction = {"max": "at least", "min": "at most"}.get(target["direction"], target["direction"])
  epochs, steps = budgets["epochs"], budgets["steps"]
  sizes = ", ".join(format_number(size) for size in study["batch_sizes"])
  momentum = "" if study["optimizer"] == "sgd" else f", momentum {study['momentum']:g}"
  warmup = (
    f", {100 * study['warmup_fraction']:g} % warmup; the learning rate is its peak" if study["warmup_fraction"] else ""
  )
  return [
    (
      "Data",
      f"{study['dataset']}: {_split_sizes(study)}",
    ),
    ("Model", f"{study['workload']}, {study['num_params']:,} parameters"),
    ("Batch norm", "none" if study["batch_norm"] == "none" else f"{study['batch_norm']} statistics"),
    ("Optimizer", f"{study['optimizer']}{momentum}, weight decay {study['weight_decay']:g}"),
    ("Schedule of the learning rate", f"{study['schedule']}{warmup}"),
    (
      "Target",
      f"{str(target['metric']).replace('_', ' ')} {direction} {target['goal']:g}; the test split is never looked at for this",
    ),
    (
      "Equal-epochs budget",
      f"{epochs['num_epochs']:g} passes over the training set at every batch size: {_updates(epochs['num_steps'])}",
    ),
    ("Equal-steps budget", f"{_updates(steps['num_steps'])} at every batch size"),
    ("Batch sizes", sizes),
    (
      "Reference batch size",
      f"{format_number(study['reference_batch_size'])}: the first grid of rates is laid out from here, the gradient noise measured here",
    ),
    (
      "Seeds",
      f"{_seeds(study['tuning_seeds'])} while tuning the rate, {_seeds(study['final_seeds'])} at the tuned rate",
    ),
    (
      "Trials",
      f"{format_number(counts['complete'])} complete, {format_number(counts['diverged'])} diverged (a diverged trial enters no mean)",
    ),
  ]


def _split_sizes(study: Mapping[str, Any]) -> str:
  return ", ".join(f"{study[f'{split}_size']:,} {split} examples" for split in ("train", "validation", "test"))


def _updates(num_steps: Mapping[str, int]) -> str:
  """Write the numbers of steps of all batch sizes as one number or as a range: `40 to 25,140 updates`."""
  low, high = min(num_steps.values()), max(num_steps.values())
  return f"{low:,} updates" if low == high else f"{low:,} to {high:,} updates"


def _seeds(seeds: Sequence[int]) -> str:
  return f"{len(seeds)} ({', '.join(str(seed) for seed in seeds)})"


def write_report(
  out_dir: str | Path,
  *,
  study: Mapping[str, Any],
  findings: Sequence[Finding],
  advice: Advice,
  environment: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
) -> Path:
  """Write `report.html`, `claims.json`, `results.csv` and `figures/<claim id>.png|pdf` into `out_dir`.

  Args:
    rows: the tidy table of all trials, as `bsjax.analysis.results_table` gives it.

  Returns: the path of `report.html`, which is written last: where it is, the rest is too.
  Holds: each file is replaced whole, so that a kill at any moment leaves the old or the new one.
  """
  out_dir = Path(out_dir)
  pngs = {}
  for finding in findings:
    claim_id = finding.claim.id
    png_path, _ = save_figure(FIGURES[claim_id](finding), out_dir / "figures", claim_id)
    pngs[claim_id] = png_path.read_bytes()
  write_atomically(out_dir / "claims.json", claims_json([finding.claim for finding in findings]))
  write_atomically(out_dir / "results.csv", rows_csv(rows))
  page = render_report(study=study, findings=findings, advice=advice, environment=environment, figures=pngs)
  write_atomically(out_dir / "report.html", page)
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
