"""Each judge on a world where its claim is true, one where it is false, and ones that cannot tell."""

import math

import numpy as np
import pytest

from bsjax.analysis import (
  judge_all,
  judge_direction_stable,
  judge_flat_minima,
  judge_generalizes,
  judge_more_steps,
  judge_oscillation,
  judge_throughput,
  judge_variance_inverse_b,
)
from bsjax.analysis.claims_noise import predicted_cosine
from tests.analysis import simulate
from tests.analysis.checks import SERIES, check


def test_without_records_every_claim_is_inconclusive_and_says_why():
  for study in (simulate.make_study(), {"target": simulate.TARGET}):
    findings = judge_all(study, [])
    assert [f.claim.id for f in findings] == list(SERIES)
    for finding in findings:
      check(finding, finding.claim.id, "inconclusive")
      assert finding.claim.measured is None
      assert finding.claim.n is None


def test_diverged_trials_alone_are_no_records():
  study = simulate.make_study()
  records = simulate.final_trials(
    study, lambda *_: {"state": "diverged", "reaches": 5, "test_accuracy": 0.9, "sharpness": 2.0}
  )
  for finding in judge_all(study, records):
    check(finding, finding.claim.id, "inconclusive")
    assert finding.claim.measured is None


# --- variance and direction: minibatches of real vectors ---


@pytest.mark.parametrize(
  ("draw", "verdict", "slope"),
  [
    ("distinct", "holds", -1),
    ("pairs", "fails", None),  # twice the variance at every B > 1: the level betrays it
    ("roots", "fails", -0.5),
  ],
)
def test_variance_inverse_b(draw, verdict, slope):
  finding = judge_variance_inverse_b(simulate.make_study(), simulate.noise_trials(draw=draw))
  check(finding, "variance_inverse_b", verdict)
  points = len(simulate.TUNING_SEEDS) * 3 * len(simulate.BATCH_SIZES)
  assert len(finding.series["batch_size"]) == points
  assert (
    finding.claim.n == points - 9 or draw != "distinct"
  )  # B = N has no variance: one point for each seed and checkpoint
  if slope == -1:
    assert finding.claim.ci_low <= -1 <= finding.claim.ci_high
  elif slope:
    assert finding.claim.measured == pytest.approx(slope, abs=0.1)  # isqrt rounds down at odd powers of two


def test_the_level_alone_fails_the_variance():
  records = simulate.noise_trials()
  for record in records:
    for row in record.probes:
      if row["probe"] == "minibatch":
        row["variance"] *= 1.3
        row["variance_sem"] *= 1.3
  finding = judge_variance_inverse_b(simulate.make_study(), records)
  check(finding, "variance_inverse_b", "fails")
  assert finding.claim.measured == pytest.approx(-1, abs=0.02)


def test_the_slope_alone_fails_the_variance():
  records = simulate.noise_trials()
  for record in records:
    for row in record.probes:
      if row["probe"] == "minibatch":
        row["variance"] *= (row["batch_size"] / 16) ** 0.1  # 1 on average over 1 to 256, to 2 %
  finding = judge_variance_inverse_b(simulate.make_study(), records)
  check(finding, "variance_inverse_b", "fails")
  assert finding.claim.measured == pytest.approx(-0.9, abs=0.02)


def test_few_samples_leave_the_variance_open():
  finding = judge_variance_inverse_b(
    simulate.make_study(), simulate.noise_trials(num_samples=3, seeds=(0,), checkpoints=(0,))
  )
  check(finding, "variance_inverse_b", "inconclusive")
  assert finding.claim.measured is not None


@pytest.mark.parametrize(("direction", "verdict"), [("true", "holds"), ("random", "fails")])
def test_direction_stable(direction, verdict):
  finding = judge_direction_stable(simulate.make_study(), simulate.noise_trials(direction=direction))
  check(finding, "direction_stable", verdict)
  if direction == "true":
    at_full = finding.series["batch_size"] == simulate.TRAIN_SIZE
    np.testing.assert_allclose(finding.series["predicted"][at_full], 1)
    np.testing.assert_allclose(finding.series["cosine"][at_full], 1)


def test_the_predicted_cosine_is_of_the_whole_training_set():
  # N = 4, tr = 8 and |G|^2 = 1 on the training set, so 1 - 8/4 = -1 after bias correction: there is a prediction all the same.
  noise = {"num_examples": 4, "grad_cov_trace": 8.0, "grad_sq_norm": -1.0}
  assert predicted_cosine(noise, 1) == pytest.approx(1 / math.sqrt(1 + 8 * (1 - 1 / 4)))
  assert predicted_cosine(noise, 4) == 1


def test_the_predicted_cosine_is_that_of_normal_gradients_in_many_directions():
  # In 2000 dimensions norms hardly vary, so the prediction is exact up to a part of 1/sqrt(2000) = 2 % and the sampling error.
  finding = judge_direction_stable(
    simulate.make_study(), simulate.noise_trials(dimension=2000, num_samples=60, seeds=(0,), checkpoints=(0,))
  )
  np.testing.assert_allclose(finding.series["cosine"], finding.series["predicted"], atol=0.02)
  assert finding.series["predicted"][0] < 0.4  # the comparison is not one of ones


def test_a_rise_that_the_noise_scale_does_not_predict_leaves_direction_open():
  records = simulate.noise_trials()
  for record in records:
    for row in record.probes:
      if row["probe"] == "minibatch" and row["batch_size"] < simulate.TRAIN_SIZE:
        row["cosine"] -= 0.15
  check(judge_direction_stable(simulate.make_study(), records), "direction_stable", "inconclusive")


def test_an_unidentifiable_noise_scale_is_told_and_does_not_stop_the_judge():
  records = simulate.noise_trials()
  for record in records:
    for row in record.probes:
      if row["probe"] == "noise" and row["step"] == 1024:
        row.update(noise_scale=None, noise_scale_ci_low=None, noise_scale_ci_high=None)
  finding = judge_direction_stable(simulate.make_study(), records)
  check(finding, "direction_stable", "holds")
  assert "step 1024" in finding.reading


# --- oscillation ---


@pytest.mark.parametrize(
  ("spread", "verdict", "slope"),
  [(lambda b: 0.3 / math.sqrt(b), "holds", -0.5), (lambda b: 0.1, "fails", 0), (lambda b: 0.02 * b**0.5, "fails", 0.5)],
)
def test_oscillation(spread, verdict, slope):
  study = simulate.make_study(batch_sizes=simulate.BATCH_SIZES[:8])
  finding = judge_oscillation(study, simulate.loss_trials(study, spread))
  check(finding, "oscillation", verdict)
  assert finding.claim.measured == pytest.approx(slope, abs=0.05)
  # About 28 rows x 5 seeds: a standard deviation known to 1/sqrt(2 x 140) = 6 %; four standard errors are 24 %.
  np.testing.assert_allclose(finding.series["spread"], [spread(b) for b in finding.series["batch_size"]], rtol=0.24)
  assert np.unique(finding.series["curve_batch_size"]).tolist() == [1, 16, 128]


def test_a_falling_loss_without_noise_has_no_spread():
  study = simulate.make_study(batch_sizes=(4,))
  finding = judge_oscillation(study, simulate.loss_trials(study, lambda b: 0.0, seeds=(100,)))
  # exp(-10 t) with 2.0 / 0.2 over the trend at t = 1/2: the moving mean misses (10/16)^2 / 6 = 7 % of a part of 6 %
  assert finding.series["spread"][0] < 0.005


def test_oscillation_is_open_when_batch_sizes_scatter():
  study = simulate.make_study(batch_sizes=(1, 4, 16))
  spread = {1: 0.1, 4: 0.02, 16: 0.08}
  check(judge_oscillation(study, simulate.loss_trials(study, spread.__getitem__)), "oscillation", "inconclusive")


# --- steps to target ---


def noisy(steps, seed, spread=0.05):
  return max(2, round(steps * math.exp(spread * np.random.default_rng((round(steps), seed)).normal())))


def test_more_steps_finds_the_critical_batch_size():
  study = simulate.make_study()
  finding = judge_more_steps(study, simulate.target_trials(study, lambda b, seed: noisy(80 * (1 + 32 / b), seed)))
  check(finding, "more_steps", "holds")
  series = finding.series
  assert series["critical_low"] < 32 < series["critical_high"]
  assert series["critical_batch_size"] == pytest.approx(
    32, rel=0.15
  )  # 5 % over sqrt(5) seeds, a few times that in B_crit
  assert series["s_min"] == pytest.approx(80, rel=0.1)
  assert (series["fit_low"] <= series["fit_steps"]).all()
  assert (series["fit_steps"] <= series["fit_high"]).all()
  np.testing.assert_allclose(series["perfect_steps"] * series["fit_batch_size"], series["perfect_steps"][0])


def test_more_steps_fails_where_steps_do_not_fall():
  study = simulate.make_study()
  finding = judge_more_steps(study, simulate.target_trials(study, lambda b, seed: noisy(200, seed + b)))
  check(finding, "more_steps", "fails")
  assert "cannot be determined" in finding.reading
  assert np.isnan(finding.series["critical_batch_size"])


def test_more_steps_is_open_when_seeds_differ_too_much():
  study = simulate.make_study(batch_sizes=(1, 2, 4))
  finding = judge_more_steps(
    study, simulate.target_trials(study, lambda b, seed: noisy(100 * b**-0.05, seed + 7 * b, 1.0))
  )
  check(finding, "more_steps", "inconclusive")
  assert finding.claim.measured is not None


def test_seeds_that_never_reach_the_target_and_diverged_ones_exclude_their_batch_size():
  study = simulate.make_study(edges={4: "high"})
  records = simulate.target_trials(
    study, lambda b, seed: None if (b, seed) == (1, 102) else noisy(80 * (1 + 32 / b), seed)
  )
  diverged = next(i for i, r in enumerate(records) if r.trial["config"]["batch_size"] == 512)
  records[diverged].status["state"] = "diverged"
  finding = judge_more_steps(study, records)
  check(finding, "more_steps", "holds")
  assert "batch size 1, 512 is left out" in finding.reading
  assert "edge of its grid at batch size 4" in finding.reading
  series = finding.series
  assert len(series["steps"]) == 50
  assert np.isnan(series["steps"][np.isin(series["batch_size"], (1, 512))]).sum() == 2
  assert (series["fit_batch_size"][0], series["fit_batch_size"][-1]) == pytest.approx((2, 256))
  assert finding.claim.n == 40


# --- generalisation and sharpness: one world for each budget ---


def in_budgets(field, epochs, steps, **more):
  worlds = {"epochs": epochs, "steps": steps}

  def measure(budget, size, seed):
    rng = np.random.default_rng((size, seed, budget == "steps"))
    return {field: worlds[budget](math.log2(size), rng.normal()), **more}

  return measure


GENERAL = {
  "better": lambda k, noise: 0.97 - 0.005 * k + 0.002 * noise,
  "same": lambda k, noise: 0.97 + 0.0005 * noise,
  "worse": lambda k, noise: 0.90 + 0.005 * k + 0.002 * noise,
  "noisy": lambda k, noise: 0.9 + 0.05 * noise,
}
SHARP = {
  "better": lambda k, noise: 2 ** (0.5 * k) * math.exp(0.1 * noise),
  "same": lambda k, noise: 3 * math.exp(0.05 * noise),
  "worse": lambda k, noise: 2 ** (-0.5 * k) * math.exp(0.1 * noise),
  "noisy": lambda k, noise: 3 * math.exp(3 * noise),
}
BUDGET_CASES = [
  ("better", "better", "holds"),
  ("same", "worse", "fails"),
  ("worse", "same", "fails"),
  ("better", "worse", "fails"),
  ("worse", "better", "fails"),
  ("better", "noisy", "inconclusive"),
  ("noisy", "worse", "fails"),
  ("noisy", "noisy", "inconclusive"),
]


DECISIVE = dict.fromkeys([("better", "worse"), ("better", "noisy"), ("noisy", "worse")], "steps")
"""Where the number that decides is not that of equal epochs."""


@pytest.mark.parametrize(("epochs", "steps", "verdict"), BUDGET_CASES)
def test_generalizes(epochs, steps, verdict):
  study = simulate.make_study()
  records = simulate.final_trials(study, in_budgets("test_accuracy", GENERAL[epochs], GENERAL[steps]))
  finding = judge_generalizes(study, records)
  check(finding, "generalizes", verdict)
  assert finding.claim.unit.endswith(f"at equal {DECISIVE.get((epochs, steps), 'epochs')}")
  if epochs == steps == "better":
    # Means of log2 B are 1 and 8: 7 x 0.005; the error is 0.002 sqrt(2 / 15).
    assert finding.claim.measured == pytest.approx(0.035, abs=4 * 0.002 * math.sqrt(2 / 15))
  assert sorted(set(finding.series["budget"])) == ["epochs", "steps"]


@pytest.mark.parametrize(("epochs", "steps", "verdict"), BUDGET_CASES)
def test_flat_minima(epochs, steps, verdict):
  study = simulate.make_study()
  finding = judge_flat_minima(study, simulate.final_trials(study, in_budgets("sharpness", SHARP[epochs], SHARP[steps])))
  check(finding, "flat_minima", verdict)
  if epochs == steps == "better":
    # Errors 0.1 / sqrt(5) at each of 10 doublings: slope error 0.0447 / (log 2 sqrt(82.5)) = 0.0071
    assert finding.claim.measured == pytest.approx(0.5, abs=4 * 0.0071)


def test_an_eigenvalue_that_did_not_converge_is_left_out():
  study = simulate.make_study()
  measure = in_budgets("sharpness", SHARP["better"], SHARP["better"])

  def spoiled(budget, size, seed):
    if seed == 100:
      return {"sharpness": 1000.0 / size**2, "residual": 0.051 * 1000.0 / size**2}
    value = measure(budget, size, seed)["sharpness"]
    return {"sharpness": value, "residual": 0.049 * value}

  finding = judge_flat_minima(study, simulate.final_trials(study, spoiled))
  check(finding, "flat_minima", "holds")
  assert finding.claim.n == 40
  assert "20 of 100 eigenvalues are left out" in finding.reading
  assert len(finding.series["sharpness"]) == 100


def test_diverged_trials_enter_no_mean():
  study = simulate.make_study()
  good = simulate.final_trials(study, in_budgets("test_accuracy", GENERAL["better"], GENERAL["better"], sharpness=2.0))
  bad = [
    simulate.train_record(
      r.trial["config"]["batch_size"],
      r.trial["config"]["num_steps"],
      104,
      test_accuracy=0.1,
      sharpness=1e9,
      state="diverged",
    )
    for r in good
    if r.trial["seed"] == 104
  ]
  survivors = [r for r in good if r.trial["seed"] != 104]
  for judge in (judge_generalizes, judge_flat_minima):
    assert judge(study, survivors + bad).claim == judge(study, survivors).claim
    assert judge(study, survivors).claim.n == 40


@pytest.mark.parametrize("state", ["diverged", "running", "failed"])
def test_noise_and_timings_of_trials_that_did_not_end_are_not_used(state):
  study = simulate.make_study()
  records = simulate.noise_trials() + simulate.timing_trials(lambda b: 100.0 * b)
  wrong = simulate.noise_trials(draw="pairs") + simulate.timing_trials(lambda b: 1.0)
  wrong = [r._replace(id="x" + r.id, status={"state": state}) for r in wrong]
  for judge in (judge_variance_inverse_b, judge_direction_stable, judge_throughput):
    assert judge(study, records + wrong).claim == judge(study, records).claim
