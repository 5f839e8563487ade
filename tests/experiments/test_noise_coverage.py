"""The coverage table: problems against automatic differentiation, draws against repeated examples, and the command."""

import csv
import functools
import json
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bsjax.probes import gradient_moments, noise_of, per_example_grads
from bsjax.probes.estimate import LEAST_TAIL
from bsjax.records import RecordError
from bsjax.study import run_command
from bsjax.study.coverage import (
  PROBLEMS,
  Cell,
  border,
  draw_statistics,
  make_cells,
  measure_cell,
  truth_of,
)
from experiments import noise_coverage


@functools.cache
def problem_of(name, noise_scale=50.0):
  return PROBLEMS[name](noise_scale)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_are_those_of_the_stated_loss(name):
  problem = problem_of(name)
  with jax.enable_x64(True):
    examples = jax.tree.map(jnp.asarray, problem.examples)
    grads = per_example_grads(problem.loss_fn, jnp.asarray(problem.params), examples)
  # A float64 sum of at most 200 products.
  np.testing.assert_allclose(problem.grads, grads, rtol=1e-12, atol=1e-13)
  assert problem.probabilities.sum() == pytest.approx(1, rel=1e-12)
  assert problem.probabilities.min() > 0


@pytest.mark.parametrize("name", ["logistic", "student_t"])
def test_a_draw_is_a_data_set_of_repeated_examples(name):
  """The moments by counts equal those of `gradient_moments` on the examples written out."""
  problem, num_examples = problem_of(name, 10.0), 700
  got = draw_statistics(problem, num_examples, np.random.default_rng(3))
  index = np.repeat(
    np.arange(problem.probabilities.size), np.random.default_rng(3).multinomial(num_examples, problem.probabilities)
  )
  assert index.size == num_examples
  with jax.enable_x64(True):
    examples = jax.tree.map(lambda x: jnp.asarray(x[index]), problem.examples)
    params = {"w": jnp.asarray(problem.params)}
    loss_fn = lambda params, example: problem.loss_fn(params["w"], example)  # noqa: E731
    want = noise_of(gradient_moments(loss_fn, params, examples, chunk_size=64, route="exact"))
  assert got.noise_scale.verdict == "identified"
  for estimate, wanted in zip(got[1:5], want[1:5], strict=True):
    # Sums of 700 float64 numbers in another order; the intervals hold differences of them.
    assert estimate[:4] == pytest.approx(wanted[:4], rel=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("noise_scale", [10.0, 1e6, math.inf])
def test_truth(name, noise_scale):
  problem = problem_of(name, noise_scale)
  truth = truth_of(problem)
  # The gradient is a millionth of the noise and less: 1e-16 of a noise of 10^3, which is squared last.
  assert truth.noise_scale == pytest.approx(noise_scale, rel=1e-6) or (
    noise_scale == math.inf and truth.noise_scale > 1e25
  )
  mean = np.average(problem.grads, axis=0, weights=problem.probabilities)
  cov = np.cov(problem.grads.T, aweights=problem.probabilities, ddof=0)
  assert truth.grad_cov_trace == pytest.approx(np.trace(cov), rel=1e-9)
  assert truth.cov_sq_norm == pytest.approx(np.trace(cov @ cov), rel=1e-9)
  assert truth.along == pytest.approx(mean @ cov @ mean, rel=1e-6, abs=1e-25)


def test_a_noise_scale_out_of_reach_is_refused():
  with pytest.raises(
    ValueError, match="noise_scale=1.0 is below what this logistic regression has anywhere; use 10 or more"
  ):
    PROBLEMS["logistic"](1.0)


def test_student_t_has_its_tails():
  """Coordinates have Student's distribution: variance 5/3, and the share beyond 6 that 5 degrees of freedom give, 0.0018."""
  problem = problem_of("student_t", math.inf)
  x, p = problem.grads, problem.probabilities
  # 48 examples in each of 42 strata: 2,016 different ones, of which the first hold half of the probability and vary by 1/sqrt(48).
  assert truth_of(problem).grad_cov_trace / 30 == pytest.approx(5 / 3, rel=0.05)
  beyond = np.mean([p[np.abs(x[:, k]) > 6].sum() for k in range(30)])
  assert beyond == pytest.approx(2 * stats.t.sf(6, 5), rel=0.15)
  assert p.min() < 1e-13


def test_spread_of_the_estimate_over_draws():
  """Over draws, |G|^2 has the truth as its mean and the variance by which the table's sizes are chosen."""
  problem = problem_of("linear_decaying")
  truth, n, num_draws = truth_of(problem), 100, 2000
  rng = np.random.default_rng(0)
  values = [draw_statistics(problem, n, rng).grad_sq_norm.value for _ in range(num_draws)]
  variance = 4 * truth.along / n + 2 * truth.cov_sq_norm / (n * (n - 1))
  assert np.mean(values) == pytest.approx(truth.grad_sq_norm, abs=4 * math.sqrt(variance / num_draws))
  # The variance of a variance: 4 standard errors are 4 sqrt(2 / 2000), and half as much again for the skew of a square.
  assert np.var(values) == pytest.approx(variance, rel=0.19)


@pytest.mark.parametrize("standard_errors", [0.0, 4.0])
def test_border(standard_errors):
  truth = truth_of(problem_of("logistic", 100.0))
  n = border(truth, standard_errors)

  def distance(n):
    sem = math.sqrt(4 * truth.along / n + 2 * truth.cov_sq_norm / n / (n - 1))
    return truth.grad_sq_norm / sem - stats.t.isf(LEAST_TAIL, n - 1)

  assert distance(n) >= standard_errors > distance(n - 1)


def test_every_noise_scale_has_every_regime():
  cells = make_cells(["logistic"], [10.0, 1e5], 100)
  assert [cell.regime for cell in cells[:8]] == ["hopeless", "borderline", "clear", "ample"] * 2
  assert all(a.num_examples < b.num_examples for a, b in zip(cells[:3], cells[1:4], strict=True))
  assert {cell.regime for cell in cells[8:]} == {"zero gradient"}
  assert cells[0].description["noise_scale"] == 10.0
  assert cells[-1].description["noise_scale"] is None
  json.dumps([cell.description for cell in cells], allow_nan=False)


def test_a_cell_counts():
  clear = measure_cell(Cell("linear_gaussian", 10.0, "clear", 43, 300), seed=1)
  assert clear["given"] == clear["covered"] + clear["too_high"] + clear["too_low"] == 300
  assert clear["covered"] == pytest.approx(0.95 * 300, abs=4 * math.sqrt(300 * 0.95 * 0.05))
  assert clear["signal_given"] == 300
  assert clear["signal_covered"] == clear["covered"]
  zero = measure_cell(Cell("linear_gaussian", math.inf, "zero gradient", 100, 100), seed=1)
  assert zero["given"] == 0
  assert zero["median_ci_ratio"] is None
  assert measure_cell(Cell("logistic", 10.0, "clear", 800, 20), seed=5) == measure_cell(
    Cell("logistic", 10.0, "clear", 800, 20), seed=5
  )


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  folder = tmp_path_factory.mktemp("coverage") / "out"
  assert noise_coverage.run(folder, smoke=True) == folder / "report.html"
  return folder


def test_what_it_leaves(out):
  with open(out / "results.csv", newline="") as handle:
    rows = list(csv.DictReader(handle))
  assert len(rows) == len(PROBLEMS) * (2 * 4 + 6)
  assert {row["problem"] for row in rows} == set(PROBLEMS)
  (claim,) = json.loads((out / "claims.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
  assert claim["id"] == "coverage"
  assert claim["verdict"] in ("holds", "inconclusive")
  table = (out / "coverage.md").read_text().splitlines()
  lines = [line for line in table if line.startswith("|")]
  assert len(lines) == len(rows) + 2
  assert len({line.count("|") for line in lines}) == 1


def test_continues_after_a_kill(out, tmp_path):
  """A folder that lacks two cells, one of them begun, is completed to the same table; nothing else is drawn again."""
  again = tmp_path / "again"
  shutil.copytree(out, again)
  first, second, *_ = sorted((again / "noise_coverage").iterdir())
  shutil.rmtree(first)
  (second / "status.json").write_text((second / "status.json").read_text().replace("complete", "running"))
  (second / "probes.jsonl").write_text("")
  before = {path: path.stat().st_mtime_ns for path in again.glob("noise_coverage/*/*") if second not in path.parents}
  noise_coverage.run(again, smoke=True)
  after = {path: path.stat().st_mtime_ns for path in again.glob("noise_coverage/*/*")}
  assert before.items() <= after.items()
  assert (first / "status.json").exists()
  assert (again / "results.csv").read_bytes() == (out / "results.csv").read_bytes()
  with pytest.raises(RecordError, match="num_draws was 20 and is now 30"):
    noise_coverage.run(again, smoke=True, num_draws=30)


def command(monkeypatch, *arguments):
  """Runs the command in this process and returns its exit code."""
  noise_coverage._FLAGS.unparse_flags()
  for name in noise_coverage._FLAGS:
    noise_coverage._FLAGS[name].unparse()
  monkeypatch.setattr(sys, "argv", ["noise_coverage", *arguments])
  return run_command(
    noise_coverage._prepare_from_flags,
    documentation=noise_coverage.__doc__,
    module="experiments.noise_coverage",
    flag_values=noise_coverage._FLAGS,
  )


def test_help_fits_a_screen(monkeypatch, capsys):
  assert command(monkeypatch, "--help") == 0
  shown = capsys.readouterr().out
  assert all(f"--{name}:" in shown for name in ("out", "num_draws", "smoke"))
  assert len(shown.splitlines()) <= 24


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--num_draws=0"], "--num_draws=0, wanted at least 1; 1000 and more to judge the claim"),
    (["--num_draws=many"], "num_draws=many"),
    (["--draws=3"], "draws"),
  ],
)
def test_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
  assert command(monkeypatch, f"--out={tmp_path / 'new'}", *arguments) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("error: ")
  assert message in captured.err
  assert captured.err.count("\n") == 1
  assert not (tmp_path / "new").exists()
