"""The figures of the scaling rules draw what the finding holds, through 1 where nothing changes, and cover nothing."""

import matplotlib.collections
import numpy as np
import pytest

from bsjax.analysis import Finding
from bsjax.analysis.claims_scaling import ADAM_RULE, judge_no_rule_fits_all
from bsjax.analysis.regret import RULES
from bsjax.figures.scaling import COLORS, FIGURES, FURTHER_FIGURES, LABELS
from tests.analysis.simulate_lattice import BASE, FACTOR, FEWEST, SIZES, bent, lattice_record, simulate
from tests.figures.drawn import assert_draws_cleanly, line_of, texts_of
from tests.report.example import make_claim

DRAW = FIGURES | FURTHER_FIGURES["no_rule_fits_all"]
SCALES = dict.fromkeys(SIZES, 20.0)


@pytest.fixture(scope="module")
def finding():
  study, records = simulate(bent(16), noise=0.1, optimizers=("sgd", "momentum", "adam"), scales=SCALES)
  for size, ratio in ((1, 1.3), (16, 1.1), (64, FACTOR)):
    records += [lattice_record("adam", size, 0.3, k, ratio * FEWEST, kind="adam_sqrt") for k in range(4)]
  return judge_no_rule_fits_all(study, records)


def series_of(finding, prefix, name, **where):
  keep = np.logical_and.reduce([finding.series[prefix + key] == value for key, value in where.items()])
  return finding.series[prefix + name][keep]


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(name, finding):
  assert_draws_cleanly(DRAW[name], finding)


@pytest.mark.parametrize("name", DRAW)
def test_one_optimizer_alone_and_sizes_that_are_no_powers_of_two(name):
  assert_draws_cleanly(DRAW[name], judge_no_rule_fits_all(*simulate(bent(16), noise=0.1, sizes=(3, 10, 70))))


def test_two_batch_sizes_have_one_pair_at_each_ratio_and_whole_bands():
  figure = DRAW["no_rule_fits_all"](finding := judge_no_rule_fits_all(*simulate(bent(16), noise=0.4, sizes=(4, 16))))
  (axes,) = figure.axes
  assert axes.get_title(loc="left").endswith("pairs at each ratio: 1")
  assert 0.95 * 0.8 > np.nanmin(finding.series["curve_low"]) > axes.get_ylim()[0]
  assert_draws_cleanly(DRAW["no_rule_fits_all"], finding)


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_without_data_the_figure_says_why(name, keep_keys, finding):
  series = {key: np.empty(0) for key in finding.series} if keep_keys else {}
  scalars = {"limit": np.asarray(4.0), "reference": np.asarray(4.0)}
  empty = Finding(make_claim(name, verdict="inconclusive"), series | scalars, "Nothing was measured because of rain.")
  assert "no data: Nothing was measured because of rain." in texts_of(DRAW[name](empty))


def test_every_rule_is_a_line_of_its_regrets_through_one(finding):
  figure = DRAW["no_rule_fits_all"](finding)
  assert [axes.get_title(loc="left").split(":")[0] for axes in figure.axes] == ["sgd", "momentum", "adam"]
  for axes, optimizer in zip(figure.axes, ("sgd", "momentum", "adam"), strict=True):
    for rule in RULES:
      line = line_of(axes, LABELS[rule])
      points = dict(zip(*line.get_data(), strict=True))
      assert points.pop(1.0) == 1.0
      assert list(points) == series_of(finding, "curve_", "factor", optimizer=optimizer, rule=rule).tolist()
      assert list(points.values()) == series_of(finding, "curve_", "regret", optimizer=optimizer, rule=rule).tolist()
    bands = [c for c in axes.collections if isinstance(c, matplotlib.collections.PolyCollection)]
    low, high = (series_of(finding, "curve_", end, optimizer=optimizer, rule="none") for end in ("low", "high"))
    heights = bands[0].get_paths()[0].vertices[:, 1]
    assert {*low.tolist(), *high.tolist(), 1.0} == set(heights)
    assert axes.get_title(loc="left").endswith("pairs at each ratio: 1–4")  # five sizes: 1 pair at 256, 4 at 4
  lowest = min(np.nanmin(finding.series["curve_low"]), 0.8)
  assert all(axes.get_ylim()[0] <= lowest for axes in figure.axes)  # no band is cut


def test_the_map_has_a_cell_for_each_rate_that_arrives_and_a_cross_elsewhere(finding):
  figure = DRAW["scaling_lattice"](finding)
  axes = figure.axes[0]
  reached = series_of(finding, "lattice_", "reached", optimizer="sgd")
  size, rate, steps = (
    series_of(finding, "lattice_", name, optimizer="sgd") for name in ("batch_size", "rate", "steps")
  )
  assert len(axes.patches) == (reached > 0).sum()
  for patch, b, each in zip(axes.patches, size[reached > 0], rate[reached > 0], strict=True):
    left, bottom, right, top = *patch.get_xy(), patch.get_x() + patch.get_width(), patch.get_y() + patch.get_height()
    assert (left * right) ** 0.5 == pytest.approx(b)  # log axes: cells lie about their points in the geometric middle
    assert (bottom * top) ** 0.5 == pytest.approx(each)
    assert top / bottom == pytest.approx(2**0.5)
  crosses = next(line for line in axes.lines if line.get_marker() == "x")
  assert sorted(crosses.get_ydata()) == sorted(rate[reached == 0])
  fastest = np.argmin(np.where(size[reached > 0] == 16, steps[reached > 0], np.inf))
  brightness = [sum(patch.get_facecolor()[:3]) for patch in axes.patches]
  assert brightness[fastest] == max(brightness)
  best = line_of(axes, "best rate")
  assert best.get_xdata().tolist() == list(SIZES)
  assert best.get_ydata().tolist() == series_of(finding, "best_", "rate", optimizer="sgd").tolist()


def test_the_rules_lines_leave_from_the_reference(finding):
  axes = DRAW["scaling_lattice"](finding).axes[0]
  start = series_of(finding, "reference_", "rate", optimizer="sgd", batch_size=SIZES[1])[0]
  assert start / BASE == pytest.approx(4, rel=0.5)  # the best rate there is 4 BASE; luck may move it by a place
  for rule, power in (("none", 0), ("sqrt", 0.5), ("linear", 1)):
    line = line_of(axes, LABELS[rule])
    assert line.get_color() == COLORS[rule]
    assert line.get_ydata() == pytest.approx(start * (np.array(SIZES) / SIZES[1]) ** power)


def test_adams_rule_is_drawn_where_it_was_measured(finding):
  sgd, _, adam = DRAW["scaling_reference"](finding).axes
  assert "batch size 4?" in texts_of(sgd.figure)
  shown = {container.get_label(): container for container in adam.containers}
  x, y = shown[LABELS[ADAM_RULE]].lines[0].get_data()
  expected = series_of(finding, "reference_", "regret", optimizer="adam", rule=ADAM_RULE)
  assert y.tolist() == expected[np.isfinite(expected)].tolist()
  assert x == pytest.approx([1, 16, 64], rel=0.3)  # moved aside a little, so that rules do not cover each other
  assert LABELS[ADAM_RULE] not in {container.get_label() for container in sgd.containers}
