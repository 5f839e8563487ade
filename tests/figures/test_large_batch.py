"""The figures of large batches draw what the findings hold: seeds, means, the baseline, what diverged; and cover nothing."""

import numpy as np
import pytest

from bsjax.analysis import Finding
from bsjax.analysis.claims_large_batch import judge_cosine_helps, judge_lars_lamb_help, judge_warmup_needed
from bsjax.analysis.large_batch import NAMES
from bsjax.figures.large_batch import FIGURES, FURTHER_FIGURES, LOOKS, WORST_SHOWN
from tests.analysis import simulate_large_batch as simulate
from tests.analysis.simulate_large_batch import SIZES, world
from tests.figures.drawn import assert_draws_cleanly, line_of, texts_of
from tests.report.example import make_claim

JUDGES = (judge_warmup_needed, judge_cosine_helps, judge_lars_lamb_help)
DRAWS = {name: (name, draw) for name, draw in FIGURES.items()} | {
  name: (claim_id, draw) for claim_id, further in FURTHER_FIGURES.items() for name, draw in further.items()
}
"""Name of a figure: the claim whose finding it draws, and what draws it."""


def findings_of(**changes):
  study, records = world(**changes)
  return {finding.claim.id: finding for finding in (judge(study, records) for judge in JUDGES)}


@pytest.fixture(scope="module")
def findings():
  return findings_of()


@pytest.mark.parametrize("name", DRAWS)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(name, findings):
  claim_id, draw = DRAWS[name]
  assert_draws_cleanly(draw, findings[claim_id])


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_empty_series_say_so(name, keep_keys, findings):
  claim_id, draw = DRAWS[name]
  series = {
    key: np.zeros(0, array.dtype) if array.ndim else array
    for key, array in findings[claim_id].series.items()
    if keep_keys
  }
  figure = draw(Finding(make_claim(claim_id, verdict="inconclusive"), series, "nothing was measured"))
  assert "no data: nothing was measured" in texts_of(figure)


def errorbars(axes):
  """Returns the centres of each arm's means, by its label."""
  return {container.get_label(): container for container in axes.containers}


def test_means_and_intervals_stand_where_the_seeds_are(findings):
  series = findings["lars_lamb_help"].series
  (axes,) = FIGURES["lars_lamb_help"](findings["lars_lamb_help"]).axes
  found = errorbars(axes)
  assert list(found) == [NAMES[arm] for arm in simulate.ARMS]
  for arm in simulate.ARMS:
    points, _, (bars,) = found[NAMES[arm]]
    at = series["mean_arm"] == arm
    np.testing.assert_allclose(points.get_ydata(), series["mean"][at])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, np.stack([series["mean_low"][at], series["mean_high"][at]], axis=1))
    assert (points.get_color(), points.get_marker()) == LOOKS[arm]
    # The seeds of an arm: faint, in its colour, at the places of its means.
    (seeds,) = [
      line
      for line in axes.lines
      if line.get_alpha() and line.get_color() == points.get_color() and len(line.get_xdata()) > len(SIZES)
    ]
    np.testing.assert_allclose(seeds.get_ydata(), series["error"][series["arm"] == arm])
    np.testing.assert_allclose(np.unique(seeds.get_xdata()), points.get_xdata())
  # All arms of a batch size lie nearer to its tick than to another's, each at a place of its own.
  places = np.array([points.get_xdata() for points, *_ in found.values()])
  assert (np.round(places) == [0, 1, 2]).all()
  assert len(np.unique(places)) == places.size
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64", "256", "1,024"]


def test_the_baseline_is_a_band(findings):
  finding = findings["cosine_helps"]
  (axes,) = FIGURES["cosine_helps"](finding).axes
  line = line_of(axes, "tuned baseline, batch size 32")
  assert set(line.get_ydata()) == {float(finding.series["baseline"])}
  (band,) = axes.patches
  assert band.get_y() == finding.series["baseline_low"]
  assert band.get_y() + band.get_height() == pytest.approx(float(finding.series["baseline_high"]))


def test_the_rule_as_it_stands_has_a_panel_and_scale_of_its_own(findings):
  tuned, rule = FIGURES["warmup_needed"](findings["warmup_needed"]).axes
  assert list(errorbars(rule)) == [NAMES[arm] for arm in simulate.RECIPES]
  assert not set(errorbars(tuned)) & set(errorbars(rule))
  assert "the linear rule as it stands" in rule.get_title(loc="left")
  assert tuned.get_ylim() != rule.get_ylim()


def test_without_the_rule_there_is_one_panel():
  finding = findings_of(failed=[("momentum_constant", simulate.REFERENCE)])["warmup_needed"]
  (axes,) = FIGURES["warmup_needed"](finding).axes
  assert not axes.patches
  assert "tuned baseline" not in texts_of(axes.figure)


def test_diverged_seeds_are_counted_on_the_upper_edge():
  finding = findings_of(diverged={("momentum_cosine", 256): 3})["cosine_helps"]
  figure = FIGURES["cosine_helps"](finding)
  (axes,) = figure.axes
  (mark,) = [text for text in axes.texts if "×" in text.get_text()]
  assert mark.get_text() == "×\n3"
  assert mark.get_color() == LOOKS["momentum_cosine"][0]
  assert round(mark.xy[0]) == 1
  assert "so many seeds diverged" in texts_of(figure)
  points, *_ = errorbars(axes)[NAMES["momentum_cosine"]]
  assert len(points.get_xdata()) == len(SIZES) - 1  # no mean where a seed is missing
  assert_draws_cleanly(FIGURES["cosine_helps"], finding)


def test_losses_are_drawn_without_a_percent_sign():
  (axes,) = FIGURES["cosine_helps"](findings_of(accuracy=False)["cosine_helps"]).axes
  assert axes.get_ylabel() == "test loss"


def test_curves_are_those_of_the_largest_batch_size(findings):
  finding = findings["lars_lamb_help"]
  series = finding.series
  (axes,) = FURTHER_FIGURES["lars_lamb_help"]["training_curves"](finding).axes
  for arm in simulate.ARMS:
    at = (series["curve_arm"] == arm) & (series["curve_batch_size"] == max(SIZES))
    line = line_of(axes, NAMES[arm])
    np.testing.assert_allclose(line.get_xdata(), series["curve_epoch"][at])
    np.testing.assert_allclose(line.get_ydata(), series["curve_loss"][at])
  baseline = line_of(axes, "tuned baseline, batch size 32")
  np.testing.assert_allclose(baseline.get_ydata(), series["curve_loss"][series["curve_batch_size"] == 32])
  assert "batch size 1,024" in axes.get_title(loc="left")


def test_searches_show_every_trial_and_ring_the_chosen(findings):
  finding = findings["lars_lamb_help"]
  (axes,) = FURTHER_FIGURES["lars_lamb_help"]["large_batch_searches"](finding).axes
  line = line_of(axes, NAMES["lars_warmup_cosine"])
  np.testing.assert_allclose(line.get_xdata(), [0.05, 0.5, 10])
  # 0.1 is the least of all; one trial diverged, one is 24 times worse.
  np.testing.assert_allclose(line.get_ydata(), [0.1 * WORST_SHOWN, 0.1, 0.1 * WORST_SHOWN])
  rings = [other for other in axes.lines if other.get_markersize() == 9 and len(other.get_xdata())]
  assert [ring.get_xdata().tolist() for ring in rings] == [[0.5]] * len(simulate.ARMS)
