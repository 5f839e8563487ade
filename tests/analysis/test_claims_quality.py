"""The judge of quality sees a batch size that costs some, and its intervals hold together."""

import numpy as np
import pytest

from bsjax.analysis.claims_quality import MARGIN, excess_over_others, judge_same_best_error
from bsjax.analysis.claims_steps import SweepRecords
from bsjax.analysis.quality import QUALITY, QUALITY_FINAL, best_quality, qualities, stopped_test_error
from bsjax.records import Record
from tests.analysis.simulate_sweep import FINAL_SEEDS, binomial_bounds, covered, make_study

SIZES = (4, 16, 64, 256)


def trial(size, seed, error, *, kind=QUALITY_FINAL, state="complete") -> Record:
  """A trial whose validation accuracy is best in the middle of its budget, and whose test error is `error` there."""
  best = 0.9 - error
  metrics = [
    {"step": step, "examples_seen": step * size, "validation_accuracy": value}
    for step, value in ((10, best - 0.1), (20, best), (30, best - 0.02), (40, best + 0.05))
  ]
  probes = [
    {"probe": "test", "step": step, "test_accuracy": accuracy}
    for step, accuracy in ((10, 0.99), (20, 1 - error), (30, 0.98))
  ]
  config = {"batch_size": size, "num_steps": 40, "eval_every": 10}
  of = {"kind": kind, "config": config, "seed": seed, "hparams": {}}
  return Record(f"{kind}-{size}-{seed}", of, {"state": state}, metrics, probes if kind == QUALITY_FINAL else [])


def swept(errors, *, spread=0.001, num_seeds=4, diverged=(), seed=0) -> SweepRecords:
  """`errors` are the mean errors of the batch sizes."""
  rng = np.random.default_rng(seed)
  study = make_study(SIZES, num_steps=lambda _: 30, every=lambda _: 10, num_trials=8) | {"test_size": 1000}
  records = [
    trial(size, s, error + spread * rng.normal(), state="diverged" if (size, s) in diverged else "complete")
    for size, error in zip(SIZES, errors, strict=True)
    for s in FINAL_SEEDS[:num_seeds]
  ]
  return SweepRecords(study, records)


def test_equal_errors_hold():
  finding = judge_same_best_error({"sgd": swept([0.05] * 4)})
  claim = finding.claim
  assert claim.verdict == "holds"
  assert claim.ci_low < 1 < claim.ci_high < 1 + MARGIN
  assert claim.n == 16
  np.testing.assert_allclose(finding.series["error"], 0.05, atol=0.01)
  assert finding.series["num_seeds"].tolist() == [4] * 4


def test_a_batch_size_that_costs_quality_fails_and_is_named():
  finding = judge_same_best_error({"sgd": swept([0.05, 0.05, 0.05, 0.08]), "momentum": swept([0.05] * 4)})
  assert finding.claim.verdict == "fails"
  assert finding.claim.unit.endswith("batch size 256 (sgd)")
  assert finding.claim.measured == pytest.approx(1.6, abs=0.05)
  assert "largest at 256" in finding.reading


def test_a_batch_size_that_gains_quality_is_no_loss():
  assert judge_same_best_error({"sgd": swept([0.05, 0.05, 0.05, 0.038])}).claim.verdict == "holds"


def test_scattered_seeds_are_open():
  assert judge_same_best_error({"sgd": swept([0.05] * 4, spread=0.02)}).claim.verdict == "inconclusive"


def test_less_than_one_example_is_no_loss():
  """Errors of half an example in a thousand against none: twice the error, but within one example."""
  held = judge_same_best_error({"sgd": swept([0.0005, 0.0005, 0.0005, 0.001], spread=1e-5)})
  assert held.claim.verdict == "holds"
  study, records = swept([0.0005, 0.0005, 0.0005, 0.001], spread=1e-5)
  study["test_size"] = 10**6
  assert judge_same_best_error({"sgd": SweepRecords(study, records)}).claim.verdict == "fails"


def test_seeds_that_diverged_are_told():
  finding = judge_same_best_error({"sgd": swept([0.05] * 4, diverged={(64, 1001)})})
  assert finding.series["num_seeds"].tolist() == [4, 4, 3, 4]
  assert "sgd, batch size 64: 1 of 4 seeds did not complete" in finding.reading


def test_a_batch_size_that_was_not_measured_is_told():
  study, records = swept([0.05] * 4)
  finding = judge_same_best_error(
    {"sgd": SweepRecords(study, [r for r in records if r.trial["config"]["batch_size"] != 16])}
  )
  assert finding.claim.verdict == "holds"
  assert "Left out: sgd, batch size 16: no trial reached the target." in finding.reading


@pytest.mark.parametrize("num_seeds", [0, 1])
def test_without_two_seeds_nothing_is_judged(num_seeds):
  finding = judge_same_best_error({"sgd": swept([0.05] * 4, num_seeds=num_seeds)})
  assert finding.claim.verdict == "inconclusive"
  assert finding.claim.measured is None
  assert "--quality_trials" in finding.reading


def test_the_test_set_is_read_where_validation_is_best_among_what_was_tested():
  target = swept([0.05] * 4).study["target"]
  record = trial(4, 0, 0.07)
  assert stopped_test_error(target, record) == pytest.approx(0.07)  # not at 10, nor at 40, which was not tested
  assert stopped_test_error(target, record._replace(status={"state": "diverged"})) is None
  assert stopped_test_error(target, record._replace(probes=[])) is None
  losses = {"metric": "validation_loss", "goal": 0.1, "direction": "min"}
  rows = [{"step": step, "validation_loss": loss} for step, loss in ((10, 0.3), (20, 0.1), (30, 0.2))]
  tests = [{"probe": "test", "step": step, "test_loss": loss} for step, loss in ((10, 0.5), (20, 0.6), (30, 0.4))]
  assert stopped_test_error(losses, record._replace(metrics=rows, probes=tests)) == 0.6


def test_the_best_point_is_the_one_with_the_best_look():
  study = swept([0.05] * 4).study
  trials = [trial(4, s, error, kind=QUALITY) for s, error in enumerate((0.2, 0.1, 0.1, 0.3))]
  assert best_quality(study, trials) == 1
  trials[1] = trials[1]._replace(status={"state": "diverged"})
  assert best_quality(study, trials) == 2
  assert best_quality(study, [t._replace(status={"state": "diverged"}) for t in trials]) is None
  assert best_quality(study, []) is None
  minimum = study | {"target": {"metric": "validation_accuracy", "goal": 0, "direction": "min"}}
  assert best_quality(minimum, trials) == 3


def test_qualities_are_of_the_fresh_seeds_and_count_trials():
  study, records = swept([0.05, 0.06, 0.07, 0.08], spread=0.0)
  records += [trial(16, s, 0.5, kind=QUALITY) for s in range(3)] + [trial(4, 7, 0.5)]  # a seed of another sweep
  found = qualities(study, records)
  assert [q.batch_size for q in found] == list(SIZES)
  assert [q.num_trials for q in found] == [0, 3, 0, 0]
  np.testing.assert_allclose([q.errors for q in found], [[e] * 4 for e in (0.05, 0.06, 0.07, 0.08)])


def simultaneous_coverage(num_draws, scales, *, num_seeds=5, seed=0) -> int:
  """Counts the draws of equal means in which every group's interval holds 0."""
  rng = np.random.default_rng(seed)
  draws = (rng.normal(size=(len(scales), num_seeds)) * np.asarray(scales)[:, None] for _ in range(num_draws))
  return sum(all(covered(interval, 0.0) for interval in excess_over_others(list(groups))) for groups in draws)


def test_the_intervals_hold_together():
  low, high = binomial_bounds(1000)
  assert low <= simultaneous_coverage(1000, [1.0] * 11) <= high


def test_the_excess_is_over_the_mean_of_the_others():
  groups = [np.array([1.0, 3.0]), np.array([4.0, 6.0]), np.array([0.0, 2.0])]
  found = excess_over_others(groups)
  assert [interval.value for interval in found] == pytest.approx([-1.0, 3.5, -2.5])
  assert all(np.isnan(interval.value) for interval in excess_over_others(groups[:1]))
