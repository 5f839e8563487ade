"""The judge of the escape test decides simulated worlds, and a small network that is really trained."""

import math

import numpy as np
import pytest

from bsjax.analysis.claims_escape import (
  MAX_RESIDUAL,
  SHARPNESS,
  Curve,
  judge_noise_escapes,
  settled_difference,
)
from tests.analysis import simulate_dynamics
from tests.analysis.checks import check
from tests.analysis.simulate_dynamics import FACTORS, STUDY, escape_trials

CLAIM = "noise_escapes"


def judge(records):
  return judge_noise_escapes(STUDY, records)


def changed(records, change, *, branch, seed=None):
  """Lets `change` edit the eigenvalues of the chosen trials."""
  for record in records:
    if record.trial["branch"] == branch and seed in (None, record.trial["seed"]):
      for row in record.probes:
        if row.get("measure") == "top_eigenvalue":
          change(row)
  return records


def unconverged(row):
  row["error"] = 2 * MAX_RESIDUAL * row["value"]


def factor(finding, branch, name="top_eigenvalue"):
  series = finding.series
  (at,) = np.flatnonzero((series["factor_branch"] == branch) & (series["factor_measure"] == name))
  return {end: series[f"factor{end}"][at] for end in ("", "_low", "_high", "_seeds")}


def test_it_holds_where_small_batches_flatten_and_large_ones_sharpen():
  finding = judge(escape_trials())
  check(finding, CLAIM, "holds")
  for branch, control in (("large_small", "large_large"), ("small_large", "small_small")):
    # A mean over 4 seeds of a difference of two stretches, each with a standard deviation of 0.1.
    expected, sem = math.log(FACTORS[branch] / FACTORS[control]), 0.1 * math.sqrt(2 / 4)
    found = factor(finding, branch)
    assert math.log(found[""]) == pytest.approx(expected, abs=4 * sem)
    assert found["_low"] < found[""] < found["_high"]
    assert found["_seeds"] == finding.claim.n == 4
  assert finding.claim.unit.endswith("from small to large batches")  # log 2.6 is less than -log 0.27
  assert finding.claim.expected == "above 1"
  assert "Small batches lead out of the sharp minimum, and large batches sharpen the flat one." in finding.reading
  assert "B = 32 at rate 0.05" in finding.reading
  assert "distance from the minimiser: 3 against 0.5" in finding.reading


def test_the_settled_half_against_the_control_at_equal_examples_seen():
  finding = judge(escape_trials(spread=0.0))
  # Checkpoints at 1/2, 3/4 and 1 of the stretch, where 1 - exp(-10 part) of the way has been covered.
  settled = 1 - np.mean(np.exp(-10 * np.array([1 / 2, 3 / 4, 1])))
  for branch, control in (("large_small", "large_large"), ("small_large", "small_small")):
    expected = (FACTORS[branch] / FACTORS[control]) ** settled
    for name, power in zip(SHARPNESS, (1, 2, 1 / 2), strict=True):
      assert factor(finding, branch, name)[""] == pytest.approx(expected**power, rel=1e-9)
  assert f"test accuracy: {0.01 * settled:+.4f}" in finding.reading


def test_curves_with_other_checkpoints_are_compared_where_both_are_known():
  line, bent = (
    Curve(np.array([0.0, 10, 100]), np.array([0.0, 10, 100])),
    Curve(np.array([0.0, 60, 90]), np.array([1.0, 61, 91])),
  )
  # One above the other by 1 everywhere; the common stretch ends at 90, and 60 and 90 lie in its second half.
  assert settled_difference(bent, line, end=90) == pytest.approx(1)
  assert settled_difference(line, bent, end=90) == pytest.approx(-1)
  # A line against a parabola that is known at 0, 50 and 100: at 50 and 100 only, for what lies between is interpolated.
  parabola = Curve(np.array([0.0, 50, 100]), np.array([0.0, 2500, 10_000]))
  assert settled_difference(parabola, line, end=100) == pytest.approx((2500 - 50 + 10_000 - 100) / 2)
  assert math.isnan(settled_difference(Curve(np.array([0.0, 10]), np.zeros(2)), line, end=100))
  assert math.isnan(settled_difference(Curve(np.empty(0), np.empty(0)), line, end=100))


@pytest.mark.parametrize(
  ("world", "verdict"),
  [
    ({"factors": FACTORS | {"large_small": 3.0, "small_large": 0.3}}, "fails"),  # reversed
    ({"factors": FACTORS | {"small_large": 0.95}, "spread": 0.02}, "fails"),  # one direction only
    ({"factors": dict.fromkeys(FACTORS, 1.0), "spread": 0.5}, "inconclusive"),  # pure noise
    ({"factors": dict.fromkeys(FACTORS, 1.0), "spread": 0.01}, "fails"),  # as good as no effect, precisely
    ({"spread": 2.0}, "inconclusive"),
    ({"seeds": (1000,)}, "inconclusive"),
  ],
)
def test_verdicts(world, verdict):
  check(judge(escape_trials(**world)), CLAIM, verdict)


def test_both_directions_are_needed_and_the_failing_one_gives_the_number():
  finding = judge(escape_trials(factors=FACTORS | {"large_small": 1.1}, spread=0.01))
  check(finding, CLAIM, "fails")
  assert finding.claim.unit.endswith("from large to small batches")
  assert finding.claim.expected == "below 1"
  assert finding.claim.measured == pytest.approx(1, abs=0.05)
  assert "Small batches do not lead out of the sharp minimum, but large batches sharpen the flat one" in finding.reading


def test_further_training_alone_is_no_escape():
  drift = {"large_small": 0.3, "large_large": 0.3, "small_large": 2.5, "small_small": 2.5}
  check(judge(escape_trials(factors=drift, spread=0.02)), CLAIM, "fails")


def test_unconverged_eigenvalues_are_left_out_and_counted():
  whole = judge(escape_trials())
  records = changed(escape_trials(), unconverged, branch="large_small", seed=1001)
  finding = judge(records)
  check(finding, CLAIM, "holds")
  assert factor(finding, "large_small")["_seeds"] == 3
  assert factor(finding, "small_large") == factor(whole, "small_large")
  assert factor(finding, "large_small", "keskar_1e-3") == factor(whole, "large_small", "keskar_1e-3")
  assert "7 of 112 eigenvalues are left out" in finding.reading
  series = finding.series
  lost = (series["branch"] == "large_small") & (series["seed"] == 1001)
  np.testing.assert_array_equal(series["converged"], ~lost)
  assert np.isfinite(series["top_eigenvalue"]).all()


def test_a_checkpoint_without_an_eigenvalue_does_not_shift_the_comparison():
  def drop(row):
    if row["step"] == 96 * 32:  # 3/4 of the control's stretch of 128 * 32 steps of 32
      row["value"], row["error"] = None, None

  finding = judge(changed(escape_trials(spread=0.0), drop, branch="small_small"))
  check(finding, CLAIM, "holds")
  # The control is interpolated there, between points that have settled to within exp(-5): 0.7 % of log 0.95.
  whole = judge(escape_trials(spread=0.0))
  assert factor(finding, "small_large")[""] == pytest.approx(factor(whole, "small_large")[""], rel=0.007 * 0.06)
  assert "4 of 112 eigenvalues are left out" in finding.reading


def test_a_diverged_trial_is_left_out_with_its_pair_only_and_counted():
  records = [
    r._replace(status={"state": "diverged"}) if (r.trial["branch"], r.trial["seed"]) == ("small_small", 1002) else r
    for r in escape_trials()
  ]
  finding = judge(records)
  check(finding, CLAIM, "holds")
  assert factor(finding, "small_large")["_seeds"] == 3
  assert factor(finding, "large_small")["_seeds"] == 4
  assert finding.reading.endswith("; 1 trial diverged.")


def test_what_was_not_measured_is_not_told():
  records = [
    r._replace(probes=[row for row in r.probes if row.get("measure") == "top_eigenvalue"]) for r in escape_trials()
  ]
  finding = judge(records)
  check(finding, CLAIM, "holds")
  assert set(finding.series["factor_measure"]) == {"top_eigenvalue"}
  assert not any(word in finding.reading for word in ("Keskar", "trace", "accuracy", "distance", "("))
  assert np.isnan(finding.series["distance"]).all()


def test_one_direction_without_a_control_stays_open():
  finding = judge([r for r in escape_trials() if r.trial["branch"] != "small_small"])
  check(finding, CLAIM, "inconclusive")
  assert finding.claim.measured is None
  assert "no seed compares small_large with small_small" in finding.reading
  assert factor(finding, "large_small")["_seeds"] == 4


@pytest.mark.parametrize("keep", [(), ("large_small", "small_large"), ("large", "small")])
def test_without_pairs_the_refusal_says_what_would_decide(keep):
  finding = judge([r for r in escape_trials() if r.trial["branch"] in keep])
  check(finding, CLAIM, "inconclusive")
  assert finding.claim.measured is None
  assert "No seed has a switched branch and its control" in finding.reading
  assert "large_small, small_large, large_large, small_small would decide" in finding.reading


def test_trials_that_only_began_are_no_pairs():
  records = [r._replace(probes=[]) if r.trial["branch"] == "large_large" else r for r in escape_trials()]
  assert "no seed compares large_small with large_large" in judge(records).reading.lower()


def test_small_batches_flatten_a_network_that_large_ones_have_sharpened():
  finding = judge_noise_escapes(simulate_dynamics.FIT_STUDY, simulate_dynamics.fitted_escape_trials())
  assert factor(finding, "large_small")["_high"] < 1
  series = finding.series
  start = {name: series["top_eigenvalue"][(series["branch"] == name) & (series["step"] == 0)] for name in FACTORS}
  np.testing.assert_array_equal(start["large_small"], start["large_large"])
  assert (start["large_large"] > start["small_small"]).all()
