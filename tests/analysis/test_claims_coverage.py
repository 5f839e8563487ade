"""The judge of the intervals on records with known counts."""

import json
import math

import pytest
from scipy import stats

from bsjax.analysis.claims_coverage import JUDGED, binomial_interval, coverage_rows, judge_coverage
from bsjax.records import Record

PROBLEM = JUDGED[0]


def record(
  problem=PROBLEM, regime="clear", *, given=1000, covered=950, num_draws=1000, noise_scale=100.0, state="complete"
):
  description = {"problem": problem, "noise_scale": noise_scale, "regime": regime, "num_examples": 50}
  measured = {
    "probe": "coverage",
    "step": 0,
    "effective_dimension": 10.0,
    "given": given,
    "covered": covered,
    "too_high": given - covered,
    "too_low": 0,
    "median_ci_ratio": 1.5 if given else None,
    "signal_given": num_draws,
    "signal_covered": num_draws // 2,
  }
  trial = {"kind": "coverage", "num_draws": num_draws} | description
  return Record(f"{problem}-{regime}-{noise_scale}", trial, {"state": state}, [], [measured])


def refused(**options):
  return record(regime="hopeless", **({"given": 0, "covered": 0} | options))


NO_GRADIENT = record(regime="zero gradient", given=0, covered=0, noise_scale=None)


def verdict(*records):
  finding = judge_coverage({}, records)
  json.dumps(finding.claim._asdict(), allow_nan=False)
  return finding.claim.verdict


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (950, 1000), (3, 40)])
def test_binomial_interval_is_the_exact_one(successes, trials):
  for level in (0.95, 0.999):
    got = binomial_interval(successes, trials, level=level)
    low, high = stats.binomtest(successes, trials).proportion_ci(level, method="exact")
    assert got == pytest.approx((successes / trials, low, high), rel=1e-9)
  assert all(map(math.isnan, binomial_interval(0, 0)))


def test_holds_where_coverage_is_right_and_nothing_else_is_given():
  records = [
    record(noise_scale=scale, covered=covered) for scale, covered in ((10.0, 955), (100.0, 946), (1000.0, 960))
  ]
  finding = judge_coverage({}, [*records, refused(), NO_GRADIENT])
  assert finding.claim.verdict == "holds"
  assert finding.claim.measured == pytest.approx(2861 / 3000)
  assert finding.claim.n == 3000
  assert "95.4 [94.6, 96.1] %" in finding.reading
  assert "94.6 to 96.0 %" in finding.reading
  assert "0 of 2,000 draws" in finding.reading
  assert set(finding.series) == {
    "problem", "noise_scale", "regime", "num_examples", "share_given", "coverage", "coverage_low", "coverage_high",
  }  # fmt: skip
  assert len(finding.series["coverage"]) == 5
  assert math.isnan(finding.series["noise_scale"][-1])
  assert math.isnan(finding.series["coverage"][-1])


@pytest.mark.parametrize("covered", [900, 990])
def test_fails_where_coverage_is_wrong_either_way(covered):
  assert verdict(record(covered=covered), refused()) == "fails"


def test_reports_the_problem_farthest_from_nominal():
  finding = judge_coverage({}, [record(covered=951), record(JUDGED[1], covered=962), refused()])
  assert finding.claim.measured == pytest.approx(0.962)
  assert JUDGED[1] in finding.reading


def test_fails_where_a_number_is_given_for_nothing():
  good = [record(noise_scale=scale) for scale in (10.0, 100.0, 1000.0, 1e4)]
  assert verdict(*good, refused()) == "holds"
  assert verdict(*good, refused(given=1)) == "fails"


def test_one_cell_far_outside_fails_though_the_rest_make_up_for_it():
  good = [record(noise_scale=scale, given=10_000, num_draws=10_000, covered=9_510) for scale in (10.0, 100.0, 1000.0)]
  # The interval of 912 of 1000 ends at 0.929, below the range, but at 0.934 at the level of one among four cells.
  for covered, expected in ((912, "holds"), (900, "fails")):
    finding = judge_coverage({}, [*good, record(noise_scale=1e4, covered=covered), refused()])
    assert finding.claim.verdict == expected
    assert ("beyond chance" in finding.reading) == (expected == "fails")


def test_few_draws_decide_nothing():
  assert verdict(record(given=20, covered=19, num_draws=20), refused()) == "inconclusive"


@pytest.mark.parametrize("records", [[], [refused()], [record()], [record(state="running"), refused()]])
def test_both_kinds_of_cells_are_needed(records):
  finding = judge_coverage({}, records)
  assert finding.claim.verdict == "inconclusive"
  assert finding.claim.measured is None
  assert "needs both kinds" in finding.reading


def test_borderline_cells_and_limits_are_reported_and_not_judged():
  good = [record(noise_scale=scale) for scale in (10.0, 100.0, 1000.0, 1e4)]
  others = [record(regime="borderline", given=300, covered=200), record("steep", covered=500)]
  finding = judge_coverage({}, [*good, *others, refused()])
  assert finding.claim.verdict == "holds"
  assert len(finding.series["problem"]) == 7


def test_rows_hold_shares():
  rows = coverage_rows([record(given=800, covered=760), NO_GRADIENT, record(state="failed")])
  assert [row["regime"] for row in rows] == ["clear", "zero gradient"]
  assert rows[0]["share_given"] == 0.8
  assert rows[0]["coverage"] == 0.95
  assert rows[0]["coverage_ci_low"] < 0.95 < rows[0]["coverage_ci_high"]
  assert rows[0]["signal_coverage"] == 0.5
  assert rows[1]["coverage"] is rows[1]["coverage_ci_low"] is rows[1]["noise_scale"] is None
