"""The judges of gradient noise decide simulated worlds in which each claim is true or false by construction."""

import math

import numpy as np
import pytest
from scipy import stats

from bsjax.analysis import (
  judge_estimators_agree,
  judge_layernorm_predicts_total,
  judge_noise_grows,
  judge_temperature,
  measurements_table,
)
from bsjax.analysis.claims_gradient_noise import (
  END_FRACTION,
  choose_quantity,
  smoothed_noise_scale,
  student_interval,
  total_rows,
  widened,
)
from bsjax.analysis.fits import Interval
from tests.analysis import simulate_noise
from tests.analysis.checks import check
from tests.analysis.simulate_noise import judge

JUDGES = (judge_noise_grows, judge_estimators_agree, judge_temperature, judge_layernorm_predicts_total)


# --- one quantity for all rows ---


def test_one_refusal_moves_every_row_to_the_training_set():
  rows = [{"verdict": "identified"}] * 4
  assert choose_quantity(rows).column == "grad_sq_norm"
  lost = choose_quantity([*rows, {"verdict": "unidentifiable"}])
  assert lost.column == "dataset_grad_sq_norm"
  assert "1 of 5 measurements" in lost.words


def test_a_noise_scale_over_time_is_a_ratio_of_means():
  rows = [{"grad_cov_trace": 2.0, "grad_sq_norm": 1.0}, {"grad_cov_trace": 4.0, "grad_sq_norm": 0.5}]
  assert smoothed_noise_scale(rows, "grad_sq_norm") == 6.0 / 1.5  # the mean of the ratios 2 and 8 is 5
  assert math.isnan(smoothed_noise_scale([{"grad_cov_trace": 2.0, "grad_sq_norm": -1.0}], "grad_sq_norm"))
  assert math.isnan(smoothed_noise_scale([{"grad_cov_trace": None, "grad_sq_norm": 1.0}], "grad_sq_norm"))


def test_students_interval_is_scipys():
  values = [1.0, 2.0, 4.0, 4.5]
  theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
  np.testing.assert_allclose(student_interval(values), (np.mean(values), theirs.low, theirs.high), rtol=1e-12)
  assert student_interval([3.0])[0] == 3.0
  assert np.isnan(student_interval([3.0])[1:]).all()
  assert np.isnan(student_interval([3.0, math.nan])).all()


def test_errors_add_in_quadrature_on_either_side():
  assert widened(Interval(1.0, -2.0, 5.0), 4.0) == Interval(1.0, -4.0, 1 + math.sqrt(32))


# --- noise_grows ---


def test_growth_is_that_of_the_smoothed_end():
  finding = judge(judge_noise_grows, simulate_noise.along_trials(seed_spread=0.0, sem=0.0))
  late = [step for step in simulate_noise.STEPS if step >= END_FRACTION * 64]
  growth = np.array([30 ** (math.log(1 + step) / math.log(65)) for step in late])
  trace = 5 / np.sqrt(growth)
  expected = trace.mean() / (trace / (10 * growth)).mean() / 10
  np.testing.assert_allclose(finding.series["factor"], expected, rtol=1e-12)
  assert len(late) == 5
  assert finding.claim.verdict == "holds"


def test_growth_is_found_and_its_interval_comes_from_the_seeds():
  finding = judge(judge_noise_grows, simulate_noise.along_trials(sem=1e-6))
  check(finding, "noise_grows", "holds")
  assert "as estimated for unseen data" in finding.reading
  assert finding.claim.n == 9
  logs = []
  for record in simulate_noise.along_trials(sem=1e-6)[:3]:
    rows = total_rows(record)
    late = smoothed_noise_scale([row for row in rows if row["step"] >= 48], "grad_sq_norm")
    logs.append(math.log(late / rows[0]["noise_scale"]))
  theirs = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
  series = finding.series
  # The rows' own errors, 1e-6 relative at the start and 3e-5 at the end, add less than 1e-6 in quadrature to 0.25.
  np.testing.assert_allclose(
    [series["factor_low"][0], series["factor_high"][0]], np.exp([theirs.low, theirs.high]), rtol=1e-4
  )


@pytest.mark.parametrize(("spread", "verdict"), [(0.02, "fails"), (1.0, "inconclusive")])
def test_a_constant_noise_scale_does_not_grow(spread, verdict):
  records = simulate_noise.along_trials(grows=lambda size, rate: 1.0, seed_spread=spread, sem=1e-6)
  check(judge(judge_noise_grows, records), "noise_grows", verdict)


def test_one_setting_without_growth_decides():
  records = simulate_noise.along_trials(grows=lambda size, rate: 1.0 if rate == 0.08 else 30.0, seed_spread=0.02)
  finding = judge(judge_noise_grows, records)
  check(finding, "noise_grows", "fails")
  assert "at batch size 4 and rate 0.08" in finding.reading
  assert "2 of 3 settings" in finding.reading
  assert finding.claim.measured == pytest.approx(1, abs=0.1)


def test_the_sampling_error_of_both_ends_is_not_averaged_over_seeds():
  records = simulate_noise.along_trials(seed_spread=0.0, sem=0.0)
  for record in records:
    for row in total_rows(record):
      row["noise_scale_ci_low"], row["noise_scale_ci_high"] = row["noise_scale"] / 2, row["noise_scale"] * 2
  claim = judge(judge_noise_grows, records).claim
  assert math.log(claim.ci_high / claim.measured) == pytest.approx(math.sqrt(2) * math.log(2))


def test_an_interval_from_zero_on_leaves_growth_open():
  records = simulate_noise.along_trials(seed_spread=0.0, sem=0.0)
  for record in records:
    total_rows(record)[0]["noise_scale_ci_low"] = 0.0
  check(judge(judge_noise_grows, records), "noise_grows", "inconclusive")


def test_unidentifiable_checkpoints_move_the_claim_to_the_training_set():
  records = simulate_noise.along_trials(sem=0.05)
  finding = judge(judge_noise_grows, records)
  check(finding, "noise_grows", "holds")
  assert "of the training set itself (exact;" in finding.reading
  lost = ~finding.series["identified"].astype(bool)
  assert lost.any()
  assert np.isnan(finding.series["noise_scale"][lost]).all()
  assert (finding.series["dataset_noise_scale"][lost] > 0).all()


def test_the_figures_series_hold_every_row():
  records = simulate_noise.along_trials(sem=1e-6)
  series = judge(judge_noise_grows, records).series
  steps, trials = len(simulate_noise.STEPS), len(records)
  assert len(series["noise_scale"]) == steps * trials
  assert len(series["layer"]) == steps * trials * len(simulate_noise.LAYERS)
  assert sorted(set(series["layer"])) == sorted(simulate_noise.LAYERS)
  assert sorted(set(series["form"])) == ["adam", "hessian"]
  # The last step of the first setting's batch size is refused: 6 trials, 2 forms.
  assert np.isnan(series["form_value"]).sum() == 12
  np.testing.assert_array_equal(series["examples_seen"], series["step"] * series["batch_size"])


# --- layernorm_predicts_total ---


def test_layernorm_predicts_the_total():
  records = simulate_noise.along_trials(sem=1e-4)
  finding = judge(judge_layernorm_predicts_total, records)
  check(finding, "layernorm_predicts_total", "holds")
  assert finding.claim.measured == pytest.approx(1, abs=0.02)
  # Theirs is twice the total: log(total) = log(norms) - log 2.
  assert float(finding.series["log_factor"]) == pytest.approx(-math.log(2), abs=0.1)


@pytest.mark.parametrize(
  ("world", "verdict"),
  [({"norm_power": 2.0}, "fails"), ({"norm_power": 1.15}, "holds"), ({"sem": 0.0075}, "inconclusive")],
)
def test_layernorm_verdicts(world, verdict):
  records = simulate_noise.along_trials(**({"sem": 1e-4} | world))
  check(judge(judge_layernorm_predicts_total, records), "layernorm_predicts_total", verdict)


def test_a_model_without_norms_says_so():
  records = simulate_noise.along_trials()
  for record in records:
    record.probes[:] = [row for row in record.probes if "Norm" not in row.get("group", "")]
  finding = judge(judge_layernorm_predicts_total, records)
  check(finding, "layernorm_predicts_total", "inconclusive")
  assert "no layers named LayerNorm" in finding.reading


def test_two_trials_are_too_few():
  records = simulate_noise.along_trials(seeds=(0, 1), settings=simulate_noise.SETTINGS[:1])
  finding = judge(judge_layernorm_predicts_total, records)
  check(finding, "layernorm_predicts_total", "inconclusive")
  assert "2 complete trials" in finding.reading


def test_a_right_slope_with_much_scatter_does_not_predict():
  records = simulate_noise.along_trials(sem=1e-6)
  rng = np.random.default_rng(0)
  for record in records:
    for row in total_rows(record):
      row["grad_cov_trace"] *= math.exp(rng.normal())
  finding = judge(judge_layernorm_predicts_total, records)
  # Over 108 points the logarithm varies by 1.2: slope 1 +- 1 / (1.2 sqrt(108)), correlation 1.2 / sqrt(1.2^2 + 1) = 0.77.
  check(finding, "layernorm_predicts_total", "fails")
  assert finding.claim.measured == pytest.approx(1, abs=4 / (1.2 * math.sqrt(108)))
  assert float(finding.series["correlation"]) == pytest.approx(0.77, abs=0.1)


def test_the_slopes_interval_is_that_of_independent_trials():
  records = simulate_noise.along_trials(sem=1e-6, seeds=range(10))
  rng = np.random.default_rng(1)
  for record in records:  # one error for all checkpoints of a trial, in proportion to the logarithm
    power = 0.1 * rng.normal()
    for row in total_rows(record):
      row["grad_cov_trace"] *= (row["grad_cov_trace"] / row["dataset_grad_sq_norm"]) ** power
  finding = judge(judge_layernorm_predicts_total, records)
  # Slopes of 30 trials that scatter by 0.1: their mean is known to 0.1 / sqrt(30), itself known to 1 / sqrt(60) = 13 %; the trials weigh
  # nearly alike, and 1,000 resamples add 5 %: within 40 %.
  width = (finding.claim.ci_high - finding.claim.ci_low) / (2 * 1.96)
  assert width == pytest.approx(0.1 / math.sqrt(30), rel=0.4)


def test_more_checkpoints_of_the_same_trials_tell_nothing_new():
  def width(repeats):
    records = simulate_noise.along_trials(sem=0.01)
    for record in records:
      record.probes[:] = [
        row | {"step": row["step"] * repeats + k}
        for k in range(repeats)
        for row in record.probes
        if row["probe"] == "noise"
      ]
    claim = judge(judge_layernorm_predicts_total, records).claim
    return claim.ci_high - claim.ci_low

  # Resampling checkpoints would halve it.
  assert width(4) == pytest.approx(width(1), rel=1e-9)


def test_parts_of_the_norms_are_added_before_they_are_divided():
  records = simulate_noise.along_trials(sem=1e-6, seeds=(0, 1, 2, 3))
  series = judge(judge_layernorm_predicts_total, records).series
  for record in records:
    for row in [row for row in record.probes if "LayerNorm" in row.get("group", "")]:
      parts = {"grad_cov_trace": 0.2, "grad_sq_norm": 0.6, "dataset_grad_sq_norm": 0.6}
      record.probes.append(row | {"group": "LayerNorm_9"} | {name: part * row[name] for name, part in parts.items()})
      row |= {name: (1 - part) * row[name] for name, part in parts.items()}
  split = judge(judge_layernorm_predicts_total, records).series
  np.testing.assert_allclose(split["layernorm"], series["layernorm"], rtol=1e-9)


# --- all of them ---


@pytest.mark.parametrize("function", JUDGES)
def test_nothing_measured_is_inconclusive_and_says_so(function):
  finding = judge(function, [])
  check(finding, finding.claim.id, "inconclusive")
  assert finding.claim.measured is None


@pytest.mark.parametrize("function", JUDGES)
@pytest.mark.parametrize("state", ["diverged", "running", "failed"])
def test_trials_that_did_not_end_are_not_used(function, state):
  records = simulate_noise.along_trials() + simulate_noise.temperature_trials()
  wrong = simulate_noise.along_trials(grows=lambda size, rate: 0.01, ghost_error=1, norm_power=5)
  wrong += simulate_noise.temperature_trials(power=-1)
  wrong = [r._replace(id="x" + r.id, status={"state": state}) for r in wrong]
  assert judge(function, records + wrong).claim == judge(function, records).claim


def test_the_table_has_every_measurement_with_its_trial():
  records = simulate_noise.along_trials() + simulate_noise.temperature_trials()
  # Real ids are hashes: their order says nothing.
  records = [r._replace(id=f"{index * 7919 % 1000:03d}") for index, r in enumerate(records)]
  table = measurements_table(records)
  assert len(table) == sum(len(r.probes) for r in records)
  assert [row["kind"] for row in table] == sorted(row["kind"] for row in table)
  first = table[0]
  assert (first["batch_size"], first["learning_rate"], first["seed"], first["branch"]) == (4, 0.02, 0, None)
  assert {row["branch"] for row in table if row["kind"] == "temperature"} == set(simulate_noise.BRANCHES)
