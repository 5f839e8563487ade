"""The judges of large batches decide simulated worlds; diverged, missing and single seeds have defined answers; intervals cover."""

import json
import math
import re

import numpy as np
import pytest

from bsjax.analysis.claims_large_batch import judge_cosine_helps, judge_lars_lamb_help, judge_warmup_needed
from bsjax.analysis.large_batch import NAMES, Outcome, large_batch_table, paired_difference
from tests.analysis import simulate_large_batch as simulate
from tests.analysis.simulate_large_batch import ERRORS, SEEDS, SIZES, world
from tests.analysis.simulate_sweep import binomial_bounds, covered

COMMON = (
  "arm batch_size seed error mean_arm mean_batch_size mean mean_low mean_high mean_seeds mean_diverged"
  " compared_batch_size compared_without compared_with difference difference_low difference_high difference_verdict"
  " baseline_batch_size baseline baseline_low baseline_high in_percent"
)
SERIES = {
  "warmup_needed": COMMON,
  "cosine_helps": COMMON,
  "lars_lamb_help": f"{COMMON} curve_arm curve_batch_size curve_epoch curve_loss"
  " tuned_arm tuned_batch_size tuned_learning_rate tuned_loss tuned_best",
}
JUDGES = {
  "warmup_needed": judge_warmup_needed,
  "cosine_helps": judge_cosine_helps,
  "lars_lamb_help": judge_lars_lamb_help,
}
PAIRS = {
  "warmup_needed": ("momentum_constant", "momentum_warmup"),
  "cosine_helps": ("momentum_warmup", "momentum_warmup_cosine"),
  "lars_lamb_help": ("momentum_warmup_cosine", "lamb_warmup_cosine"),
}
SEM = 0.1 / math.sqrt(len(SEEDS))
"""Of a mean difference: half of each arm's variance of 0.1^2 is common and cancels, what is left of the two adds up."""


def judge(claim_id, verdict, **changes):
  """Judges a world, and checks what every finding must satisfy."""
  finding = JUDGES[claim_id](*world(**changes))
  claim = finding.claim
  assert (claim.id, claim.figure, claim.verdict) == (claim_id, claim_id, verdict)
  assert list(finding.series) == SERIES[claim_id].split()
  assert all(isinstance(array, np.ndarray) for array in finding.series.values())
  json.dumps(claim._asdict(), allow_nan=False)
  assert all(x is None or type(x) is float for x in (claim.measured, claim.ci_low, claim.ci_high))
  assert 1 <= len(re.findall(r"[.](?= [A-Z]|$)", finding.reading)) <= 3, finding.reading
  assert finding.reading[0].isupper()
  assert "nan" not in finding.reading
  assert "  " not in finding.reading
  return finding


@pytest.mark.parametrize("claim_id", JUDGES)
def test_it_holds_where_the_remedy_helps(claim_id):
  finding = judge(claim_id, "holds")
  claim = finding.claim
  without, with_it = PAIRS[claim_id]
  assert claim.measured == pytest.approx(ERRORS[without] - ERRORS[with_it], abs=4 * SEM)
  assert claim.ci_low < claim.measured < claim.ci_high
  # Student's half-width is 2.36 standard errors, themselves known to 1 / sqrt(2 * 7) = 27 %: within 3 times that.
  assert claim.ci_high - claim.measured == pytest.approx(2.36 * SEM, rel=0.8)
  assert claim.n == len(SEEDS)
  assert claim.unit.startswith("percentage points of test error, ")
  assert f"{NAMES[without]} and {NAMES[with_it]} end with a test error of" in finding.reading
  (baseline,) = re.findall(r"tuned baseline at batch size 32: ([\d.]+) \[", finding.reading)
  assert float(baseline) == pytest.approx(simulate.BASELINE_ERROR, abs=4 * SEM)


@pytest.mark.parametrize("claim_id", JUDGES)
@pytest.mark.parametrize(
  ("gain", "spread", "verdict"),
  [
    (-1.0, 0.1, "fails"),  # the remedy hurts
    (0.0, 0.02, "fails"),  # no effect, and known to be: below a tenth of the baseline's 2 %
    (0.05, 0.02, "holds"),  # small, and known to be above 0
    (0.1, 1.5, "inconclusive"),
    (0.3, 1.5, "inconclusive"),
  ],
)
def test_verdicts(claim_id, gain, spread, verdict):
  without, with_it = PAIRS[claim_id]
  judge(claim_id, verdict, errors=ERRORS | {without: 4.0, with_it: 4.0 - gain}, spread=spread)


@pytest.mark.parametrize(("test_size", "verdict"), [(5000, "inconclusive"), (200, "fails")])
def test_less_than_one_example_is_no_difference(test_size, verdict):
  """The interval reaches 0.2 % to 0.5 %: more than a tenth of the baseline's error, less than one of 200 examples."""
  study, records = world(errors=ERRORS | {"momentum_constant": 5.25}, spread=0.4)
  finding = judge_warmup_needed(study | {"test_size": test_size}, records)
  assert finding.claim.ci_low < 0
  assert 0.2 < finding.claim.ci_high < 0.5
  assert finding.claim.verdict == verdict


def test_less_than_a_tenth_of_the_baselines_error_is_no_difference():
  """The interval reaches about 0.05 %: less than a tenth of 2 %, and more than one of 5,000 examples."""
  study, records = world(errors=ERRORS | {"momentum_constant": 5.04}, spread=0.08)
  finding = judge_warmup_needed(study | {"test_size": 5000}, records)
  assert finding.claim.ci_low < 0
  assert 100 / 5000 < finding.claim.ci_high < 0.2
  assert finding.claim.verdict == "fails"


def test_the_largest_batch_size_decides_and_the_reading_tells_the_others():
  reversed_at_largest = ERRORS | {("momentum_constant", 1024): 4.0}
  finding = judge("warmup_needed", "fails", errors=reversed_at_largest)
  assert finding.claim.measured == pytest.approx(-1, abs=4 * SEM)
  assert finding.reading.startswith("At batch size 1,024 momentum and momentum + warm-up end with")
  series = finding.series
  chosen = series["compared_without"] == "momentum_constant"
  verdicts = dict(
    zip(series["compared_batch_size"][chosen].tolist(), series["difference_verdict"][chosen], strict=True)
  )
  assert verdicts == {64: "holds", 256: "holds", 1024: "fails"}
  found = re.search(r"At 256: \+([\d.]+) \[.*?\]; at 64: \+([\d.]+) \[", finding.reading)
  assert [float(x) for x in found.groups()] == pytest.approx([1, 1], abs=4 * SEM)


def test_beside_it_stand_the_same_under_a_cosine_and_the_rule_as_it_stands():
  finding = judge("warmup_needed", "holds")
  series = finding.series
  at = series["compared_batch_size"] == 1024
  pairs = list(zip(series["compared_without"][at], series["compared_with"][at], strict=True))
  assert pairs == [
    ("momentum_constant", "momentum_warmup"),
    ("momentum_cosine", "momentum_warmup_cosine"),
    ("rule_constant", "rule_warmup"),
  ]
  expected = [ERRORS[without] - ERRORS[with_it] for without, with_it in pairs]
  np.testing.assert_allclose(series["difference"][at], expected, atol=4 * SEM)
  told = re.search(
    r"At 1,024 under a cosine ([\d.]+) and ([\d.]+) %, .*; by the linear rule as it stands ([\d.]+) and ([\d.]+) %,",
    finding.reading,
  )
  ends = [ERRORS[arm] for pair in pairs[1:] for arm in pair]
  np.testing.assert_allclose([float(end) for end in told.groups()], ends, atol=4 * SEM)


def test_the_better_of_each_two_is_chosen_by_validation_loss():
  """LARS has the lower validation loss here although LAMB has the lower test error, and AdamW beats momentum."""
  losses = {
    "lars_warmup_cosine": 1.0,
    "lamb_warmup_cosine": 2.0,
    "momentum_warmup_cosine": 9.0,
    "adamw_warmup_cosine": 8.0,
  }
  finding = judge("lars_lamb_help", "fails", losses=losses)
  series = finding.series
  assert set(series["compared_without"]) == {"adamw_warmup_cosine"}
  assert set(series["compared_with"]) == {"lars_warmup_cosine"}
  expected = ERRORS["adamw_warmup_cosine"] - ERRORS["lars_warmup_cosine"]
  assert finding.claim.measured == pytest.approx(expected, abs=4 * SEM)


def test_an_arm_that_diverged_everywhere_is_not_the_better_one():
  finding = judge("lars_lamb_help", "fails", failed=[("lamb_warmup_cosine", size) for size in SIZES])
  assert set(finding.series["compared_with"]) == {"lars_warmup_cosine"}


@pytest.mark.parametrize(
  ("diverged", "verdict", "words"),
  [
    ({("momentum_constant", 1024): 2}, "holds", "2 of 8 seeds diverged with momentum, so it loses"),
    ({("momentum_warmup", 1024): 1}, "fails", "1 of 8 seeds diverged with momentum + warm-up, so it loses"),
    (
      {("momentum_constant", 1024): 8, ("momentum_warmup", 1024): 1},
      "inconclusive",
      "8 of 8 seeds diverged with momentum and 1 of 8 seeds diverged with momentum + warm-up, so neither wins",
    ),
  ],
)
def test_an_arm_with_diverged_seeds_loses(diverged, verdict, words):
  finding = judge("warmup_needed", verdict, diverged=diverged)
  assert f"At batch size 1,024 {words}." in finding.reading
  assert finding.claim.measured is None
  at = (finding.series["mean_arm"] == "momentum_constant") & (finding.series["mean_batch_size"] == 1024)
  assert finding.series["mean_diverged"][at] == diverged.get(("momentum_constant", 1024), 0)
  assert np.isnan(finding.series["mean"][at]).all() == (("momentum_constant", 1024) in diverged)


def test_divergence_elsewhere_is_told_and_decides_nothing():
  finding = judge("warmup_needed", "holds", diverged={("momentum_constant", 64): 3})
  assert "at 64: 3 of 8 seeds diverged with momentum" in finding.reading
  assert finding.claim.n == len(SEEDS)


def test_an_arm_all_of_whose_trials_diverged_loses():
  finding = judge("warmup_needed", "holds", failed=[("momentum_constant", 1024)])
  assert "At batch size 1,024 all trials of the search diverged with momentum, so it loses." in finding.reading


@pytest.mark.parametrize(
  ("claim_id", "left_out"),
  [
    ("warmup_needed", "momentum_warmup"),
    ("cosine_helps", "momentum_warmup_cosine"),
    ("lars_lamb_help", "adamw_warmup_cosine"),
    ("lars_lamb_help", "lars_warmup_cosine"),
  ],
)
def test_an_arm_that_was_not_trained_is_named_with_its_flag(claim_id, left_out):
  finding = judge(claim_id, "inconclusive", arms=[arm for arm in simulate.ARMS if arm != left_out])
  assert f"At batch size 1,024 {left_out} was not trained: add {left_out} to --arms." in finding.reading
  assert finding.reading.count("--arms") == 1
  assert (finding.claim.measured, finding.claim.n) == (None, None)


def test_a_pair_that_stands_beside_may_be_missing():
  finding = judge("warmup_needed", "holds", arms=("momentum_constant", "momentum_warmup"))
  assert "under a cosine momentum_cosine and momentum_warmup_cosine were not trained" in finding.reading


def test_one_seed_decides_nothing():
  finding = judge("warmup_needed", "inconclusive", seeds=SEEDS[:1])
  assert "momentum and momentum + warm-up completed 1 seeds in common, 2 are needed" in finding.reading
  assert finding.claim.ci_low is None


def test_seeds_that_have_not_ended_are_left_out():
  study, records = world()
  running = {"final-momentum_constant-01024-0.5-1000", "final-momentum_warmup-01024-0.5-1001"}
  records = [r._replace(status={"state": "running"}) if r.id in running else r for r in records]
  finding = judge_warmup_needed(study, [r for r in records if r.id != "final-momentum_warmup-01024-0.5-1002"])
  assert (finding.claim.verdict, finding.claim.n) == ("holds", len(SEEDS) - 3)


def test_without_a_baseline_the_rule_is_not_told_and_the_claim_is():
  finding = judge("warmup_needed", "holds", failed=[("momentum_constant", simulate.REFERENCE)])
  assert "tuned baseline" not in finding.reading
  assert "the baseline has no rate to scale" in finding.reading
  assert np.isnan(finding.series["baseline"])


def test_a_workload_without_accuracy_is_judged_by_its_loss():
  finding = judge("cosine_helps", "holds", accuracy=False)
  assert finding.claim.unit.startswith("test loss, ")
  assert finding.claim.measured == pytest.approx(1, abs=4 * SEM)
  assert "end with a test loss of" in finding.reading
  assert "%" not in finding.reading
  assert not finding.series["in_percent"]


def test_the_series_hold_every_seed_and_their_means():
  series = judge("lars_lamb_help", "holds").series
  assert set(series["arm"]) == set(simulate.ARMS)
  at = (series["arm"] == "adamw_warmup_cosine") & (series["batch_size"] == 256)
  assert series["seed"][at].tolist() == list(SEEDS)
  mean = (series["mean_arm"] == "adamw_warmup_cosine") & (series["mean_batch_size"] == 256)
  assert series["mean"][mean] == pytest.approx(series["error"][at].mean(), rel=1e-12)
  assert (series["baseline_low"] < series["baseline"]) & (series["baseline"] < series["baseline_high"])


def test_curves_are_means_over_seeds_against_epochs():
  series = judge("lars_lamb_help", "holds").series
  assert not set(series["curve_arm"]) & set(simulate.RECIPES)
  at = (series["curve_arm"] == "momentum_constant") & (series["curve_batch_size"] == 1024)
  np.testing.assert_allclose(series["curve_epoch"][at], [2, 4])
  np.testing.assert_allclose(series["curve_loss"][at], [0.2048, 0.1024])  # twice the last at half of the budget
  assert (series["curve_batch_size"] == simulate.REFERENCE).sum() == 2


def test_searches_hold_every_trial_and_mark_the_chosen_point():
  series = judge("lars_lamb_help", "holds").series
  at = (series["tuned_arm"] == "lamb_warmup_cosine") & (series["tuned_batch_size"] == 64)
  np.testing.assert_allclose(series["tuned_learning_rate"][at], [0.05, 0.5, 10])
  np.testing.assert_allclose(series["tuned_loss"][at], [0.1 + math.log(10), 0.1, math.inf])
  assert series["tuned_best"][at].tolist() == [False, True, False]


def test_the_table_names_arms_and_test_losses():
  study, records = world(sizes=(64,), seeds=SEEDS[:2])
  rows = large_batch_table(study, records)
  assert len(rows) == len(records)
  (row,) = [row for row in rows if row["id"] == "final-rule_warmup-00064-0.5-1000"]
  assert (row["arm"], row["kind"], row["batch_size"]) == ("rule_warmup", "final", 64)
  assert row["test_loss"] == pytest.approx(1 - row["test_accuracy"])


@pytest.mark.parametrize("common", [0.0, 0.6])
def test_intervals_of_differences_cover(common):
  """The mean of 100 (4 % - 3.5 %) lies in 95 % of the intervals, to binomial bounds; Welch's would be too wide where seeds agree."""
  rng, truth, num_worlds = np.random.default_rng(5), 0.5, 2000
  seeds = tuple(range(8))
  hits = 0
  for _ in range(num_worlds):
    pair = (Outcome(seeds, errors, 0, 8) for errors in simulate.draw_pair(rng, num_seeds=8, common=common))
    hits += covered(paired_difference(*pair), truth)
  low, high = binomial_bounds(num_worlds)
  assert low <= hits <= high


def test_pairs_are_matched_by_seed():
  first = Outcome((1, 2, 3), np.array([1.0, 2.0, 3.0]), 0, 4)
  second = Outcome((2, 3, 4), np.array([1.5, 2.5, 99.0]), 0, 4)
  difference = paired_difference(first, second)
  assert tuple(difference) == (0.5, 0.5, 0.5)
