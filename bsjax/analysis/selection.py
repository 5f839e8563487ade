"""Choosing records: which trials answer which question, and the numbers read off one trial."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

from bsjax.records import Record

Objective = Literal["validation_loss", "steps_to_target"]
BUDGETS = ("epochs", "steps")
RATE_TOLERANCE = 1e-6
"""Two learning rates are the same below this relative difference: a rate that went through float32 differs in the eighth digit."""


class TunedRate(NamedTuple):
  """The tuned learning rate of one batch size; `edge` tells on which edge of its grid it sits, if on one."""

  learning_rate: float
  edge: Literal["low", "high"] | None


class BestRate(NamedTuple):
  """What tuning chose. `scores` maps each rate of the grid to its mean score, infinite if a seed failed."""

  learning_rate: float | None
  edge: Literal["low", "high"] | None
  scores: dict[float, float]


def is_number(value: Any) -> TypeGuard[float]:
  """Tells whether a JSON value is a finite number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
  """Returns the records of one kind (`train`, `noise` or `timing`) that ran to their end, in the order of their ids."""
  chosen = (r for r in records if r.trial.get("kind") == kind and r.status.get("state") == "complete")
  return sorted(chosen, key=lambda r: r.id)


def num_diverged(records: Iterable[Record]) -> int:
  """Counts the diverged trials."""
  return sum(r.status.get("state") == "diverged" for r in records)


def batch_size(record: Record) -> int:
  """Returns the examples per update of a trial."""
  return int(record.trial["config"]["batch_size"])


def token_column(study: Mapping[str, Any], record: Record) -> dict[str, int]:
  """Returns the tokens per update of a trial, as a column `tokens_per_batch`; none where the examples of the study are no text."""
  tokens = study.get("tokens_per_example")
  return {"tokens_per_batch": batch_size(record) * tokens} if tokens else {}


def learning_rate(record: Record) -> float:
  """Returns the learning rate of a trial."""
  return float(record.trial["hparams"]["learning_rate"])


def num_steps(study: dict, choice: str, size: int) -> int | None:
  """Returns how many steps a budget allows at a batch size; for the choice "target", the longer of all budgets. None if unknown."""
  budgets = study.get("budgets", {})
  names = BUDGETS if choice == "target" else (choice,)
  lengths = [budgets[name]["num_steps"].get(str(size)) for name in names if name in budgets]
  return max((int(n) for n in lengths if n is not None), default=None)


def tuned_rate(study: dict, choice: str, size: int) -> TunedRate | None:
  """Returns the rate tuned for `choice` ("epochs", "steps" or "target") at a batch size, None where tuning found none."""
  entry = study.get("tuned", {}).get(choice, {}).get(str(size)) or {}
  rate = entry.get("learning_rate")
  return TunedRate(float(rate), entry.get("edge")) if is_number(rate) else None


def budgets_of(study: dict, record: Record) -> tuple[str, ...]:
  """Names the budgets that a train record belongs to: none, one, or both where they coincide."""
  steps = record.trial["config"].get("num_steps")
  return tuple(name for name in BUDGETS if steps is not None and steps == num_steps(study, name, batch_size(record)))


def final_records(study: dict, records: Sequence[Record], choice: str, *, complete: bool = True) -> list[Record]:
  """Returns the train records at the tuned rate of `choice` over the final seeds, ordered by batch size and seed.

  `complete=False` keeps diverged and unfinished ones, for counting.
  """
  seeds = set(study.get("final_seeds", ()))

  def chosen(record: Record) -> bool:
    if record.trial.get("kind") != "train" or record.trial.get("seed") not in seeds:
      return False
    size = batch_size(record)
    tuned = tuned_rate(study, choice, size)
    return (
      tuned is not None
      and record.trial["config"].get("num_steps") == num_steps(study, choice, size)
      and math.isclose(learning_rate(record), tuned.learning_rate, rel_tol=RATE_TOLERANCE)
      and (not complete or record.status.get("state") == "complete")
    )

  return sorted(filter(chosen, records), key=lambda r: (batch_size(r), r.trial["seed"], r.id))


def probe_rows(record: Record, probe: str) -> list[dict]:
  """Returns the rows of one probe, in the order written."""
  return [row for row in record.probes if row.get("probe") == probe]


def last_probe_value(record: Record, probe: str, field: str) -> float | None:
  """Returns a field of a probe's last row, None if it was not measured."""
  value = [None, *(row.get(field) for row in probe_rows(record, probe))][-1]
  return float(value) if is_number(value) else None


def last_metric(record: Record, field: str) -> float | None:
  """Returns the last value logged under `field`, None if there is none or if it is not finite."""
  value = [None, *(row[field] for row in record.metrics if field in row)][-1]
  return float(value) if is_number(value) else None


def steps_to_target(record: Record, target: dict) -> int | None:
  """Returns the first evaluated step whose metric passes the goal, None if none did or if the trial diverged.

  `target` is `{"metric", "goal", "direction": "max" | "min"}`. The goal itself passes: at least the goal, or at most, at evaluated
  steps only, without smoothing or interpolation. So the answer is late by up to one evaluation interval.

  Source: Shallue et al. (2019), "steps to result", as computed by the authors' code (`compute_steps_to_result`). There the goal itself
  does not pass, and the first of all trials is taken; here each trial keeps its own number.
  """
  if record.status.get("state") == "diverged":
    return None
  sign = 1 if target["direction"] == "max" else -1
  passing = (
    int(row["step"])
    for row in record.metrics
    if is_number(row.get(target["metric"])) and sign * row[target["metric"]] >= sign * target["goal"]
  )
  return min(passing, default=None)


def score(record: Record, objective: Objective, target: dict) -> float:
  """Returns what tuning minimises: the final validation loss or the steps to target; infinite for a failed trial."""
  if record.status.get("state") != "complete":
    return math.inf
  value = last_metric(record, "validation_loss") if objective == "validation_loss" else steps_to_target(record, target)
  return math.inf if value is None else float(value)


def best_rate(records: Sequence[Record], *, objective: Objective, target: dict, seeds: Sequence[int]) -> BestRate:
  """Chooses the learning rate of one batch size (and one budget) over the tuning `seeds`.

  A rate's score is the mean over the seeds of the final validation loss or of the steps to target. A seed fails if its trial
  diverged, did not finish, is missing, or (for the steps) never reached the target. The fewest failures win first and the mean over
  the other seeds decides among equals, so a rate with a failed seed loses unless every rate has one; ties go to the smaller rate.

  Args:
    records: train records of one batch size and one number of steps; other seeds are ignored.

  Returns: the rate (None if no trial of any rate succeeded), the edge of the grid that it sits on, and the score of each rate. A
    larger rate that was tried and diverged counts as a grid point: the rate below it is no edge. A grid of one rate is its "high" edge.
  """
  by_rate: dict[float, dict[int, float]] = {}
  for record in records:
    if record.trial["seed"] in seeds:
      by_rate.setdefault(learning_rate(record), {})[record.trial["seed"]] = score(record, objective, target)
  rates = sorted(by_rate)
  scores, ranks = {}, {}
  for rate in rates:
    finite = [value for value in by_rate[rate].values() if math.isfinite(value)]
    failures = len(set(seeds)) - len(finite)
    mean = sum(finite) / len(finite) if finite else math.inf
    scores[rate] = math.inf if failures else mean
    ranks[rate] = (failures, mean, rate)
  alive = [rate for rate in rates if math.isfinite(ranks[rate][1])]
  if not alive:
    return BestRate(None, None, scores)
  best = min(alive, key=lambda rate: ranks[rate])
  edge: Literal["low", "high"] | None = "high" if best == rates[-1] else "low" if best == rates[0] else None
  return BestRate(best, edge, scores)
