"""Regret: exact on lattices without noise, free of the winner's curse with noise, intervals that cover, gaps that are told."""

import math

import numpy as np
import pytest
from scipy import stats

from bsjax.analysis import regret as module
from bsjax.analysis.regret import (
  RULES,
  adam_regret,
  best_rates,
  compare,
  fewest_steps,
  mean_regret,
  measure_regrets,
  noise_scales,
  off_lattice,
  read_lattice,
  rule_factor,
  rule_shifts,
  worst_regret,
)
from bsjax.optim import noise_limited_rate, scale_learning_rate
from tests.analysis.simulate_lattice import (
  BASE,
  FACTOR,
  FEWEST,
  ROUNDING,
  SIZES,
  SQUARE_ROOT,
  bent,
  coverage,
  expected_regrets,
  lattice_record,
  noise_limited,
  power_law,
  regret,
  simulate,
)

OFF = ~np.eye(len(SIZES), dtype=bool)
UP = np.triu(np.ones_like(OFF), 1)


def measured(place=SQUARE_ROOT, **world):
  study, records = simulate(place, **world)
  lattice, scales = read_lattice(study, records, "sgd"), noise_scales(records, "sgd")
  return lattice, measure_regrets(lattice, scales)


def values(regrets, rule):
  """Regrets of all pairs, as factors."""
  return np.exp(regrets.held_out[0, :, regrets.rules.index(rule)].mean(axis=0))


@pytest.mark.parametrize("place", [SQUARE_ROOT, power_law(0.0), power_law(1.0), bent(16)])
def test_regrets_without_noise_are_those_of_the_curve(place):
  """All best and carried rates lie on the lattice, so that each regret is the height of the curve, to the rounding of whole steps."""
  _, regrets = measured(place)
  for rule, exponent in (("none", 0), ("sqrt", 1), ("linear", 2)):
    shift = np.log2(np.array(SIZES) / np.array(SIZES)[:, None]) * exponent
    expected = [[regret(place(b), place(b0) + shift[i, j]) for j, b in enumerate(SIZES)] for i, b0 in enumerate(SIZES)]
    assert values(regrets, rule) == pytest.approx(np.array(expected), rel=ROUNDING)
    interval, pairs = mean_regret(regrets, rule, OFF)
    assert pairs == len(SIZES) * (len(SIZES) - 1)
    assert interval.value == pytest.approx(math.exp(np.log(np.array(expected)[OFF]).mean()), rel=ROUNDING)
    assert interval.low == pytest.approx(interval.high, rel=ROUNDING)  # no noise, no doubt


def test_the_rule_of_the_noise_fits_where_it_is_true():
  """Rates are rounded to the lattice, by a quarter of a doubling at most at either end: half a doubling in all."""
  place = noise_limited(20.0)
  lattice, regrets = measured(place, scales=dict.fromkeys(SIZES, 20.0))
  assert regrets.measured[RULES.index("noise")].sum() == len(SIZES) * (len(SIZES) - 1)
  assert values(regrets, "noise").max() <= math.exp(0.5 * (math.log(2) / 2) ** 2) + ROUNDING
  assert values(regrets, "none").max() == pytest.approx(FACTOR)
  shifts = rule_shifts(lattice.batch_sizes, dict.fromkeys(SIZES, 20.0))
  assert [off_lattice(shifts[at]) for at in range(3)] == [1, 1, 1]
  assert 1.05 < off_lattice(shifts[3]) <= 2**0.25


def test_rules_are_those_of_the_optimizers():
  for b0, b in ((8, 64), (64, 8), (3, 3)):
    for rule in ("none", "sqrt", "linear"):
      expected = scale_learning_rate(rule, 0.3, batch_size=b, reference_batch_size=b0)
      assert 0.3 * rule_factor(rule, b0, b) == pytest.approx(expected, rel=1e-12)
    expected = noise_limited_rate(0.3, 50.0, batch_size=b, reference_batch_size=b0)
    assert 0.3 * rule_factor("noise", b0, b, 50.0) == pytest.approx(expected, rel=1e-12)


def test_noise_scales_are_geometric_means_of_what_was_identified():
  _, records = simulate(scales={4: 30.0, 64: 80.0})
  assert noise_scales(records, "sgd") == pytest.approx({4: 30.0, 64: 80.0})
  assert noise_scales(records, "adam") == {}


def test_luck_alone_costs_nothing(monkeypatch):
  """All rates are equal, so every regret is 0. Chosen and judged on the same seeds it would be large: four standard errors apart."""
  world = {"curvature": 0.0, "noise": 0.3, "seeds": 6, "sizes": (1, 2, 4)}
  with monkeypatch.context() as patch:
    patch.setattr(module, "NUM_DRAWS", 0)
    worlds = [measure_regrets(read_lattice(*simulate(power_law(0), seed=k, **world), "sgd"), {}) for k in range(60)]
  off = ~np.eye(3, dtype=bool)
  judged = np.array([w.held_out[0, :, 0].mean(axis=0)[off].mean() for w in worlds])
  chosen = np.array([w.chosen_on[0, :, 0].mean(axis=0)[off].mean() for w in worlds])
  assert abs(judged.mean()) < 4 * judged.std() / math.sqrt(len(judged))
  assert chosen.mean() > 4 * chosen.std() / math.sqrt(len(chosen))
  assert chosen.mean() > 0.1


def test_the_worst_pair_does_not_owe_its_size_to_its_choice(monkeypatch):
  """All pairs cost nothing: the judged worst pair costs nothing on average, the largest of all pairs clearly something."""
  worlds = [measured(power_law(0), curvature=0.0, noise=0.3, seeds=6, sizes=(1, 2, 4), seed=k)[1] for k in range(40)]
  up = np.triu(np.ones((3, 3), bool), 1)
  found = [worst_regret([w], "none", [up]) for w in worlds]
  judged = np.array([math.log(worst.regret.value) for worst in found])
  largest = np.array([np.log(values(w, "none"))[up].max() for w in worlds])
  assert abs(judged.mean()) < 4 * judged.std() / math.sqrt(len(judged))
  assert largest.mean() > 4 * largest.std() / math.sqrt(len(largest))
  for worst, world, most in zip(found, worlds, largest, strict=True):
    assert world.held_out[0, :, 0, *worst.pair].mean() == pytest.approx(most)
    uppers = [mean_regret(world, "none", one(up.shape, pair))[0].high for pair in np.argwhere(up)]
    assert worst.regret.high >= max(uppers) > worst.regret.low


def one(shape, pair):
  mask = np.zeros(shape, bool)
  mask[tuple(pair)] = True
  return mask


def test_the_worst_pair_is_found_over_optimizers():
  fits, does_not = measured(SQUARE_ROOT)[1], measured(power_law(0.25))[1]
  worst = worst_regret([fits, does_not], "sqrt", [UP, UP])
  # From 1 to 256 the rate should grow by 4 places and grows by 8, four too many, which is 4 times and diverges.
  assert (worst.which, worst.pair) == (1, (0, 4))
  assert worst.regret == pytest.approx((FACTOR, FACTOR, FACTOR))
  assert worst_regret([fits], "sqrt", [UP]).regret.value == pytest.approx(1, rel=ROUNDING)
  assert worst_regret([fits], "noise", [UP]) is None


@pytest.mark.parametrize(("seeds", "noise"), [(4, 0.15), (6, 0.05)])
def test_intervals_hold_the_regret_to_expect(seeds, noise, monkeypatch):
  """Bounds: what the coverage of these two worlds, measured on 300 of each, leaves once in a thousand among 60."""
  world = {"place": bent(30), "noise": noise, "seeds": seeds, "sizes": (4, 8, 16, 32, 64)}
  found = coverage(monkeypatch, num_worlds=60, num_truths=200, **world)
  least = {name: stats.binom.ppf(0.001, 60, share) / 60 for name, share in (("mean", 0.94), ("pair", 0.87))}
  for name, share in found.items():
    assert (share >= least[name]).all(), (name, share)


def test_intervals_narrow_with_seeds_and_widen_with_noise():
  def width(**world):
    interval, _ = mean_regret(measured(bent(30), **world)[1], "none", OFF)
    return math.log(interval.high / interval.low)

  assert 0 < width(noise=0.02, seeds=6) < width(noise=0.2, seeds=6)
  # The square root of 4 is 2; a single width is uncertain by about 1 / sqrt(2 * 5) at six seeds.
  assert 1.2 < width(noise=0.2, seeds=6) / width(noise=0.2, seeds=24) < 4


def test_failures_cost_the_factor_and_no_more():
  limit = math.log(FACTOR)
  numbers = np.array(
    [[9.0, False, 1.0, False], [3.0, True, 2.9, False], [3.0, True, 3.0, True], [1.0, False, 3.0, True]]
  )
  steps, failed, best, best_failed = numbers.T
  found = compare(steps, failed.astype(bool), best, best_failed.astype(bool), FACTOR)
  assert found == pytest.approx([limit, limit, 0.0, -limit])


def test_a_rate_that_fails_for_some_seed_loses():
  """Column 0 is reliable; column 1 is faster, but one seed of three never arrives."""
  steps = np.array([[100.0, 70.0], [100.0, 70.0], [100.0, np.nan]])
  # Column 1 with its failure at 4 x 100: (70 * 70 * 400)^(1/3) = 125 > 100.
  assert fewest_steps(steps, FACTOR) == (0, pytest.approx(100))
  assert fewest_steps(steps[:2], FACTOR) == (1, pytest.approx(70))
  assert fewest_steps(np.full((2, 3), np.nan), FACTOR) is None
  # A slow rate's 10 000 steps do not decide what a failure costs: it is 4 x 200, and (70 * 70 * 800)^(1/3) = 158 < 200.
  slow = np.column_stack([2 * steps[:, 0], steps[:, 1], [10_000.0] * 3])
  assert fewest_steps(slow, FACTOR) == (1, pytest.approx((70 * 70 * 800) ** (1 / 3)))


def test_the_best_rate_is_refined_to_the_vertex():
  """The curve is a parabola in log rate, so the vertex through three of its points is its own."""
  place = noise_limited(20.0)
  lattice, _ = measured(place)
  for size, best in zip(SIZES, best_rates(lattice), strict=True):
    assert best.rate == pytest.approx(
      BASE * 2 ** (place(size) / 2), rel=1e-4
    )  # rounding over the curvature of one step
    assert best.place == np.argmin(abs(lattice.rates - best.rate))
    assert best.steps == pytest.approx(
      FEWEST, rel=0.016
    )  # at most a quarter of a doubling off: exp(0.5 * 0.173^2) = 1.015


def test_a_missing_trial_leaves_its_batch_size_out():
  study, records = simulate()
  gone = next(r for r in records if r.trial["config"]["batch_size"] == 16)
  lattice = read_lattice(study, [r for r in records if r is not gone], "sgd")
  assert lattice.left_out == {16: "1 of 52 trials are missing"}
  assert lattice.batch_sizes.tolist() == [1, 4, 64, 256]
  unfinished = [r._replace(status={"state": "running"}) if r is gone else r for r in records]
  assert 16 in read_lattice(study, unfinished, "sgd").left_out


def test_a_batch_size_without_arrivals_keeps_its_reason():
  study, records = simulate()
  study["lattices"]["sgd"]["4"]["reason"] = "every trial diverged"
  del study["lattices"]["sgd"]["64"]
  assert read_lattice(study, records, "sgd").left_out == {4: "every trial diverged", 64: "it was not trained"}
  far = [r._replace(metrics=r.metrics[:1]) if r.trial["config"]["batch_size"] == 1 else r for r in records]
  assert read_lattice(study, far, "sgd").left_out[1] == "no trial reached the target"


def test_of_repeated_trials_the_longest_counts_and_other_intervals_do_not():
  study, records = simulate()
  rate = BASE
  cut = lattice_record("sgd", 1, rate, 0, math.inf, num_steps=5)
  coarse = lattice_record("sgd", 1, rate, 0, 7, num_steps=10**10, every=99)
  whole = read_lattice(study, records, "sgd")
  assert (read_lattice(study, [cut, coarse, *records, cut], "sgd").log_steps == whole.log_steps).all()


def test_beyond_an_open_side_nothing_is_known():
  """The linear rule from 1 to 256 leads to the high end: at least the factor where that side is closed, unknown where it is open."""
  study, records = simulate(power_law(0))
  closed = read_lattice(study, records, "sgd")
  assert values(measure_regrets(closed, {}), "linear")[0, 4] == pytest.approx(FACTOR)
  study["lattices"]["sgd"]["256"]["open"] = ["high"]
  opened = measure_regrets(read_lattice(study, records, "sgd"), {})
  linear = opened.measured[RULES.index("linear")]
  assert not linear[0, 4]
  assert linear[4, 0]
  assert opened.measured[0, 0, 4]


def test_adams_rule_is_compared_with_the_best_rate():
  study, records = simulate(optimizers=("adam",))
  for number in range(4):
    records.append(lattice_record("adam", 64, 0.3, number, 1.5 * FEWEST, kind="adam_sqrt"))
    records.append(lattice_record("adam", 256, 0.3, number, math.inf, kind="adam_sqrt"))
  lattice = read_lattice(study, records, "adam")
  regrets = measure_regrets(lattice, {})
  assert adam_regret(study, records, lattice, regrets, 64).value == pytest.approx(1.5, rel=ROUNDING)
  assert adam_regret(study, records, lattice, regrets, 256) == pytest.approx((FACTOR, FACTOR, FACTOR))
  assert math.isnan(adam_regret(study, records, lattice, regrets, 16).value)
  assert records[-2].trial["config"]["batch_size"] == 64
  assert math.isnan(adam_regret(study, records[:-2], lattice, regrets, 64).value)  # one seed is missing


def test_expected_regrets_are_near_the_curve_at_little_noise(monkeypatch):
  """The regret to expect of one who tunes on five seeds is that of the curve, where no two rates are nearly tied."""
  truth = expected_regrets(monkeypatch, 20, place=SQUARE_ROOT, noise=0.01, seeds=6)
  exact = measured(SQUARE_ROOT)[1].held_out[0].mean(axis=0)
  # Four standard errors of a mean over 6 seeds, 20 worlds: 4 x 0.01 x sqrt(2) / sqrt(120) = 0.005.
  assert np.abs(truth - exact)[:3].max() < 0.006
