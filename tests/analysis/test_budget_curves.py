import math

import numpy as np
import pytest

from bsjax.analysis.budget_curves import budget_curves
from tests.analysis import simulate_sweep

STUDY = simulate_sweep.make_study((8, 32), num_steps=lambda _: 400, every=lambda _: 10, num_trials=4)


def accuracy(step, needs):
  return 1 - 0.03 * math.sqrt(needs / step)


def test_the_best_value_within_a_budget_of_steps():
  records = simulate_sweep.sweep_of(STUDY, {8: [200, 800], 32: [2000, 1000]})
  curves = budget_curves(STUDY, records, [5, 55, 100, 200, 10000], unit="steps")
  expected = [
    [math.nan, math.nan],  # before the first look
    [accuracy(50, 200), accuracy(50, 1000)],
    [accuracy(100, 200), accuracy(100, 1000)],
    [accuracy(200, 200), accuracy(200, 1000)],
    [accuracy(200, 200), accuracy(400, 1000)],  # trials end at their goal, or at 400 steps
  ]
  np.testing.assert_allclose(curves.best, expected, rtol=1e-12)  # the same expression, up to the order of its products
  np.testing.assert_array_equal(curves.reached, [[False, False]] * 3 + [[True, False]] * 2)
  np.testing.assert_array_equal(curves.batch_sizes, [8, 32])


def test_an_epoch_buys_fewer_steps_of_a_larger_batch():
  records = simulate_sweep.sweep_of(STUDY, {8: [800], 32: [800]})
  curves = budget_curves(STUDY, records, [1.0], unit="epochs")
  assert STUDY["train_size"] == 1024  # 128 steps of 8, of which 120 are seen; 32 steps of 32, of which 30 are
  assert curves.best[0] == pytest.approx([accuracy(120, 800), accuracy(30, 800)])


def test_a_budget_holds_the_very_step_it_was_computed_from():
  """At train sizes like 1,000 a step times B / N times N / B may come out below the step."""
  study = STUDY | {"train_size": 1000}
  sizes, steps = (3, 7, 11), range(10, 200, 10)
  assert any(step * size / 1000 * (1000 / size) < step for size in sizes for step in steps)  # so it does here
  for size in sizes:
    small = simulate_sweep.make_study((size,), num_steps=lambda _: 400, every=lambda _: 10, num_trials=1) | study
    small |= {"sweep": {str(size): STUDY["sweep"]["8"]}, "batch_sizes": [size]}
    record = simulate_sweep.trial_record(small, size, 0, 800)
    found = budget_curves(small, [record], [step * size / 1000 for step in steps], unit="epochs")
    assert found.best[:, 0] == pytest.approx([accuracy(step, 800) for step in steps])


def test_the_best_value_is_not_the_last_one():
  record = simulate_sweep.trial_record(STUDY, 8, 0, 800)
  record.metrics[20]["validation_accuracy"] = 0.965
  curves = budget_curves(STUDY, [record], [200, 300], unit="steps")
  assert curves.best[:, 0] == pytest.approx([accuracy(200, 800), 0.965])


def test_a_metric_to_be_lowered():
  study = STUDY | {"target": {"metric": "train_loss", "goal": 0.9, "direction": "min"}}
  records = [simulate_sweep.trial_record(study, 8, seed, needs, stops=False) for seed, needs in enumerate((800, 1600))]
  curves = budget_curves(study, records, [100, 400], unit="steps")
  assert curves.best[:, 0] == pytest.approx([1 - 0.5 * 95 / 800, 1 - 0.5 * 395 / 800])
  assert curves.reached[:, 0].tolist() == [False, True]


def test_cut_and_diverged_trials_stand_for_no_longer_budget():
  cut = simulate_sweep.trial_record(STUDY, 8, 0, 500, num_steps=100)
  diverged = simulate_sweep.trial_record(STUDY, 8, 1, 300, state="diverged")
  curves = budget_curves(STUDY, [cut, diverged], [50, 100, 150], unit="steps")
  np.testing.assert_allclose(curves.best[:, 0], [accuracy(50, 500), accuracy(100, 500), math.nan], rtol=1e-12)
