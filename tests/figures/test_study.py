"""The figures draw what the findings hold, cover nothing, change no global state and save to equal bytes."""

import doctest
import re

import numpy as np
import pytest

from bsjax.analysis import Finding, judge_all
from bsjax.figures import save_figure, style
from bsjax.figures.study import FIGURES
from tests.figures.drawn import assert_draws_cleanly, texts_of
from tests.report.example import B_CRIT, S_MIN, make_claim, make_findings

CLAIM_IDS = [
  "variance_inverse_b",
  "direction_stable",
  "oscillation",
  "more_steps",
  "generalizes",
  "flat_minima",
  "throughput",
  "linear_scaling",
]
FINDINGS = {finding.claim.id: finding for finding in make_findings()}


def _line(axes, label):
  """Return the one line of `axes` whose label starts so."""
  (found,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
  return found


def _errorbar(axes, label):
  """Return x, mean and the two ends of each bar of the error-bar series whose label starts so, read off what is drawn."""
  (found,) = [container for container in axes.containers if container.get_label().startswith(label)]
  points, _, (bars,) = found
  ends = np.array([segment[:, 1] for segment in bars.get_segments()])
  return points.get_xdata(), points.get_ydata(), ends


def test_one_figure_per_claim():
  assert sorted(FIGURES) == sorted(CLAIM_IDS)


@pytest.mark.parametrize("claim_id", CLAIM_IDS)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(claim_id):
  assert_draws_cleanly(FIGURES[claim_id], FINDINGS[claim_id])


@pytest.mark.parametrize("claim_id", CLAIM_IDS)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_empty_series_say_so(claim_id, keep_keys):
  series = {
    name: np.zeros(0, np.asarray(array).dtype)
    for name, array in FINDINGS[claim_id].series.items()
    if keep_keys and np.ndim(array)
  }
  figure = FIGURES[claim_id](Finding(make_claim(claim_id, verdict="inconclusive"), series, "nothing was measured"))
  assert "no data: nothing was measured" in texts_of(figure)


@pytest.mark.parametrize("claim_id", CLAIM_IDS)
def test_a_single_point_is_drawn(claim_id):
  finding = FINDINGS[claim_id]
  series = {name: array[:1] if np.ndim(array) else np.asarray(np.nan) for name, array in finding.series.items()}
  figure = FIGURES[claim_id](finding._replace(claim=finding.claim._replace(n=None), series=series))
  figure.draw_without_rendering()
  assert "no data" not in texts_of(figure)


@pytest.mark.parametrize("claim_id", CLAIM_IDS)
def test_batch_sizes_are_labelled_with_powers_of_two(claim_id):
  figure = FIGURES[claim_id](FINDINGS[claim_id])
  figure.draw_without_rendering()
  axes_list = [axes for axes in figure.axes if axes.get_xlabel().startswith("batch size")]
  assert axes_list
  for axes in axes_list:
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{2**power:,}" for power in range(11)]


def test_a_long_batch_axis_thins_its_labels_to_powers_of_two():
  _, (axes,) = style.new_figure("?")
  style.batch_size_axis(axes, np.array([1, 50_000]))
  ticks = axes.get_xticks()
  assert len(ticks) <= style.MAX_TICKS
  assert set(np.log2(ticks) % 1) == {0.0}


def test_mean_and_standard_error_against_hand_arithmetic():
  keys, means, bars = style.mean_and_error(np.array([8, 2, 8, 8, 2]), np.array([1.0, 5.0, 2.0, 6.0, np.nan]))
  assert keys.tolist() == [2, 8]
  assert means.tolist() == [5.0, 3.0]
  # Deviations -2, -1, 3: sum of squares 14, over n - 1 = 2 is 7; the standard error is sqrt(7/3). One value has no spread.
  np.testing.assert_allclose(bars, [[0.0, np.sqrt(7 / 3)]] * 2, rtol=1e-14)


def test_geometric_mean_and_its_factor():
  _, means, bars = style.mean_and_error(np.array([1, 1]), np.array([2.0, 8.0]), geometric=True)
  # Base-2 logarithms 1 and 3: mean 2, standard error sqrt(2)/sqrt(2) = 1, so 4 with a factor of 2 each way.
  np.testing.assert_allclose(means, [4.0], rtol=1e-14)
  np.testing.assert_allclose(bars, [[2.0], [4.0]], rtol=1e-14)


def test_measurements_with_their_own_errors_are_pooled():
  _, (axes,) = style.new_figure("?")
  x, y, sem = np.array([4, 4, 1]), np.array([1.0, 3.0, 9.0]), np.array([0.3, 0.4, 0.2])
  style.draw_measurements(axes, x, y, sem, color="k", label="m")
  drawn_x, means, ends = _errorbar(axes, "m")
  assert list(drawn_x) == [1, 4]
  assert list(means) == [9.0, 2.0]
  # sqrt(0.3^2 + 0.4^2) / 2 = 0.25.
  np.testing.assert_allclose(ends, [[8.8, 9.2], [1.75, 2.25]], rtol=1e-14)


def test_variance_is_drawn_beside_its_prediction():
  finding = FINDINGS["variance_inverse_b"]
  left, right = FIGURES["variance_inverse_b"](finding).axes
  series = finding.series
  for step in (0, 100, 400):
    chosen = series["step"] == step
    _, means, _ = _errorbar(left, f"measured, step {step}")
    np.testing.assert_allclose(
      means, [series["variance"][chosen & (series["batch_size"] == size)].mean() for size in 2 ** np.arange(11)]
    )
  dashed = [line for line in left.lines if line.get_linestyle() == "--"]
  levels = {
    step: series["predicted"][(series["step"] == step) & (series["batch_size"] == 1)][0] for step in (0, 100, 400)
  }
  np.testing.assert_allclose(sorted(line.get_ydata()[0] for line in dashed), sorted(levels.values()))
  ratios = np.concatenate([line.get_ydata() for line in right.lines if line.get_alpha() is not None])
  np.testing.assert_allclose(np.sort(ratios), np.sort(series["variance"] / series["predicted"]))


def test_the_whole_data_set_as_one_batch_has_no_variance_to_draw():
  finding = FINDINGS["variance_inverse_b"]
  series = {name: array.astype(float) for name, array in finding.series.items()}
  largest = series["batch_size"] == 1024
  series["predicted"][largest] = series["variance"][largest] = series["variance_sem"][largest] = 0.0
  left, right = FIGURES["variance_inverse_b"](finding._replace(series=series)).axes
  for axes in (left, right):
    assert axes.get_xlim()[1] < 1024
    assert all(np.isfinite(line.get_ydata()).all() for line in axes.lines)


def test_steps_to_target_show_fit_critical_interval_and_seeds_that_never_arrived():
  finding = FINDINGS["more_steps"]
  figure = FIGURES["more_steps"](finding)
  (axes,) = figure.axes
  fit = _line(axes, "fit")
  np.testing.assert_allclose(fit.get_ydata(), S_MIN * (1 + B_CRIT / fit.get_xdata()))
  perfect = _line(axes, "perfect scaling")
  assert perfect.get_linestyle() == "--"
  np.testing.assert_allclose(perfect.get_xdata() * perfect.get_ydata(), S_MIN * (1 + B_CRIT))
  assert _line(axes, "B$_{crit}$").get_xdata() == [B_CRIT, B_CRIT]
  (span,) = [patch for patch in axes.patches if "interval" in str(patch.get_label())]
  assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx((39.0, 55.2))

  # At B = 1024 two of three seeds never arrived: crosses with their number, and no mean of the one that did.
  never = _line(axes, "target never reached")
  assert never.get_xdata().tolist() == [1024]
  assert [text.get_text() for text in axes.texts] == ["2"]
  sizes, means, ends = _errorbar(axes, "geometric mean over seeds")
  assert sizes.tolist() == (2 ** np.arange(10)).tolist()
  series = finding.series
  logs = np.array([np.log(series["steps"][series["batch_size"] == size]) for size in sizes])
  np.testing.assert_allclose(means, np.exp(logs.mean(axis=1)))
  factor = np.exp(logs.std(axis=1, ddof=1) / np.sqrt(3))
  np.testing.assert_allclose(ends, np.stack([means / factor, means * factor], axis=1))


@pytest.mark.parametrize("low", [np.nan, 39.0])
def test_an_unbounded_or_missing_critical_batch_size_keeps_the_axis(low):
  finding = FINDINGS["more_steps"]
  unknown = {
    "critical_batch_size": np.asarray(np.nan),
    "critical_low": np.asarray(low),
    "critical_high": np.asarray(np.nan),
  }
  (axes,) = FIGURES["more_steps"](finding._replace(series=finding.series | unknown)).axes
  # The margin of the batch-size axis: 0.4 doublings on either side.
  assert axes.get_xlim() == pytest.approx((1 / 2**0.4, 1024 * 2**0.4))
  spans = [patch for patch in axes.patches if "interval" in str(patch.get_label())]
  assert len(spans) == np.isfinite(low)
  assert not any(str(line.get_label()).startswith("B$_{crit}$") for line in axes.lines)


@pytest.mark.parametrize(
  ("claim_id", "name", "forward", "back"),
  [("generalizes", "test_accuracy", np.asarray, np.asarray), ("flat_minima", "sharpness", np.log, np.exp)],
)
def test_both_budgets_are_drawn(claim_id, name, forward, back):
  series = FINDINGS[claim_id].series
  (axes,) = FIGURES[claim_id](FINDINGS[claim_id]).axes
  for budget in ("epochs", "steps"):
    sizes, means, ends = _errorbar(axes, f"equal {budget}")
    values = forward(
      np.array([series[name][(series["budget"] == budget) & (series["batch_size"] == size)] for size in sizes])
    )
    assert values.shape == (11, 3)
    center, sem = values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(means, back(center))
    np.testing.assert_allclose(ends, np.stack([back(center - sem), back(center + sem)], axis=1))


def test_eigenvalues_that_have_not_converged_enter_no_mean():
  finding = FINDINGS["flat_minima"]
  sharpness = np.array([4.0, 16.0, 100.0, -1.0])
  series = {
    "budget": np.array(["epochs"] * 4),
    "batch_size": np.array([8, 8, 8, 8]),
    "seed": np.arange(4),
    "sharpness": sharpness,
    "residual": np.array([0.004, 0.0, np.inf, 0.0]),
  }
  (axes,) = FIGURES["flat_minima"](finding._replace(series=series)).axes
  _, means, _ = _errorbar(axes, "equal epochs")
  # The geometric mean of 4 and 16 alone.
  np.testing.assert_allclose(means, [8.0])
  assert _line(axes, "not converged").get_ydata().tolist() == [100.0]
  assert "residual at most 0.001 λ₁; 2 eigenvalues not converged" in axes.get_title(loc="left")


def test_oscillation_draws_spread_and_curves():
  series = FINDINGS["oscillation"].series
  left, right = FIGURES["oscillation"](FINDINGS["oscillation"]).axes
  _, spread, ends = _errorbar(left, "mean spread")
  np.testing.assert_allclose(spread, series["spread"])
  np.testing.assert_allclose(ends.T, [series["spread"] - series["spread_sem"], series["spread"] + series["spread_sem"]])
  for size in (4, 32, 256):
    np.testing.assert_allclose(
      _line(right, f"trend at B = {size}").get_ydata(), series["curve_trend"][series["curve_batch_size"] == size]
    )
  assert len(right.lines) == 6


def test_throughput_marks_medians_knee_and_linear_growth():
  series = FINDINGS["throughput"].series
  left, right = FIGURES["throughput"](FINDINGS["throughput"]).axes
  for axes, values in ((left, series["examples_per_second"]), (right, 1000 * series["seconds_per_step"])):
    medians = [np.median(values[series["batch_size"] == size]) for size in 2 ** np.arange(11)]
    np.testing.assert_allclose(_line(axes, "median over repeats").get_ydata(), medians)
    # Twice the batch, twice the examples per second; the time of a step stays that of the smallest batch.
    growth = 2.0 ** np.arange(11) if axes is left else np.ones(11)
    np.testing.assert_allclose(_line(axes, "linear growth").get_ydata(), medians[0] * growth)
    assert _line(axes, "knee").get_xdata() == [64.0, 64.0]


def test_rates_at_the_edge_of_their_grid_are_hollow_and_explained():
  (axes, _) = FIGURES["linear_scaling"](FINDINGS["linear_scaling"]).axes
  hollow = _line(axes, "best rate at its grid's edge")
  assert hollow.get_xdata().tolist() == [1024]
  assert hollow.get_markerfacecolor() == "white"
  filled = _line(axes, "best rate (slope 0.97")
  assert filled.get_xdata().tolist() == (2 ** np.arange(10)).tolist()
  assert filled.get_markerfacecolor() != "white"
  rule = _line(axes, "linear rule")
  np.testing.assert_allclose(rule.get_ydata() / rule.get_xdata(), rule.get_ydata()[0])
  root = _line(axes, "square-root rule")
  np.testing.assert_allclose(root.get_ydata() ** 2 / root.get_xdata(), root.get_ydata()[0] ** 2)


def test_grid_points_are_coloured_by_their_excess_over_the_fewest_steps():
  finding = FINDINGS["linear_scaling"]
  grid = {
    "grid_batch_size": np.array([2, 2, 2, 4, 4]),
    "grid_learning_rate": np.array([0.1, 0.2, 0.4, 0.1, 0.2]),
    "grid_score": np.array([30.0, 20.0, np.nan, 90.0, 10.0]),
  }
  (axes, _) = FIGURES["linear_scaling"](finding._replace(series=finding.series | grid)).axes
  (points,) = axes.collections
  # 30/20, 20/20, 90/10 (shown as 4 or more), 10/10; the rate without a score is a cross.
  np.testing.assert_allclose(points.get_array(), [1.5, 1.0, 4.0, 1.0])
  assert _line(axes, "a seed diverged").get_ydata().tolist() == [0.4]


@pytest.mark.parametrize("claim_id", ["generalizes", "linear_scaling"])
def test_saving_twice_gives_equal_bytes_without_a_date(claim_id, tmp_path):
  once = save_figure(FIGURES[claim_id](FINDINGS[claim_id]), tmp_path / "a", claim_id)
  figure = FIGURES[claim_id](FINDINGS[claim_id])
  save_figure(figure, tmp_path / "b", claim_id)
  again = save_figure(figure, tmp_path / "b", claim_id)
  assert [path.name for path in once] == [f"{claim_id}.png", f"{claim_id}.pdf"]
  for first, second in zip(once, again, strict=True):
    content = first.read_bytes()
    assert content == second.read_bytes()
    assert not re.search(rb"CreationDate|ModDate|tIME|Software", content)
  assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(path.name for path in once)


def test_documented_examples():
  failed, tried = doctest.testmod(style)
  assert tried >= 2
  assert failed == 0


def test_the_findings_of_an_empty_study_are_drawn():
  target = {"metric": "validation_accuracy", "goal": 0.9, "direction": "max"}
  for finding in judge_all({"target": target, "batch_sizes": [1, 2]}, []):
    assert "no data" in texts_of(FIGURES[finding.claim.id](finding))
