"""The judge of the temperature decides simulated worlds, and stochastic gradient descent on a quadratic."""

import math

import numpy as np
import pytest

from bsjax.analysis import judge_temperature
from tests.analysis import simulate_noise
from tests.analysis.checks import check
from tests.analysis.simulate_noise import judge


def test_temperature_holds_where_the_noise_scale_follows_it():
  finding = judge(judge_temperature, simulate_noise.temperature_trials())
  check(finding, "temperature", "holds")
  assert finding.claim.n == 4
  series = finding.series
  np.testing.assert_allclose(sorted(series["predicted"]), [1, 16, 16, 16])
  # Standard error of a mean log ratio of two stretches over 4 seeds: 0.1 sqrt(2 / 4); four of them.
  np.testing.assert_allclose(np.log(series["factor"] / series["predicted"]), 0, atol=4 * 0.1 * math.sqrt(2 / 4))
  assert set(series["phase"]) == {"before", "during", "after"}


def test_the_settled_half_is_what_counts():
  finding = judge(judge_temperature, simulate_noise.temperature_trials(spread=0.0))
  # Checkpoints at 1/2, 3/4 and 1 of the stretch; the scale has covered 1 - exp(-10 part) of the way from 40 to 640 in log;
  # tr(Sigma) is constant, so the mean of |G|^2 is that of 1 / scale.
  part = np.array([1 / 2, 3 / 4, 1])
  scale = 40 * 16 ** (1 - np.exp(-10 * part))
  expected = 1 / np.mean(1 / scale) / 40
  np.testing.assert_allclose(finding.series["factor"][:3], expected, rtol=1e-9)
  np.testing.assert_allclose(finding.series["factor"][3], 1, rtol=1e-9)


@pytest.mark.parametrize(
  ("world", "verdict"),
  [
    ({"power": 0.5}, "fails"),  # 16 predicted, 4 measured
    ({"power": 0.9}, "holds"),  # 16^0.1 = 1.3 off
    ({"returns": False}, "fails"),
    ({"spread": 1.5}, "inconclusive"),
    ({"seeds": (0,)}, "inconclusive"),
  ],
)
def test_temperature_verdicts(world, verdict):
  check(judge(judge_temperature, simulate_noise.temperature_trials(**world)), "temperature", verdict)


def test_the_control_counts():
  wrong = {"rate / 4 and B / 4": (4, 0.1 / 4)}
  records = simulate_noise.temperature_trials(spread=0.01)
  for record in records:
    if record.trial["branch"] in wrong and record.trial["phase"] == "during":
      for row in record.probes:
        row["dataset_grad_sq_norm"] /= 8
  finding = judge(judge_temperature, records)
  check(finding, "temperature", "fails")
  assert "rate / 4 and B / 4" in finding.reading
  assert finding.claim.measured == pytest.approx(8, rel=0.1)


def test_without_an_unchanged_branch_there_is_no_comparison():
  records = [
    r for r in simulate_noise.temperature_trials() if r.trial["branch"] != "unchanged" or r.trial["phase"] == "before"
  ]
  finding = judge(judge_temperature, records)
  check(finding, "temperature", "inconclusive")
  assert finding.claim.measured is None


def test_a_seed_that_diverged_in_one_branch_is_left_out_there():
  records = simulate_noise.temperature_trials()
  victim = next(
    i
    for i, r in enumerate(records)
    if r.trial["branch"] == "B x 16" and r.trial["phase"] == "during" and r.trial["seed"] == 0
  )
  records[victim] = records[victim]._replace(status={"state": "diverged"})
  series = judge(judge_temperature, records).series
  whole = judge(judge_temperature, simulate_noise.temperature_trials()).series
  same = series["factor"] == whole["factor"]
  assert same.tolist() == [name != "B x 16" for name in series["factor_branch"]]


def quadratic_sgd(*, replace, num_examples=256, seeds=8, dimension=16):
  """Runs plain SGD on L_i = 1/2 h (w - c_i)^2 through the temperature test, all seeds at once; |G|^2 = |h w|^2 and tr(Sigma) are exact.

  The slowest direction, h = 0.25, relaxes in 1 / (0.2 / 16 * 0.25) = 320 steps of 8 at the lowest temperature; a stretch has 3,072.
  """
  rng = np.random.default_rng(0)
  h = np.geomspace(1.0, 0.25, dimension)
  c = rng.normal(size=(num_examples, dimension))
  c -= c.mean(axis=0)
  trace = float(np.sum((h * c) ** 2) / (num_examples - 1))
  records = []

  def stretch(branch, phase, size, rate, w, before):
    num_steps, marks = 96 * num_examples // size, 64
    pool = np.zeros((seeds, 0), int)
    probes = [[] for _ in range(seeds)]
    for step in range(num_steps + 1):
      if step % (num_steps // marks) == 0:
        for seed in range(seeds):
          row = {"probe": "noise", "step": step, "group": "all", "grad_cov_trace": trace}
          probes[seed].append(row | {"dataset_grad_sq_norm": float(np.sum((h * w[seed]) ** 2))})
      if replace:
        index = rng.integers(num_examples, size=(seeds, size))
      else:
        if pool.shape[1] < size:
          pool = rng.permuted(np.tile(np.arange(num_examples), (seeds, 1)), axis=1)
        index, pool = pool[:, :size], pool[:, size:]
      w = w - rate * h * (w - c[index].mean(axis=1))
    place = {"branch": branch, "phase": phase, "examples_before": before}
    records.extend(
      simulate_noise.record("temperature", size, rate, seed, probes[seed], num_steps=num_steps, **place)
      for seed in range(seeds)
    )
    return w

  base = (8, 0.2)
  middle = stretch("unchanged", "before", *base, np.zeros((seeds, dimension)), 0)
  for branch, (size, rate) in {"unchanged": base, "B x 16": (128, 0.2), "rate / 16": (8, 0.2 / 16)}.items():
    end = stretch(branch, "during", size, rate, middle, 96 * num_examples)
    stretch(branch, "after", *base, end, 192 * num_examples)
  return records


def test_temperature_holds_for_sgd_with_independent_batches_on_a_quadratic():
  finding = judge(judge_temperature, quadratic_sgd(replace=True))
  check(finding, "temperature", "holds")
  # McCandlish et al. (2018), appendix C, says 16 exactly, up to eps h / 2 = 10 % at the higher rate.
  assert (finding.series["factor_low"] < 16 * 1.1).all()
  assert (finding.series["factor_high"] > 16 / 1.1).all()


def test_batches_without_replacement_make_a_cool_run_quieter_than_predicted():
  series = judge(judge_temperature, quadratic_sgd(replace=False)).series
  assert (series["factor_low"] > 2 * 16).all()
