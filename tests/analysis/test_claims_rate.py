"""Throughput and the learning rate, judged in worlds whose answer is known."""

import re

import numpy as np
import pytest

from bsjax.analysis import (
  judge_linear_scaling,
  judge_throughput,
)
from tests.analysis import simulate
from tests.analysis.checks import check

# --- throughput ---


@pytest.mark.parametrize(
  ("throughput", "verdict", "knee"),
  [
    (lambda b: 100.0 * min(b, 64), "holds", 64),
    (lambda b: 100.0 * b**0.95, "holds", None),
    (lambda b: 100.0 * b**0.72, "fails", None),
    (lambda b: 100.0, "fails", 1),  # saturated from the start
  ],
)
def test_throughput(throughput, verdict, knee):
  finding = judge_throughput(simulate.make_study(), simulate.timing_trials(throughput))
  check(finding, "throughput", verdict)
  np.testing.assert_equal(finding.series["knee"], np.nan if knee is None else knee)


def test_unsteady_timings_leave_throughput_open():
  records = simulate.timing_trials(lambda b: 100.0 * b, batch_sizes=(1, 2, 4), noise=0.3)
  check(judge_throughput(simulate.make_study(), records), "throughput", "inconclusive")
  single = simulate.timing_trials(lambda b: 100.0 * b, repeats=1)
  assert judge_throughput(simulate.make_study(), single).claim.measured is None


# --- learning rate ---


@pytest.mark.parametrize(
  ("best", "verdict", "slope", "stop"),
  [
    (lambda b: 0.003 * b, "holds", 1.0, None),
    (lambda b: 0.003 * b**0.5, "fails", 0.5, 8),  # B/B^0.5 exceeds the grid's factor 2 first at B = 8
    (lambda b: 0.03, "fails", 0.0, 4),
    (
      lambda b: 0.003 * b / (1 + b / 64),
      None,
      None,
      64,
    ),  # eps_max / (1 + B_noise / B): at B = 64 by (1 + 1) / (1 + 1/64) < 2
  ],
)
def test_linear_scaling(best, verdict, slope, stop):
  study, records = simulate.rate_grid(simulate.make_study(), best)
  finding = judge_linear_scaling(study, records)
  check(finding, "linear_scaling", verdict or finding.claim.verdict)
  # Steps are whole numbers and differ by one between seeds, so a vertex errs by about 1 % of the grid's factor.
  if slope is not None:
    assert finding.claim.measured == pytest.approx(slope, abs=0.01)
    np.testing.assert_allclose(finding.series["learning_rate"], [best(b) for b in simulate.BATCH_SIZES], rtol=0.03)
  if stop is None:
    assert "still not more than one step" in finding.reading
  else:
    at = int(re.search(r"stops holding at (\d+)", finding.reading)[1])
    assert at == (128 if stop == 64 else stop)


def test_a_slope_between_the_rules_leaves_linear_scaling_open():
  scatter = dict(zip(simulate.BATCH_SIZES, (1, 3, 0.4, 2, 0.5, 1, 2, 0.5, 3, 0.6), strict=True))
  study, records = simulate.rate_grid(simulate.make_study(), lambda b: 0.003 * b**0.75 * scatter[b])
  check(judge_linear_scaling(study, records), "linear_scaling", "inconclusive")


def test_rates_on_the_edge_are_marked_and_left_out():
  study, records = simulate.rate_grid(simulate.make_study(), lambda b: 0.003 * b)
  for size in ("256", "512"):
    study["tuned"]["target"][size] = {"learning_rate": 0.1, "edge": "high"}
  finding = judge_linear_scaling(study, records)
  check(finding, "linear_scaling", "holds")
  assert finding.series["batch_size"][finding.series["edge"]].tolist() == [256, 512]
  assert finding.claim.n == 8
  assert "2 more sit on the edge" in finding.reading
  few = {**study, "batch_sizes": [1, 2, 256, 512]}
  check(judge_linear_scaling(few, records), "linear_scaling", "inconclusive")


def test_a_rate_that_failed_has_no_score():
  study, records = simulate.rate_grid(simulate.make_study(), lambda b: 0.003 * b)
  largest = max(r.trial["hparams"]["learning_rate"] for r in records)
  for r in records:
    if r.trial["hparams"]["learning_rate"] == largest and r.trial["seed"] == 1:
      r.status["state"] = "diverged"
  series = judge_linear_scaling(study, records).series
  assert np.isnan(series["grid_score"][series["grid_learning_rate"] == largest]).all()
  assert np.isfinite(series["grid_score"][series["grid_learning_rate"] < largest]).all()
