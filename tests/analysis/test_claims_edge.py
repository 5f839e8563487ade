"""The judge of the edge of stability decides simulated worlds, and a small network that really goes there."""

import math

import numpy as np
import pytest

from bsjax.analysis.claims_edge import judge_edge_of_stability, running_median
from tests.analysis import simulate_dynamics
from tests.analysis.checks import check
from tests.analysis.simulate_dynamics import EDGE_RATES, EDGE_SIZES, EDGE_STEPS, STUDY, TRAIN_SIZE, edge_trials

CLAIM = "edge_of_stability"


def judge(records):
  return judge_edge_of_stability(STUDY, records)


def states(finding, *, size=TRAIN_SIZE, rate=None):
  series = finding.series
  at = series["trial_batch_size"] == size
  at &= True if rate is None else np.isclose(series["trial_learning_rate"], rate)
  return set(series["state"][at])


def with_curve(record, ratios, name="top_eigenvalue"):
  """Replaces a measure by one with these ratios to the edge, at the record's first checkpoints."""
  rate = record.trial["hparams"]["learning_rate"]
  steps = [row["step"] for row in record.probes if row["probe"] == "test"]
  rows = [row for row in record.probes if row.get("measure") != name]
  rows += [simulate_dynamics.measure(step, name, 2 * r / rate) for step, r in zip(steps, ratios, strict=False)]
  return record._replace(probes=rows)


def test_it_holds_where_full_batches_reach_the_edge_and_smaller_ones_stop_below():
  finding = judge(edge_trials())
  check(finding, CLAIM, "holds")
  # The ceiling is 1.05 up to exp(0.02 z) of the trial and of each checkpoint; the largest median of about 10 lies within 3 of the latter.
  assert finding.claim.measured == pytest.approx(1.05, rel=0.1)
  assert finding.claim.n == len(EDGE_RATES) * 3
  assert states(finding) == {"reached"}
  assert states(finding, size=EDGE_SIZES[0]) == {"never reached"}
  # B^0.2, up to the same scatter over a range of log 64.
  assert "the slope of the log peak against log B is 0.2" in finding.reading
  assert "batch sharpness times rate / 2 reaches 0.9 in 18 of 18 trials" in finding.reading


def test_peak_and_plateau_of_a_known_curve():
  (record,) = edge_trials(sizes=(TRAIN_SIZE,), rates=(0.1,), seeds=(1000,))
  ratios = [0.2, 0.4, 5.0, 0.8, 0.95, 1.1, 1.0, 1.2, 1.0, 0.9, 0.5, 0.4, 0.8, 0.3, 0.2]
  finding = judge([with_curve(record, ratios)])
  # Medians of three, centred on the second value onward: 0.4, 0.8, 0.95, 0.95, 1.0, 1.1, 1.0, 1.0, 0.9, 0.5, 0.5, 0.4, 0.3.
  assert finding.series["peak"].tolist() == [1.1]  # neither the spike of 5 nor the maximum of 1.2
  plateau = ratios[3:10]  # from the first median of 0.9 or more to the last of 0.75 or more; the later 0.8 is a spike
  assert finding.series["plateau"][0] == pytest.approx(np.exp(np.mean(np.log(plateau))))
  steps = simulate_dynamics.EDGE_CHECKPOINTS
  assert finding.series["plateau_share"][0] == pytest.approx((steps[9] - steps[3]) / steps[14])
  np.testing.assert_allclose(finding.series["ratio"][: len(ratios)], ratios)


def test_a_plateau_that_lasts_goes_to_the_end():
  (record,) = edge_trials(sizes=(TRAIN_SIZE,), rates=(0.1,), seeds=(1000,))
  series = judge([with_curve(record, [0.2, 0.5, 1.0, 1.0, 1.0, 1.0, 2.0])]).series
  assert series["plateau"][0] == pytest.approx(
    2 ** (1 / 5)
  )  # the first median of 0.9 or more is centred on the third value
  steps = simulate_dynamics.EDGE_CHECKPOINTS
  assert series["plateau_share"][0] == pytest.approx((steps[6] - steps[2]) / steps[6])


def test_running_median():
  assert running_median(np.array([3.0, 1, 2, 9, 0])).tolist() == [2, 2, 2]
  assert running_median(np.ones(2)).tolist() == []


@pytest.mark.parametrize(
  ("world", "verdict"),
  [
    ({"ceiling": lambda size, rate: 0.5 * (size / TRAIN_SIZE) ** 0.2}, "fails"),  # stops half way
    ({"ceiling": lambda size, rate: 2.0 * (size / TRAIN_SIZE) ** 0.2}, "fails"),  # goes on to twice
    ({"ceiling": lambda size, rate: 1.05 * (TRAIN_SIZE / size) ** 0.2}, "fails"),  # smaller batches go higher
    ({"ceiling": lambda size, rate: 1.0}, "fails"),  # no dependence on B
    ({"ends": True}, "holds"),  # leaves the edge in the end
    ({"spread": 0.5}, "inconclusive"),
    ({"seeds": (1000,)}, "inconclusive"),
    ({"sizes": EDGE_SIZES[:2]}, "inconclusive"),  # no full batch
    ({"sizes": EDGE_SIZES[2:]}, "inconclusive"),  # nothing else
    ({"start": 1000.0, "pace": 0.0, "ceiling": lambda size, rate: 1e3}, "inconclusive"),  # everything begins above
  ],
)
def test_verdicts(world, verdict):
  check(judge(edge_trials(**world)), CLAIM, verdict)


def test_the_slope_gives_the_number_where_it_decides():
  finding = judge(edge_trials(ceiling=lambda size, rate: 1.0))
  check(finding, CLAIM, "fails")
  assert "slope" in finding.claim.unit
  assert finding.claim.expected == "above 0"
  # The largest of a few medians varies by about 0.02, over log 64 and 9 trials at each end.
  assert finding.claim.measured == pytest.approx(0, abs=4 * 0.02 * math.sqrt(2 / 9) / math.log(64))
  assert "so it is driven to the edge" in finding.reading
  assert "so smaller batches do not keep it lower" in finding.reading


def test_the_slope_compares_at_equal_rates():
  """The ceiling falls with the rate and not with B, and high rates were run at small batches only."""
  low, high = EDGE_RATES[0], EDGE_RATES[2]

  def ceiling(size, rate):
    return 1.0 if rate == low else 0.5

  records = edge_trials(ceiling=ceiling, rates=(low,), spread=0.001)
  records += edge_trials(ceiling=ceiling, rates=(high,), sizes=EDGE_SIZES[:1], spread=0.001)
  finding = judge(records)
  check(finding, CLAIM, "fails")
  assert finding.claim.measured == pytest.approx(0, abs=0.01)


def test_training_that_was_too_short_decides_nothing_against_the_claim():
  """The eigenvalue still grows at two of three rates; at these, smaller batches have no ceiling to show either."""
  finding = judge(edge_trials(pace=0.02))
  check(finding, CLAIM, "holds")
  assert [states(finding, rate=rate) for rate in EDGE_RATES] == [{"not there yet"}, {"not there yet"}, {"reached"}]
  assert finding.claim.n == 3
  assert "6 trials had not reached the edge at full batch but were still rising" in finding.reading
  # 0.13 if the rates were counted at which no batch size was trained for long enough; the ceiling goes as B^0.2.
  assert "the slope of the log peak against log B is 0.2" in finding.reading

  def ceiling(size, rate):  # beyond the edge at the rate that gets there
    return 2.0 * (size / TRAIN_SIZE) ** 0.2

  check(judge(edge_trials(ceiling=ceiling)), CLAIM, "fails")
  finding = judge(edge_trials(pace=0.1, ceiling=ceiling))
  assert [states(finding, rate=rate) for rate in EDGE_RATES] == [{"not there yet"}, {"reached"}, {"reached"}]
  check(finding, CLAIM, "inconclusive")


def test_where_every_rate_was_too_short_the_refusal_says_so():
  finding = judge(edge_trials(pace=0.001, start=20.0, rates=EDGE_RATES[:1]))
  assert states(finding) == {"never reached"}  # gains 4 % in all: that is no rise
  finding = judge(edge_trials(pace=0.01, rates=EDGE_RATES[:1]))
  assert states(finding) == {"not there yet"}
  check(finding, CLAIM, "inconclusive")
  assert finding.claim.measured is None
  assert "3 trials had not reached the edge at full batch but were still rising" in finding.reading


def test_stopping_below_counts_against_and_is_told():
  finding = judge(edge_trials(ceiling=lambda size, rate: 0.5 * (size / TRAIN_SIZE) ** 0.2))
  assert states(finding) == {"never reached"}
  assert np.isnan(finding.series["plateau"]).all()
  assert "which is not the edge" in finding.reading
  assert "9 trials stayed below the edge at full batch" in finding.reading


def test_trials_that_begin_above_the_edge_are_counted_apart():
  records = edge_trials()
  above = [i for i, r in enumerate(records) if r.trial["hparams"]["learning_rate"] == EDGE_RATES[2]]
  for i in above:
    records[i] = with_curve(records[i], [3.0, 2.5, 2.0, 1.5, *[1.0] * 20])
  finding = judge(records)
  check(finding, CLAIM, "holds")
  assert states(finding, rate=EDGE_RATES[2]) == {"began above"}
  assert finding.claim.n == 2 * 3
  assert "9 trials began above the edge" in finding.reading
  # The rates left give the same peak as if the third had not been run.
  assert finding.claim.measured == judge(edge_trials(rates=EDGE_RATES[:2])).claim.measured


def test_seeds_are_the_repeats_and_not_rates():
  """Each rate has its own ceiling, the same for all seeds: then the mean over rates is known exactly."""
  finding = judge(edge_trials(ceiling=lambda size, rate: (1 + 3 * rate) * (size / TRAIN_SIZE) ** 0.2, spread=0.0))
  check(finding, CLAIM, "holds")
  expected = np.exp(np.mean(np.log1p(3 * np.array(EDGE_RATES))))
  assert finding.claim[4:7] == pytest.approx([expected] * 3)
  assert f"({1 + 3 * EDGE_RATES[0]:.2f} to {1 + 3 * EDGE_RATES[2]:.2f} at 3 rates)" in finding.reading


def test_unconverged_eigenvalues_are_left_out_and_counted():
  records = edge_trials()
  whole = judge(records)
  for record in records:
    wrong = [row for row in record.probes if row.get("measure") == "top_eigenvalue"][8]
    wrong["value"], wrong["error"] = 1e6, 1e6
  finding = judge(records)
  check(finding, CLAIM, "holds")
  assert f"27 of {27 * len(simulate_dynamics.EDGE_CHECKPOINTS)} eigenvalues are left out" in finding.reading
  np.testing.assert_allclose(finding.series["peak"], whole.series["peak"])
  assert np.isnan(finding.series["ratio"]).sum() == 27


def test_trials_with_too_few_checkpoints_and_diverged_ones_are_counted():
  records = edge_trials()
  records[0] = with_curve(records[0], [0.2, 0.3])
  records[-1] = records[-1]._replace(status={"state": "diverged"})
  finding = judge(records)
  check(finding, CLAIM, "holds")
  assert finding.claim.n == 8
  assert "1 trial had fewer than 3 usable checkpoints; 1 trial diverged." in finding.reading
  assert np.isnan(finding.series["peak"][0])


def test_without_trials_the_refusal_says_what_would_decide():
  finding = judge([])
  check(finding, CLAIM, "inconclusive")
  assert finding.claim.measured is None
  assert "Trials at the full batch of 4,096 examples and at smaller ones" in finding.reading


def test_without_a_full_batch_the_reading_says_so_and_keeps_the_slope():
  finding = judge(edge_trials(sizes=EDGE_SIZES[:2]))
  assert finding.reading.startswith("No full-batch trial tells")
  assert "so smaller batches keep it lower" in finding.reading
  assert finding.claim.measured is None


def test_batch_sharpness_is_told_of_smaller_batches_only():
  def silent(record):
    full = record.trial["config"]["batch_size"] == TRAIN_SIZE
    return with_curve(record, [0.95] * 20 if full else [0.1] * 20, "batch_sharpness")

  finding = judge([silent(record) for record in edge_trials()])
  check(finding, CLAIM, "holds")
  assert "reaches 0.9 in 0 of 18 trials." in finding.reading
  without = judge(edge_trials(batch_sharpness=False))
  check(without, CLAIM, "holds")
  assert "Batch sharpness was not measured along trials of smaller batches." in without.reading


def test_the_full_batch_may_be_a_part_of_the_training_set():
  study = STUDY | {"train_size": 10 * TRAIN_SIZE, "edge": {"train_size": TRAIN_SIZE}}
  finding = judge_edge_of_stability(study, edge_trials())
  check(finding, CLAIM, "holds")
  assert finding.series["full_batch_size"] == TRAIN_SIZE
  assert judge_edge_of_stability(study | {"edge": {}}, edge_trials()).reading.startswith("No full-batch trial tells")


def test_the_series_has_every_checkpoint_and_trial():
  series = judge(edge_trials()).series
  checkpoints = len(simulate_dynamics.EDGE_CHECKPOINTS)
  assert len(series["ratio"]) == 27 * checkpoints
  assert len(series["peak"]) == 27
  np.testing.assert_allclose(series["ratio"], series["top_eigenvalue"] * series["learning_rate"] / 2)
  np.testing.assert_allclose(series["gradient_ratio"], 0.8 * series["ratio"])
  np.testing.assert_allclose(series["examples_seen"], series["step"] * series["batch_size"])
  assert series["step"].max() == EDGE_STEPS


def test_a_network_goes_to_the_edge_and_smaller_batches_stay_below():
  finding = judge_edge_of_stability(simulate_dynamics.FIT_STUDY, simulate_dynamics.fitted_edge_trials())
  check(finding, CLAIM, "holds")
  series = finding.series
  full = series["trial_batch_size"] == simulate_dynamics.FIT_SIZE
  fast = full & (series["trial_learning_rate"] == 0.3)
  # Cohen et al. (2021): at the edge the eigenvalue hovers just above 2 / rate; here within 5 %.
  np.testing.assert_allclose(series["plateau"][fast], 1, atol=0.05)
  assert set(series["state"][full & (series["trial_learning_rate"] == 0.1)]) == {"not there yet"}
  assert (series["peak"][~full] < 0.9).all()
