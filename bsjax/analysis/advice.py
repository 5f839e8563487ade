"""The answer of the study: which batch size to use, and what each one costs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.analysis.claim import Finding, finite_or_none
from bsjax.analysis.claims_rate import throughput_points
from bsjax.analysis.claims_training import steps_points
from bsjax.analysis.selection import (
  batch_size,
  final_records,
  is_number,
  last_probe_value,
  of_kind,
  probe_rows,
  tuned_rate,
)
from bsjax.records import Record

Bounds = tuple[float | None, float | None, float | None]
"""Value, low and high end of its interval; None for what is not known."""


class Advice(NamedTuple):
  """What to use and why; all numbers are floats, ints or None. Noise scales and batch sizes are in examples.

  `table` has one dict for each batch size: batch_size, learning_rate, steps (to target, mean over seeds; None unless every
  seed reached it), examples, seconds (steps x median seconds per step, None without timing), test_accuracy (at equal epochs), edge.
  `training_set_noise_scale_end` takes the training set for all there is: exact, and known where `noise_scale_end`, an estimate for unseen
  data, cannot be identified.
  """

  noise_scale_start: Bounds
  noise_scale_end: Bounds
  critical_batch_size: Bounds
  batch_size: int | None
  learning_rate: float | None
  reason: str
  table: list[dict[str, Any]]
  training_set_noise_scale_end: float | None = None


def advise(study: dict, records: Sequence[Record], findings: Sequence[Finding]) -> Advice:
  """Recommends a batch size for this workload, target, optimizer and machine.

  Rule: with a critical batch size B_crit, the largest tested batch size at or below it where every seed reached the target. On the fit
  S = S_min (1 + B_crit/B), E = E_min (1 + B/B_crit) both costs are twice the least possible at B_crit itself; a power of two just below
  costs up to 3 S_min steps and at most 2 E_min examples. If no batch size tested lies below B_crit, the smallest one. Without a B_crit
  the rule is weaker: the batch size with the shortest time to target on this machine. Without timing either, no recommendation.

  The first rule balances steps against examples and knows neither the machine nor generalisation: on hardware that saturates below
  B_crit a smaller batch may be as fast, and the table shows it.

  Source: McCandlish et al. (2018), Eqs. 2.11-2.12.
  """
  fit = next((f for f in findings if f.claim.id == "more_steps"), None)
  keys = ("critical_batch_size", "critical_low", "critical_high")
  critical = _bounds(*(float(fit.series[key]) for key in keys)) if fit else (None, None, None)
  table = _table(study, records)
  size, reason = _recommend(table, critical)
  rate = next((row["learning_rate"] for row in table if row["batch_size"] == size), None)
  return Advice(
    noise_scale_start=_noise_scale(records, last=False),
    noise_scale_end=_noise_scale(records, last=True),
    critical_batch_size=critical,
    batch_size=size,
    learning_rate=rate,
    reason=reason,
    table=table,
    training_set_noise_scale_end=_training_set_noise_scale(records),
  )


def _bounds(value: float, low: float, high: float) -> Bounds:
  return finite_or_none(value), finite_or_none(low), finite_or_none(high)


def _recommend(table: Sequence[dict[str, Any]], critical: Bounds) -> tuple[int | None, str]:
  """Returns the batch size of the first rule that applies, and the reason in one sentence."""
  reached = [row for row in table if row["steps"] is not None]
  value, low, high = critical
  if reached and value is not None:
    below = [row for row in reached if row["batch_size"] <= value]
    row = below[-1] if below else reached[0]
    size = row["batch_size"]
    relation = (
      "the largest tested batch size at or below" if below else "the smallest tested batch size, which lies above"
    )
    return size, (
      f"Batch size {size} is {relation} the critical batch size {value:.3g} [{low:.3g}, {high:.3g}]: by the fit it takes "
      f"{1 + value / size:.2g} times the fewest possible steps and {1 + size / value:.2g} times the fewest possible examples."
    )
  timed = [row for row in reached if row["seconds"] is not None]
  if timed:
    row = min(timed, key=lambda row: row["seconds"])
    return row["batch_size"], (
      f"The critical batch size could not be determined, so this is the weaker rule: batch size {row['batch_size']} reached the target "
      f"in the shortest time on this machine, {row['seconds']:.3g} seconds."
    )
  missing = "no batch size reached the target with every seed" if not reached else "steps were not timed"
  return None, f"No batch size is recommended, because the critical batch size could not be determined and {missing}."


def _table(study: dict, records: Sequence[Record]) -> list[dict[str, Any]]:
  steps: dict[int, list[float]] = {}
  for size, _, count in steps_points(study, records):
    steps.setdefault(size, []).append(count)
  seconds: dict[int, list[float]] = {}
  for size, _, _, duration in throughput_points(records):
    seconds.setdefault(size, []).append(duration)
  accuracies: dict[int, list[float]] = {}
  for record in final_records(study, records, "epochs"):
    accuracy = last_probe_value(record, "test", "test_accuracy")
    if accuracy is not None:
      accuracies.setdefault(batch_size(record), []).append(accuracy)
  rows = []
  for size in sorted(study.get("batch_sizes", ())):
    tuned = tuned_rate(study, "target", size)
    mean_steps = finite_or_none(float(np.mean(steps[size]))) if size in steps else None
    rows.append(
      {
        "batch_size": size,
        "learning_rate": tuned.learning_rate if tuned else None,
        "steps": mean_steps,
        "examples": mean_steps * size if mean_steps is not None else None,
        "seconds": float(mean_steps * np.median(seconds[size])) if mean_steps is not None and size in seconds else None,
        "test_accuracy": float(np.mean(accuracies[size])) if size in accuracies else None,
        "edge": tuned.edge if tuned else None,
      }
    )
  return rows


def _checkpoint(records: Sequence[Record], *, last: bool) -> list[dict]:
  """Returns the noise rows of all seeds at the first or last checkpoint."""
  rows = [row for r in of_kind(records, "noise") for row in probe_rows(r, "noise") if is_number(row.get("step"))]
  at = (max if last else min)((row["step"] for row in rows), default=None)
  return [row for row in rows if row["step"] == at]


def _training_set_noise_scale(records: Sequence[Record]) -> float | None:
  """Returns tr(Sigma) / |G|^2 of the training set at the last checkpoint: mean over mean of the seeds, exact for these examples."""
  rows = _checkpoint(records, last=True)
  fields = ("grad_cov_trace", "dataset_grad_sq_norm")
  if not rows or not all(is_number(row.get(field)) for row in rows for field in fields):
    return None
  return finite_or_none(float(np.divide(*(np.mean([row[field] for row in rows]) for field in fields))))


def _noise_scale(records: Sequence[Record], *, last: bool) -> Bounds:
  """Returns the noise scale at the first or last checkpoint: mean tr(Sigma) over mean |G|^2 of the seeds.

  A mean of ratios would be biased (McCandlish et al., footnote 12). The interval runs from the lowest to the highest end of the seeds'
  own intervals. None if it is unidentifiable for any seed.
  """
  rows = _checkpoint(records, last=last)
  fields = ("grad_cov_trace", "grad_sq_norm", "noise_scale", "noise_scale_ci_low", "noise_scale_ci_high")
  if not rows or not all(is_number(row.get(field)) for row in rows for field in fields):
    return None, None, None
  value = np.mean([row["grad_cov_trace"] for row in rows]) / np.mean([row["grad_sq_norm"] for row in rows])
  return _bounds(value, min(row["noise_scale_ci_low"] for row in rows), max(row["noise_scale_ci_high"] for row in rows))
