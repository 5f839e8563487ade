"""Products with curvature matrices against closed forms and dense matrices, in float64, and spread over devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bsjax.models import cnn, mlp, vit
from bsjax.probes import (
  fisher_vector_product,
  gauss_newton_block_product,
  gauss_newton_vector_product,
  hessian_block_product,
  hessian_vector_product,
)

N = 11


@pytest.mark.parametrize("chunk_size", [1, 4, N])
def test_logistic_regression(chunk_size):
  """H = X' diag(s (1 - s)) X / N, with s the logistic function of X w: every example has its own Hessian."""

  def loss_fn(weights, example):
    return jnp.logaddexp(0.0, example @ weights)

  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, weights, vector = rng.normal(size=(N, 6)), rng.normal(size=6), rng.normal(size=6)
    run = jax.jit(functools.partial(hessian_vector_product, loss_fn, chunk_size=chunk_size))
    s = 1 / (1 + np.exp(-x @ weights))
    expected = x.T @ (s * (1 - s) * (x @ vector)) / N
    # Sums of 11 in another order and a few operations: tens of roundings of 1e-16.
    np.testing.assert_allclose(run(weights, x, vector), expected, rtol=0, atol=1e-14 * np.abs(expected).max())


def test_columns_equal_the_dense_hessian_of_a_net():
  def loss_fn(params, example):
    hidden = jnp.tanh(example["x"] @ params["in"] + params["bias"])
    return (hidden @ params["out"] - example["y"]) ** 2

  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    params = {"in": rng.normal(size=(4, 5)), "bias": rng.normal(size=5), "out": rng.normal(size=5)}
    examples = {"x": rng.normal(size=(N, 4)), "y": rng.normal(size=N)}
    flat, unravel = ravel_pytree(params)

    def mean_loss(flat):
      return jnp.mean(jax.vmap(loss_fn, (None, 0))(unravel(flat), examples))

    @jax.jit
    @jax.vmap
    def columns(vector):
      product = hessian_vector_product(loss_fn, params, examples, unravel(vector), chunk_size=4)
      return ravel_pytree(product)[0]

    want = jax.jit(jax.hessian(mean_loss))(flat)
    # The same derivatives by two routes: some 30 sums and products of 1e-16 each.
    np.testing.assert_allclose(columns(jnp.eye(flat.size)), want, rtol=0, atol=1e-13 * np.abs(want).max())


ZOO = {
  "mlp": mlp((4, 4, 1), (5,), 3),
  "batch norm": mlp((4, 4, 1), (5,), 3, batch_norm="running"),
  "cnn": cnn((4, 4, 1), 3, channels=(2, 3)),
  "transformer": vit((4, 4, 1), 3, width=4, num_heads=2, depth=1),
}


@functools.cache
def dense(kind):
  """A net of the zoo away from its initial symmetries, its losses as functions, and its three matrices made densely."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(2)
    variables = ZOO[kind].init(jax.random.key(0))
    shift = lambda x: np.asarray(x, np.float64) + 0.3 * rng.normal(size=x.shape)  # noqa: E731
    params = jax.tree.map(shift, variables.params)
    state = jax.tree.map(lambda x: np.abs(shift(x)) + 0.5, variables.model_state)
    examples = {"image": rng.normal(size=(7, 4, 4, 1)), "label": rng.integers(0, 3, 7)}
    flat, unravel = ravel_pytree(params)

    def outputs_fn(params, example):
      return ZOO[kind].apply(params, state, example["image"][None], train=False)[0][0]

    def output_loss_fn(logits, example):
      return jax.nn.logsumexp(logits) - logits[example["label"]]

    def loss_fn(params, example):
      return output_loss_fn(outputs_fn(params, example), example)

    def logits(flat):
      return jax.vmap(outputs_fn, (None, 0))(unravel(flat), examples)

    def losses(flat):
      return jax.vmap(loss_fn, (None, 0))(unravel(flat), examples)

    @jax.jit
    def matrices(flat):
      jacobian = jax.jacrev(logits)(flat)
      p = jax.nn.softmax(logits(flat))
      curvature = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
      grads = jax.jacrev(losses)(flat)
      return (
        jax.hessian(lambda flat: jnp.mean(losses(flat)))(flat),
        jnp.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / 7,
        grads.T @ grads / 7,
      )

    return loss_fn, outputs_fn, output_loss_fn, params, examples, unravel, *map(np.asarray, matrices(flat))


@pytest.mark.parametrize("kind", ZOO)
def test_products_equal_dense_matrices(kind):
  loss_fn, outputs_fn, output_loss_fn, params, examples, unravel, hessian, gauss_newton, fisher = dense(kind)
  with jax.enable_x64(True):
    vectors = np.random.default_rng(3).normal(size=(3, len(hessian)))
    block = jax.vmap(unravel)(vectors)

    @jax.jit
    def products(params, examples, vector, block):
      return (
        hessian_vector_product(loss_fn, params, examples, vector, chunk_size=3),
        hessian_block_product(loss_fn, params, examples, block, chunk_size=7),
        gauss_newton_vector_product(outputs_fn, output_loss_fn, params, examples, vector, chunk_size=3),
        gauss_newton_block_product(outputs_fn, output_loss_fn, params, examples, block, chunk_size=7),
        fisher_vector_product(loss_fn, params, examples, vector, chunk_size=3),
      )

    flat = lambda tree: ravel_pytree(tree)[0]  # noqa: E731
    h_one, h_block, c_one, c_block, f_one = products(params, examples, unravel(vectors[0]), block)
    found = {
      "hessian": (flat(h_one), hessian @ vectors[0]),
      "hessian, block": (jax.vmap(flat)(h_block), vectors @ hessian),
      "gauss_newton": (flat(c_one), gauss_newton @ vectors[0]),
      "gauss_newton, block": (jax.vmap(flat)(c_block), vectors @ gauss_newton),
      "fisher": (flat(f_one), fisher @ vectors[0]),
    }
    for name, (got, want) in found.items():
      # Some hundreds of roundings of 1e-16 along each route.
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max(), err_msg=name)


def test_gauss_newton_is_the_hessian_of_a_linear_model_and_misses_a_nonlinear_models_own_curvature():
  *_, hessian, gauss_newton, _ = dense("mlp")
  last = slice(-18, None)  # kernel and bias of the last layer, in which the logits are linear
  leaves = jax.tree_util.tree_leaves_with_path(dense("mlp")[3])
  assert [jax.tree_util.keystr(path) for path, _ in leaves[2:]] == ["['Dense_1']['bias']", "['Dense_1']['kernel']"]
  np.testing.assert_allclose(hessian[last, last], gauss_newton[last, last], rtol=0, atol=1e-12)
  assert np.abs(hessian - gauss_newton).max() > 1e-2


PROGRAM = """
import functools, jax, jax.numpy as jnp, numpy as np
from bsjax.models import cnn
from bsjax.probes import gauss_newton_block_product, gauss_newton_vector_product, hessian_block_product, hessian_vector_product, over_mesh

jax.config.update("jax_enable_x64", True)
mesh = jax.make_mesh((2, 4), ("trial", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = cnn((4, 4, 1), 3, channels=(2, 3))
rng = np.random.default_rng(0)
params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.init(jax.random.key(0)).params)

def outputs_fn(params, example):
  return model.apply(params, {}, example["image"][None], train=False)[0][0]

def output_loss_fn(logits, example):
  return jax.nn.logsumexp(logits) - logits[example["label"]]

def loss_fn(params, example):
  return output_loss_fn(outputs_fn(params, example), example)

vector = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
block = jax.tree.map(lambda x: np.stack([x, 2 * x]), vector)
model_fns = (outputs_fn, output_loss_fn)
for product, functions, at, count in (
  (hessian_vector_product, (loss_fn,), vector, 24),
  (hessian_vector_product, (loss_fn,), vector, 22),  # no multiple of 4 devices
  (hessian_block_product, (loss_fn,), block, 24),
  (gauss_newton_vector_product, model_fns, vector, 24),
  (gauss_newton_block_product, model_fns, block, 24),
):
  examples = {"image": rng.normal(size=(count, 4, 4, 1)), "label": rng.integers(0, 3, count)}
  mean_fn = functools.partial(product, *functions, chunk_size=4)
  spread = jax.jit(over_mesh(mean_fn, mesh))
  want, got = jax.jit(mean_fn)(params, examples, at), spread(params, examples, at)
  gap = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (want, got))))
  print(f"{product.__name__} {count}: {gap} {'all_reduce' in spread.lower(params, examples, at).as_text()}")
"""


def test_spread_over_devices_equals_one_device():
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
  }
  command = [sys.executable, "-W", "error", "-c", PROGRAM]
  root = Path(__file__).parents[2]
  done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  rows = dict(line.split(": ") for line in done.stdout.splitlines())
  assert len(rows) == 5
  for name, row in rows.items():
    gap, reduced = row.split()
    assert float(gap) < 1e-13, name  # sums of 24 numbers of order 1 in another order, float64
    assert reduced == str(name.endswith("24")), name
