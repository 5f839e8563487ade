"""The figures of sharpness along training draw what the findings hold, leave out what has not converged, and cover nothing."""

import numpy as np
import pytest

from bsjax.analysis import Finding
from bsjax.analysis.claims_edge import PEAK_HIGH, PEAK_LOW, judge_edge_of_stability
from bsjax.analysis.claims_escape import judge_noise_escapes
from bsjax.figures import style
from bsjax.figures.dynamics import FIGURES
from tests.analysis import simulate_dynamics
from tests.analysis.simulate_dynamics import (
  EDGE_RATES,
  EDGE_SIZES,
  SEEDS,
  STUDY,
  TRAIN_SIZE,
  edge_trials,
  escape_trials,
)
from tests.figures.drawn import assert_draws_cleanly, line_of, texts_of
from tests.report.example import make_claim

GEOMETRIC_PARTS = (0, *(2.0**-k for k in range(6, -1, -1)))
BRANCH_LABELS = {
  "large_small": ("large-batch minimiser, switched to B = 32", style.VERMILION, "-"),
  "large_large": ("large-batch minimiser, goes on with B = 1,024", style.VERMILION, "--"),
  "small_large": ("small-batch minimiser, switched to B = 1,024", style.BLUE, "-"),
  "small_small": ("small-batch minimiser, goes on with B = 32", style.BLUE, "--"),
}


@pytest.fixture(scope="module")
def findings():
  found = (
    judge_noise_escapes(STUDY, escape_trials(parts=GEOMETRIC_PARTS)),
    judge_edge_of_stability(STUDY, edge_trials()),
  )
  return {finding.claim.id: finding for finding in found}


def _means(series, at, x, y, *, geometric=True):
  """Returns the points of the mean over seeds, computed from the series."""
  places = np.unique(series[x][at])
  values = [series[y][at & (series[x] == place)] for place in places]
  return places, [np.exp(np.log(v).mean()) if geometric else v.mean() for v in values]


def _assert_draws(line, x, y):
  np.testing.assert_allclose(line.get_xdata(), x)
  np.testing.assert_allclose(line.get_ydata(), y)


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(name, findings):
  assert_draws_cleanly(FIGURES[name], findings[name])


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_empty_series_say_so(name, keep_keys, findings):
  series = {
    key: np.zeros(0, np.asarray(array).dtype)
    for key, array in findings[name].series.items()
    if keep_keys and np.ndim(array)
  }
  figure = FIGURES[name](Finding(make_claim(name, verdict="inconclusive"), series, "nothing was measured"))
  assert "no data: nothing was measured" in texts_of(figure)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_single_point_is_drawn(name, place, findings):
  series = {
    key: array[[place]] if np.ndim(array) else array for key, array in findings[name].series.items() if array.size
  }
  figure = FIGURES[name](findings[name]._replace(series=series))
  figure.draw_without_rendering()
  assert "no data" not in texts_of(figure)
  drawn = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
  assert len(drawn) >= 2


def test_the_four_branches_are_means_over_seeds(findings):
  series = findings["noise_escapes"].series
  panels = FIGURES["noise_escapes"](findings["noise_escapes"]).axes
  for axes, name, geometric in zip(
    panels, ("top_eigenvalue", "distance", "test_accuracy"), (True, False, False), strict=True
  ):
    for branch, (label, color, dashes) in BRANCH_LABELS.items():
      line = line_of(axes, label)
      assert (line.get_color(), line.get_linestyle()) == (color, dashes)
      at = series["branch"] == branch
      _assert_draws(line, *_means(series, at, "examples_seen", name, geometric=geometric))
      faint = [other for other in axes.lines if other.get_alpha() and other.get_color() == color]
      seeds = [other for other in faint if other.get_linestyle() == dashes]
      assert len(seeds) == len(SEEDS)
      drawn = sorted(other.get_ydata()[-1] for other in seeds)
      np.testing.assert_allclose(
        drawn, sorted(series[name][at & (series["examples_seen"] == series["examples_seen"].max())])
      )
    (band,) = axes.patches
    assert band.get_x() == pytest.approx(simulate_dynamics.ESCAPE_EXAMPLES / 2)
    assert band.get_x() + band.get_width() == pytest.approx(simulate_dynamics.ESCAPE_EXAMPLES)


def test_unconverged_eigenvalues_are_not_drawn_and_are_counted():
  records = escape_trials()
  victim = next(r for r in records if r.trial["branch"] == "large_small" and r.trial["seed"] == SEEDS[1])
  rows = [row for row in victim.probes if row.get("measure") == "top_eigenvalue"]
  rows[2]["value"], rows[2]["error"] = 1e6, 1e6
  finding = judge_noise_escapes(STUDY, records)
  axes = FIGURES["noise_escapes"](finding).axes[0]
  assert "1 not converged, left out" in axes.get_title(loc="left")
  assert max(line.get_ydata().max() for line in axes.lines) < 1000
  line = line_of(axes, BRANCH_LABELS["large_small"][0])
  # The mean is one of all seeds, or it is not drawn: there it would jump.
  steps = [row["step"] for row in rows]
  np.testing.assert_allclose(line.get_xdata(), [32 * step for i, step in enumerate(steps) if i != 2])


def test_full_batches_approach_two_over_the_rate(findings):
  finding = findings["edge_of_stability"]
  series = finding.series
  left = FIGURES["edge_of_stability"](finding).axes[0]
  dashed = [line for line in left.lines if line.get_linestyle() == "--"]
  np.testing.assert_allclose([line.get_ydata()[0] for line in dashed], [2 / rate for rate in EDGE_RATES])
  strong = [line for line in left.lines if line.get_marker() == "o"]
  for rate, line, edge in zip(EDGE_RATES, strong, dashed, strict=True):
    at = (series["batch_size"] == TRAIN_SIZE) & (series["learning_rate"] == rate)
    _assert_draws(line, *_means(series, at, "step", "top_eigenvalue"))
    assert line.get_color() == edge.get_color()
    (name,) = [text for text in left.texts if text.get_text() == f"2 / {rate:g}"]
    assert name.get_color() == line.get_color()
    assert name.xy[1] == pytest.approx(2 / rate)


def test_every_batch_size_at_the_middle_rate_on_one_scale(findings):
  finding = findings["edge_of_stability"]
  series = finding.series
  figure = FIGURES["edge_of_stability"](finding)
  for axes, name in zip(figure.axes[1:], ("ratio", "batch_ratio"), strict=True):
    for size in EDGE_SIZES:
      at = (series["batch_size"] == size) & (series["learning_rate"] == EDGE_RATES[1])
      _assert_draws(line_of(axes, f"B = {size:,}"), *_means(series, at, "step", name))
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((PEAK_LOW, PEAK_HIGH))
    assert f"rate {EDGE_RATES[1]:g}" in axes.get_title(loc="left")
  assert figure.axes[1].get_ylim() == figure.axes[2].get_ylim()
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert labels == [
    *(f"B = {size:,}" for size in EDGE_SIZES),
    "edge of stability: 2 / rate",
    "at the edge: 0.8 to 1.25",
  ]


def test_the_rate_shown_is_one_that_was_run_at_the_most_batch_sizes():
  records = edge_trials(rates=EDGE_RATES[:1]) + edge_trials(sizes=EDGE_SIZES[2:], rates=EDGE_RATES[1:])
  figure = FIGURES["edge_of_stability"](judge_edge_of_stability(STUDY, records))
  assert f"rate {EDGE_RATES[0]:g};" in figure.axes[1].get_title(loc="left")
  assert len([line for line in figure.axes[0].lines if line.get_linestyle() == "--"]) == 3


def test_a_panel_without_a_number_says_so():
  figure = FIGURES["edge_of_stability"](judge_edge_of_stability(STUDY, edge_trials(batch_sharpness=False)))
  assert [[text.get_text() for text in axes.texts].count("not measured") for axes in figure.axes] == [0, 0, 1]
  figure = FIGURES["edge_of_stability"](judge_edge_of_stability(STUDY, edge_trials(sizes=EDGE_SIZES[:2])))
  assert [[text.get_text() for text in axes.texts].count("not measured") for axes in figure.axes] == [1, 0, 0]
  records = [
    r._replace(probes=[row for row in r.probes if row.get("measure") != "top_eigenvalue"]) for r in escape_trials()
  ]
  figure = FIGURES["noise_escapes"](judge_noise_escapes(STUDY, records))
  assert [[text.get_text() for text in axes.texts].count("not measured") for axes in figure.axes] == [1, 0, 0]


def test_a_narrow_range_still_has_numbers_on_its_axis():
  same = dict.fromkeys(simulate_dynamics.FACTORS, 1.0)
  finding = judge_noise_escapes(STUDY, escape_trials(factors=same))
  narrow = finding._replace(series=finding.series | {"top_eigenvalue": 60 + finding.series["top_eigenvalue"] / 10})
  figure = FIGURES["noise_escapes"](narrow)
  figure.draw_without_rendering()
  axes = figure.axes[0]
  low, high = axes.get_ylim()
  labels = [
    tick.label1.get_text()
    for tick in axes.yaxis.get_major_ticks() + axes.yaxis.get_minor_ticks()
    if low <= tick.get_loc() <= high and tick.label1.get_text()
  ]
  # 62 to 70 in a factor of 1.13: the ten between, at least one, carries its number.
  assert "70" in labels
