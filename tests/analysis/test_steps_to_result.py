import math

import numpy as np
import pytest

from bsjax.analysis import steps_to_result as module
from bsjax.analysis.steps_to_result import (
  SMOOTHING,
  count_states,
  matching_train_goal,
  smoothed_train_loss,
  steps_to_result,
  steps_to_train_loss,
  sweep_records,
  sweep_trials,
  trial_state,
)
from bsjax.records import Record
from tests.analysis import simulate_sweep

SIZES = (1, 4, 16, 64)
NEVER = math.inf


def study_of(*, sizes=(8,), num_steps=400, every=10, num_trials=8, **settings):
  return simulate_sweep.make_study(
    sizes, num_steps=lambda _: num_steps, every=lambda _: every, num_trials=num_trials, **settings
  )


def whole_sweep(**settings):
  """A sweep of four batch sizes, two trials of which diverged, looked at every hundredth of the fewest steps possible."""
  rng = np.random.default_rng(0)
  needs = simulate_sweep.simulate_steps(rng, num_trials=16, sizes=SIZES)
  needs = {size: np.where(np.isfinite(values), values, NEVER) for size, values in needs.items()}
  study = simulate_sweep.make_study(
    SIZES,
    num_steps=lambda size: round(8 * simulate_sweep.hyperbola(size)),
    every=lambda size: round(simulate_sweep.hyperbola(size) / 100),
    num_trials=16,
  )
  diverged = {(1, 3), (64, int(np.argmin(needs[64])))}  # the second would have been the fastest of its batch size
  return study, needs, simulate_sweep.sweep_of(study, needs, diverged=diverged, **settings)


def test_the_state_of_a_trial_in_shallues_words():
  study = study_of()

  def state(needs, **settings):
    return trial_state(study, simulate_sweep.trial_record(study, 8, 0, needs, **settings))

  assert state(200) == "complete"
  assert state(NEVER) == "complete"  # all steps of the budget
  assert state(200, num_steps=210) == "complete"  # would have been cut, but reached the target first
  assert state(200, num_steps=190) == "incomplete"
  assert state(NEVER, state="running") == state(100, state="running") == state(100, state="failed") == "incomplete"
  assert state(100, state="diverged", stops=False) == "infeasible"  # passed the target before it diverged


def test_states_are_counted_and_divergence_keeps_its_step():
  study = study_of()
  records = [
    simulate_sweep.trial_record(study, 8, seed, needs, **settings)
    for seed, (needs, settings) in enumerate(
      [
        (90, {}),
        (NEVER, {}),
        (NEVER, {"num_steps": 200}),
        (NEVER, {"state": "running"}),
        (NEVER, {"state": "diverged"}),
      ]
    )
  ]
  assert count_states(study, records) == {8: (2, 2, 1)}
  assert [trial.diverged_at for trial in sweep_trials(study, records, 8)] == [None] * 4 + [201]
  assert steps_to_result(study, records)[0].counts == (2, 2, 1)


def test_shallues_rule_takes_the_first_look_of_any_complete_trial():
  study = study_of()
  needs = (203, 101, 108, NEVER)  # looks every 10 steps: trials 1 and 2 tie at 110
  infeasible = simulate_sweep.trial_record(study, 8, 4, 20, state="diverged", stops=False)
  unfinished = simulate_sweep.trial_record(study, 8, 5, 20, state="running")
  records = [simulate_sweep.trial_record(study, 8, seed, x, rate=0.1 + seed) for seed, x in enumerate(needs)]
  (result,) = steps_to_result(study, [infeasible, unfinished, *records[::-1]])
  assert (result.outcome, result.steps, result.point) == ("reached", 110, 1)
  assert result.hparams["learning_rate"] == 1.1
  assert result.quantisation == 10 / 110
  assert (result.rule, result.metric, result.goal) == ("shallue", "validation_accuracy", 0.97)
  assert (result.num_reached, result.counts) == (3, (4, 1, 1))
  assert result.num_open == 1  # the unfinished trial passed the goal at step 20


@pytest.mark.parametrize("give_up", [1, 1.5, 4])
def test_cutting_trials_never_changes_steps_to_result(give_up):
  study, _, records = whole_sweep()
  _, _, cut = whole_sweep(give_up=give_up)
  whole, results = steps_to_result(study, records), steps_to_result(study, cut)
  assert [(r.outcome, r.steps, r.point, r.hparams, r.num_open) for r in results] == [
    (r.outcome, r.steps, r.point, r.hparams, 0) for r in whole
  ]
  assert all(r.outcome == "reached" for r in whole)
  assert sum(len(r.metrics) for r in cut) < sum(len(r.metrics) for r in records)
  assert all(r.counts.incomplete for r in results)
  assert not any(r.counts.incomplete for r in whole)


def test_a_diverged_trial_is_no_minimum():
  study, needs, records = whole_sweep()
  result = steps_to_result(study, records)[-1]
  every = study["sweep"]["64"]["eval_every"]
  second = np.sort(needs[64])[1]
  assert result.steps == math.ceil(second / every) * every
  assert result.counts.infeasible == 1


def test_what_is_not_reached_says_how_near():
  study = study_of(sizes=(8, 16, 32, 64))
  near, far = (simulate_sweep.trial_record(study, 8, seed, x) for seed, x in enumerate((500, 900)))
  diverged = simulate_sweep.trial_record(study, 16, 0, 50, state="diverged", stops=False)
  running = simulate_sweep.trial_record(study, 32, 0, NEVER, state="running")
  results = steps_to_result(study, [near, far, diverged, running])
  assert [r.outcome for r in results] == ["not reached", "all infeasible", "unfinished", "no trial"]
  assert all(r.steps is None and r.point is None and r.hparams == {} and math.isnan(r.quantisation) for r in results)
  assert results[0].nearest == pytest.approx(1 - 0.03 * math.sqrt(500 / 400))
  assert [r.num_open for r in results] == [0, 0, 1, 0]
  assert math.isnan(results[1].nearest)  # what an infeasible trial reached does not count
  assert results[2].nearest == 0.5
  assert math.isnan(results[3].nearest)


def test_a_metric_to_be_lowered_is_nearest_at_its_lowest():
  study = study_of() | {"target": {"metric": "train_loss", "goal": 0.1, "direction": "min"}}
  near, far = (simulate_sweep.trial_record(study, 8, seed, needs, stops=False) for seed, needs in enumerate((500, 900)))
  (result,) = steps_to_result(study, [near, far])
  assert result.outcome == "not reached"
  assert result.nearest == pytest.approx(1 - 0.5 * 395 / 500)


def test_trials_of_another_sweep_are_left_out():
  study = study_of(num_trials=3)

  def trial(point, needs, **settings):
    return simulate_sweep.trial_record(study, 8, point, needs, **settings)

  mine = [trial(0, 200), trial(2, 300)]
  others = [
    trial(1, 50, every=5),  # looked at more often
    trial(3, 50),  # beyond the number of trials
    trial(1, 50, kind="pilot"),
    simulate_sweep.trial_record(study_of(sizes=(16,)), 16, 1, 50),
  ]
  assert sweep_records(study, [*others, *mine], 8) == mine
  cut, longer = trial(0, 200, num_steps=100), mine[0]
  assert sweep_records(study, [longer, cut], 8) == sweep_records(study, [cut, longer], 8) == [longer]


def linear_record(every, end=4000, slope=1e-4):
  rows = [
    {"step": step, "examples_seen": 8 * step, "train_loss": 1 - slope * (step - every / 2)}
    for step in range(every, end + 1, every)
  ]
  return Record("linear", {}, {"state": "complete"}, rows, [])


@pytest.mark.parametrize("every", [5, 20])
def test_smoothing_delays_a_straight_line_by_its_fraction(every):
  record = linear_record(every)
  losses = np.array(smoothed_train_loss(record))
  steps = np.array([row["step"] for row in record.metrics])
  # Within a row the loss is replaced by its mean: an error of the order (every / width of the average)^2 of the loss in a row,
  # and the width is 0.05 * 4000 = 200 steps at the end.
  assert losses[-1] == pytest.approx(1 - 1e-4 * steps[-1] / (1 + SMOOTHING), abs=1e-4 * every * (every / 200))


def test_smoothing_leaves_a_constant_and_says_where_a_loss_is_missing():
  record = linear_record(10, slope=0.0)
  assert smoothed_train_loss(record) == pytest.approx(
    [1.0] * len(record.metrics), rel=1e-12
  )  # 400 sums of two rounded products
  record.metrics[3]["train_loss"] = math.nan
  losses = smoothed_train_loss(record)
  assert np.isfinite(losses[:3]).all()
  assert np.isnan(losses[3:]).all()


def test_mccandlishs_rule_finds_the_same_bend_later_by_the_smoothing():
  study, needs, records = whole_sweep()
  results = steps_to_train_loss(study, records, goal=simulate_sweep.TRAIN_GOAL)
  for result, shallue in zip(results, steps_to_result(study, records), strict=True):
    expected = (1 + SMOOTHING) * simulate_sweep.TRAIN_SHARE * needs[result.batch_size][result.point]
    every = study["sweep"][str(result.batch_size)]["eval_every"]
    # One row of rounding up, and less than another from the mean within a row (see above).
    assert -every < result.steps - expected < 2 * every
    assert result.point == shallue.point
    assert (result.rule, result.metric, result.num_open) == ("mccandlish", module.SMOOTHED, 0)


def test_a_trial_that_stopped_before_the_training_goal_leaves_the_answer_open():
  study = study_of()
  slow = simulate_sweep.trial_record(study, 8, 0, 300)
  fast = simulate_sweep.trial_record(study, 8, 1, 100)
  for row in fast.metrics:
    row["train_loss"] += 0.2  # stops at its validation target, at step 100, with a training loss of about 0.7
  (result,) = steps_to_train_loss(study, [slow, fast], goal=simulate_sweep.TRAIN_GOAL)
  assert (result.point, result.num_open) == (0, 1)
  assert result.steps > 100


def test_the_matching_goal_is_answered_wherever_the_target_is():
  study, _, records = whole_sweep()
  goal = matching_train_goal(study, records)
  results = steps_to_train_loss(study, records, goal=goal)
  for result, shallue in zip(results, steps_to_result(study, records), strict=True):
    assert result.outcome == shallue.outcome == "reached"
    assert result.steps <= shallue.steps
  assert any(
    r.steps == s.steps for r, s in zip(results, steps_to_result(study, records), strict=True)
  )  # no lower goal would do
  assert matching_train_goal(study_of(), []) is None


def test_edges_of_the_search_are_handed_on():
  study = study_of(edges={8: {"learning_rate": "high"}})
  (result,) = steps_to_result(study, [simulate_sweep.trial_record(study, 8, 0, 100)])
  assert result.edges == {"learning_rate": "high"}
