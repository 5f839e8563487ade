"""The curvature benchmark runs; its errors, residuals and operation counts are what they say; its opponents find the same eigenvalues."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree
from jax.interpreters import partial_eval

from bsjax.probes import spectral_quadrature
from bsjax.probes.keskar import KeskarSharpness
from scripts import curvature_peers as peers
from scripts import noise_problems
from scripts.curvature_problems import (
  ACCURACY,
  WORK,
  compared,
  estimating_side,
  flat_product,
  images,
  in_float64,
  moments,
  relative_error,
  trained,
)
from scripts.noise_problems import Problem

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.bench_curvature"]


def run(*flags):
  # In a process of its own: the benchmark pins its process to one core.
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run([*COMMAND, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_smoke_prints_one_row_for_each_comparison():
  done = run("--smoke", "--num_examples=256")
  assert done.returncode == 0, done.stderr
  rows = {(row["case"], row["versus"]): row for row in map(json.loads, done.stdout.splitlines())}
  assert list(rows) == [("hvp_mlp512", "grad"), ("top1_mlp512", "bare_hvps"), ("top1_mlp512", "scipy")]
  for row in rows.values():
    assert (row["bench"], row["n"]) == ("curvature", 2)
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
  product, bare, scipy = rows.values()
  # float32 against float64: rounding shows, 1e-6 here. A ReLU that it turns changes a small part of one image's thousandth.
  assert 0 < product["our_error"] < 1e-4
  assert 0 < product["their_error"] < 1e-4
  first, second, last = 784 * 512, 512 * 512, 512 * 10
  assert product["floor"] == float(f"{(3 * first + 7 * second + 8 * last) / (2 * first + 3 * (second + last)):.4g}")
  assert bare["their_matvecs"] == bare["our_matvecs"] > 1
  for row in (bare, scipy):
    assert 0 < row["our_error"] <= ACCURACY
    # Some eigenvalue lies within the residual of a Ritz value, and a symmetric matrix's Ritz value is closer than that.
    assert row["our_error"] <= row["our_residual"]
  assert 0 < scipy["their_error"] <= ACCURACY


def test_an_unknown_case_is_refused_with_the_known_ones():
  done = run("--only=top2_mlp512")
  assert done.returncode != 0
  assert "top10_mlp512" in done.stderr
  assert done.stdout == ""


def flops(function, *arguments):
  """Counts the products that a function cannot do without: two per multiply-add, dead code left out."""
  closed = jax.make_jaxpr(function)(*arguments)
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return count(jaxpr)


def count(jaxpr):
  total = 0.0
  for equation in jaxpr.eqns:
    sizes = [variable.aval.shape for variable in equation.invars]
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      depth = math.prod(sizes[0][axis] for axis in contracted)
      total += 2 * depth * equation.outvars[0].aval.size
    elif equation.primitive.name.startswith("loop_safe"):
      # Of images [V, N, H, W, C] and kernels [V, kh, kw, I, O] two come in and one goes out.
      geometry = equation.params["geometry"]
      channels = (sizes[0][-1], sizes[1][-1]) if "filter" in equation.primitive.name else sizes[1][-2:]
      total += 2 * sizes[0][1] * math.prod((*geometry.output_size, *geometry.kernel_size, *channels))
    else:
      for inner in jaxprs_in_params(equation.params):
        total += count(inner)
  return total


@pytest.mark.parametrize("network", WORK)
def test_operation_counts_are_those_of_the_traced_program(network):
  problem = {
    "mlp512": noise_problems.mlp512,
    "cnn": noise_problems.cnn,
    "transformer": functools.partial(noise_problems.transformer, tied=False),
  }[network]()
  example = jax.tree.map(lambda x: x[0], problem.examples)

  def grad(params):
    return jax.grad(problem.loss_fn)(params, example)

  def product(params, vector):
    return jax.jvp(grad, (params,), (vector,))[1]

  # Counted by hand are the products with weights and of activations. What else is a dot to JAX (a sum, a bias) is far smaller.
  assert flops(grad, problem.params) == pytest.approx(WORK[network].gradient(), rel=5e-3)
  assert WORK[network].gradient() == problem.flops
  assert flops(product, problem.params, problem.params) == pytest.approx(WORK[network].products(1), rel=5e-3)
  # One vector more costs what depends on it: the linear map alone.
  linear = jax.linearize(grad, problem.params)[1]
  assert flops(linear, problem.params) == pytest.approx(WORK[network].products(2) - WORK[network].products(1), rel=5e-3)


@functools.cache
def small():
  """A trained perceptron of 20-8-3, its Hessian made densely in float64, and the three largest eigenvalues."""
  draw = np.random.default_rng(0)
  examples = {
    "image": jnp.asarray(draw.normal(size=(30, 20)), jnp.float32),
    "label": jnp.asarray(draw.integers(3, size=30)),
  }
  params = {
    f"Dense_{i}": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])} for i, shape in enumerate([(20, 8), (8, 3)])
  }

  def loss_fn(params, example):
    hidden = jax.nn.relu(example["image"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    logits = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    return jax.nn.logsumexp(logits) - logits[example["label"]]

  problem = trained(Problem(loss_fn, params, examples, 8, 8, 0.0), 0)
  with jax.enable_x64(True):
    flat, unravel = ravel_pytree(in_float64(problem.params))
    data = in_float64(problem.examples)

    @jax.jit
    @jax.hessian
    def hessian(flat):
      return jnp.mean(jax.vmap(loss_fn, (None, 0))(unravel(flat), data))

    matrix = np.asarray(hessian(flat))
  return problem, matrix, np.linalg.eigvalsh(matrix)[::-1][:3]


def test_the_flat_product_is_that_of_the_dense_hessian():
  problem, matrix, _ = small()
  with jax.enable_x64(True):
    problem = problem._replace(params=in_float64(problem.params), examples=in_float64(problem.examples))
    vector = np.random.default_rng(1).normal(size=len(matrix))
    np.testing.assert_allclose(flat_product(problem)(vector), matrix @ vector, rtol=1e-10)


def test_training_learns():
  problem, _, _ = small()
  losses = jax.vmap(problem.loss_fn, (None, 0))(problem.params, problem.examples)
  assert jnp.mean(losses) < 0.5 * math.log(3)  # log 3 is the loss of not knowing


def test_keskar_rows_say_how_often_ours_is_no_lower():
  def result(value, gap, num_evaluations):
    return KeskarSharpness(value, 0.5, 0.1, gap, None, num_evaluations, "")

  mine = [result(2.0, 0.0, 11), result(3.0, 0.3, 9), result(4.0, 0.1, 10)]
  others = [result(2.0, 0.0, 12), result(2.5, 0.0, 14), result(4.5, 0.2, 13)]
  row = compared(mine, others)
  assert row["no_lower"] == pytest.approx(2 / 3)
  assert (row["our_maxima"], row["their_maxima"]) == ([2.0, 3.0, 4.0], [2.0, 2.5, 4.5])
  assert (row["our_error"], row["their_error"]) == (0.3, 0.2)
  assert (row["our_evaluations"], row["their_evaluations"]) == (10, 13)


def test_relative_error_is_of_the_worst_value():
  assert relative_error(np.array([2.0, 1.1]), np.array([2.0, 1.0])) == pytest.approx(0.1)
  assert np.isnan(relative_error(np.array([2.0, np.nan]), np.array([2.0, 1.0])))


def scipy_side():
  problem, _, truth = small()
  return peers.loosest(lambda tolerance: peers.scipy_side(problem, 3, tolerance), (1e-1, 1e-4), truth)


def matfree_side():
  pytest.importorskip("matfree")
  return peers.matfree_side(small()[0], 3, small()[2])


def curvlinops_side():
  pytest.importorskip("torch")
  pytest.importorskip("curvlinops")
  return peers.curvlinops_side(small()[0], 3, 1e-4)


def pyhessian_side():
  pytest.importorskip("torch")
  pytest.importorskip("pyhessian")
  return peers.pyhessian_side(small()[0], 3, 1e-6)


@pytest.mark.filterwarnings("ignore")  # of PyTorch and of what stands on it
@pytest.mark.parametrize("make", [scipy_side, matfree_side, curvlinops_side, pyhessian_side])
def test_opponents_find_the_eigenvalues_of_the_dense_hessian(make):
  _, _, truth = small()
  side = make()
  found = side.call()
  values = side.read(found)
  assert list(values) == sorted(values, reverse=True)
  assert relative_error(values, truth) <= ACCURACY
  # A pair's residual bounds its value's distance from an eigenvalue, and float32 products are exact to about 1e-6.
  residuals = side.residuals(found)
  assert residuals.shape == (3,)
  assert np.all(np.abs(values - truth) / truth <= residuals + 1e-6)
  assert np.all(residuals < 0.1)
  assert side.notes(found)["their_matvecs"] >= 3


PROBES = 3


def our_density():
  return lambda *arguments: moments(*spectral_quadrature(*arguments, num_probes=PROBES, num_matvecs=6))


def matfree_density():
  pytest.importorskip("matfree")
  return peers.matfree_density(PROBES, 6)


@pytest.mark.parametrize("make", [our_density, matfree_density])
def test_densities_have_the_moments_of_their_probes(make):
  problem, matrix, _ = small()
  keys = jax.random.split(jax.random.key(noise_problems.SEED), PROBES)
  probes = np.stack([jax.random.rademacher(key, (len(matrix),), float) for key in keys])
  # Six nodes are exact for z'Hz / P and z'HHz / P.
  truth = np.stack([np.sum(probes * (probes @ matrix), 1), np.sum((probes @ matrix) ** 2, 1)], 1) / len(matrix)
  check_estimate(estimating_side(problem, make()), truth.mean(0), truth.std(0, ddof=1) / PROBES**0.5)


def check_estimate(side, values, sems):
  found = side.call()
  notes = side.notes(found)
  # Float32 products are exact to about 1e-6 of the largest eigenvalue, and these are averages of a few of them.
  np.testing.assert_allclose(notes["values"], values, rtol=1e-4)
  np.testing.assert_allclose(notes["sems"], sems, rtol=1e-3)
  np.testing.assert_array_equal(side.read(found), np.float32(notes["values"]))
  assert notes["mib"] > 0


def test_traces_are_those_of_their_probes():
  pytest.importorskip("matfree")
  problem, matrix, _ = small()
  key = jax.random.key(noise_problems.SEED)

  def quadratic_forms(probes):
    return np.sum(probes * (probes @ matrix), 1)

  together = quadratic_forms(np.asarray(jax.random.rademacher(key, (PROBES, len(matrix)), float)))
  # matfree's standard error divides by n, not n - 1.
  check_estimate(
    estimating_side(problem, peers.matfree_trace(PROBES)), [together.mean()], [together.std() / PROBES**0.5]
  )
  keys = jax.random.split(key, PROBES)
  apart = quadratic_forms(np.stack([jax.random.rademacher(key, (len(matrix),), float) for key in keys]))
  check_estimate(
    estimating_side(problem, peers.matfree_map_trace(PROBES)), [apart.mean()], [apart.std(ddof=1) / PROBES**0.5]
  )


def test_more_images_than_there_are_is_an_error():
  with pytest.raises(ValueError, match="digits has 1024 training images, not 2000; use fewer, or --data=mnist"):
    images("digits", None, 2000)


def test_a_residual_shows_a_wrong_vector():
  _, matrix, truth = small()
  pairs = truth, np.linalg.eigh(matrix)[1][:, ::-1][:, [0, 1, 1]]
  side = peers.pairs_side(lambda: pairs, lambda vector: matrix @ vector, lambda _: {})
  # The third value is paired with the second vector: |H v - lambda v| = |lambda_2 - lambda_3|.
  want = [0, 0, (truth[1] - truth[2]) / truth[2]]
  np.testing.assert_allclose(side.residuals(pairs), want, rtol=0, atol=1e-12)


def test_the_loosest_sufficient_tolerance_is_taken_and_else_the_tightest():
  def make(tolerance):
    return peers.pairs_side(
      lambda: (np.array([1 + tolerance]), np.ones((1, 1))), lambda v: v, lambda _: {"t": tolerance}
    )

  assert peers.loosest(make, (1e-2, 9e-5, 1e-6), np.array([1.0])).notes(None) == {"t": 9e-5}
  assert peers.loosest(make, (1e-1, 1e-2), np.array([1.0])).notes(None) == {"t": 1e-2}
