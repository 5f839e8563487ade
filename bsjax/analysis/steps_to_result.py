"""Steps to result: what became of each trial of a sweep, and the fewest steps to a goal at each batch size, by two published rules."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from bsjax.analysis.selection import batch_size, is_number, steps_to_target
from bsjax.records import Record

TrialState = Literal["complete", "incomplete", "infeasible"]
Outcome = Literal["reached", "not reached", "unfinished", "all infeasible", "no trial"]
Rule = Literal["shallue", "mccandlish"]
SMOOTHING = 0.05
"""The training loss is averaged over about this fraction of the examples seen so far."""
SMOOTHED = "smoothed_train_loss"


class SweepTrial(NamedTuple):
  """What became of one trial: `steps` to the goal (None if never), the `last_step` evaluated, the value `nearest` to the goal (NaN if
  there is none), and the step at which it diverged (None if it did not, or if that was not recorded)."""

  point: int
  state: TrialState
  steps: int | None
  last_step: int
  nearest: float
  diverged_at: int | None
  hparams: dict[str, Any]


class StateCounts(NamedTuple):
  """How many trials of one batch size are in each state."""

  complete: int
  incomplete: int
  infeasible: int


class StepsToResult(NamedTuple):
  """The answer at one batch size by one rule.

  `steps` and `point` are None and `hparams` empty unless the outcome is "reached". `quantisation` is the evaluation interval over the
  steps: the answer is late by at most this share of itself. `nearest` is the best value of the metric in any feasible trial, NaN if
  there is none. `num_open` trials could still turn out to need fewer steps; above 0, `steps` is an upper bound only. `edges` names the
  edges of the search space that the best trial sits on: then a wider space may need fewer steps.
  """

  batch_size: int
  rule: Rule
  metric: str
  goal: float
  outcome: Outcome
  steps: int | None
  point: int | None
  hparams: dict[str, Any]
  quantisation: float
  nearest: float
  counts: StateCounts
  num_reached: int
  num_open: int
  edges: dict[str, str]


def sweep_records(study: dict, records: Iterable[Record], size: int) -> list[Record]:
  """Returns the trials of the sweep at a batch size, one for each point, ordered by point.

  A point is its trial's seed. Trials that were looked at at another cadence, or beyond the number of trials, belong to another sweep.
  Of two trials of one point, cut at different steps, the longer one stands.
  """
  entry = study["sweep"][str(size)]
  longest: dict[int, Record] = {}
  for record in sorted(records, key=lambda r: (r.trial["config"].get("num_steps", 0), r.id)):
    config, point = record.trial["config"], record.trial["seed"]
    if (
      record.trial.get("kind") == "sweep"
      and batch_size(record) == size
      and config.get("eval_every", 1) == entry["eval_every"]
      and point < entry["num_trials"]
    ):
      longest[point] = record
  return [longest[point] for point in sorted(longest)]


def trial_state(study: dict, record: Record) -> TrialState:
  """Tells what became of a trial, in Shallue's words.

  complete: it reached the study's target, or ran all steps that its batch size allows. infeasible: it diverged. incomplete: it is still
  running, it failed, or it was cut sooner, because by then it needed more steps than another trial had.

  Source: Shallue et al. (2019), trial status in the authors' artefact; there a trial is complete only after all its steps.
  """
  if record.status.get("state") == "diverged":
    return "infeasible"
  if record.status.get("state") != "complete":
    return "incomplete"
  whole = record.trial["config"]["num_steps"] >= study["sweep"][str(batch_size(record))]["num_steps"]
  return "complete" if whole or steps_to_target(record, study["target"]) is not None else "incomplete"


def sweep_trials(study: dict, records: Iterable[Record], size: int, target: dict | None = None) -> list[SweepTrial]:
  """Describes the trials of the sweep at a batch size, ordered by point, with their steps to `target` (default: the study's)."""
  target = target or study["target"]
  best_of = max if target["direction"] == "max" else min
  return [
    SweepTrial(
      point=record.trial["seed"],
      state=trial_state(study, record),
      steps=steps_to_target(record, target),
      last_step=max((int(row["step"]) for row in record.metrics), default=0),
      nearest=best_of(
        (float(row[target["metric"]]) for row in record.metrics if is_number(row.get(target["metric"]))),
        default=math.nan,
      ),
      diverged_at=record.status.get("first_nonfinite_step"),
      hparams=record.trial["hparams"],
    )
    for record in sweep_records(study, records, size)
  ]


def count_states(study: dict, records: Sequence[Record]) -> dict[int, StateCounts]:
  """Counts the trials of the sweep in each state, for each batch size."""
  return {size: _counts(sweep_trials(study, records, size)) for size in _sizes(study)}


def steps_to_result(study: dict, records: Sequence[Record]) -> list[StepsToResult]:
  """Finds the fewest steps to the study's target at each batch size by Shallue's rule.

  The first evaluated step at which any complete trial passes the goal on the validation metric: no smoothing, no interpolation, no mean
  over seeds; of equal trials the lower point. Incomplete and infeasible trials are counted and never enter.

  Holds: cutting later trials at a multiple (at least 1) of the fewest steps found by earlier ones changes neither `steps` nor `point`:
    a trial that is cut has not passed the goal by then, so it cannot be first. It can change `nearest` and the counts only.

  Source: Shallue et al. (2019), "steps to result", as computed by the authors' code. There the goal itself does not pass; here it does.
  """
  return [_fewest(study, records, size, study["target"], "shallue") for size in _sizes(study)]


def steps_to_train_loss(
  study: dict, records: Sequence[Record], *, goal: float, smoothing: float = SMOOTHING
) -> list[StepsToResult]:
  """Finds the fewest steps to a training loss at each batch size by McCandlish's rule.

  The first evaluated step at which the smoothed training loss (`smoothed_train_loss`) of any complete trial is at or below the goal.
  Trials that stop at their validation target may end before they reach this goal, and then say only that they need more steps than
  they took: `num_open` counts those that could be first. `matching_train_goal` chooses a goal that every batch size answers.

  Source: McCandlish et al. (2018), appendix A.3: the loss is smoothed by an exponential average before the goal is tested (decay chosen
    by hand), and the run of the rate grid with the fewest steps counts. The paper tests one rate a run, here a trial is any point.
  """
  target = {"metric": SMOOTHED, "goal": goal, "direction": "min"}
  smoothed = [_with_smoothed_loss(record, smoothing) for record in records if record.trial.get("kind") == "sweep"]
  return [_fewest(study, smoothed, size, target, "mccandlish") for size in _sizes(study)]


def smoothed_train_loss(record: Record, smoothing: float = SMOOTHING) -> list[float]:
  """Averages the training loss exponentially, over a fixed fraction of the examples seen: one value for each row.

  L_k = d_k L_(k-1) + (1 - d_k) l_k with d_k = (E_(k-1) / E_k)^(1 / smoothing), E_k the examples seen at row k and l_k the mean loss since
  the row before. A fixed fraction delays all batch sizes alike: a loss that falls in a straight line is reached later by the factor
  1 + smoothing, whatever the batch size and the cadence, so S_min is that much larger and the critical batch size is unchanged.

  Holds: the first row is its own average; a row whose loss is not finite makes all later averages NaN.
  """
  values: list[float] = []
  average, seen = 0.0, 0.0
  for row in record.metrics:
    decay = (seen / row["examples_seen"]) ** (1 / smoothing)
    loss = row.get("train_loss")
    average = decay * average + (1 - decay) * loss if is_number(loss) else math.nan
    seen = row["examples_seen"]
    values.append(average)
  return values


def matching_train_goal(study: dict, records: Sequence[Record], *, smoothing: float = SMOOTHING) -> float | None:
  """Returns the smoothed training loss that goes with the study's target: the highest among the best trials as they reach it.

  The best trial of every batch size has reached this loss by the time it passes the target, so `steps_to_train_loss` has an answer
  wherever `steps_to_result` has one. None if no batch size reached the target.
  """
  goals = []
  for result in steps_to_result(study, records):
    for record in sweep_records(study, records, result.batch_size):
      if record.trial["seed"] == result.point:
        losses = zip(record.metrics, smoothed_train_loss(record, smoothing), strict=True)
        goals += [loss for row, loss in losses if row["step"] == result.steps]
  return max(goals, default=None)


def _fewest(study: dict, records: Sequence[Record], size: int, target: dict, rule: Rule) -> StepsToResult:
  entry = study["sweep"][str(size)]
  trials = sweep_trials(study, records, size, target)
  feasible = [trial for trial in trials if trial.state != "infeasible"]
  counts = _counts(trials)
  reached = [trial for trial in feasible if trial.state == "complete" and trial.steps is not None]
  best = min(reached, key=lambda trial: (trial.steps, trial.point), default=None)
  steps = best.steps if best else None
  bound = math.inf if steps is None else steps
  outcome: Outcome = (
    "reached"
    if best
    else "not reached"
    if counts.complete
    else "unfinished"
    if counts.incomplete
    else "all infeasible"
    if counts.infeasible
    else "no trial"
  )
  near = [trial.nearest for trial in feasible if math.isfinite(trial.nearest)]
  return StepsToResult(
    batch_size=size,
    rule=rule,
    metric=target["metric"],
    goal=target["goal"],
    outcome=outcome,
    steps=steps,
    point=best.point if best else None,
    hparams=best.hparams if best else {},
    quantisation=entry["eval_every"] / steps if steps else math.nan,
    nearest=(max if target["direction"] == "max" else min)(near, default=math.nan),
    counts=counts,
    num_reached=len(reached),
    num_open=sum(_is_open(trial, bound, entry["num_steps"]) for trial in feasible),
    edges=dict(entry.get("edges") or {}),
  )


def _is_open(trial: SweepTrial, fewest: float, budget: int) -> bool:
  """Tells whether a feasible trial could still turn out to need fewer steps than the fewest of the complete ones."""
  if trial.steps is None:
    return trial.last_step < min(fewest, budget)
  return trial.state == "incomplete" and trial.steps < fewest


def _with_smoothed_loss(record: Record, smoothing: float) -> Record:
  averages = smoothed_train_loss(record, smoothing)
  return record._replace(metrics=[row | {SMOOTHED: x} for row, x in zip(record.metrics, averages, strict=True)])


def _counts(trials: Sequence[SweepTrial]) -> StateCounts:
  return StateCounts(*(sum(trial.state == state for trial in trials) for state in StateCounts._fields))


def _sizes(study: dict) -> list[int]:
  return sorted(int(size) for size in study["sweep"])
