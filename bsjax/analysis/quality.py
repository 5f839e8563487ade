"""How good each batch size can get: test error where the validation metric is best along a whole budget, at fresh seeds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bsjax.analysis.selection import batch_size, is_number, probe_rows
from bsjax.records import Record

QUALITY, QUALITY_FINAL = "quality", "quality_final"
"""Kinds of trials that use their whole budget: those that choose a point, and those that judge it."""


class Quality(NamedTuple):
  """What a batch size reached with the point that was best: `errors` f64[n], one for each fresh seed that completed.

  `num_seeds` counts all fresh seeds, `num_trials` the trials that chose the point.
  """

  batch_size: int
  errors: np.ndarray
  num_seeds: int
  num_trials: int


def best_value(target: dict, record: Record) -> float | None:
  """Returns the best value of the target's metric along a complete trial, None where it has none."""
  if record.status.get("state") != "complete":
    return None
  values = [float(row[target["metric"]]) for row in record.metrics if is_number(row.get(target["metric"]))]
  return (max if target["direction"] == "max" else min)(values, default=None)


def stopped_test_error(target: dict, record: Record) -> float | None:
  """Returns the test error of a complete trial at the step, of those tested, whose validation metric is best; the first of equals.

  So the test set chooses nothing, and a curve that jumps more from look to look gains nothing by having more chances. The error is 1 -
  accuracy, or the metric itself if it is to be small. None where nothing was tested.
  """
  if record.status.get("state") != "complete":
    return None
  sign = -1 if target["direction"] == "max" else 1
  validation = {row["step"]: row[target["metric"]] for row in record.metrics if is_number(row.get(target["metric"]))}
  tested = [
    (sign * float(validation[row["step"]]), row["step"], float(row[test_metric(target)]))
    for row in probe_rows(record, "test")
    if row["step"] in validation and is_number(row.get(test_metric(target)))
  ]
  if not tested:
    return None
  value = min(tested)[2]
  return 1 - value if is_accuracy(target) else value


def test_metric(target: dict) -> str:
  """Names the metric on the test set."""
  return str(target["metric"]).replace("validation", "test")


def is_accuracy(target: dict) -> bool:
  """Tells whether the target's metric is an accuracy, so that 1 minus it is an error."""
  return str(target["metric"]).endswith("accuracy")


def best_quality(study: dict, records: Sequence[Record]) -> int | None:
  """Returns which trial got best, the first of equals; None where none completed."""
  sign = -1 if study["target"]["direction"] == "max" else 1
  values = [best_value(study["target"], record) for record in records]
  alive = [index for index, value in enumerate(values) if value is not None]
  return min(alive, key=lambda index: (sign * float(values[index] or 0.0), index), default=None)


def qualities(study: dict, records: Iterable[Record]) -> list[Quality]:
  """Collects what each batch size reached, by batch size; those without a fresh seed are left out.

  Source: Shallue et al. (2019), section 4.7: the best validation error over the whole training, at the metaparameters that are best for
  it. There the validation set chooses and judges.
  """
  final: dict[int, list[Record]] = {}
  tried: dict[int, int] = {}
  for record in sorted(records, key=lambda r: (batch_size(r), r.trial["seed"])):
    if record.trial.get("kind") == QUALITY_FINAL and record.trial["seed"] in study["final_seeds"]:
      final.setdefault(batch_size(record), []).append(record)
    if record.trial.get("kind") == QUALITY:
      tried[batch_size(record)] = tried.get(batch_size(record), 0) + 1
  return [
    Quality(
      size,
      np.array([error for r in group if (error := stopped_test_error(study["target"], r)) is not None]),
      len(group),
      tried.get(size, 0),
    )
    for size, group in sorted(final.items())
  ]
