"""The figures of gradient noise draw what the findings hold, mark what is not identifiable, and cover nothing."""

import numpy as np
import pytest

from bsjax.analysis import (
  Finding,
  judge_estimators_agree,
  judge_layernorm_predicts_total,
  judge_noise_grows,
  judge_temperature,
)
from bsjax.analysis.claim import columns
from bsjax.figures import (
  FIGURES,
  FURTHER_FIGURES,
  dynamics,
  estimators,
  landscape,
  large_batch,
  noise,
  pretrain,
  scaling,
  sharpness,
  steps,
  study,
)
from tests.analysis import simulate_noise
from tests.figures.drawn import assert_draws_cleanly, line_of, texts_of
from tests.report.example import make_claim

DRAW = (
  noise.FIGURES
  | estimators.FIGURES
  | {name: draw for more in noise.FURTHER_FIGURES.values() for name, draw in more.items()}
)


def coverage_finding():
  """Returns cells of the coverage experiment as they should be: 95 % where intervals are given, none where nothing can be said."""
  rng, rows = np.random.default_rng(0), []
  for problem in ("linear_gaussian", "linear_decaying", "logistic", "student_t"):
    for scale in 10.0 ** np.arange(1, 7):
      for regime, given in (("hopeless", 0), ("borderline", 800), ("clear", 1990), ("ample", 2000)):
        covered = rng.binomial(given, 0.95) / given if given else np.nan
        half = 1.96 * np.sqrt(0.95 * 0.05 / given) if given else np.nan
        rows.append((problem, scale, regime, 100 * scale, given / 2000, covered, covered - half, covered + half))
    rows.append((problem, np.nan, "zero gradient", 100, 0.0, np.nan, np.nan, np.nan))
  names = "problem noise_scale regime num_examples share_given coverage coverage_low coverage_high"
  return Finding(make_claim("coverage"), columns(names, rows), "a reading")


@pytest.fixture(scope="module")
def findings():
  along = simulate_noise.along_trials(sem=0.02)
  found = [judge(simulate_noise.STUDY, along) for judge in (judge_noise_grows, judge_estimators_agree)]
  found.append(judge_layernorm_predicts_total(simulate_noise.STUDY, along))
  found.append(judge_temperature(simulate_noise.STUDY, simulate_noise.temperature_trials()))
  found.append(coverage_finding())
  by_name = {finding.claim.id: finding for finding in found}
  return by_name | {name: by_name[claim] for claim, more in noise.FURTHER_FIGURES.items() for name in more}


def _hollow(axes):
  """Return the points of all open markers."""
  lines = [line for line in axes.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
  return np.concatenate([line.get_xydata() for line in lines])


def test_every_claim_has_its_figure():
  rooms = (study, noise, estimators, sharpness, landscape, dynamics, steps, scaling, large_batch, pretrain)
  assert set(FIGURES) == {name for room in rooms for name in room.FIGURES}
  assert len(FIGURES) == sum(len(room.FIGURES) for room in rooms)
  further = [getattr(room, "FURTHER_FIGURES", {}) for room in rooms]
  assert {name: figures for each in further for name, figures in each.items()} == FURTHER_FIGURES
  assert set(FURTHER_FIGURES) <= set(FIGURES)
  assert not set(DRAW) & set(study.FIGURES)


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(name, findings):
  assert_draws_cleanly(DRAW[name], findings[name])


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_empty_series_say_so(name, keep_keys, findings):
  series = {
    key: np.zeros(0, np.asarray(array).dtype)
    for key, array in findings[name].series.items()
    if keep_keys and np.ndim(array)
  }
  figure = DRAW[name](Finding(make_claim(name, verdict="inconclusive"), series, "nothing was measured"))
  assert "no data: " in texts_of(figure)


@pytest.mark.parametrize("name", DRAW)
def test_a_single_point_is_drawn(name, findings):
  series = {key: array[:1] if np.ndim(array) else np.asarray(np.nan) for key, array in findings[name].series.items()}
  if name == "temperature":  # a point that belongs to a branch
    series = {key: array[-1:] for key, array in findings[name].series.items()}
    series["phase"] = np.array(["during"])
  figure = DRAW[name](findings[name]._replace(series=series))
  figure.draw_without_rendering()
  assert "no data" not in texts_of(figure)


def test_the_noise_scale_is_the_geometric_mean_of_seeds_with_its_band(findings):
  series = findings["noise_grows"].series
  axes = DRAW["noise_grows"](findings["noise_grows"]).axes[0]
  at = (series["batch_size"] == 32) & (series["step"] == 4)
  line = line_of(axes, "B = 32, rate 0.1")
  (place,) = np.flatnonzero(np.isclose(line.get_xdata(), 128))
  assert line.get_ydata()[place] == pytest.approx(np.exp(np.log(series["noise_scale"][at]).mean()))
  band = axes.collections[-1].get_paths()[0].vertices
  ends = np.exp([np.log(series[name][at]).mean() for name in ("low", "high")])
  np.testing.assert_allclose(sorted(band[np.isclose(band[:, 0], 128), 1]), ends)


def test_what_is_not_identifiable_is_an_open_marker_and_the_legend_says_so(findings):
  finding = findings["noise_grows"]
  series = finding.series
  figure = DRAW["noise_grows"](finding)
  points = _hollow(figure.axes[0])
  keys = np.stack([series["batch_size"], series["learning_rate"], series["step"]])
  lost = np.unique(keys[:, ~series["identified"].astype(bool)], axis=1).T
  assert len(points) == len(lost) > 0
  for size, rate, step in lost:
    at = (series["batch_size"] == size) & (series["learning_rate"] == rate) & (series["step"] == step)
    value = np.exp(np.log(series["dataset_noise_scale"][at]).mean())
    assert np.isclose(points, [size * step, value]).all(axis=1).any()
    line = line_of(figure.axes[0], f"B = {size:,.0f}, rate {rate:.3g}")
    assert np.isnan(line.get_ydata()[line.get_xdata() == size * step]).all()
  assert noise.OPEN in [text.get_text() for text in figure.legends[0].get_texts()]
  sure = judge_noise_grows(simulate_noise.STUDY, simulate_noise.along_trials(sem=1e-6))
  known = np.isfinite(sure.series["form_value"])
  forms = {name: array[known] for name, array in sure.series.items() if name.startswith("form")}
  sure = sure._replace(series=sure.series | forms)
  assert noise.OPEN not in texts_of(DRAW["noise_grows"](sure))


def test_three_forms_and_every_layer_stand_beside_the_total(findings):
  right = DRAW["noise_grows"](findings["noise_grows"]).axes[1]
  for label, factor in (("Hessian form: tr(HΣ) / G'HG", 0.3), ("in Adam's metric (heuristic)", 1.5)):
    assert line_of(right, label).get_ydata()[0] == pytest.approx(10 * factor)
  labels = [line.get_label() for line in DRAW["noise_layers"](findings["noise_layers"]).axes[0].lines]
  assert set(simulate_noise.LAYERS) | {"all parameters"} <= set(labels)


def test_many_layers_are_thinned_to_the_noisiest(findings):
  series = dict(findings["noise_layers"].series)
  names = [f"Dense_{index:02d}" for index in range(12)]
  copies = {key: np.tile(array, 12) for key, array in series.items() if key.startswith("layer")}
  size = len(series["layer"])
  copies["layer"] = np.repeat(names, size)
  copies["layer_dataset_noise_scale"] = copies["layer_dataset_noise_scale"] * np.repeat(2.0 ** np.arange(12), size)
  figure = DRAW["noise_layers"](findings["noise_layers"]._replace(series=series | copies))
  labels = [line.get_label() for line in figure.axes[0].lines if str(line.get_label()).startswith("Dense")]
  assert labels == names[-noise.MOST_LAYERS :]
  assert "the noisiest 8 of 12 layers" in texts_of(figure)


def test_temperature_shows_the_predicted_and_the_measured_factor(findings):
  finding = findings["temperature"]
  left, right = DRAW["temperature"](finding).axes
  series = finding.series
  ticks = [text.get_text() for text in right.get_yticklabels()]
  assert ticks == list(series["factor_branch"])
  np.testing.assert_allclose(line_of(right, "predicted: T / T'").get_xdata(), series["predicted"])
  bars = [container for container in right.containers if container[0].get_marker() == "o"]
  np.testing.assert_allclose([bar[0].get_xdata()[0] for bar in bars], series["factor"])
  ends = [bar[2][0].get_segments()[0][:, 0] for bar in bars]
  np.testing.assert_allclose(ends, np.stack([series["factor_low"], series["factor_high"]], axis=1))
  line = line_of(left, "B x 16")
  at = (series["branch"] == "B x 16") & (series["examples_seen"] == line.get_xdata()[3])
  assert line.get_ydata()[3] == pytest.approx(np.exp(np.log(series["noise_scale"][at].astype(float)).mean()))


def test_estimators_show_each_error_and_the_rounding(findings):
  finding = findings["estimators_agree"]
  left, right = DRAW["estimators_agree"](finding).axes
  series = finding.series
  drawn = np.concatenate([line.get_ydata() for line in left.lines if line.get_marker() == "o"])
  np.testing.assert_allclose(np.sort(drawn), np.sort(series["z"][series["route"] != "ghost"]))
  at = (series["route"] == "ghost") & (series["quantity"] == "grad_sq_norm")
  np.testing.assert_allclose(line_of(right, "ghost, |G|²").get_ydata(), series["relative_error"][at])


def test_the_layernorm_fit_is_the_finding_s(findings):
  finding = findings["layernorm_predicts_total"]
  axes = DRAW["layernorm_predicts_total"](finding).axes[0]
  (fit,) = [line for line in axes.lines if str(line.get_label()).startswith("fit")]
  slope, log_factor = float(finding.series["slope"]), float(finding.series["log_factor"])
  np.testing.assert_allclose(np.log(fit.get_ydata()), log_factor + slope * np.log(fit.get_xdata()))
  assert len(axes.collections[0].get_offsets()) == len(finding.series["total"])


def test_coverage_shows_every_cell_with_its_interval_and_how_often_one_is_given(findings):
  series = findings["coverage"].series
  left, right = DRAW["coverage"](findings["coverage"]).axes
  given = np.isfinite(series["coverage"])
  drawn = np.concatenate([bars[0].get_ydata() for bars in left.containers])
  np.testing.assert_allclose(np.sort(drawn), np.sort(series["coverage"][given]))
  ends = np.concatenate([np.array(bars[2][0].get_segments()).reshape(-1, 2, 2)[:, :, 1] for bars in left.containers])
  np.testing.assert_allclose(np.sort(ends[:, 0]), np.sort(series["coverage_low"][given]))
  x = np.concatenate([bars[0].get_xdata() for bars in left.containers])
  # A mark is moved by at most a quarter of a decade from the noise scale that it belongs to.
  np.testing.assert_allclose(np.sort(np.round(np.log10(x))), np.sort(np.log10(series["noise_scale"][given])))
  shares = np.concatenate([line.get_ydata() for line in right.lines])
  np.testing.assert_allclose(np.sort(shares), np.sort(series["share_given"]))
  assert [text.get_text() for text in right.get_xticklabels()] == list(dict.fromkeys(series["regime"]))
