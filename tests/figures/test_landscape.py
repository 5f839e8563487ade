"""The figures of landscapes draw the numbers that the finding holds, cover nothing, and say where there is nothing."""

import matplotlib
import numpy as np
import pytest
from mpl_toolkits.mplot3d import Axes3D

from bsjax.analysis.claims_landscape import judge_sharper_line
from bsjax.figures import landscape
from bsjax.figures.landscape import FIGURES, FURTHER_FIGURES
from tests.analysis.simulate_landscape import FLOOR, GRID, STUDY, factors, paths, surroundings
from tests.figures.drawn import assert_draws_cleanly, line_of, texts_of

DRAW = FIGURES | FURTHER_FIGURES["sharper_line"]


@pytest.fixture(scope="module")
def finding():
  return judge_sharper_line(STUDY, paths(factors(3.0), batch_norm="reestimated") | surroundings())


@pytest.fixture(scope="module")
def drawn(finding):
  return {name: draw(finding) for name, draw in DRAW.items()}


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(name, finding):
  assert_draws_cleanly(DRAW[name], finding)


@pytest.mark.parametrize("name", DRAW)
def test_the_statistics_are_named(name, drawn):
  assert "statistics re-estimated at every point" in texts_of(drawn[name])


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_empty_series_say_so(name, keep_keys, finding):
  series = {
    key: np.zeros(0, np.asarray(array).dtype) for key, array in finding.series.items() if keep_keys and np.ndim(array)
  }
  assert "no data: " in texts_of(DRAW[name](finding._replace(series=series)))


@pytest.mark.parametrize("missing", ["line", "curve", "random", "trajectory", "path", "large"])
def test_what_is_missing_hinders_nothing_else(missing):
  """Lines alone, surroundings alone, one solution alone."""
  rows = {name: row for name, row in (paths(factors(3.0)) | surroundings()).items() if missing not in name}
  finding = judge_sharper_line({}, rows)
  without = {"random": 3, "line": 1, "trajectory": 1}.get(missing, 0)
  texts = [texts_of(draw(finding)) for draw in DRAW.values()]
  assert sum("no data: " in text for text in texts) == without


def test_a_loss_that_is_not_known_is_a_gap():
  rows = paths(factors(3.0)) | surroundings()
  lost = {
    name: [row | {"train_loss": None} if row["x"] <= -0.75 and "path" not in name else row for row in rows[name]]
    for name in rows
  }
  finding = judge_sharper_line(STUDY, lost)
  for draw in DRAW.values():
    figure = draw(finding)
    figure.draw_without_rendering()
    assert "no data" not in texts_of(figure)
  line = line_of(DRAW["sharper_line"](finding).axes[0], "train loss")
  assert np.isnan(line.get_ydata()[line.get_xdata() <= -0.75]).all()
  assert np.isfinite(line.get_ydata()[line.get_xdata() > -0.75]).all()


def test_single_points_are_no_surface(finding):
  series = {key: array[:1] if np.ndim(array) else array for key, array in finding.series.items()}
  one = finding._replace(series=series)
  assert ["no data: " in texts_of(draw(one)) for draw in DRAW.values()] == [False, True, True, False, True]


def test_the_lines_are_the_means_of_the_seeds(drawn, finding):
  series = finding.series
  line, curve, rises, *accuracies = drawn["sharper_line"].axes
  for axes, right, path in ((line, accuracies[0], "line"), (curve, accuracies[1], "curve")):
    for split in ("train", "test"):
      for metric, panel in (("loss", axes), ("accuracy", right)):
        drawn_line = line_of(panel, f"{split} {metric}")
        at = series["path"] == path
        want = [np.mean(series[f"{split}_{metric}"][at & (series["alpha"] == x)]) for x in np.unique(series["alpha"])]
        np.testing.assert_allclose(drawn_line.get_ydata(), want)
        assert drawn_line.get_linestyle() == {"train": "-", "test": "--"}[split]
    assert axes.get_yscale() == "log"
    assert len(axes.lines) == 2 * (5 + 1)  # each seed, and the mean, of training and test
  above = line_of(rises, "around large batch, B = 1,024")
  np.testing.assert_allclose(above.get_xdata(), [-0.25, -0.125, 0, 0.125, 0.25])
  steepness = 0.2 * np.mean(factors(3.0))
  np.testing.assert_allclose(above.get_ydata(), steepness * np.array([4, 1, 0, 1, 4]) / 64, atol=1e-12)
  assert rises.get_yscale() == "linear"
  assert "mean rise, large / small: 3.00 [2.65, 3.40]" in rises.get_title(loc="left")


def test_planes_share_one_scale_that_holds_all_values(drawn, finding):
  left, right, bar = drawn["landscape_planes"].axes
  filled = [axes.collections[0] for axes in (left, right)]
  assert filled[0].norm.vmin == filled[1].norm.vmin <= FLOOR["small"]
  assert filled[0].norm.vmax == filled[1].norm.vmax >= finding.series["plane_train_loss"].max()
  assert isinstance(filled[0].norm, matplotlib.colors.LogNorm)
  assert "training loss (log scale)" in bar.get_ylabel()
  for axes, solution in ((left, "small"), (right, "large")):
    assert axes.get_title(loc="left").startswith(f"{solution} batch, B = ")
    outlined = [text for text in axes.findobj(matplotlib.text.Text) if text.get_path_effects()]
    labels = {text.get_text() for text in outlined if text.get_visible()}
    assert len(labels) >= 3
    assert labels <= {f"{level:.3g}" for level in filled[0].levels}


def test_contours_lie_where_the_loss_has_their_level(drawn):
  """floor + 0.5 (x^2 + 4 y^2) in the first plane; between points of the grid, 1/4 apart, a parabola lies below its chord by up to
  k h^2 / 8 = 2 / 64 along y and 0.5 / 64 along x."""
  lines = drawn["landscape_planes"].axes[0].collections[1]
  checked = 0
  for level, path in zip(lines.levels, lines.get_paths(), strict=True):
    for x, y in path.vertices:
      loss = FLOOR["small"] + 0.5 * (x**2 + 4 * y**2)
      assert level - 2.5 / 64 - 1e-9 <= loss <= level + 1e-9
      checked += 1
  assert checked > 50


def test_surfaces_have_the_height_of_the_loss(finding, monkeypatch):
  given = []
  monkeypatch.setattr(Axes3D, "plot_surface", lambda self, *arrays, **options: given.append((arrays, options)))
  figure = DRAW["landscape_surfaces"](finding)
  for ((x, y, z), options), solution, factor in zip(given, ("small", "large"), (1, 2), strict=True):
    np.testing.assert_array_equal(x, np.broadcast_to(GRID, (9, 9)))
    np.testing.assert_array_equal(y, x.T)
    np.testing.assert_allclose(z, np.log10(FLOOR[solution] + factor * 0.5 * (x**2 + 4 * y**2)))
    assert (options["rcount"], options["ccount"]) == (9, 9)  # every point is drawn
  first, second = figure.axes
  assert first.get_zlim() == second.get_zlim()
  assert first.get_zlim()[0] <= np.log10(FLOOR["small"])


def test_random_lines_are_the_means_of_the_directions(drawn):
  axes = drawn["landscape_random_lines"].axes[0]
  for solution, size, factor in (("small", "32", 1), ("large", "1,024", 2)):
    line = line_of(axes, f"{solution} batch, B = {size}: train")
    want = FLOOR[solution] + factor * 0.5 * np.mean([1 / 1.5, 1, 1.5]) * GRID**2
    np.testing.assert_allclose(line.get_ydata(), want)
  assert "each of 3 directions" in axes.get_title(loc="left")


def test_the_trajectory_lies_on_its_plane(drawn):
  axes = drawn["landscape_trajectory"].axes[0]
  path = line_of(axes, "checkpoints")
  np.testing.assert_allclose(path.get_xdata(), 1.5 * np.array([1, 0.6, 0.3, 0.1, 0]))
  assert line_of(axes, "start of training").get_xydata().tolist() == [[1.5, 0.8]]
  assert line_of(axes, "its end").get_xydata().tolist() == [[0, 0]]
  assert "90 %" in axes.get_xlabel()
  assert "8 %" in axes.get_ylabel()
  assert axes.get_xlim() == (-2, 2)


@pytest.mark.parametrize(("low", "high"), [(0.01, 5.0), (1e-6, 300.0), (0.5, 0.6), (2.2, 2.3), (0.9, 12.0)])
def test_levels_are_round_enclose_the_values_and_show_the_shape(low, high):
  grid = np.array([[low, high]])
  levels = landscape._levels([(np.zeros(2), np.zeros(1), grid)])
  assert levels[0] <= low < levels[1]
  assert levels[-2] < high <= levels[-1]
  assert 8 <= len(levels) <= 24
  assert (np.diff(levels) > 0).all()
  assert [float(f"{level:.3g}") for level in levels] == pytest.approx(levels, rel=1e-9)
