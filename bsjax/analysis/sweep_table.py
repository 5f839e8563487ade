"""The tidy table of the trials of several sweeps."""

from collections.abc import Mapping
from typing import Any

from bsjax.analysis.claims_steps import Sweeps
from bsjax.analysis.quality import best_value
from bsjax.analysis.selection import batch_size, last_metric, steps_to_target, token_column
from bsjax.analysis.steps_to_result import trial_state
from bsjax.records import Record


def sweep_table(sweeps: Sweeps) -> list[dict[str, Any]]:
  """Returns one flat row for each trial, ordered by optimizer, kind, batch size, point and id; the same columns in all rows.

  `state` is that of `trial_state`, `diverged_at` the step where an infeasible trial ceased to be finite. Texts also have
  `tokens_per_batch`. No wall times: the same study gives the same table.
  """
  hparams = dict.fromkeys(name for _, records in sweeps.values() for r in records for name in r.trial["hparams"])
  return [
    {
      "id": record.id,
      "optimizer": optimizer,
      "kind": record.trial["kind"],
      "state": trial_state(study, record),
      "batch_size": batch_size(record),
      **token_column(study, record),
      "seed": record.trial["seed"],
      **{name: record.trial["hparams"].get(name) for name in hparams},
      **_lengths(record.trial["config"]),
      "steps_to_target": steps_to_target(record, study["target"]),
      f"best_{study['target']['metric']}": best_value(study["target"], record),
      "train_loss": last_metric(record, "train_loss"),
      "diverged_at": record.status.get("first_nonfinite_step"),
    }
    for optimizer, (study, records) in sweeps.items()
    for record in sorted(records, key=_place)
    if record.trial["kind"] != "timing"
  ]


def _place(record: Record) -> tuple[str, int, int, str]:
  return record.trial["kind"], batch_size(record), record.trial["seed"], record.id


def _lengths(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"num_steps": config["num_steps"], "eval_every": config["eval_every"]}
