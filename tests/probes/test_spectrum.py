"""Eigenpairs against dense solvers, SciPy and chosen spectra, and their residuals against the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

from bsjax.models import cnn, mlp, vit
from bsjax.probes import eigenpairs, hessian_vector_product, layer_loss
from bsjax.probes.lanczos import Tridiagonal, begin, extend


def symmetric(eigenvalues, seed=0):
  """A dense symmetric matrix with the given eigenvalues and random eigenvectors."""
  rng = np.random.default_rng(seed)
  vectors, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
  return vectors @ np.diag(eigenvalues) @ vectors.T


def start(size, seed=1):
  return np.random.default_rng(seed).normal(size=size)


@functools.partial(jax.jit, static_argnames=("max_matvecs", "num_top", "num_bottom"))
def pairs_of(matrix, v0, **options):
  """Run `eigenpairs` on a dense matrix, in one program."""
  return eigenpairs(lambda v: matrix @ v, v0, **options)


def wanted(eigenvalues, num_top, num_bottom):
  ascending = np.sort(eigenvalues)
  return np.concatenate([ascending[::-1][:num_top], ascending[:num_bottom]])


def true_residuals(matrix, got):
  vectors = np.asarray(got.vectors, np.float64)
  return np.linalg.norm(vectors @ np.asarray(matrix, np.float64) - np.asarray(got.values)[:, None] * vectors, axis=1)


OUTLIERS = [100.0, 60.0, 30.0, *np.linspace(0, 1, 97)]
CASES = {
  # name: eigenvalues, how many at the top, at the bottom; most have 40 rows and one program
  "single": ([2.5], 1, 0),
  "all of them": ([*np.linspace(-2, 3, 9)], 5, 4),
  "negative": ([*np.linspace(-9, -1, 40)], 4, 2),
  "indefinite, larger below": ([*np.linspace(-50, 0, 39), 4.0], 4, 2),
  "double, of low rank": ([7.0, 7.0, 3.0, *[0.0] * 37], 4, 2),
  "triple, between negative ones": ([5.0, 5.0, 5.0, *[-40.0] * 37], 4, 2),
  "fourfold, of low rank": ([7.0] * 4 + [3.0, -1.0] + [0.0] * 34, 4, 2),
  "identity": ([1.0] * 40, 4, 2),
  "zero": ([0.0] * 40, 4, 2),
  "outliers": ([100.0, 60.0, 30.0, *np.linspace(0, 1, 37)], 4, 2),
  "close": ([1.01, 1.0, *np.linspace(0, 0.9, 38)], 4, 2),
  "a gap after the third": ([*np.linspace(16, 11, 3), *np.linspace(0.77, -0.2, 37)], 4, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_solver(case):
  eigenvalues, num_top, num_bottom = CASES[case]
  with jax.enable_x64(True):
    matrix = symmetric(eigenvalues)
    size, scale = len(matrix), np.abs(eigenvalues).max()
    options = {"num_top": num_top, "num_bottom": num_bottom, "max_matvecs": 200, "tolerance": 1e-9}
    got = pairs_of(matrix, start(size), **options)
    truth = wanted(eigenvalues, num_top, num_bottom)
    # A symmetric matrix has an eigenvalue within the residual of a Ritz value; 20 epsilons, 5e-15, is the promised floor.
    np.testing.assert_array_less(np.abs(got.values - truth), 1e-9 * np.abs(truth) + 1e-13 * scale + 1e-300)
    residuals = true_residuals(matrix, got)
    assert np.all(residuals <= got.residuals + 1e-14 * scale)
    np.testing.assert_array_less(got.residuals, 1.01e-9 * np.abs(truth) + 1e-13 * scale + 1e-300)
    vectors = np.asarray(got.vectors)
    # Vectors of one space are orthonormal to the rounding of sums over `size` terms.
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(vectors)), rtol=0, atol=1e-13)
    assert got.num_matvecs <= size + 1


@pytest.mark.parametrize("seed", range(5))
def test_residuals_in_float32_are_the_size_of_the_truth(seed):
  eigenvalues = [*np.linspace(16, 11, 9), *np.linspace(0.77, -0.2, 141)]
  matrix = jnp.asarray(symmetric(eigenvalues, seed), jnp.float32)
  got = pairs_of(
    matrix, jnp.asarray(start(150, seed), jnp.float32), num_top=10, num_bottom=0, max_matvecs=60, tolerance=1e-3
  )
  truth = true_residuals(matrix, got)
  # From above, to the rounding that this norm itself meets; not by more than sqrt(K) = 3.2 in the part that is rounding, which is
  # below 20 epsilons of the largest eigenvalue.
  floor = 20 * 1.2e-7 * 16
  assert np.all(truth <= got.residuals + 0.02 * floor)
  assert np.all(got.residuals <= truth + 3.2 * floor)
  assert np.all(got.residuals[:9] <= 1e-3 * got.values[:9])
  assert np.all(got.residuals > 0)


def test_residuals_see_an_operator_that_rounds_coarsely():
  """An error of 1e-3 in each product is invisible to beta_m s_mi, but not to the product that checks."""
  noise = jnp.asarray(np.random.default_rng(3).normal(size=(40, 40)) * 1e-3)
  matrix = jnp.asarray(symmetric(np.linspace(1, 9, 40)), jnp.float32)
  got = pairs_of(
    matrix + noise.astype(jnp.float32), jnp.asarray(start(40), jnp.float32), num_top=3, max_matvecs=41, tolerance=1e-5
  )
  truth = true_residuals(np.asarray(matrix + noise, np.float64).T, got)
  assert np.all(truth > 1e-3)  # the operator is not symmetric by so much
  assert np.all(truth <= 1.5 * got.residuals)  # random signs: within a factor, not a bound
  assert np.all(got.residuals <= 3.2 * 1.5 * truth)


def test_agrees_with_scipy():
  with jax.enable_x64(True):
    matrix = symmetric(np.random.default_rng(5).normal(size=80) ** 3)
    operator = LinearOperator(matrix.shape, matvec=lambda v: matrix @ v, dtype=np.float64)
    got = pairs_of(matrix, start(80), num_top=4, num_bottom=3, max_matvecs=81, tolerance=1e-8)
    top, top_vectors = eigsh(operator, 4, which="LA")
    bottom, bottom_vectors = eigsh(operator, 3, which="SA")
    np.testing.assert_allclose(got.values, [*top[::-1], *bottom], rtol=0, atol=1e-10 * np.abs(matrix).sum())
    overlaps = np.abs(np.sum(got.vectors * np.vstack([top_vectors.T[::-1], bottom_vectors.T]), 1))
    np.testing.assert_allclose(overlaps, 1, rtol=0, atol=1e-10)  # an angle of residual / gap, squared


def test_makes_the_products_it_reports_and_no_more_than_needed():
  matrix = jnp.asarray(symmetric(OUTLIERS), jnp.float32)
  made = []

  def matvec(vector):
    jax.debug.callback(lambda: made.append(1))
    return matrix @ vector

  run = jax.jit(functools.partial(eigenpairs, matvec, num_top=3, max_matvecs=90))
  counts = []
  for tolerance in (1e-1, 1e-5):
    made.clear()
    got = run(jnp.asarray(start(100), jnp.float32), tolerance=tolerance)
    jax.effects_barrier()
    assert len(made) == got.num_matvecs
    assert np.all(got.residuals <= np.maximum(tolerance * got.values, 20 * 1.2e-7 * 100 + 1e-4))
    counts.append(len(made))
  assert counts[0] < counts[1] < 30


def test_compiles_once_with_two_products_in_the_program():
  traced = []

  def matvec(vector):
    traced.append(1)
    return jnp.where(jnp.sinh(vector) > 1e9, 0, 2 * vector + jnp.sum(vector))  # linear; the sine can be counted

  run = jax.jit(functools.partial(eigenpairs, matvec, num_top=2, max_matvecs=9, tolerance=1e-3))
  run(jnp.asarray(start(20), jnp.float32))
  count = len(traced)
  text = run.lower(jnp.asarray(start(20), jnp.float32)).as_text()
  assert text.count("chlo.sinh") == 2  # that of the loop, and the one that measures the rounding
  run(jnp.asarray(start(20, 7), jnp.float32))
  assert len(traced) == count
  assert run._cache_size() == 1


def test_says_how_far_it_is_where_products_run_out():
  with jax.enable_x64(True):
    matrix = symmetric(np.linspace(0, 1, 60))
    got = pairs_of(matrix, start(60), num_top=2, max_matvecs=6, tolerance=1e-6)
    assert got.num_matvecs == 6
    assert np.all(got.residuals > 1e-3)
    np.testing.assert_allclose(got.residuals, true_residuals(matrix, got), rtol=1e-9)
    gaps = np.abs(np.linalg.eigvalsh(matrix) - np.asarray(got.values)[:, None]).min(1)
    assert np.all(gaps <= got.residuals)


def test_float32_basis_stays_orthogonal():
  """A dominant eigenvalue at the other end is what makes Lanczos vectors lose their orthogonality."""
  matrix = jnp.asarray(symmetric([-1e4, *np.linspace(0, 1, 79)]), jnp.float32)
  got = pairs_of(matrix, jnp.asarray(start(80), jnp.float32), max_matvecs=75, tolerance=1e-5)
  truth = np.linalg.eigvalsh(np.asarray(matrix, np.float64))[-1]
  # A product of 80 terms of size 1e4 is off by some 6e-8 * 1e4 * sqrt(80) = 5e-3.
  assert abs(got.values[0] - truth) < 1e-2
  assert got.residuals[0] < 3e-2
  assert got.num_matvecs < 50


@pytest.mark.parametrize("size", [70, 40_000])
def test_rows_are_orthonormal_to_float32(size):
  """Below and above the width that a sweep takes at a time."""
  eigenvalues = np.concatenate([[-1e3, 1e3, 300.0], np.linspace(-1, 1, size - 3)])
  diagonal = jnp.asarray(eigenvalues, jnp.float32)

  @jax.jit
  def run(v0):
    space = begin(v0, 45)
    return jax.lax.fori_loop(0, 45, lambda _, space: extend(space, diagonal * space.basis[space.size])[0], space)

  space = run(jnp.asarray(start(size), jnp.float32))
  basis = np.asarray(space.basis[:46], np.float64)
  np.testing.assert_allclose(basis @ basis.T, np.eye(46), rtol=0, atol=2e-6)  # 20 epsilons
  tridiagonal = (
    np.diag(space.diagonal[:45]) + np.diag(space.off_diagonal[:44], 1) + np.diag(space.off_diagonal[:44], -1)
  )
  projected = basis[:45] @ (eigenvalues[:, None] * basis[:45].T)
  np.testing.assert_allclose(tridiagonal, projected, rtol=0, atol=20 * 1.2e-7 * 1e3)


def test_what_almost_cancels_is_orthogonalised_again():
  """A product that lies in the space but for 1e-5 of it: one pass leaves components of 6e-8 / 1e-5 = 0.6 % of what remains."""
  rows = np.linalg.qr(start(24 * 500).reshape(500, 24))[0].T.astype(np.float32)
  product = rows[:20].sum(0) + 1e-5 * start(500).astype(np.float32) / 500**0.5
  zeros = jnp.zeros(24)
  longer, exhausted = jax.jit(extend)(Tridiagonal(jnp.asarray(rows), zeros, zeros, jnp.int32(19)), jnp.asarray(product))
  assert not exhausted
  assert longer.size == 20
  overlaps = rows[:20].astype(float) @ np.asarray(longer.basis[20], float)
  np.testing.assert_allclose(overlaps, 0, rtol=0, atol=2e-7)
  np.testing.assert_allclose(longer.diagonal, np.eye(24)[19], rtol=0, atol=1e-5)  # its component along the last row
  np.testing.assert_array_equal(longer.basis[21:], rows[21:])  # rows that are not in use stay as they are


def test_stops_when_the_space_is_exhausted():
  matrix = jnp.asarray(symmetric([-1.0, -2.0, -5.0, -9.0]), jnp.float32)
  got = pairs_of(matrix, jnp.ones(4), max_matvecs=30, tolerance=0.0)
  assert got.num_matvecs <= 5
  np.testing.assert_allclose(got.values, [-1], rtol=0, atol=1e-5)  # roundings of 6e-8 times an eigenvalue of 9


def test_identity_takes_a_product_a_pair():
  got = pairs_of(jnp.eye(50), jnp.asarray(start(50), jnp.float32), num_top=3, max_matvecs=30, tolerance=1e-3)
  assert got.num_matvecs == 4
  np.testing.assert_allclose(got.values, 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first_bad", [0, 3, 6])
def test_a_product_that_is_not_finite_ends_the_search(first_bad):
  """At the first product, in the middle, and at the one that checks (`max_matvecs` is the seventh)."""
  matrix = jnp.asarray(symmetric(np.linspace(0, 1, 60)), jnp.float32)
  count = []

  def product(vector):
    count.append(1)
    return np.asarray(matrix @ vector) if len(count) <= first_bad else np.full(60, np.inf, np.float32)

  def matvec(vector):
    return jax.pure_callback(product, jax.ShapeDtypeStruct((60,), jnp.float32), vector)

  got = jax.jit(functools.partial(eigenpairs, matvec, num_top=2, max_matvecs=7, tolerance=1e-6))(jnp.ones(60))
  assert np.all(np.isnan(got.values))
  assert np.all(np.isnan(got.residuals))
  assert got.num_matvecs == min(first_bad + 2, 7)  # the check is made in any case


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_top": 0}, "num_top=0 and num_bottom=0 ask for no eigenpair"),
    ({"num_top": 3, "num_bottom": -1}, "ask for no eigenpair"),
    ({"num_top": 3, "num_bottom": 1}, "ask for 4 eigenpairs of an operator that has 3"),
    ({"max_matvecs": 1}, "max_matvecs=1 must be at least 2"),
    ({"num_top": 2, "max_matvecs": 2}, "max_matvecs=2 must be at least 3"),
    ({"v0": jnp.zeros(3)}, "v0 has norm 0.0"),
    ({"v0": jnp.array([1.0, jnp.nan, 0.0])}, "v0 has norm nan"),
  ],
)
def test_refuses(options, message):
  options = {"v0": jnp.ones(3), "max_matvecs": 9, "tolerance": 0.1} | options
  with pytest.raises(ValueError, match=message):
    eigenpairs(lambda v: v, options.pop("v0"), **options)


NETS = {
  "mlp": lambda: mlp((4, 4, 1), (5,), 3),
  "batch norm": lambda: mlp((4, 4, 1), (5,), 3, batch_norm="running"),
  "cnn": lambda: cnn((4, 4, 1), 3, channels=(2, 2)),
  "vit": lambda: vit((4, 4, 1), 3, width=4, depth=1, num_heads=2),
}


@functools.cache
def net_and_examples(name):
  """A small net in float64 at a random point, its loss, 9 examples and its Hessian."""
  model = NETS[name]()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes.params)
  state = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, size=leaf.shape), shapes.model_state)
  examples = {"image": rng.normal(size=(9, 4, 4, 1)), "label": rng.integers(0, 3, 9)}

  def loss_fn(params, example):
    logits, _ = model.apply(params, state, example["image"][None], train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits[0], example["label"])

  return loss_fn, params, examples, np.asarray(dense_hessian(loss_fn, params, examples))


def dense_hessian(loss_fn, params, examples):
  flat, unravel = ravel_pytree(params)
  return jax.jit(jax.hessian(lambda w: jnp.mean(jax.vmap(loss_fn, (None, 0))(unravel(w), examples))))(flat)


@pytest.mark.parametrize("name", NETS)
def test_hessian_of_every_kind_of_net(name):
  with jax.enable_x64(True):
    loss_fn, params, examples, dense = net_and_examples(name)

    @jax.jit
    def run(params, examples, vector):
      matvec = functools.partial(hessian_vector_product, loss_fn, params, examples, chunk_size=4)
      return eigenpairs(matvec, vector, num_top=4, num_bottom=2, max_matvecs=90, tolerance=1e-8)

    got = run(params, examples, optax.tree.random_like(jax.random.key(0), params))
    values, vectors = np.linalg.eigh(dense)
    scale = np.abs(values).max()
    # Errors of values are squares of residuals over gaps: below the residual whatever the gaps.
    np.testing.assert_allclose(got.values, wanted(values, 4, 2), rtol=0, atol=1e-8 * scale)
    flat = np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(got.vectors))
    assert np.all(
      np.linalg.norm(flat @ dense - np.asarray(got.values)[:, None] * flat, axis=1) <= got.residuals + 1e-13 * scale
    )
    assert np.all(got.residuals <= 1.01e-8 * np.abs(got.values) + 1e-12 * scale)
    np.testing.assert_allclose(abs(flat[0] @ vectors[:, -1]), 1, rtol=0, atol=1e-9)
    assert jax.tree.structure(got.vectors) == jax.tree.structure(params)


@pytest.mark.parametrize("name", NETS)
def test_layer_blocks_are_those_of_the_dense_hessian(name):
  with jax.enable_x64(True):
    loss_fn, params, examples, dense = net_and_examples(name)
    index = dict(zip(map(jax.tree_util.keystr, _paths(params)), _positions(params), strict=True))
    layers = sorted({key.rpartition("[")[0] for key in index})
    for layer in (layers[0], layers[-1]):
      own = [key for key in sorted(index) if key.rpartition("[")[0] == layer]
      where = np.concatenate([index[key] for key in own])
      block_loss, block_params = layer_loss(loss_fn, params, layer.strip("[']").replace("']['", "/"))
      block = np.asarray(dense_hessian(block_loss, block_params, examples))
      assert block.shape == (len(where),) * 2
      np.testing.assert_allclose(block, dense[np.ix_(where, where)], rtol=0, atol=1e-13 * max(1, np.abs(dense).max()))


def _paths(params):
  return [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def _positions(params):
  ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])
  return [np.arange(end - leaf.size, end) for end, leaf in zip(ends, jax.tree.leaves(params), strict=True)]


def test_an_unknown_layer_is_refused_by_name():
  with pytest.raises(ValueError, match=r"layer='Dense' is not in the parameters; use one of a, b"):
    layer_loss(lambda params, example: 0.0, {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(2)}}, "Dense")
