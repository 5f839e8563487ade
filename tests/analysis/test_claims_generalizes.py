"""The judge of flatness and test error on solutions whose ranks are known by construction."""

import math

import numpy as np
import pytest
from scipy import stats

from bsjax.analysis.claims_sharpness import (
  LEAST_TAU,
  judge_flat_generalizes,
)
from bsjax.analysis.ranks import cluster_weights, kendall_tau, tau_interval
from bsjax.analysis.solutions import MAX_RELATIVE_SEM, measure_label
from tests.analysis import checks
from tests.analysis import simulate_sharpness as simulate
from tests.analysis.simulate_sharpness import rows

JUDGED = [measure for measure in simulate.MEASURES if measure != "bottom_eigenvalue"]
STUDY = simulate.make_study()


def generalizes(verdict, records, study=STUDY):
  finding = judge_flat_generalizes(study, records)
  checks.check(finding, "flat_generalizes", verdict)
  return finding


@pytest.mark.parametrize(("agreement", "verdict"), [(1.0, "holds"), (-1.0, "fails")])
def test_flat_generalizes(agreement, verdict):
  records = simulate.solutions(agreement=agreement)
  finding = generalizes(verdict, records[::-1])
  series = finding.series
  assert series["tau_measure"].tolist() == JUDGED
  assert set(series["tau_verdict"]) == {verdict}
  for row, measure in enumerate(JUDGED):
    at = series["measure"] == measure
    expected = stats.kendalltau(series["value"][at], series["test_error"][at]).statistic
    assert series["tau"][row] == pytest.approx(expected, abs=1e-12)
    # The test losses are three times the errors, so they have the same ranks.
    assert series["test_loss_tau"][row] == series["tau"][row]
  best = np.argmax(series["tau_low"])
  assert finding.claim.measured == series["tau"][best]
  assert finding.claim.ci_low == series["tau_low"][best]
  assert finding.claim.unit == f"Kendall's tau-b of {measure_label(JUDGED[best])} and test error"
  assert finding.claim.n == 40
  assert "flatness is the cause" in finding.reading
  assert "training losses of 0.045 to 0.05 " in finding.reading


def test_flatness_that_says_nothing_leaves_it_open():
  finding = generalizes("inconclusive", simulate.solutions(agreement=0, cell_noise=0.5))
  assert "all 5 measures leave it open whether the flatter one generalises better" in finding.reading


def test_one_measure_is_enough_and_is_named():
  records = simulate.solutions(slope=lambda m, p: 0.3 if m == "sam" else -1.0, rate_parts=(0.5, 1.0))
  finding = generalizes("holds", records)
  verdicts = dict(zip(finding.series["tau_measure"], finding.series["tau_verdict"], strict=True))
  assert verdicts.pop("sam") == "holds"
  assert set(verdicts.values()) == {"fails"}
  assert "Kendall's tau-b of SAM and test error" in finding.claim.unit
  assert "the flatter one generalises better by 1 of 5 measures (SAM), and not by 4" in finding.reading


def test_one_measure_that_fails_while_others_are_open_decides_nothing():
  slopes = {"sam": -1.0, "average": -1.0}
  records = simulate.solutions(slope=lambda m, p: slopes.get(m, 0.0), rate_parts=(0.5, 1.0), cell_noise=0.3, draw=1)
  finding = generalizes("inconclusive", records)
  assert set(finding.series["tau_verdict"]) == {"fails", "inconclusive"}


def test_solutions_at_equal_epochs_do_not_count():
  records = simulate.solutions(phases=("level",))
  expected = generalizes("holds", records).claim
  records += simulate.solutions(phases=("budget",), agreement=-1)
  assert generalizes("holds", records).claim == expected


def test_intervals_hold_for_all_measures_at_once():
  records = simulate.solutions(cell_noise=0.4)
  finding = judge_flat_generalizes(STUDY, records)
  assert finding.series["level"] == pytest.approx(1 - 0.05 / 5)
  at = finding.series["measure"] == "trace"
  clusters = list(zip(finding.series["batch_size"][at], finding.series["rate_part"][at], strict=True))
  value, error = (finding.series[name][at] for name in ("value", "test_error"))
  samples = kendall_tau(value, error, weights=cluster_weights(clusters))
  (row,) = np.flatnonzero(finding.series["tau_measure"] == "trace")
  for level in (0.95, 0.99):
    expected = tau_interval(samples, num_clusters=8, level=level)
    found = tuple(finding.series[f"tau{end}"][row] for end in ("", "_low", "_high"))
    assert (found == pytest.approx(expected)) == (level == 0.99)


def test_what_batch_size_alone_does_is_told_apart():
  # The rates explain all: a large one is flat and generalises; within a rate the flatter has the larger error.
  records = simulate.solutions(slope=lambda m, p: 0.1, agreement=0, cell_noise=0, seed_noise=0)
  for record in records:
    log_b, part = math.log(record.trial["config"]["batch_size"]), record.trial["rate_part"]
    record.probes[0]["test_accuracy"] = 0.5 + 0.1 * math.log(part) + 1e-3 * log_b
  finding = judge_flat_generalizes(STUDY, records)
  assert (finding.series["granulated_tau"] == -1).all()
  assert (finding.series["tau"] > 0).all()
  assert "where batch size alone differs -1.00" in finding.reading


def test_the_training_loss_is_a_control():
  records = simulate.solutions()
  for record in records:
    record.probes[0]["train_loss"] = 0.1 - 0.05 * record.probes[0]["test_accuracy"]
  finding = generalizes("holds", records)
  assert finding.series["control_tau"] == pytest.approx(1)
  assert np.isnan(finding.series["partial_tau"]).all()
  assert "given the training loss unknown" in finding.reading
  assert "The training loss itself has tau 1.00" in finding.reading


def test_given_an_unrelated_training_loss_tau_stays_what_it_is():
  finding = generalizes("holds", simulate.solutions())
  assert finding.series["control_tau_low"] < 0 < finding.series["control_tau_high"]
  # (a - bc) / sqrt((1 - b^2)(1 - c^2)) with |b|, |c| <= 0.2 lies within 0.04 + 0.04 of a.
  assert abs(finding.series["control_tau"]) < 0.2
  np.testing.assert_allclose(finding.series["partial_tau"], finding.series["tau"], atol=0.08)


def test_unknown_values_are_left_out_and_negative_ones_keep_their_rank():
  records = simulate.solutions(phases=("level",))
  before = generalizes("holds", records).series
  trace = rows(records, "trace")
  for row in trace[:2]:
    row["value"] = None
  for row in trace[2:5]:
    row["error"] = 1.01 * MAX_RELATIVE_SEM * row["value"]
  for row in rows(records, "sam"):
    row["value"] -= 1e3
  after = generalizes("holds", records).series
  at = [JUDGED.index(name) for name in ("trace", "sam")]
  assert after["tau_points"][at].tolist() == [35, 40]
  assert after["tau"][at[1]] == before["tau"][at[1]]


def test_a_missing_test_loss_is_unknown_and_nothing_else():
  records = simulate.solutions()
  expected = generalizes("holds", records).claim
  for record in records:
    record.probes[0]["test_loss"] = None
  finding = generalizes("holds", records)
  assert finding.claim == expected
  assert "with the test loss unknown" in finding.reading


def _one_error(records):
  for record in records:
    record.probes[0]["test_accuracy"] = 0.9


def _no_test(records):
  for record in records:
    record.probes.pop(0)


def _unconverged(records):
  for record in records:
    for row in record.probes:
      if row["probe"] == "measure":
        row["value"] = None


@pytest.mark.parametrize(
  ("options", "spoil", "words"),
  [
    ({"batch_sizes": (8,)}, None, "were trained with batch size 8"),
    ({"batch_sizes": (8, 32)}, None, "come from 4 settings only"),
    ({"phases": ("budget",)}, None, "No complete solution at equal training loss"),
    ({}, _no_test, "No complete solution at equal training loss has its test error"),
    ({}, _one_error, "All 40 solutions at equal training loss have the same test error"),
    ({}, _unconverged, "No measure is known well enough in 6 settings"),
  ],
)
def test_what_cannot_be_ranked_is_refused_with_the_reason(options, spoil, words):
  records = simulate.solutions(**options)
  if spoil:
    spoil(records)
  finding = generalizes("inconclusive", records)
  assert words in finding.reading
  assert finding.claim.measured is None
  assert finding.claim.n is None


def test_a_small_tau_fails_only_if_it_is_known_to_be_small():
  assert 0 < LEAST_TAU < 0.5
  finding = generalizes("fails", simulate.solutions(agreement=-1, slope=lambda m, p: 0.3))
  assert (finding.series["tau_high"] < LEAST_TAU).all()
