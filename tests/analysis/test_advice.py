import numpy as np
import pytest

from bsjax.analysis import advise, judge_all
from tests.analysis import simulate


def steps_of(size, seed):
  return round(80 * (1 + 40 / size) * (1 + 0.01 * (seed - 102)))


def advice_for(study, records):
  return advise(study, records, judge_all(study, records))


def test_the_largest_tested_batch_size_at_or_below_the_critical_one_is_recommended():
  study = simulate.make_study(rates={32: 0.25}, edges={2: "low"})
  records = simulate.target_trials(study, steps_of)
  for r in records:
    r.trial["hparams"]["learning_rate"] = study["tuned"]["target"][str(r.trial["config"]["batch_size"])][
      "learning_rate"
    ]
  records += simulate.timing_trials(lambda b: 1000.0, noise=0.0)
  advice = advice_for(study, records)
  assert advice.critical_batch_size[0] == pytest.approx(40, rel=0.02)  # steps are rounded
  assert (advice.batch_size, advice.learning_rate) == (32, 0.25)
  # At B = 32 with B_crit = 40: 1 + 40/32 = 2.25 (2.2 or 2.3) and 1 + 32/40 = 1.8
  assert "times the fewest possible steps and 1.8 times" in advice.reason
  row = next(row for row in advice.table if row["batch_size"] == 32)
  mean = np.mean([steps_of(32, seed) for seed in simulate.FINAL_SEEDS])
  assert (row["steps"], row["examples"], row["seconds"]) == pytest.approx((mean, 32 * mean, 32 * mean / 1000))
  assert [r["edge"] for r in advice.table[:3]] == [None, "low", None]


def test_the_test_accuracy_of_the_table_is_at_equal_epochs():
  study = simulate.make_study(batch_sizes=(1, 512))
  measure = lambda budget, size, seed: {"test_accuracy": {"epochs": 0.9, "steps": 0.1}[budget] + 0.01 * (seed - 102)}  # noqa: E731
  table = advice_for(study, simulate.final_trials(study, measure)).table
  assert [row["test_accuracy"] for row in table] == pytest.approx([0.9, 0.9])


def test_without_a_critical_batch_size_the_fastest_is_recommended_and_called_weaker():
  study = simulate.make_study()
  records = simulate.target_trials(study, lambda b, seed: 200 + seed % 3)
  advice = advice_for(study, records + simulate.timing_trials(lambda b: 1000.0 * b ** (0.5 if b > 8 else 1.1)))
  assert advice.critical_batch_size == (None, None, None)
  assert advice.batch_size == 8
  assert "weaker rule" in advice.reason
  assert advice_for(study, records).batch_size is None
  assert "steps were not timed" in advice_for(study, records).reason


def test_a_batch_size_where_a_seed_never_reached_the_target_is_not_recommended():
  study = simulate.make_study()
  records = simulate.target_trials(study, lambda b, seed: None if (b, seed) == (32, 103) else steps_of(b, seed))
  advice = advice_for(study, records)
  assert advice.batch_size == 16
  assert next(row["steps"] for row in advice.table if row["batch_size"] == 32) is None


def test_without_records_the_advice_is_a_refusal_with_its_reason():
  advice = advice_for(simulate.make_study(), [])
  assert (advice.batch_size, advice.learning_rate) == (None, None)
  assert "no batch size reached the target" in advice.reason
  assert len(advice.table) == len(simulate.BATCH_SIZES)


def test_the_noise_scale_at_start_and_end_is_the_ratio_of_means_and_refuses_with_the_seeds():
  records = simulate.noise_trials(num_samples=2)
  rows = [row for r in records for row in r.probes if row["probe"] == "noise" and row["step"] == 0]
  start = advice_for(simulate.make_study(), records).noise_scale_start
  expected = sum(row["grad_cov_trace"] for row in rows) / sum(row["grad_sq_norm"] for row in rows)
  ends = min(row["noise_scale_ci_low"] for row in rows), max(row["noise_scale_ci_high"] for row in rows)
  assert start == pytest.approx((expected, *ends))
  next(row for row in records[0].probes if row["probe"] == "noise" and row["step"] == 1024)["noise_scale"] = None
  advice = advice_for(simulate.make_study(), records)
  assert advice.noise_scale_start == start
  assert advice.noise_scale_end == (None, None, None)


def test_the_training_set_s_own_noise_scale_is_known_where_the_estimate_is_refused():
  records = simulate.noise_trials()
  last = max(row["step"] for r in records for row in r.probes if row["probe"] == "noise")
  for r in records:
    for row in r.probes:
      if row["probe"] == "noise":
        end = row["step"] == last
        row |= {"grad_cov_trace": 6.0, "dataset_grad_sq_norm": 0.002 if end else 5.0}
        row |= {"noise_scale": None, "verdict": "unidentifiable"} if end else {}
  advice = advice_for(simulate.make_study(), records)
  assert advice.noise_scale_end == (None, None, None)
  assert advice.training_set_noise_scale_end == pytest.approx(3000)
  records[0].probes.clear()
  for r in records:
    for row in r.probes:
      row.pop("dataset_grad_sq_norm", None)
  assert advice_for(simulate.make_study(), records).training_set_noise_scale_end is None
