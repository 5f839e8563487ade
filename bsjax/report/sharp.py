"""What the page of the study of sharp minima says: its answer, its tables, and what was held fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsjax.analysis import Finding
from bsjax.analysis.selection import batch_size, is_number, probe_rows
from bsjax.analysis.solutions import BATCH_NORM_WORDS, PHASES, measure_label
from bsjax.records import Record
from bsjax.report.experiment import Page, Table
from bsjax.report.page import split_sizes


def sharp_page(study: Mapping[str, Any], records: Sequence[Record], findings: Sequence[Finding]) -> Page:
  """Compose the page from the study's summary, its records and its findings."""
  flat, ranks = findings[:2]
  tables = (
    _measures_table(study, flat, "level"),
    _measures_table(study, flat, "budget"),
    _layers_table(study, records),
    _statistics_table(study, records),
  )
  return Page(
    title=f"Sharp minima: {study['workload']}",
    question=f"Do small batches end in flatter minima of {study['workload']}, and does flatness tell which solution generalises?",
    lead=f"{study['workload']} has {study['num_params']:,} parameters and was trained on {study['train_size']:,} examples of "
    f"{study['dataset']}, to the same training loss and for equal epochs. Every solution was measured by {len(study['measures'])} "
    f"measures of curvature and flatness on {_examples(study)}.",
    answer=_answer(flat, ranks),
    tables=[table for table in tables if table.rows],
    fixed=_held_fixed(study),
  )


def _answer(flat: Finding, ranks: Finding) -> str:
  """Say in two sentences by how many measures small batches end flatter, and what flatness says of the test error."""
  phases, verdicts = flat.series["slope_phase"], flat.series["slope_verdict"]
  if not len(phases) or not (verdicts != "inconclusive").any():
    return f"{flat.reading} {ranks.reading}"
  clauses = []
  for phase, words in PHASES.items():
    here = verdicts[phases == phase].tolist()
    yes, no = here.count("holds"), here.count("fails")
    clauses.append(f"{words} yes by {yes} of {len(here)} measures, no by {no}, open by {len(here) - yes - no}")
  outcome = {
    "holds": "Flatness by at least one measure ranks the test error",
    "fails": "Flatness by none of the measures ranks the test error",
    "inconclusive": "Whether flatness by any measure ranks the test error is left open",
  }[ranks.claim.verdict]
  return f"Do small batches end flatter? {'; '.join(clauses)}. {outcome}, at equal training loss.".replace(
    "? at", "? At"
  )


def _examples(study: Mapping[str, Any]) -> str:
  every = study["num_examples"] == study["train_size"]
  return "the whole training set" if every else f"the first {study['num_examples']:,} training examples"


def _measures_table(study: Mapping[str, Any], flat: Finding, phase: str) -> Table:
  """Compare the smallest and the largest batch size, and give the slope over all."""
  series = flat.series
  small, large = min(study["batch_sizes"]), max(study["batch_sizes"])

  def at(measure: str, size: int) -> float | None:
    chosen = (series["phase"] == phase) & (series["measure"] == measure) & (series["batch_size"] == size)
    values = series["value"][chosen & series["used"]] if chosen.any() else np.empty(0)
    return float(np.exp(np.mean(np.log(values)))) if len(values) else None

  rows = []
  slopes = zip(
    *(series[f"slope{name}"].tolist() for name in ("_phase", "_measure", "", "_low", "_high", "_verdict")), strict=True
  )
  for of_phase, measure, slope, low, high, verdict in slopes:
    if of_phase == phase:
      ends = at(measure, small), at(measure, large)
      ratio = ends[1] / ends[0] if ends[0] and ends[1] else None
      answer = {"holds": "yes", "fails": "no", "inconclusive": "open"}[verdict]
      rows.append((measure_label(measure), *ends, ratio, (slope, low, high), answer))
  return Table(
    f"Measures of flatness {PHASES[phase]}: geometric means over rates and seeds at the smallest and the largest batch size, and the slope "
    "of log(measure) against log(batch size) over all, with its 95 % interval. A positive slope says that small batches end flatter.",
    ("Measure", f"B = {small:,}", f"B = {large:,}", "Ratio", "Slope", "Flatter?"),
    rows if len(series["phase"]) else [],
  )


def _rows_of(records: Sequence[Record], size: int, probe: str) -> list[dict]:
  """Return the rows of a probe over all solutions of a batch size."""
  solutions = [record for record in records if record.trial.get("kind") == "solution" and batch_size(record) == size]
  return [row for record in solutions for row in probe_rows(record, probe)]


def _layers_table(study: Mapping[str, Any], records: Sequence[Record]) -> Table:
  """Compare the layers' blocks of the Hessian between the smallest and the largest batch size."""
  sizes = min(study["batch_sizes"]), max(study["batch_sizes"])
  found: dict[str, dict[tuple[int, str], list[float]]] = {}
  for size in sizes:
    for row in _rows_of(records, size, "layer"):
      for name in ("top_eigenvalue", "trace"):
        if is_number(row[name]):
          found.setdefault(row["layer"], {}).setdefault((size, name), []).append(row[name])

  def mean(layer: str, size: int, name: str) -> float | None:
    values = found[layer].get((size, name))
    return float(np.mean(values)) if values else None

  return Table(
    "The Hessian's diagonal block of each layer at equal training loss, mean over rates and seeds.",
    ("Layer", *(f"{words}, B = {size:,}" for words in ("Largest eigenvalue", "Trace") for size in sizes)),
    [(layer, *(mean(layer, size, name) for name in ("top_eigenvalue", "trace") for size in sizes)) for layer in found],
  )


def _statistics_table(study: Mapping[str, Any], records: Sequence[Record]) -> Table:
  """Show what batch-norm statistics do to two measures, on the same solutions."""
  sizes = min(study["batch_sizes"]), max(study["batch_sizes"])
  found: dict[tuple[str, str], dict[int, list[float]]] = {}
  for size in sizes:
    for row in _rows_of(records, size, "measure"):
      if row.get("phase") == "statistics" and is_number(row["value"]) and row["value"] > 0:
        found.setdefault((row["measure"], row["batch_norm"]), {}).setdefault(size, []).append(row["value"])

  def mean(values: dict[int, list[float]], size: int) -> float | None:
    return float(np.exp(np.mean(np.log(values[size])))) if size in values else None

  rows = []
  for (measure, statistics), values in sorted(found.items()):
    ends = [mean(values, size) for size in sizes]
    ratio = ends[1] / ends[0] if ends[0] and ends[1] else None
    rows.append((measure_label(measure), BATCH_NORM_WORDS[statistics], *ends, ratio))
  return Table(
    "The same solutions at equal training loss under three kinds of batch-norm statistics: geometric means over rates and seeds.",
    ("Measure", "Statistics", *(f"B = {size:,}" for size in sizes), "Ratio"),
    rows,
  )


def _held_fixed(study: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return what was the same in every trial, as names and sentences."""
  momentum = "" if study["optimizer"] == "sgd" else f", momentum {study['momentum']:g}"
  rates = "; ".join(
    f"batch size {size}: {', '.join(f'{rate:.3g}' for rate in rates)}"
    for size, rates in study["learning_rates"].items()
  )
  counts, escape, edge = study["counts"], study["escape"], study["edge"]
  return [
    ("Data", f"{study['dataset']}: {split_sizes(study)}"),
    ("Model", f"{study['workload']}, {study['num_params']:,} parameters"),
    ("Curvature", f"of the mean training loss over {_examples(study)}; {BATCH_NORM_WORDS[study['statistics']]}"),
    ("Optimizer", f"{study['optimizer']}{momentum}, no weight decay, constant rate"),
    ("Learning rates", rates),
    ("Equal training loss", f"the first checkpoint below {study['train_loss_level']:g}"),
    ("Equal epochs", f"{study['num_epochs']:g} passes over the training set"),
    (
      "Escapes",
      f"between batch size {escape['small']} at rate {escape['small_rate']:.3g} and batch size {escape['large']} at rate "
      f"{escape['large_rate']:.3g}, from the end of training",
    ),
    (
      "Edge of stability",
      f"plain gradient descent on the first {edge['train_size']:,} training examples; batch sizes "
      f"{', '.join(map(str, edge['batch_sizes']))}; rates {', '.join(f'{rate:.3g}' for rate in edge['learning_rates'])}",
    ),
    (
      "Seeds",
      f"{len(study['seeds'])} ({', '.join(map(str, study['seeds']))}); of the edge of stability {len(edge['seeds'])}",
    ),
    ("Trials", f"{counts['complete']:,} complete, {counts['diverged']:,} diverged"),
  ]
