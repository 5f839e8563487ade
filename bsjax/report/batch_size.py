"""Write the page of the batch-size study: the answer first, then every claim with its number, its figure and what was held fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bsjax.analysis import Advice, Finding
from bsjax.report.numbers import format_interval, format_number, format_ratio, is_missing
from bsjax.report.page import render_page, split_sizes, write_page


def render_report(
  *,
  study: Mapping[str, Any],
  findings: Sequence[Finding],
  advice: Advice,
  environment: Mapping[str, Any],
  figures: Mapping[str, bytes],
) -> str:
  """Render the page as one HTML document; see `render_page`.

  Args:
    study: what was trained and held fixed; the keys are those of `bsjax.analysis`'s study summary.
    advice: the answer.
  """
  steps_reading = next(
    (finding.reading for finding in findings if finding.claim.id == "more_steps"), "steps were not measured."
  )
  return render_page(
    "batch_size.html.jinja",
    findings=findings,
    figures=figures,
    fixed=_held_fixed(study),
    environment=environment,
    study=study,
    headline=_headline(study, advice),
    reason=advice.reason,
    answers=_answers(advice, steps_reading),
    choices=_choices(advice),
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
      f"{study['dataset']}: {split_sizes(study)}",
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
  """Write the page and the files beside it, as `write_page` does.

  Args:
    rows: the tidy table of all trials, as `bsjax.analysis.results_table` gives it.
  """
  return write_page(
    out_dir,
    findings=findings,
    rows=rows,
    render=lambda figures: render_report(
      study=study, findings=findings, advice=advice, environment=environment, figures=figures
    ),
  )
