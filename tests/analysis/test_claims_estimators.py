"""The judge of the estimators decides simulated worlds in which the cheap ones agree with the exact one or do not."""

import numpy as np
import pytest

from bsjax.analysis import judge_estimators_agree
from bsjax.analysis.claims_estimators import QUANTITIES
from tests.analysis import simulate_noise
from tests.analysis.checks import check
from tests.analysis.simulate_noise import judge


def test_estimators_agree():
  finding = judge(judge_estimators_agree, simulate_noise.along_trials())
  check(finding, "estimators_agree", "holds")
  # 9 trials, 3 checkpoints, 3 routes, 2 quantities.
  assert finding.claim.n == 9 * 3 * 3 * 2
  series = finding.series
  sampled = series["route"] != "ghost"
  expected = (series["value"][sampled] - series["exact"][sampled]) / series["sem"][sampled]
  np.testing.assert_array_equal(series["z"][sampled], expected)


@pytest.mark.parametrize(
  ("world", "verdict", "words"),
  [
    ({"ghost_error": 1e-4}, "fails", "ghost route is within 0.0001"),
    ({"bias": 1.1}, "fails", "by the device route most"),
    ({"honest": 2.5}, "fails", "by more than their standard errors allow"),
    ({"route_sem": 12.0}, "inconclusive", "as their standard errors say"),
  ],
)
def test_estimators_that_differ_or_are_too_noisy(world, verdict, words):
  finding = judge(judge_estimators_agree, simulate_noise.along_trials(**world))
  check(finding, "estimators_agree", verdict)
  assert words in finding.reading


def test_a_route_that_was_not_measured_is_named():
  records = simulate_noise.along_trials()
  for record in records:
    record.probes[:] = [row for row in record.probes if row.get("route") != "device"]
  finding = judge(judge_estimators_agree, records)
  check(finding, "estimators_agree", "holds")
  assert "the device route was not measured" in finding.reading
  assert "not measured" not in judge(judge_estimators_agree, simulate_noise.along_trials()).reading


@pytest.mark.parametrize("missing", ["ghost", "exact"])
def test_without_exact_or_ghost_there_is_no_comparison(missing):
  records = simulate_noise.along_trials()
  for record in records:
    record.probes[:] = [row for row in record.probes if row.get("route") != missing]
  check(judge(judge_estimators_agree, records), "estimators_agree", "inconclusive")


def test_honest_estimators_are_rarely_accused():
  # Level 0.01 over all tests of a world: of 300 worlds about 3 are accused, at most 3 + 4 sqrt(3) = 10.
  accused = 0
  for world in range(300):
    records = simulate_noise.along_trials(layers=False, seeds=(100 + world,))
    accused += judge(judge_estimators_agree, records).claim.verdict == "fails"
  assert accused <= 10


def test_rounding_is_relative_to_what_is_subtracted():
  # |G|^2 = 1e-9 is what is left of 1.000000001 after tr(Sigma)/N = 1 was taken off: an error of 1e-9 is 1e-9 of that.
  exact = {
    "probe": "route",
    "step": 0,
    "route": "exact",
    "grad_cov_trace": 64.0,
    "grad_sq_norm": 1e-9,
    "num_examples": 64,
  }
  rows = [exact, exact | {"route": "ghost", "grad_sq_norm": 2e-9, "grad_cov_trace": 64.64}]
  rows += [exact | {"route": "device", "grad_sq_norm_sem": 1.0, "grad_cov_trace_sem": 1.0}]
  series = judge(judge_estimators_agree, [simulate_noise.record("along", 4, 0.1, 0, rows)]).series
  error = {
    name: series["relative_error"][(series["route"] == "ghost") & (series["quantity"] == name)] for name in QUANTITIES
  }
  np.testing.assert_allclose(error["grad_sq_norm"], 1e-9, rtol=1e-6)
  np.testing.assert_allclose(error["grad_cov_trace"], 0.01, rtol=1e-6)
