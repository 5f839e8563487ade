"""The figures of sharp minima draw what the findings hold, mark verdicts and what is unknown, and cover nothing."""

import numpy as np
import pytest

from bsjax.analysis import Finding
from bsjax.analysis.claims_sharpness import judge_flat_generalizes, judge_flat_measures
from bsjax.analysis.solutions import BATCH_NORM_WORDS, MEASURE_LABELS, PHASES, measure_label
from bsjax.figures import sharpness, style
from tests.analysis import simulate_sharpness as simulate
from tests.figures.drawn import assert_draws_cleanly, assert_nothing_is_covered_or_cut, texts_of
from tests.report.example import make_claim

DRAW = sharpness.FIGURES | {
  name: draw for more in sharpness.FURTHER_FIGURES.values() for name, draw in more.items() if name != "spectra"
}
CLAIM_OF = {name: claim for claim, more in sharpness.FURTHER_FIGURES.items() for name in more}
JUDGED = [measure for measure in MEASURE_LABELS if measure != "bottom_eigenvalue"]


def world(measures, batch_norm="ghost"):
  """Returns both findings of a study in which slopes go from steep to reversed and some values are unknown, by figure."""
  study = simulate.make_study(measures=measures)
  slopes = dict(zip(measures, np.linspace(0.7, -0.3, len(measures)), strict=True))
  records = simulate.solutions(measures=measures, slope=lambda m, p: slopes[m], batch_sizes=(8, 16, 32, 64, 128))
  for index, record in enumerate(records):
    for row in record.probes:
      if row.get("measure") == "top_eigenvalue" and index % 17 == 3:
        row["error"] = 0.2 * row["value"]
      if row.get("measure") == "fisher_top" and record.trial["phase"] == "level":
        row["value"] = None
      if "batch_norm" in row:
        row["batch_norm"] = batch_norm
  found = {
    "flat_measures": judge_flat_measures(study, records),
    "flat_generalizes": judge_flat_generalizes(study, records),
  }
  return found | {name: found[claim] for name, claim in CLAIM_OF.items()}


@pytest.fixture(scope="module")
def findings():
  return world(tuple(MEASURE_LABELS))


@pytest.fixture(scope="module")
def figures(findings):
  """Returns every figure of `findings`, drawn once; a test reads them and changes nothing."""
  return {name: draw(findings[name]) for name, draw in DRAW.items()}


def _points(axes):
  """Returns value, low, high and verdict of every row of a forest, by place."""
  verdicts = {(color, marker): kind for kind, (color, marker, _, _) in sharpness.VERDICTS.items()}
  rows = {}
  for bars in axes.containers:
    mark, _, (segments,) = bars
    (ends,) = segments.get_segments()
    kind = verdicts.get((mark.get_color(), mark.get_marker()), "control")
    rows[round(float(mark.get_ydata()[0]))] = (mark.get_xdata()[0], *ends[:, 0], kind)
  return rows


def _label_of(axes):
  return {place: text.get_text() for place, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}


def test_every_claim_has_its_figure():
  assert set(sharpness.FIGURES) == set(sharpness.FURTHER_FIGURES) == {"flat_measures", "flat_generalizes"}


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(name, findings):
  assert_draws_cleanly(DRAW[name], findings[name])


@pytest.mark.parametrize("count", [1, 5])
def test_few_measures_have_room_too(count):
  few = world(tuple(JUDGED[-count:]))
  for name, draw in DRAW.items():
    assert_nothing_is_covered_or_cut(draw(few[name]))


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_empty_series_say_so(name, keep_keys, findings):
  series = {
    key: np.zeros(0, np.asarray(array).dtype)
    for key, array in findings[name].series.items()
    if keep_keys and np.ndim(array)
  }
  figure = DRAW[name](Finding(make_claim(name, verdict="inconclusive"), series, "nothing was measured"))
  assert "no data: nothing was measured" in texts_of(figure)


@pytest.mark.parametrize("name", DRAW)
def test_a_single_point_is_drawn(name, findings):
  # The first measurement is one of those that the judge leaves out.
  keep = slice(1, 2) if name in CLAIM_OF else slice(0, 1)
  series = {key: array[keep] if np.ndim(array) else array for key, array in findings[name].series.items()}
  if name == "measures_against_batch_size":
    series["slope_measure"] = series["measure"]
  figure = DRAW[name](findings[name]._replace(series=series))
  figure.draw_without_rendering()
  assert "no data" not in texts_of(figure)


def test_the_forest_holds_every_slope_with_its_interval_and_verdict(findings, figures):
  finding = findings["flat_measures"]
  series, figure = finding.series, figures["flat_measures"]
  assert set(series["slope_verdict"]) == set(sharpness.VERDICTS)
  for axes, (phase, words) in zip(figure.axes, PHASES.items(), strict=True):
    assert words in axes.get_title(loc="left")
    labels, rows = _label_of(figure.axes[0]), _points(axes)
    assert [labels[place] for place in sorted(labels, reverse=True)] == [measure_label(name) for name in JUDGED]
    drawn = {labels[place]: row for place, row in rows.items()}
    at = (series["slope_phase"] == phase) & np.isfinite(series["slope"])
    names = ("slope_measure", "slope_verdict", "slope", "slope_low", "slope_high")
    expected = [*zip(*(series[name][at] for name in names), strict=True)]
    assert set(drawn) == {measure_label(name) for name, *_ in expected}
    for name, verdict, *bounds in expected:
      *found, kind = drawn[measure_label(name)]
      np.testing.assert_allclose(found, bounds, rtol=1e-12)  # an end is drawn as value + length of the bar
      assert kind == verdict
    low, high = axes.get_xlim()
    assert low < series["slope_low"][at].min()
    assert high > series["slope_high"][at].max()
  assert [text.get_text() for text in figure.axes[0].texts] == ["not known"]
  assert not figure.axes[1].texts


def test_captions_name_the_numbers_and_the_statistics_of_batch_norm(findings, figures):
  for figure in figures.values():
    assert BATCH_NORM_WORDS["ghost"] in texts_of(figure)
  figure = figures["flat_measures"]
  assert "0–50 solutions each" in figure.axes[0].get_title(loc="left")
  used = findings["flat_measures"].series["slope_points"][len(JUDGED) :]
  assert f"{used.min():.0f}–50 solutions each" in figure.axes[1].get_title(loc="left")
  assert "5 seeds (faint) and geometric means" in texts_of(figures["measures_against_batch_size"])


def test_small_panels_show_each_seed_and_the_geometric_means(findings, figures):
  finding = findings["measures_against_batch_size"]
  series, figure = finding.series, figures["measures_against_batch_size"]
  assert [axes.get_title(loc="left") for axes in figure.axes] == [measure_label(name) for name in JUDGED]
  axes = figure.axes[JUDGED.index("sam")]
  at = (series["measure"] == "sam") & (series["phase"] == "level") & (series["rate_part"] == 0.25)
  (line,) = [line for line in axes.lines if line.get_label() == "0.25 × the rule's rate, at equal training loss"]
  means = [np.exp(np.log(series["value"][at & (series["batch_size"] == size)]).mean()) for size in line.get_xdata()]
  np.testing.assert_allclose(line.get_ydata(), means)
  faint = [line for line in axes.lines if line.get_alpha() == 0.3]
  shown = np.sort(np.concatenate([line.get_ydata() for line in faint]))
  np.testing.assert_allclose(shown, np.sort(series["value"][series["measure"] == "sam"]))
  assert {line.get_color() for line in faint} == {style.BLUE, style.VERMILION}
  assert axes.get_xscale() == axes.get_yscale() == "log"


def test_what_is_left_out_is_a_cross_and_in_no_mean(findings, figures):
  finding = findings["measures_against_batch_size"]
  series, figure = finding.series, figures["measures_against_batch_size"]
  axes = figure.axes[JUDGED.index("top_eigenvalue")]
  (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
  left_out = (series["measure"] == "top_eigenvalue") & ~series["used"]
  assert left_out.sum() > 2
  np.testing.assert_allclose(np.sort(crosses.get_ydata()), np.sort(series["value"][left_out]))
  faint = np.concatenate([line.get_ydata() for line in axes.lines if line.get_alpha() == 0.3])
  assert not np.isin(series["value"][left_out], faint).any()


def test_the_forest_of_taus_holds_every_tau_and_the_control(findings, figures):
  finding = findings["flat_generalizes"]
  series, figure = finding.series, figures["flat_generalizes"]
  left, right = figure.axes
  labels, rows = _label_of(left), _points(left)
  drawn = {labels[place]: row for place, row in rows.items()}
  known = np.isfinite(series["tau"])
  assert set(drawn) == {measure_label(name) for name in series["tau_measure"][known]} | {"training loss (control)"}
  names = ("tau_measure", "tau_verdict", "tau", "tau_low", "tau_high")
  rows = [*zip(*(series[name][known] for name in names), strict=True)]
  rows.append(("training loss (control)", "control", *(series[f"control_tau{end}"] for end in ("", "_low", "_high"))))
  for name, verdict, *bounds in rows:
    *found, kind = drawn[measure_label(name)]
    np.testing.assert_allclose(found, bounds, rtol=1e-12)  # an end is drawn as value + length of the bar
    assert kind == verdict
  bars = {container.get_label(): container for container in right.containers}
  assert len(bars) == 3
  for prefix, words in (
    ("test_loss", "test loss"),
    ("granulated", "batch size alone"),
    ("partial", "given the training loss"),
  ):
    (container,) = [container for label, container in bars.items() if words in label]
    np.testing.assert_allclose(container[0].get_xdata(), series[f"{prefix}_tau"])
    # The rows stand at the same height as the measures on the left, moved by less than half a row.
    np.testing.assert_array_equal(np.round(container[0].get_ydata()), np.arange(len(JUDGED), 0, -1))


def test_test_errors_stand_above_their_measures_in_the_colour_of_the_batch_size(findings, figures):
  finding = findings["measures_against_test_error"]
  series, figure = finding.series, figures["measures_against_test_error"]
  shown = [name for name in JUDGED if name != "fisher_top"]
  titles = [axes.get_title(loc="left").split("\n") for axes in figure.axes]
  assert [title[0] for title in titles] == [measure_label(name) for name in shown]
  tau = series["tau"][series["tau_measure"] == "sam"][0]
  axes = figure.axes[shown.index("sam")]
  assert titles[shown.index("sam")][1] == f"τ = {tau:.2f}"
  sizes = np.unique(series["batch_size"])
  for size, color in zip(sizes, style.shades(len(sizes)), strict=True):
    at = (series["measure"] == "sam") & (series["batch_size"] == size)
    points = np.concatenate([line.get_xydata() for line in axes.lines if line.get_color() == color])
    expected = np.stack([series["value"][at], 100 * series["test_error"][at]], axis=1)
    np.testing.assert_allclose(points[np.argsort(points[:, 0])], expected[np.argsort(expected[:, 0])])
  for axes in figure.axes:
    low, high = axes.get_xlim()
    assert 2 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= 5


def test_negative_values_have_a_linear_axis():
  found = world(("trace",))["measures_against_test_error"]
  value = found.series["value"].copy()
  value[0] = -1.0
  (axes,) = DRAW["measures_against_test_error"](found._replace(series=found.series | {"value": value})).axes
  assert axes.get_xscale() == "linear"
  assert axes.get_xlim()[0] < -1
