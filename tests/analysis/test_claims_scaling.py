"""The judge of the scaling rules: all three verdicts on simulated records, and what it says where something is missing."""

import json
import math
import re

import numpy as np
import pytest

from bsjax.analysis.claims_scaling import ADAM_RULE, LEAST_LOSS, SELECTIONS, judge_no_rule_fits_all
from bsjax.analysis.regret import RULES
from tests.analysis.simulate_lattice import (
  BASE,
  FACTOR,
  FEWEST,
  ROUNDING,
  SIZES,
  bent,
  lattice_record,
  noise_limited,
  power_law,
  regret,
  simulate,
)

SERIES = (
  "lattice_optimizer lattice_batch_size lattice_rate lattice_steps lattice_reached"
  " best_optimizer best_batch_size best_rate best_steps best_noise_scale"
  " curve_optimizer curve_rule curve_factor curve_regret curve_low curve_high curve_pairs"
  " summary_optimizer summary_rule summary_selection summary_regret summary_low summary_high summary_pairs"
  " worst_optimizer worst_rule worst_from worst_to worst_regret worst_low worst_high"
  " slope_optimizer slope_value slope_low slope_high offset_optimizer offset_rule offset_factor"
  " reference_optimizer reference_rule reference_batch_size reference_rate reference_regret reference_low reference_high"
  " left_optimizer left_batch_size left_reason limit reference"
)
TRUE_SCALE = dict.fromkeys(SIZES, 20.0)
WRONG_SCALE = dict.fromkeys(SIZES, 1e4)
"""A noise scale far too large: the rule of the noise is then the linear one."""


def check(finding, verdict):
  """What every finding must satisfy, whatever its verdict."""
  claim = finding.claim
  assert (claim.id, claim.figure, claim.verdict) == ("no_rule_fits_all", "no_rule_fits_all", verdict)
  assert set(finding.series) == set(SERIES.split())
  for prefix in ("lattice_", "best_", "curve_", "summary_", "worst_", "slope_", "offset_", "reference_", "left_"):
    assert len({len(array) for name, array in finding.series.items() if name.startswith(prefix)}) == 1
  json.dumps(claim._asdict(), allow_nan=False)
  if claim.measured is not None:
    assert claim.ci_low <= claim.measured <= claim.ci_high
    assert claim.n > 0
  assert 1 <= len(re.findall(r"[.](?= [A-Z]|$)", finding.reading)) <= 3, finding.reading
  assert finding.reading[0].isupper()
  assert "nan" not in finding.reading.lower()
  assert "  " not in finding.reading


def rows(finding, prefix, names, **where):
  """Rows of a series, as tuples, where other columns have given values."""
  series = finding.series
  keep = np.ones(len(series[prefix + names.split()[0]]), bool)
  for name, value in where.items():
    keep &= series[prefix + name] == value
  return list(zip(*(series[prefix + name][keep].tolist() for name in names.split()), strict=True))


def test_holds_where_every_rule_costs_steps_somewhere():
  """The best rate grows with b up to 16 and stays: none fails below, linear above, sqrt on both sides, and the noise scale is wrong."""
  finding = judge_no_rule_fits_all(*simulate(bent(16), noise=0.02, scales=WRONG_SCALE))
  check(finding, "holds")
  # sqrt is right from 1 to 256 (8 places); its worst is from 16 to 256, or 1 to 16: 4 places wrong, which costs the factor or diverges.
  least = {
    rule: max(regret(bent(16)(b), bent(16)(b0) + exponent * math.log2(b / b0)) for b0 in SIZES for b in SIZES if b > b0)
    for rule, exponent in (("none", 0), ("sqrt", 1), ("linear", 2))
  }
  assert finding.claim.measured == pytest.approx(
    min(least.values()), rel=0.1
  )  # noise of 2 % over 4 seeds, luck of the choice
  assert finding.claim.ci_low > LEAST_LOSS
  assert finding.claim.n == 10
  assert finding.reading.startswith("Every rule costs steps somewhere")


def test_fails_where_a_rule_fits_everywhere():
  finding = judge_no_rule_fits_all(*simulate(power_law(0.5), noise=0.01, scales=WRONG_SCALE))
  check(finding, "fails")
  assert finding.claim.measured == pytest.approx(1, abs=0.03)  # 1 % noise: four standard errors over 4 seeds
  assert finding.claim.ci_high < LEAST_LOSS
  assert "The rule sqrt fits everywhere" in finding.reading
  assert "linear at least 4" in finding.reading


def test_fails_with_two_optimizers_only_where_one_rule_fits_both():
  """sqrt fits one and linear the other: neither fits both, and with `none` as bad every rule costs steps somewhere."""
  study, records = simulate(power_law(0.5), noise=0.01, scales=WRONG_SCALE)
  other, more = simulate(power_law(1), noise=0.01, optimizers=("adam",), scales=WRONG_SCALE)
  for name in ("lattices", "base_rates"):
    study[name] |= other[name]
  study["optimizers"] = ["sgd", "adam"]
  finding = judge_no_rule_fits_all(study, records + more)
  check(finding, "holds")
  both = rows(finding, "worst_", "rule regret", optimizer="")
  each = {name: dict(rows(finding, "worst_", "rule regret", optimizer=name)) for name in ("sgd", "adam")}
  assert each["sgd"]["sqrt"] < 1.1
  assert each["adam"]["linear"] < 1.1
  for rule, value in both:
    assert value == pytest.approx(max(each["sgd"][rule], each["adam"][rule]), rel=0.05)


def test_is_open_where_luck_is_larger_than_the_loss():
  finding = judge_no_rule_fits_all(*simulate(power_law(0.5), noise=0.4, scales=WRONG_SCALE))
  check(finding, "inconclusive")
  assert finding.claim.ci_low < LEAST_LOSS < finding.claim.ci_high
  assert "left open" in finding.reading


def test_verdicts_are_seldom_wrong():
  """Where sqrt costs nothing at all, "holds" is wrong; each rule's lower end would have to lie above 1.2: at most 2.5 % of worlds."""
  verdicts = [
    judge_no_rule_fits_all(*simulate(power_law(0.5), noise=0.15, sizes=(4, 16, 64), seed=seed)).claim.verdict
    for seed in range(20)
  ]
  assert (
    verdicts.count("holds") <= 2
  )  # binomial: 3 or more of 20 at 2.5 % happen once in 80, and all of this is conservative


def test_series_say_what_was_measured():
  finding = judge_no_rule_fits_all(*simulate(power_law(0.5), scales=TRUE_SCALE))
  check(finding, "fails")
  assert finding.series["limit"] == FACTOR
  assert finding.series["reference"] == 4
  for b, rate, steps, scale in rows(finding, "best_", "batch_size rate steps noise_scale"):
    assert (rate, steps, scale) == pytest.approx((BASE * b**0.5, FEWEST, 20.0), rel=1e-3)
  ((slope, low, high),) = rows(finding, "slope_", "value low high")
  assert (slope, low, high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-3)
  curve = dict(rows(finding, "curve_", "factor regret", rule="none"))
  assert list(curve) == [1 / 256, 1 / 64, 1 / 16, 1 / 4, 4, 16, 64, 256]
  assert curve[1 / 16] == pytest.approx(regret(0, 4), rel=ROUNDING)
  assert dict(rows(finding, "curve_", "factor pairs", rule="none"))[16] == 3
  summary = dict(rows(finding, "summary_", "selection pairs", rule="sqrt"))
  assert summary == dict(zip(SELECTIONS, (20, 10, 10, 8, 4, 4), strict=True))
  # From the smallest size: the rate is 2 j places too small at 4^j, j = 1 to 4.
  from_smallest = dict(rows(finding, "summary_", "selection regret", rule="none"))["from_smallest"]
  assert from_smallest == pytest.approx(np.prod([regret(2 * j, 0) for j in (1, 2, 3, 4)]) ** (1 / 4), rel=ROUNDING)
  assert rows(finding, "worst_", "from to regret", rule="sqrt", optimizer="sgd")[0][2] == pytest.approx(1, rel=ROUNDING)
  assert (finding.series["worst_from"] < finding.series["worst_to"]).all()
  reference = {
    b: (rate, cost) for b, rate, cost in rows(finding, "reference_", "batch_size rate regret", rule="linear")
  }
  assert reference[64] == pytest.approx((BASE * 4**0.5 * 16, regret(6, 2 + 8)), rel=ROUNDING)
  assert math.isnan(reference[4][1])
  offsets = dict(rows(finding, "offset_", "rule factor"))
  assert (offsets["none"], offsets["sqrt"], offsets["linear"]) == (1, 1, 1)
  assert 1 < offsets["noise"] <= 2**0.25
  middle = rows(finding, "lattice_", "rate steps reached", batch_size=4)
  # 4.8 places down cost the factor (0.5 (0.347 x)^2 = log 4), 3.2 places up diverge: 4 below and 3 above the best arrive.
  assert [reached for *_, reached in middle] == [0.0, *[1.0] * 8, 0.0]
  assert min(middle, key=lambda row: row[1])[0] == pytest.approx(BASE * 2)


def test_the_rule_of_the_noise_can_be_the_one_that_fits():
  finding = judge_no_rule_fits_all(*simulate(noise_limited(20.0), noise=0.01, scales=TRUE_SCALE))
  check(finding, "fails")
  assert "The rule noise fits everywhere" in finding.reading


def test_adams_own_rule_stands_beside_the_others():
  study, records = simulate(power_law(0.5), optimizers=("adam",))
  records += [lattice_record("adam", 64, 0.3, number, 1.5 * FEWEST, kind="adam_sqrt") for number in range(4)]
  finding = judge_no_rule_fits_all(study, records)
  found = dict(rows(finding, "reference_", "batch_size regret", rule=ADAM_RULE))
  assert found.pop(64) == pytest.approx(1.5, rel=ROUNDING)
  assert all(math.isnan(value) for value in found.values())
  sgd = judge_no_rule_fits_all(*simulate(power_law(0.5)))
  assert ADAM_RULE not in sgd.series["reference_rule"]


def test_a_rule_without_a_noise_scale_is_left_out():
  finding = judge_no_rule_fits_all(*simulate(power_law(0.5), noise=0.01))
  check(finding, "fails")
  assert "Left out: the rule noise (not measured with every optimizer)." in finding.reading
  assert set(finding.series["worst_rule"]) == set(RULES) - {"noise"}
  study, records = simulate(power_law(0.5), noise=0.01, optimizers=("sgd", "adam"), scales=TRUE_SCALE)
  records = [r for r in records if r.trial["kind"] == "lattice" or r.trial["config"]["optimizer"] == "sgd"]
  finding = judge_no_rule_fits_all(study, records)
  assert "the rule noise (not measured with every optimizer)" in finding.reading
  assert [name for (name,) in rows(finding, "worst_", "optimizer", rule="noise")] == ["sgd"]


def test_nothing_measured_is_told():
  study, _ = simulate()
  finding = judge_no_rule_fits_all(study, [])
  check(finding, "inconclusive")
  assert finding.claim.measured is None
  assert finding.reading.startswith("No optimizer has two batch sizes whose best rate is known")
  assert "sgd at B = 64 (52 of 52 trials are missing)" in finding.reading


def test_diverged_everywhere_is_told():
  study, records = simulate()
  records = [r._replace(status={"state": "diverged", "first_nonfinite_step": 3}) for r in records]
  finding = judge_no_rule_fits_all(study, records)
  check(finding, "inconclusive")
  assert "sgd at B = 1 (no trial reached the target)" in finding.reading


def test_one_batch_size_or_one_seed_judges_nothing():
  study, records = simulate(sizes=(4, 16))
  finding = judge_no_rule_fits_all(study, [r for r in records if r.trial["config"]["batch_size"] == 4])
  check(finding, "inconclusive")
  assert len(finding.series["best_rate"]) == 1
  finding = judge_no_rule_fits_all(*simulate(seeds=1))
  check(finding, "inconclusive")
  assert "One seed cannot both choose a rate and judge it" in finding.reading
  assert len(finding.series["best_rate"]) == len(SIZES)


def test_a_batch_size_that_fails_is_left_out_and_the_others_judged():
  study, records = simulate(power_law(0.5), noise=0.01)
  study["lattices"]["sgd"]["16"]["reason"] = "not reached: the nearest validation_accuracy is 0.9, the target 0.95"
  finding = judge_no_rule_fits_all(study, records)
  check(finding, "fails")
  assert "sgd at B = 16 (not reached: the nearest validation_accuracy is 0.9, the target 0.95)" in finding.reading
  assert rows(finding, "left_", "batch_size") == [(16,)]
  assert finding.claim.n == 6
