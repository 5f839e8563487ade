"""The tidy table of all trials."""

from collections.abc import Sequence
from typing import Any

from bsjax.analysis.selection import (
  batch_size,
  budgets_of,
  last_metric,
  last_probe_value,
  learning_rate,
  steps_to_target,
  token_column,
)
from bsjax.records import Record


def results_table(study: dict, records: Sequence[Record]) -> list[dict[str, Any]]:
  """Returns one flat row for each trial, ordered by kind, batch size, number of steps, learning rate, seed and id.

  All rows have the same columns: id, kind, state, budgets (joined by "+"), seed, the fields of config and hparams, of a text
  tokens_per_batch, then the outcomes, None where a trial has none. No wall times: the same study gives the same table.
  """
  ordered = sorted(
    records,
    key=lambda r: (
      r.trial["kind"],
      batch_size(r),
      r.trial["config"].get("num_steps") or 0,
      learning_rate(r) if "learning_rate" in r.trial["hparams"] else 0.0,
      r.trial["seed"],
      r.id,
    ),
  )
  config = dict.fromkeys(name for r in ordered for name in r.trial["config"])
  hparams = dict.fromkeys(name for r in ordered for name in r.trial["hparams"])
  return [
    {
      "id": r.id,
      "kind": r.trial["kind"],
      "state": r.status.get("state"),
      "budgets": "+".join(budgets_of(study, r)) if r.trial["kind"] == "train" else "",
      "seed": r.trial["seed"],
      **{name: _cell(r.trial["config"].get(name)) for name in config},
      **{name: _cell(r.trial["hparams"].get(name)) for name in hparams},
      **token_column(study, r),
      "steps_to_target": steps_to_target(r, study["target"]),
      "validation_loss": last_metric(r, "validation_loss"),
      "validation_accuracy": last_metric(r, "validation_accuracy"),
      "test_accuracy": last_probe_value(r, "test", "test_accuracy"),
      "sharpness": last_probe_value(r, "sharpness", "sharpness"),
    }
    for r in ordered
  ]


def _cell(value: Any) -> Any:
  """Turns a list into one cell, joined by "+"."""
  return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else value
