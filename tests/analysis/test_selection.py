import pytest

from bsjax.analysis import best_rate, results_table, steps_to_target
from bsjax.analysis.selection import budgets_of, final_records, num_steps
from bsjax.records import Record
from tests.analysis import simulate

ACCURACY = simulate.TARGET
LOSS = {"metric": "validation_loss", "goal": 0.5, "direction": "min"}


def trial(values: list, metric="validation_accuracy", state="complete") -> Record:
  metrics = [{"step": 10 * (i + 1), **({} if value == "absent" else {metric: value})} for i, value in enumerate(values)]
  return simulate.record("train", 8, 10 * len(values), 0, state=state, metrics=metrics)


@pytest.mark.parametrize(
  ("target", "values", "expected"),
  [
    (ACCURACY, [0.9, 0.94, 0.96, 0.97], 30),
    (ACCURACY, [0.9, 0.95, 0.96], 20),  # the goal itself passes
    (ACCURACY, [0.9, 0.96, 0.9, 0.97], 20),  # the first time counts, even if it is lost again
    (ACCURACY, [0.9, 0.94], None),
    (ACCURACY, ["absent", 0.96], 20),  # rows without an evaluation
    (ACCURACY, [None, 0.96], 20),  # how records keep a number that was not finite
    (ACCURACY, [], None),
    (LOSS, [0.9, 0.5, 0.4], 20),
    (LOSS, [0.9, 0.51], None),
    (LOSS, [float("nan"), 0.4], 20),
  ],
)
def test_steps_to_target_is_the_first_evaluation_that_passes(target, values, expected):
  assert steps_to_target(trial(values, target["metric"]), target) == expected


def test_a_diverged_trial_never_reaches_the_target():
  assert steps_to_target(trial([0.99], state="diverged"), ACCURACY) is None


def grid(losses: dict, states: dict | None = None) -> list[Record]:
  """Tuning trials: `losses[rate]` are the final validation losses of seeds 0, 1, 2; `states[rate, seed]` may differ from complete."""
  return [
    simulate.train_record(
      8, 100, seed, rate=rate, validation_loss=loss, state=(states or {}).get((rate, seed), "complete")
    )
    for rate, seed_losses in losses.items()
    for seed, loss in enumerate(seed_losses)
  ]


def choose(records, objective="validation_loss", seeds=(0, 1, 2)):
  return best_rate(records, objective=objective, target=ACCURACY, seeds=seeds)


def test_best_rate_has_the_lowest_mean_over_the_seeds():
  best = choose(grid({0.1: (3, 3, 3), 0.2: (1, 1, 4), 0.4: (0, 3, 4)}))
  assert (best.learning_rate, best.edge) == (0.2, None)
  assert best.scores == pytest.approx({0.1: 3, 0.2: 2, 0.4: 7 / 3})


@pytest.mark.parametrize(("best", "edge"), [(0.1, "low"), (0.2, None), (0.4, "high")])
def test_the_edge_of_the_grid_is_marked(best, edge):
  losses = {rate: (1, 1, 1) if rate == best else (2, 2, 2) for rate in (0.1, 0.2, 0.4)}
  assert choose(grid(losses))[:2] == (best, edge)


def test_a_rate_with_a_diverged_seed_loses_but_still_borders_the_grid():
  best = choose(grid({0.1: (2, 2, 2), 0.2: (1, 1, 1), 0.4: (0, 0, 0)}, {(0.4, 1): "diverged"}))
  assert best.learning_rate == 0.2
  assert best.edge is None
  assert best.scores[0.4] == float("inf")


def test_if_every_rate_has_a_diverged_seed_the_fewest_failures_win():
  states = {(0.1, 0): "diverged", (0.2, 0): "diverged", (0.2, 1): "diverged"}
  assert choose(grid({0.1: (0, 5, 5), 0.2: (0, 0, 1)}, states)).learning_rate == 0.1


def test_a_missing_seed_and_an_unfinished_trial_are_failures():
  records = grid({0.1: (3, 3, 3), 0.2: (1, 1), 0.4: (2, 2, 2)}, {(0.4, 2): "running"})
  assert choose(records).learning_rate == 0.1


def test_without_any_successful_trial_there_is_no_best_rate():
  states = {(0.1, seed): "diverged" for seed in range(3)}
  assert choose(grid({0.1: (1, 1, 1)}, states))[:2] == (None, None)
  assert choose([])[:2] == (None, None)


def test_other_seeds_do_not_take_part_in_tuning():
  records = grid({0.1: (1, 1, 1, 90), 0.2: (2, 2, 2, 0)})
  assert choose(records).learning_rate == 0.1


def test_the_fewest_steps_win_and_never_reaching_the_target_is_a_failure():
  reaches = {0.1: (60, 60, 60), 0.2: (40, 50, 60), 0.4: (10, 10, None)}
  records = [
    simulate.train_record(8, 100, seed, rate=rate, reaches=at)
    for rate, times in reaches.items()
    for seed, at in enumerate(times)
  ]
  best = choose(records, "steps_to_target")
  assert best.learning_rate == 0.2
  assert best.scores == pytest.approx({0.1: 60, 0.2: 50, 0.4: float("inf")})


def test_a_trial_belongs_to_each_budget_whose_length_it_has():
  study = simulate.make_study()
  study["budgets"]["epochs"]["num_steps"]["8"] = simulate.STEPS
  trials = [
    simulate.train_record(1, simulate.EPOCHS * simulate.TRAIN_SIZE, 100),
    simulate.train_record(1, simulate.STEPS, 100),
    simulate.train_record(8, simulate.STEPS, 100),
    simulate.train_record(1, 77, 100),
  ]
  assert [budgets_of(study, r) for r in trials] == [("epochs",), ("steps",), ("epochs", "steps"), ()]
  assert num_steps(study, "target", 1) == simulate.EPOCHS * simulate.TRAIN_SIZE
  assert num_steps(study, "target", 512) == simulate.STEPS


def test_final_records_are_complete_tuned_and_of_the_final_seeds():
  study = simulate.make_study()
  good = simulate.train_record(
    1, simulate.STEPS, 100, rate=simulate.RATE * (1 + 1e-8)
  )  # a rate that went through float32
  others = [
    simulate.train_record(1, simulate.STEPS, 0),
    simulate.train_record(1, simulate.STEPS, 101, rate=2 * simulate.RATE),
    simulate.train_record(1, simulate.STEPS, 102, state="diverged"),
    simulate.train_record(1, simulate.STEPS + 1, 103),
    simulate.record("noise", 1, simulate.STEPS, 104),
  ]
  assert final_records(study, [*others, good], "steps") == [good]


def test_the_results_table_is_flat_deterministic_and_without_wall_times():
  study = simulate.make_study()
  records = [
    simulate.train_record(2, simulate.STEPS, 101, reaches=40, test_accuracy=0.9, sharpness=3.0),
    simulate.train_record(2, simulate.STEPS, 100, state="diverged", reaches=40),
    *simulate.timing_trials(lambda size: 10.0 * size, batch_sizes=(2,)),
  ]
  records[0].trial["config"]["probes"] = ["test", "sharpness"]
  rows = results_table(study, records)
  assert rows == results_table(study, records[::-1])
  assert len({tuple(row) for row in rows}) == 1
  assert not any("seconds" in name for name in rows[0])
  timing, diverged, complete = rows
  assert timing["kind"] == "timing"
  assert (diverged["state"], diverged["steps_to_target"]) == ("diverged", None)
  assert (complete["budgets"], complete["probes"], diverged["probes"]) == ("steps", "test+sharpness", None)
  outcomes = ("batch_size", "learning_rate", "steps_to_target", "test_accuracy", "sharpness")
  assert [complete[name] for name in outcomes] == [2, 0.1, 40, 0.9, 3.0]


def test_the_results_table_of_a_text_counts_tokens():
  """Sequences of 64 predictions; of a trial that left no rows too. Without tokens in the study, the table has no such column."""
  study = simulate.make_study()
  records = [
    *simulate.timing_trials(lambda size: 10.0 * size, batch_sizes=(2,)),
    simulate.train_record(4, simulate.STEPS, 100),
  ]
  plain, text = results_table(study, records), results_table(study | {"tokens_per_example": 64}, records)
  assert "tokens_per_batch" not in plain[0]
  assert [row.pop("tokens_per_batch") for row in text] == [2 * 64, 4 * 64]
  assert text == plain
