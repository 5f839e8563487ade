"""What the arms of a study of large batches came to, read from their records: outcomes over final seeds, and paired differences."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.analysis.finite_trials import mean_interval
from bsjax.analysis.fits import UNKNOWN, Interval
from bsjax.analysis.selection import last_probe_value
from bsjax.analysis.table import results_table
from bsjax.records import Record

RECIPES = ("rule_constant", "rule_warmup")
"""The linear rule as it stands, without and with its warm-up."""
NAMES = {
  "momentum_constant": "momentum",
  "momentum_warmup": "momentum + warm-up",
  "momentum_cosine": "momentum + cosine",
  "momentum_warmup_cosine": "momentum + warm-up + cosine",
  "lars_warmup_cosine": "LARS + warm-up + cosine",
  "lamb_warmup_cosine": "LAMB + warm-up + cosine",
  "adamw_warmup_cosine": "AdamW + warm-up + cosine",
  "rule_constant": "linear rule, untuned",
  "rule_warmup": "linear rule + warm-up, untuned",
}
"""What each arm is called in sentences and figures."""


class Outcome(NamedTuple):
  """What an arm came to at one batch size, over its final seeds: f64[n] errors of those that completed, in the order of `seeds`.

  `planned` counts all of them. Where no trial of the search survived there is nothing to train: all count as diverged, and
  `found` is False.
  """

  seeds: tuple[int, ...]
  errors: np.ndarray
  diverged: int
  planned: int
  found: bool = True

  @property
  def mean(self) -> Interval:
    """The mean error with Student's interval; none while a seed diverged, for the others are a selection."""
    return mean_interval(self.errors) if not self.diverged else UNKNOWN

  @property
  def loss(self) -> str:
    """Says how many seeds diverged."""
    return f"{self.diverged} of {self.planned} seeds diverged" if self.found else "all trials of the search diverged"


def final_trials(study: Mapping, records: Mapping[str, Record], size: int, arm: str) -> list[Record]:
  """Returns the final trials of an arm at a batch size that are there; none for an arm that was not trained.

  Args:
    records: by id.
  """
  return [records[name] for name in entry_of(study, size, arm).get("final", ()) if name in records]


def entry_of(study: Mapping, size: int, arm: str) -> Mapping[str, Any]:
  """Returns what was tuned of an arm at a batch size; empty for an arm that was not trained."""
  return study["tuned"].get(str(size), {}).get(arm, {})


def better_arm(entries: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the arm with the lowest mean validation loss over its repeats, of the entries of one batch size; an arm without one loses."""

  def loss(arm: str) -> float:
    mean = entries[arm].get("validation_loss")
    return math.inf if mean is None else mean

  return min(entries, key=loss)


def error_metric(records: Iterable[Record]) -> str:
  """Says what is judged: "test_accuracy", whose complement is the error, or "test_loss" where a workload has no accuracy."""
  with_accuracy = any(last_probe_value(record, "test", "test_accuracy") is not None for record in records)
  return "test_accuracy" if with_accuracy else "test_loss"


def read_outcome(study: Mapping, records: Mapping[str, Record], size: int, arm: str, metric: str) -> Outcome | None:
  """Reads the final trials of an arm; None for an arm that was not trained at this batch size.

  Args:
    records: by id.
    metric: of `error_metric`; accuracies become errors in percent.
  """
  if not entry_of(study, size, arm):
    return None
  trials = sorted(final_trials(study, records, size, arm), key=lambda record: record.trial["seed"])
  planned = len(study["final_seeds"])
  if not entry_of(study, size, arm)["final"]:
    return Outcome((), np.empty(0), planned, planned, found=False)
  values = {
    record.trial["seed"]: value
    for record in trials
    if record.status.get("state") == "complete" and (value := last_probe_value(record, "test", metric)) is not None
  }
  errors = np.array(list(values.values()), float)
  diverged = sum(record.status.get("state") == "diverged" for record in trials)
  return Outcome(tuple(values), 100 * (1 - errors) if metric == "test_accuracy" else errors, diverged, planned)


def paired_difference(without: Outcome, with_it: Outcome) -> Interval:
  """Returns the mean over common seeds of the difference of two arms, with Student's interval.

  A seed gives both arms the same initial weights and the same order of examples, so their errors may rise and fall together: on
  digits_mlp the correlation of two arms over 16 seeds is 0.3 on average at batch size 1,024, and none at 64 and 256.

  Measured coverage (`tests/analysis/simulate_large_batch.py`: error counts of 517 test examples, 2 to 16 seeds, errors that correlate by up
  to 0.26): 94.4 to 95.6 %. Welch's interval, which ignores the pairs, covers 95 to 98.5 %; with 8 seeds it is 7 % narrower without
  correlation, and 10 % wider with the largest. The interval is for this very test set: it says nothing of other examples.
  """
  first, second = (dict(zip(outcome.seeds, outcome.errors, strict=True)) for outcome in (without, with_it))
  return mean_interval(np.array([first[seed] - second[seed] for seed in without.seeds if seed in second]))


def large_batch_table(study: dict, records: Sequence[Record]) -> list[dict[str, Any]]:
  """Returns one flat row for each trial, as `results_table` does, with its arm, and its loss and error rate on the test set."""
  by_id = {record.id: record for record in records}
  return [
    {"arm": by_id[row["id"]].trial["arm"]}
    | row
    | {"test_loss": last_probe_value(by_id[row["id"]], "test", "test_loss")}
    for row in results_table(study, records)
  ]
