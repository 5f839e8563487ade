"""The judge of every flatness measure on solutions whose slopes are known by construction."""

import math

import numpy as np
import pytest
from scipy import stats

from bsjax.analysis import claims_sharpness
from bsjax.analysis.claims_sharpness import common_slope, judge_flat_generalizes, judge_flat_measures
from bsjax.analysis.solutions import MAX_RELATIVE_SEM, MEASURE_LABELS, measure_label, reliable
from tests.analysis import checks
from tests.analysis import simulate_sharpness as simulate
from tests.analysis.simulate_sharpness import rows

JUDGED = [measure for measure in simulate.MEASURES if measure != "bottom_eigenvalue"]
STUDY = simulate.make_study()


def flat(verdict, records, study=STUDY):
  finding = judge_flat_measures(study, records)
  checks.check(finding, "flat_measures", verdict)
  return finding


def slope_of(finding, phase, measure):
  series = finding.series
  (row,) = np.flatnonzero((series["slope_phase"] == phase) & (series["slope_measure"] == measure))
  return {name: series[name][row] for name in series if name.startswith("slope")}


# --- the fit ---


def test_the_common_slope_is_that_of_a_regression_with_dummies():
  rng = np.random.default_rng(0)
  part = np.repeat([0.25, 1.0, 4.0], 5)
  size = np.tile([2.0, 8.0, 32.0, 128.0, 512.0], 3)
  keep = np.arange(15) != 7  # a cell is missing
  part, size = part[keep], size[keep]
  value = np.exp(0.2 * np.log(size) + part + rng.normal(size=14))
  found = common_slope(size, part, value)
  design = np.stack([np.log(size), *(part == p for p in (0.25, 1.0, 4.0))], axis=1).astype(float)
  coefficients, (squares,), *_ = np.linalg.lstsq(design, np.log(value), rcond=None)
  error = math.sqrt(squares / (14 - 4) * np.linalg.inv(design.T @ design)[0, 0])
  expected = coefficients[0] + np.array([0, -1, 1]) * stats.t.ppf(0.975, 10) * error
  # Condition number below 100, so 1e-12 leaves room for 4500 float64 roundings.
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_seeds_of_a_cell_count_as_their_geometric_mean():
  size, part = np.array([1.0, 2.0, 4.0, 8.0]), np.ones(4)
  value = np.array([1.0, 3.0, 4.0, 7.0])
  spread = np.array([[0.5, 2.0], [1.0, 1.0], [0.1, 10.0], [4.0, 0.25]])  # geometric means 1, arithmetic ones not
  many = common_slope(np.repeat(size, 2), np.repeat(part, 2), (value[:, None] * spread).ravel())
  np.testing.assert_allclose(many, common_slope(size, part, value), rtol=1e-12)


def test_a_slope_needs_two_batch_sizes_at_one_rate_and_its_interval_a_degree_of_freedom():
  assert math.isnan(common_slope(np.array([1.0, 2.0]), np.array([1.0, 2.0]), np.ones(2)).value)
  assert math.isnan(common_slope(np.empty(0), np.empty(0), np.empty(0)).value)
  two = common_slope(np.array([1.0, 4.0]), np.ones(2), np.array([1.0, 2.0]))
  assert two.value == pytest.approx(0.5)
  assert math.isnan(two.low)


def test_the_interval_of_the_slope_holds_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(1)
  size, part = np.tile(2.0 ** np.arange(3, 8), 2), np.repeat([0.25, 1.0], 5)
  held = 0
  for _ in range(400):
    found = common_slope(size, part, np.exp(0.3 * np.log(size) - part + 0.4 * rng.normal(size=10)))
    held += found.low <= 0.3 <= found.high
  # 4 binomial standard errors of 400 draws: 4 sqrt(0.95 0.05 / 400) = 4.4 %.
  assert 0.95 - 0.044 <= held / 400 <= 0.95 + 0.044


# --- flat_measures ---


def test_every_measure_and_phase_has_its_own_slope():
  slopes = {
    (m, p): 0.1 + 0.1 * i + (0.05 if p == "level" else 0) for i, m in enumerate(JUDGED) for p in ("level", "budget")
  }
  records = simulate.solutions(slope=lambda m, p: slopes.get((m, p), 1.0), cell_noise=0, seed_noise=0)
  finding = flat("holds", records[::-1])
  for (measure, phase), slope in slopes.items():
    found = slope_of(finding, phase, measure)
    # Noise-free powers: what is left is rounding of exp and log.
    np.testing.assert_allclose([found["slope"], found["slope_low"], found["slope_high"]], slope, atol=1e-12)
    assert found["slope_verdict"] == "holds"
    assert (found["slope_points"], found["slope_cells"]) == (40, 8)
  assert finding.claim.measured == pytest.approx(0.1)
  assert finding.claim.n == 40
  assert finding.claim.unit == "slope of log(largest Hessian eigenvalue) against log B, at equal epochs"
  assert "At equal training loss and at equal epochs small batches end flatter by all 5 measures." in finding.reading
  assert "bottom_eigenvalue" not in finding.series["measure"]
  assert finding.series["batch_norm"] == "no batch norm"


@pytest.mark.parametrize(("slope", "verdict"), [(0.3, "holds"), (0.0, "fails"), (-0.3, "fails")])
def test_flat_measures(slope, verdict):
  finding = flat(verdict, simulate.solutions(slope=lambda m, p: slope, cell_noise=0.03))
  # Standard deviation of a cell's mean: sqrt(0.03^2 + 0.1^2 / 5) = 0.054. Sum of squares of the centred log B of 8 cells: 19.2. So a slope
  # has a standard error of 0.054 / sqrt(19.2) = 0.0123; four of them.
  np.testing.assert_allclose(finding.series["slope"], slope, atol=0.05)
  if slope:
    assert set(finding.series["slope_verdict"]) == {verdict}
  assert (verdict == "holds") == ("by all 5 measures" in finding.reading)


def test_noise_leaves_it_open():
  finding = flat("inconclusive", simulate.solutions(slope=lambda m, p: 0.0, cell_noise=1.0))
  assert "all 5 measures leave it open whether small batches end flatter" in finding.reading
  assert finding.claim.ci_low < 0 < finding.claim.ci_high


def test_one_measure_that_disagrees_fails_the_claim_and_is_named():
  finding = flat("fails", simulate.solutions(slope=lambda m, p: -0.2 if (m, p) == ("sam", "budget") else 0.3))
  assert finding.claim.measured == pytest.approx(-0.2, abs=0.05)
  assert finding.claim.unit == "slope of log(SAM) against log B, at equal epochs"
  assert "at equal epochs small batches end flatter by 4 of 5 measures, and not by 1 (SAM)" in finding.reading
  assert "At equal training loss small batches end flatter by all 5 measures;" in finding.reading


def test_rates_with_other_slopes_widen_the_interval():
  records = simulate.solutions(cell_noise=0, seed_noise=0, measures=("trace",))
  for record in records:
    for row in record.probes:
      if row.get("measure") == "trace" and record.trial["rate_part"] == 1.0:
        row["value"] *= record.trial["config"]["batch_size"] ** 0.4
  found = slope_of(flat("holds", records, simulate.make_study(measures=("trace",))), "level", "trace")
  assert found["slope"] == pytest.approx(0.5)  # of 0.3 and 0.7
  assert found["slope_low"] < 0.4


@pytest.mark.parametrize(
  ("measure", "change"),
  [
    ("top_eigenvalue", {"value": 1e6, "error": 0.051e6}),
    ("top_eigenvalue", {"value": 1e6, "error": None}),
    ("top_eigenvalue", {"value": -3.0}),
    ("trace", {"value": 1e6, "error": 1.01 * MAX_RELATIVE_SEM * 1e6}),
    ("keskar_1e-3", {"value": None}),
    ("sam", {"value": 0.0}),
    ("sam", {"value": math.inf}),
  ],
)
def test_what_is_not_known_or_not_positive_is_left_out_and_counted(measure, change):
  records = simulate.solutions(cell_noise=0, seed_noise=0)
  for row in rows(records, measure, "level")[:4]:  # four of the five seeds of one cell
    row |= change
  finding = flat("holds", records)
  found = slope_of(finding, "level", measure)
  assert found["slope"] == pytest.approx(0.3)
  assert (found["slope_points"], found["slope_cells"]) == (36, 8)
  assert "4 of 400 values are left out" in finding.reading
  assert finding.series["used"].sum() == 396


def test_errors_at_the_border_are_used():
  assert reliable({"value": 2.0, "error": 0.1, "error_kind": "residual"})
  assert reliable({"value": -2.0, "error": 0.1, "error_kind": "residual"})
  assert reliable({"value": 2.0, "error": 0.5, "error_kind": "sem"})
  assert reliable({"value": 2.0, "error": None, "error_kind": None})


def test_a_measure_without_rows_leaves_the_claim_open_and_is_named():
  records = simulate.solutions()
  for record in records:
    record.probes[:] = [row for row in record.probes if row.get("measure") != "sam"]
  finding = flat("inconclusive", records)
  assert "by 4 of 5 measures, and 1 (SAM) leave it open" in finding.reading
  assert "of SAM at equal training loss, is not known" in finding.reading
  assert finding.claim.measured is None
  assert finding.claim.n == 0


def test_only_the_last_row_of_a_measure_counts():
  records = simulate.solutions(cell_noise=0, seed_noise=0)
  for record in records:
    early = [row | {"step": 1, "value": 7.0} for row in record.probes if row["probe"] == "measure"]
    record.probes[:0] = early
  assert flat("holds", records).claim.measured == pytest.approx(0.3)


def test_diverged_trials_and_those_without_a_level_twin_are_counted():
  records = simulate.solutions()
  lost = [r for r in records if r.trial["phase"] == "level" and r.trial["seed"] == 0][:3]
  for record in lost:
    records.remove(record)
  for phase in ("budget", "level"):
    records.append(simulate.solution(phase, 8, 2.0, 9, {"trace": 1e9}, test_error=0.9, state="diverged"))
  for judge in (judge_flat_measures, judge_flat_generalizes):
    finding = judge(STUDY, records)
    assert finding.claim.verdict == "holds"
    assert "3 of 40 trials never reached the training loss" in finding.reading
    assert "1 trial diverged" in finding.reading
    assert 2.0 not in finding.series["rate_part"]
  assert slope_of(flat("holds", records), "level", "trace")["slope_points"] == 37


def test_other_kinds_of_trials_are_none_of_it():
  records = simulate.solutions()
  expected = flat("holds", records).claim
  for kind in ("escape", "edge"):
    other = simulate.solution("level", 8, 1.0, 0, {"trace": 1e9}, test_error=0.9)
    other.trial["kind"] = kind
    records.append(other._replace(id=kind))
  assert flat("holds", records).claim == expected


@pytest.mark.parametrize(
  "change", [{"batch_sizes": (8,)}, {"batch_sizes": ()}, {"rate_parts": (1.0,), "batch_sizes": (8, 32)}]
)
def test_too_few_batch_sizes_are_refused(change):
  finding = flat("inconclusive", simulate.solutions(**change))
  assert finding.claim.measured is None
  assert "Solutions of three batch sizes" in finding.reading
  sizes = ", ".join(map(str, change["batch_sizes"])) or "none"
  assert f"batch sizes {sizes})" in finding.reading


def test_a_study_without_measures_is_refused():
  for judge, claim_id in ((judge_flat_measures, "flat_measures"), (judge_flat_generalizes, "flat_generalizes")):
    for records in ([], simulate.solutions()):
      finding = judge({}, records)
      checks.check(finding, claim_id, "inconclusive")
      assert finding.claim.measured is None


def test_without_a_common_loss_the_claim_stays_open():
  finding = flat("inconclusive", simulate.solutions(phases=("budget",)))
  assert "At equal training loss all 5 measures leave it open" in finding.reading
  assert "40 of 40 trials never reached the training loss" in finding.reading


@pytest.mark.parametrize(
  ("kinds", "words"), [(("running",), "running statistics"), (("batch", "ghost"), "ghost batches")]
)
def test_the_statistics_of_batch_norm_are_said(kinds, words):
  records = simulate.solutions()
  for index, row in enumerate(rows(records, "trace")):
    row["batch_norm"] = kinds[index % len(kinds)]
  assert words in str(flat("holds", records).series["batch_norm"])


def test_labels_tell_measures_apart():
  assert len(set(MEASURE_LABELS.values())) == len(MEASURE_LABELS)
  assert measure_label("a_new_one") == "a_new_one"


def test_spectra_are_listed_by_solution_and_draw():
  rows = [{"probe": "spectrum", "draw": draw, "node": draw + 0.5, "weight": 1.0} for draw in (1, 0)]
  record = simulate.solution("level", 8, 1.0, 0, {}, test_error=0.1)
  record = record._replace(probes=[*record.probes, *rows])
  series = judge_flat_measures(STUDY, [record]).series
  assert series["spectrum_draw"].tolist() == [0, 1]
  assert series["spectrum_node"].tolist() == [0.5, 1.5]
  assert (series["spectrum_batch_size"] == 8).all()


def test_the_example_of_a_tally_is_right():
  import doctest

  assert doctest.testmod(claims_sharpness).failed == 0
