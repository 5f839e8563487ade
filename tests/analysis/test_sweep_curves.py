import math

import numpy as np
import pytest

from bsjax.analysis import fits, sweep_curves
from bsjax.analysis.sweep_curves import fit_sweep, steps_by_batch_size
from tests.analysis import simulate_sweep
from tests.analysis.simulate_sweep import CRITICAL, S_MIN, SIZES, covered, hyperbola


def exact_sweep(curve=hyperbola, sizes=SIZES):
  """Eight equal trials at each batch size: no spread at all."""
  return {size: np.full(8, curve(size)) for size in sizes}


def test_an_exact_hyperbola_gives_every_number_back():
  curve = fit_sweep(exact_sweep())
  assert curve.fit.reason == ""
  # The fit's search ends at a spacing of 1e-6 in log B_crit.
  assert curve.fit.s_min == pytest.approx((S_MIN,) * 3, rel=1e-5)
  assert curve.fit.critical == pytest.approx((CRITICAL,) * 3, rel=1e-5)
  assert curve.e_min == pytest.approx((S_MIN * CRITICAL,) * 3, rel=1e-5)
  assert curve.fit_perfect_until == pytest.approx((0.2 * CRITICAL,) * 3, rel=1e-5)
  np.testing.assert_allclose(curve.steps, [hyperbola(b) for b in SIZES], rtol=1e-12)  # log and exp
  np.testing.assert_allclose(curve.perfect, [hyperbola(1) / b for b in SIZES], rtol=1e-12)


def test_the_regimes_of_an_exact_hyperbola():
  """B S grows as 1 + B / 64: 1.2 times that of B = 1 at B = 14; S / S(1024) = (1 + 64 / B) / 1.0625 is 1.18 at B = 256, 1.41 at 128."""
  curve = fit_sweep(exact_sweep())
  assert curve.perfect_until.value == pytest.approx(simulate_sweep.chord_end(), rel=1e-12)
  assert (
    8 < curve.perfect_until.value < 1.2 * (CRITICAL + 1) - CRITICAL
  )  # the chord of a convex curve crosses a little sooner
  assert curve.max_useful == (256, 256, 256)
  expected = ["perfect scaling"] * 4 + ["diminishing returns"] * 4 + ["maximal data parallelism"] * 3
  assert list(curve.regime) == expected
  assert curve.regime_share.tolist() == [1.0] * 11


def test_more_batch_sizes_bring_the_end_of_perfect_scaling_to_its_exact_place():
  sizes = [1, *range(13, 16), 64, 1024]
  until = fit_sweep(exact_sweep(sizes=sizes)).perfect_until.value
  assert until == pytest.approx(1.2 * (CRITICAL + 1) - CRITICAL, rel=1e-9)  # 14 exactly is a batch size here


def test_perfect_scaling_that_ends_once_and_for_all():
  """A dip back under 20 % overhead moves the end behind it; what lies before counts as perfect scaling."""
  overhead = {1: 1.0, 2: 1.3, 4: 1.1, 8: 1.5, 16: 3.0}
  curve = fit_sweep({b: np.full(8, 1000 * x / b) for b, x in overhead.items()})
  share = math.log(1.2 / 1.1) / math.log(1.5 / 1.1)
  assert curve.perfect_until.value == pytest.approx(4 * 2**share)
  assert curve.regime[:3] == ("perfect scaling",) * 3


def test_ends_that_the_batch_sizes_do_not_show_are_infinite():
  perfect = fit_sweep(exact_sweep(lambda b: 1e5 / b))
  assert perfect.perfect_until == perfect.max_useful == (math.inf,) * 3
  assert set(perfect.regime) == {"perfect scaling"}
  assert "no clear bend" in perfect.fit.reason
  assert np.isnan([*perfect.e_min, *perfect.fit_perfect_until]).all()
  flat = fit_sweep(exact_sweep(lambda b: 700.0))
  assert flat.max_useful.value == 1
  assert "do not fall" in flat.fit.reason
  bending = fit_sweep(exact_sweep(sizes=SIZES[:8]))  # up to B = 128: the steps still fall by a quarter from 64
  assert bending.max_useful.value == math.inf
  assert bending.fit.critical.value == pytest.approx(CRITICAL, rel=1e-5)


def test_batch_sizes_that_hardly_reached_the_goal_are_left_out_with_the_reason():
  steps = exact_sweep()
  steps[1] = np.array([10.0, 10.0, 10.0, *[np.nan] * 5])  # would ruin the fit
  steps[2] = np.full(8, np.nan)
  curve = fit_sweep(steps)
  assert curve.reasons == {
    1: "3 of 8 trials reached the goal, and 4 are needed",
    2: "0 of 8 trials reached the goal, and 4 are needed",
  }
  assert curve.batch_sizes.tolist() == list(SIZES[2:])
  assert curve.perfect[0] == pytest.approx(hyperbola(4))
  assert curve.fit.critical.value == pytest.approx(CRITICAL, rel=1e-5)


def test_a_sweep_that_reached_nothing_has_an_empty_curve():
  curve = fit_sweep({size: np.full(8, np.nan) for size in (1, 2)})
  assert len(curve.batch_sizes) == len(curve.regime) == len(curve.regime_share) == 0
  assert "only 0 batch sizes" in curve.fit.reason
  assert np.isnan([*curve.perfect_until, *curve.max_useful, *curve.e_min]).all()
  assert "only 3 batch sizes" in fit_sweep(exact_sweep(sizes=(1, 16, 256))).fit.reason


def test_the_curve_is_the_same_at_every_call():
  steps = simulate_sweep.simulate_steps(np.random.default_rng(0), noise=0.1)
  first, second = fit_sweep(steps), fit_sweep(steps)
  np.testing.assert_array_equal(first.samples, second.samples)
  assert first.fit.critical == second.fit.critical


def measured(monkeypatch, **world):
  monkeypatch.setattr(sweep_curves, "NUM_RESAMPLES", 200)  # for speed
  return simulate_sweep.coverage(120, **world)


NAMES = ("critical", "s_min", "e_min", "perfect_until", "max_useful")


def test_intervals_cover_where_tuning_separates_the_trials(monkeypatch):
  """Two hyperparameters and a little luck: the intervals promise 95 %, and err on the wide side by design."""
  found = measured(monkeypatch, num_trials=64, num_tuned=2, noise=0.1)
  low, _ = simulate_sweep.binomial_bounds(120)
  assert found["fitted"] == 120
  assert all(found[name] >= low / 120 for name in NAMES), found
  assert found["width"] < 2  # and yet they say something: the critical batch size within a factor of 2 from end to end


def test_intervals_cover_where_luck_separates_the_trials(monkeypatch):
  """One hyperparameter and much luck: the light tail for which the spread of a half is hardly wider than that of the whole.

  92 % is what 300 sweeps showed for the parameters and 90 % for the end of perfect scaling, so 95 % is not asked for: bounds about 92 %.
  """
  found = measured(monkeypatch, num_trials=64, num_tuned=1, noise=0.3)
  low, high = simulate_sweep.binomial_bounds(120, 0.92)
  for name in ("critical", "s_min", "e_min", "perfect_until"):
    assert low <= 120 * found[name] <= high, found
  assert found["max_useful"] >= low / 120


def test_a_curve_that_is_no_hyperbola_widens_the_interval():
  steps = simulate_sweep.simulate_steps(np.random.default_rng(1), num_tuned=1)
  wavy = {size: values * math.exp(0.3 * (-1) ** k) for k, (size, values) in enumerate(steps.items())}
  plain, bent = fit_sweep(steps).fit, fit_sweep(wavy).fit
  assert bent.misfit == pytest.approx(0.3, rel=0.1)  # two of eleven degrees of freedom go into the fit
  assert bent.critical.high / bent.critical.low > 1.5 * plain.critical.high / plain.critical.low


def test_the_curve_from_records_counts_every_trial_and_uses_complete_ones_only():
  sizes = (1, 4, 16, 64, 256)
  needs = simulate_sweep.simulate_steps(np.random.default_rng(2), num_trials=16, num_tuned=1, sizes=sizes)
  needs = {size: np.where(np.isfinite(x), x, math.inf) for size, x in needs.items()}
  study = simulate_sweep.make_study(
    sizes,
    num_steps=lambda size: round(8 * hyperbola(size)),
    every=lambda size: round(hyperbola(size) / 50),
    num_trials=16,
  )
  records = simulate_sweep.sweep_of(study, needs, diverged={(16, int(np.argmin(needs[16])))}, give_up=4)
  steps = steps_by_batch_size(study, records)
  for size in sizes:
    every = study["sweep"][str(size)]["eval_every"]
    expected = np.ceil(needs[size] / every) * every
    if size == 16:
      expected[np.argmin(needs[16])] = np.nan
    known = np.isfinite(steps[size])
    np.testing.assert_array_equal(steps[size][known], expected[known])
    # A trial is cut at 4 times the fewest found before it, never sooner than 4 times the fewest of all.
    assert np.all(~(expected[~known] <= 4 * np.nanmin(expected)))
    assert len(steps[size]) == 16
  unfinished = simulate_sweep.trial_record(study, 64, 0, 10, state="running")
  assert np.isnan(steps_by_batch_size(study, [unfinished])[64]).all()
  curve = fit_sweep(steps)
  assert covered(curve.fit.critical, CRITICAL)
  # Looks raise every answer by up to 1/50, tuning over 16 trials of one hyperparameter by a few per cent.
  assert covered(curve.fit.s_min, S_MIN * 1.01)
  assert fits.MIN_BATCH_SIZES <= len(curve.batch_sizes) == 5
