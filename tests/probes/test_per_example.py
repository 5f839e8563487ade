"""Per-example gradients against a loop and a closed form; chunked sums against the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import mean_gradient, per_example_grads, per_example_losses

N = 11


def net_loss(params, example):
  """A smooth two-layer net with a scalar output."""
  hidden = jnp.tanh(example["x"] @ params["in"] + params["bias"])
  return (hidden @ params["out"] - example["y"]) ** 2


def net_problem():
  rng = np.random.default_rng(0)
  params = {"in": rng.normal(size=(4, 5)), "bias": rng.normal(size=5), "out": rng.normal(size=5)}
  examples = {"x": rng.normal(size=(N, 4)), "y": rng.normal(size=N)}
  return jax.tree.map(jnp.asarray, (params, examples))


def example_of(examples, i):
  return jax.tree.map(lambda x: x[i], examples)


def assert_trees_close(got, want, rtol):
  """Compare leaf by leaf, relative to the largest entry of each leaf."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.max(np.abs(b))), got, want)


def test_equal_a_loop_over_examples():
  with jax.enable_x64(True):
    params, examples = net_problem()
    roots = np.sqrt(per_example_losses(net_loss, params, examples))
    grads = per_example_grads(net_loss, params, examples)
    for i in range(N):
      loss, grad = jax.value_and_grad(net_loss)(params, example_of(examples, i))
      # A loss is the square of a difference r of numbers of order one: |r| is as exact as they are, a few roundings, however small it is.
      np.testing.assert_allclose(roots[i], np.sqrt(loss), rtol=0, atol=20 * np.finfo(np.float64).eps)
      # Its gradient is 2 r times that of r: sums of five of the same float64 operations, batched.
      by_root = [
        jax.tree.map(lambda g, r=r: g / r, g) for g, r in ((example_of(grads, i), roots[i]), (grad, np.sqrt(loss)))
      ]
      assert_trees_close(*by_root, rtol=1e-14)


@pytest.mark.parametrize("chunk_size", [1, 4, 10, N, N + 2])
def test_mean_gradient_counts_every_example_once(chunk_size):
  def linear_loss(weights, example):
    return 0.5 * (example["x"] @ weights - example["y"]) ** 2

  with jax.enable_x64(True):
    _, examples = net_problem()
    x, y = np.array(examples["x"]), np.array(examples["y"])
    weights = np.array([1.0, -2.0, 0.5, 3.0])
    run = jax.jit(functools.partial(mean_gradient, linear_loss, chunk_size=chunk_size))
    loss, grad = run(jnp.asarray(weights), examples)
    residuals = x @ weights - y
    # Sums of 11 in another order: 11 roundings of 1e-16, and as much again from cancellation between examples.
    np.testing.assert_allclose(loss, np.mean(residuals**2) / 2, rtol=1e-14)
    np.testing.assert_allclose(grad, x.T @ residuals / N, rtol=1e-13)


def test_takes_numpy_examples_and_integers_outside_jit():
  examples = {"image": np.arange(20, dtype=np.uint8).reshape(5, 4), "label": np.arange(5, dtype=np.int32)}

  def loss_fn(weights, example):
    return example["label"] * (example["image"].astype(jnp.float32) @ weights)

  loss, grad = mean_gradient(loss_fn, jnp.ones(4), examples, chunk_size=2)
  np.testing.assert_array_equal(grad, [24, 26, 28, 30])  # (1/5) sum_i i (4 i + j) = 24 + 2 j, exact in float32
  assert loss == 24 + 26 + 28 + 30


def test_rejects_examples_of_unequal_number():
  with pytest.raises(ValueError, match=r"leading axes \[2, 3\]; wanted one common"):
    mean_gradient(net_loss, {}, {"x": np.zeros((3, 4)), "y": np.zeros(2)}, chunk_size=2)
  with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
    mean_gradient(net_loss, {}, {"x": np.zeros((3, 4)), "y": np.zeros(3)}, chunk_size=0)
