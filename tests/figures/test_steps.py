"""The figures of sweeps draw what the findings hold, mark what is doubtful, and cover nothing."""

import numpy as np
import pytest

from bsjax.analysis import Finding
from bsjax.analysis.claims_quality import judge_same_best_error
from bsjax.analysis.claims_steps import (
  judge_lr_sensitivity,
  judge_momentum_extends_scaling,
  judge_three_regimes,
)
from bsjax.figures import style
from bsjax.figures.steps import FIGURES, FURTHER_FIGURES, OUTCOMES
from tests.analysis import test_claims_quality
from tests.analysis.test_claims_steps import SIZES, swept
from tests.figures.drawn import assert_draws_cleanly, line_of, texts_of
from tests.report.example import make_claim

DRAW = FIGURES | FURTHER_FIGURES["three_regimes"]


@pytest.fixture(scope="module")
def findings():
  sweeps = {
    "sgd": swept("sgd", critical=16.0, diverged=2, edges={4: {"learning_rate": "high"}}),
    "momentum": swept("momentum", critical=128.0, seed=1),
  }
  found = [judge(sweeps) for judge in (judge_three_regimes, judge_momentum_extends_scaling, judge_lr_sensitivity)]
  quality = {name: test_claims_quality.swept([0.05] * 4, seed=seed) for seed, name in enumerate(sweeps)}
  found.append(judge_same_best_error(quality))
  return {finding.claim.id: finding for finding in found} | dict.fromkeys(("trial_states", "budget_curves"), found[0])


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(name, findings):
  assert_draws_cleanly(DRAW[name], findings[name])


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_without_data_the_figure_says_why(name, keep_keys, findings):
  series = {key: np.empty(0) for key in findings[name].series} if keep_keys else {}
  finding = Finding(make_claim(name, verdict="inconclusive"), series, "Nothing was measured because of rain.")
  assert "no data: Nothing was measured because of rain." in texts_of(DRAW[name](finding))


def points_of(axes, color) -> tuple[list[float], list[float]]:
  """Returns where the large marks of a colour stand."""
  lines = [line for line in axes.lines if line.get_color() == color and line.get_markersize() == 5.5]
  return tuple(
    np.concatenate([np.asarray(get(line), float) for line in lines]).tolist()
    for get in (lambda line: line.get_xdata(), lambda line: line.get_ydata())
  )


def test_the_curve_and_its_examples_are_drawn(findings):
  finding = findings["three_regimes"]
  figure = DRAW["three_regimes"](finding)
  left, right = figure.axes
  at = finding.series["optimizer"] == "momentum"
  steps = finding.series["steps"][at]
  x, y = points_of(left, style.VERMILION)
  assert x == list(SIZES)
  np.testing.assert_allclose(y, steps)
  x, y = points_of(right, style.VERMILION)
  np.testing.assert_allclose(y[: len(SIZES)], steps * SIZES)
  np.testing.assert_allclose(y[len(SIZES) :], finding.series["train_steps"][at] * SIZES)
  dotted = [line for line in left.lines if line.get_linestyle() == ":" and line.get_color() == style.VERMILION]
  np.testing.assert_allclose(dotted[0].get_ydata(), steps[0] / np.array(SIZES))
  dashed = [line for line in left.lines if line.get_linestyle() == "--" and line.get_color() == style.VERMILION]
  critical = finding.series["critical"][finding.series["curve_optimizer"] == "momentum"][0]
  fitted = dashed[0].get_ydata()
  assert fitted[0] / fitted[-1] == pytest.approx((1 + critical) / (1 + critical / SIZES[-1]))
  examples = next(line for line in right.lines if line.get_linestyle() == "--" and line.get_color() == style.VERMILION)
  np.testing.assert_allclose(examples.get_ydata(), fitted * dashed[0].get_xdata())


def test_all_trials_are_counted_in_the_bars(findings):
  finding = findings["trial_states"]
  figure = DRAW["trial_states"](finding)
  assert [axes.get_title(loc="left") for axes in figure.axes] == ["sgd", "momentum"]
  for axes, name in zip(figure.axes, ("sgd", "momentum"), strict=True):
    at = finding.series["state_optimizer"] == name
    heights = [[bar.get_height() for bar in group] for group in axes.containers]
    np.testing.assert_allclose(heights, [finding.series[outcome][at] for outcome in OUTCOMES])
    assert np.sum(heights, axis=0).tolist() == [48] * len(SIZES)
    floors = [[bar.get_y() for bar in group] for group in axes.containers]
    np.testing.assert_allclose(floors, np.cumsum([np.zeros(len(SIZES)), *heights[:-1]], axis=0))


def test_budgets_buy_what_the_series_say(findings):
  finding = findings["budget_curves"]
  steps, epochs = DRAW["budget_curves"](finding).axes
  for axes, unit in ((steps, "steps"), (epochs, "epochs")):
    lines = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata())]
    at = finding.series["budget_unit"] == unit
    budgets = np.unique(finding.series["budget"][at])
    assert len(lines) == len(budgets) == 4
    for line, budget in zip(lines, budgets, strict=True):
      here = at & (finding.series["budget"] == budget) & np.isfinite(finding.series["budget_best"])
      np.testing.assert_array_equal(line.get_xdata(), finding.series["budget_batch_size"][here])
      np.testing.assert_allclose(line.get_ydata(), finding.series["budget_best"][here])
  hollow = [line for line in steps.lines if line.get_fillstyle() == "none"]
  reached = finding.series["budget_reached"] & (finding.series["budget_unit"] == "steps")
  assert sum(len(line.get_xdata()) for line in hollow) == reached.sum() > 0


def test_doubtful_rates_are_hollow(findings):
  finding = findings["lr_sensitivity"]
  left, _ = DRAW["lr_sensitivity"](finding).axes
  hollow = [line for line in left.lines if line.get_fillstyle() == "none" and line.get_color() == style.BLUE]
  assert np.concatenate([line.get_xdata() for line in hollow]).tolist() == [4]
  best = finding.series["best"][finding.series["optimizer"] == "sgd"]
  assert np.concatenate([line.get_ydata() for line in hollow]) == pytest.approx(best[1:2])


def test_momentum_is_drawn_with_both_critical_batch_sizes(findings):
  finding = findings["momentum_extends_scaling"]
  (axes,) = DRAW["momentum_extends_scaling"](finding).axes
  labels = [str(line.get_label()) for line in axes.lines]
  without, with_it = (finding.series[f"critical_{word}"].item() for word in ("without", "with"))
  assert line_of(axes, f"critical batch size without momentum: {without:,.0f}").get_xdata()[0] == pytest.approx(without)
  assert f"critical batch size with momentum: {with_it:,.0f}" in labels
  (bars,) = axes.containers
  np.testing.assert_allclose(bars[0].get_ydata(), finding.series["ratio"])


def test_each_seed_and_the_mean_of_every_batch_size_are_drawn(findings):
  finding = findings["same_best_error"]
  (axes,) = DRAW["same_best_error"](finding).axes
  faint = [line for line in axes.lines if line.get_alpha() == 0.3]
  assert sum(len(line.get_xdata()) for line in faint) == len(finding.series["error"]) == 32
  assert axes.get_ylim()[0] == 0
