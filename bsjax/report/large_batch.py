"""What the page of the study of large batches says: its answer, its tables, and what was held fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsjax.analysis import Finding
from bsjax.analysis.finite_trials import mean_interval
from bsjax.analysis.large_batch import NAMES, RECIPES, Outcome, error_metric, final_trials, read_outcome
from bsjax.analysis.selection import last_metric, steps_to_target
from bsjax.records import Record
from bsjax.report.experiment import Page, Table
from bsjax.report.numbers import format_number
from bsjax.report.page import split_sizes


def large_batch_page(study: Mapping[str, Any], records: Sequence[Record], findings: Sequence[Finding]) -> Page:
  """Compose the page from the study's summary, its records and its findings."""
  finals = {record.id: record for record in records if record.trial.get("kind") == "final"}
  metric = error_metric(finals.values())
  reference, baseline = study["reference_batch_size"], study["baseline"]
  arms = [(reference, baseline), *((size, arm) for size in study["batch_sizes"] for arm in study["arms"])]
  recipes = [(size, arm) for size in study["batch_sizes"] for arm in RECIPES if arm in study["tuned"][str(size)]]
  header = ("Batch size", "Arm", "Rate", "Warm-up", quantity(metric), "Validation loss", "Steps to target", "Trials")
  tables = [
    Table(
      f"Every arm as tuned, at {study['num_epochs']:g} epochs for every batch size: means over {len(study['final_seeds'])} fresh "
      "seeds, with the 95 % interval. A rate with a mark sits on the edge of its space, which was widened as often as allowed. "
      "Steps to target: the median over the seeds, and how many arrived. Trials: of the search, with those of wider spaces; how "
      "many of them diverged.",
      header,
      [tuned_row(study, finals, size, arm, metric) for size, arm in arms],
    ),
    _comparisons_table(findings, metric),
    Table(
      f"The linear rule as it stands: the best rate at batch size {reference} times the ratio of the batch sizes, untuned.",
      header[:-1],
      [tuned_row(study, finals, size, recipe, metric)[:-1] for size, recipe in recipes],
    ),
  ]
  return Page(
    title=f"Large batches: {study['workload']}",
    question=f"At the largest batches of {study['workload']}, what helps: warm-up, a cosine, LARS, LAMB, AdamW?",
    lead=f"{study['workload']} has {study['num_params']:,} parameters and was trained on {study['train_size']:,} examples of "
    f"{study['dataset']} for {study['num_epochs']:g} epochs at every batch size. Each of {len(study['arms'])} ways to train was tuned "
    f"at each batch size with {study['num_trials']} trials, and judged at {len(study['final_seeds'])} fresh seeds.",
    answer=_answer(study, finals, metric, findings),
    tables=[table for table in tables if table.rows],
    fixed=_held_fixed(study),
  )


def quantity(metric: str) -> str:
  """Name a column of errors."""
  return "Test error, %" if metric == "test_accuracy" else "Test loss"


def _comparisons_table(findings: Sequence[Finding], metric: str) -> Table:
  """Return what every claim compared, at every batch size."""
  rows = []
  for finding in findings:
    series = finding.series
    names = ("batch_size", "without", "with")
    compared = zip(*(series[f"compared_{name}"].tolist() for name in names), strict=True)
    values = zip(*(series[f"difference{end}"].tolist() for end in ("", "_low", "_high")), strict=True)
    verdicts = series["difference_verdict"].tolist()
    for (size, without, with_it), difference, verdict in zip(compared, values, verdicts, strict=True):
      answer = {"holds": "yes", "fails": "no", "inconclusive": "open"}[verdict]
      rows.append((size, NAMES[without], NAMES[with_it], difference, answer))
  unit = "percentage points of test error" if metric == "test_accuracy" else "test loss"
  return Table(
    f"What was compared: the first arm minus the second, in {unit}, over common seeds.",
    ("Batch size", "First arm", "Second arm", "Difference", "Is the second better?"),
    rows,
  )


def tuned_row(study: Mapping[str, Any], finals: Mapping[str, Record], size: int, arm: str, metric: str) -> tuple:
  """Return an arm's row of the table; what was not measured is None."""
  entry = study["tuned"][str(size)][arm]
  outcome = read_outcome(study, finals, size, arm, metric)
  trials = final_trials(study, finals, size, arm)
  complete = [record for record in trials if record.status.get("state") == "complete"]
  point = entry["point"] or {}
  steps = sorted(s for record in complete if (s := steps_to_target(record, study["target"])) is not None)
  losses = [loss for record in complete if (loss := last_metric(record, "validation_loss")) is not None]
  edge = entry.get("edges", {}).get("learning_rate")
  rate = format_number(point["learning_rate"]) + (f" ({edge} edge)" if edge else "") if point else None
  warmup = f"{100 * point['warmup_steps'] / entry['num_steps']:.0f} %" if "warmup_steps" in point else None
  return (
    size,
    NAMES[arm],
    rate,
    warmup,
    _error_cell(outcome),
    tuple(mean_interval(np.array(losses))) if losses else None,
    f"{int(np.median(steps)):,} ({len(steps)} of {len(trials)})" if steps else "not reached" if trials else None,
    f"{entry['num_trials']}, {entry['num_diverged']} diverged" if "num_trials" in entry else None,
  )


def _error_cell(outcome: Outcome | None) -> Any:
  """Return a mean with its interval; how many diverged, if any did."""
  if outcome is None:
    return None
  if outcome.diverged:
    return outcome.loss
  return tuple(outcome.mean) if len(outcome.errors) else None


def _answer(study: Mapping[str, Any], finals: Mapping[str, Record], metric: str, findings: Sequence[Finding]) -> str:
  """Say how the best arm at the largest batch size ends against the baseline, and which of the remedies help."""
  largest, reference = max(study["batch_sizes"]), study["reference_batch_size"]
  entries = study["tuned"].get(str(largest), {})
  losses = {arm: entries[arm]["validation_loss"] for arm in study["arms"] if arm in entries}
  known = {arm: loss for arm, loss in losses.items() if loss is not None}
  verdicts = {
    "holds": "yes",
    "fails": "no",
    "inconclusive": "left open",
  }
  remedies = zip(("a warm-up", "a cosine", "LARS or LAMB"), findings, strict=True)
  clauses = ", ".join(f"{name}: {verdicts[finding.claim.verdict]}" for name, finding in remedies)
  help_sentence = f"What helps there, beyond tuning the rate: {clauses}."
  if not known:
    return f"At batch size {largest:,} no arm was trained to its end. {help_sentence}"
  best = min(known, key=lambda arm: known[arm])
  unit = " % test error" if metric == "test_accuracy" else " test loss"
  ends = []
  for size, arm in ((largest, best), (reference, study["baseline"])):
    outcome = read_outcome(study, finals, size, arm, metric)
    mean = outcome.mean.value if outcome is not None else math.nan
    ends.append(f"{mean:.3g}{unit}" if math.isfinite(mean) else "no error that was measured at all seeds")
  return (
    f"At batch size {largest:,} the best arm by validation loss is {NAMES[best]}, with {ends[0]}; the tuned baseline at batch size "
    f"{reference:,} ends at {ends[1]} after the same {study['num_epochs']:g} epochs. {help_sentence}"
  )


def _held_fixed(study: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return what was the same in every trial, as names and sentences."""
  decays: dict[float, dict[str, None]] = {}
  for arm in study["arms"].values():
    decays.setdefault(arm["weight_decay"], {})[arm["optimizer"]] = None
  counts, (points, seeds) = study["counts"], study["repeats"]
  return [
    ("Data", f"{study['dataset']}: {split_sizes(study)}"),
    ("Model", f"{study['workload']}, {study['num_params']:,} parameters"),
    ("Epochs", f"{study['num_epochs']:g} at every batch size"),
    ("Momentum", f"{study['momentum']:g}, also the beta1 of AdamW and LAMB, whose beta2 is 0.999"),
    ("Weight decay", "; ".join(f"{decay:g} for {', '.join(names)}" for decay, names in decays.items())),
    (
      "Tuning",
      f"{study['num_trials']} quasi-random trials of each arm at each batch size over the rate and, where there is one, the length of the "
      f"warm-up; a quarter more for a wider space, as often as one of the best rates sits on an edge, at most 3 times; then the best "
      f"{points} points at {seeds} fresh seeds each. The point with the lowest mean validation loss at the end of the budget wins.",
    ),
    ("Final seeds", f"{len(study['final_seeds'])}, from {study['final_seeds'][0]}; they chose nothing"),
    ("Trials", f"{counts['complete']:,} complete, {counts['diverged']:,} diverged"),
  ]
