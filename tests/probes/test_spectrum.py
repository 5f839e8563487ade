"""The top eigenvalue against dense solvers, and its residual against the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from bsjax.probes import hessian_vector_product, top_eigenvalue


def symmetric(eigenvalues, seed=0):
  """A dense symmetric matrix with the given eigenvalues and random eigenvectors."""
  rng = np.random.default_rng(seed)
  vectors, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
  return vectors @ np.diag(eigenvalues) @ vectors.T


def start(size, seed=1):
  return np.random.default_rng(seed).normal(size=size)


@functools.partial(jax.jit, static_argnames="max_matvecs")
def top_of(matrix, v0, **options):
  """Run `top_eigenvalue` on a dense matrix, in one program."""
  return top_eigenvalue(lambda v: matrix @ v, v0, **options)


CASES = {
  "single": [2.5],
  "quadratic": [3.0, 1.0, 0.1],
  "negative": [-1.0, -2.0, -5.0, -9.0],
  "indefinite, larger below": [*np.linspace(-50, 0, 20), 4.0],
  "double": [7.0, 7.0, *np.linspace(-1, 1, 10)],
  "zero": [0.0] * 5,
  "outliers": [100.0, 60.0, 30.0, *np.linspace(0, 1, 97)],
  "close": [1.01, 1.0, *np.linspace(0, 0.9, 58)],
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_solver(case):
  with jax.enable_x64(True):
    matrix = symmetric(CASES[case])
    tolerance = 1e-9
    size = len(matrix)
    got = top_of(matrix, start(size), max_matvecs=200, tolerance=tolerance)
    truth = np.linalg.eigvalsh(matrix)[-1]
    scale = np.abs(CASES[case]).max()
    # A symmetric matrix has an eigenvalue within the residual of a Ritz value.
    np.testing.assert_allclose(got.value, truth, rtol=0, atol=1.01 * tolerance * abs(truth) + 1e-14 * scale)
    residual = np.linalg.norm(matrix @ got.vector - got.value * got.vector)
    np.testing.assert_allclose(got.residual, residual, rtol=0, atol=1e-14 * scale)
    assert got.residual <= 1.01 * tolerance * abs(truth) + 1e-14 * scale
    np.testing.assert_allclose(np.linalg.norm(got.vector), 1, rtol=1e-14)
    assert got.num_matvecs <= size + 1


def test_makes_the_products_it_reports_and_no_more_than_needed():
  matrix = jnp.asarray(symmetric(CASES["outliers"]), jnp.float32)
  made = []

  def matvec(vector):
    jax.debug.callback(lambda: made.append(1))
    return matrix @ vector

  run = jax.jit(functools.partial(top_eigenvalue, matvec, max_matvecs=90))
  counts = []
  for tolerance in (1e-1, 1e-5):
    made.clear()
    got = run(jnp.asarray(start(100), jnp.float32), tolerance=tolerance)
    jax.effects_barrier()
    assert len(made) == got.num_matvecs
    assert got.residual <= tolerance * got.value
    counts.append(len(made))
  assert counts[0] < counts[1] < 30


def test_says_how_far_it_is_where_products_run_out():
  with jax.enable_x64(True):
    matrix = symmetric(np.linspace(0, 1, 60))
    got = top_of(matrix, start(60), max_matvecs=6, tolerance=1e-6)
    assert got.num_matvecs == 6
    assert got.residual > 1e-3
    np.testing.assert_allclose(got.residual, np.linalg.norm(matrix @ got.vector - got.value * got.vector), rtol=1e-12)
    assert np.min(np.abs(np.linalg.eigvalsh(matrix) - got.value)) <= got.residual


def test_float32_basis_stays_orthogonal():
  """A dominant eigenvalue at the other end is what makes Lanczos vectors lose their orthogonality.

  With one pass of orthogonalisation per step the residual of this problem stays at 6.5; with none but the three-term
  recurrence it takes 63 products instead of 35.
  """
  matrix = jnp.asarray(symmetric([-1e4, *np.linspace(0, 1, 79)]), jnp.float32)
  got = top_of(matrix, jnp.asarray(start(80), jnp.float32), max_matvecs=75, tolerance=1e-5)
  truth = np.linalg.eigvalsh(np.asarray(matrix, np.float64))[-1]
  # A product of 80 terms of size 1e4 is off by some 6e-8 * 1e4 * sqrt(80) = 5e-3.
  assert abs(got.value - truth) < 1e-2
  assert got.residual < 1e-2
  assert got.num_matvecs < 50


def test_stops_when_the_space_is_exhausted():
  matrix = jnp.asarray(symmetric(CASES["negative"]), jnp.float32)
  got = top_of(matrix, jnp.ones(4), max_matvecs=30, tolerance=0.0)
  assert got.num_matvecs <= 5
  np.testing.assert_allclose(got.value, -1, rtol=0, atol=1e-5)  # roundings of 6e-8 times an eigenvalue of 9


def test_a_product_that_is_not_finite_ends_the_search():
  got = top_of(jnp.full((8, 8), jnp.nan), jnp.ones(8), max_matvecs=8, tolerance=1e-3)
  assert np.isnan(got.value)
  assert np.isnan(got.residual)
  assert got.num_matvecs == 2


def test_needs_a_product_to_make_and_one_to_check():
  with pytest.raises(ValueError, match="max_matvecs=1 must be at least 2"):
    top_eigenvalue(lambda v: v, jnp.ones(3), max_matvecs=1, tolerance=0.1)


def test_hessian_of_a_net_over_pytrees_in_one_program():
  def loss_fn(params, example):
    hidden = jnp.tanh(example["x"] @ params["in"] + params["bias"])
    return (hidden @ params["out"] - example["y"]) ** 2

  rng = np.random.default_rng(1)
  params = {"in": rng.normal(size=(4, 5)), "bias": rng.normal(size=5), "out": rng.normal(size=5)}
  examples = {"x": rng.normal(size=(11, 4)), "y": rng.normal(size=11)}

  @jax.jit
  def run(params, examples, vector):
    matvec = functools.partial(hessian_vector_product, loss_fn, params, examples, chunk_size=4)
    return top_eigenvalue(matvec, vector, max_matvecs=40, tolerance=1e-10)

  with jax.enable_x64(True):
    flat, unravel = ravel_pytree(params)

    def mean_loss(flat):
      return jnp.mean(jax.vmap(loss_fn, (None, 0))(unravel(flat), examples))

    truth = np.linalg.eigvalsh(jax.jit(jax.hessian(mean_loss))(flat))[-1]
    got = run(params, examples, optax.tree.random_like(jax.random.key(0), params))
    np.testing.assert_allclose(got.value, truth, rtol=1e-10)
    assert got.residual <= 1.01e-10 * truth
    assert jax.tree.structure(got.vector) == jax.tree.structure(params)
