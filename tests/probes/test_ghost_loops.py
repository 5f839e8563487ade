"""Parameters inside loops: ghost norms against per-example gradients in float64, and which loops are seen through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.conv import conv
from bsjax.probes import ghost_norms, ghost_projections, ghost_routes, in_metric, per_example_grads

STEPS, WIDTH = 4, 3


def loop(body, start, scanned=None, **options):
  """Sums sin of what a scan carries at last and of what it stacks."""
  carry, stacked = jax.lax.scan(body, start, scanned, **options)
  return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((carry, stacked)))


def recurrent(params, example):
  """All three uses of a recurrent layer in the loop, and what it returns at every step."""

  def body(h, x):
    h = jnp.tanh(h @ params["w"] + x @ params["u"] + params["b"])
    return h, 2 * h

  return loop(body, jnp.zeros(WIDTH), example["x"])


def backwards(params, example):
  return loop(lambda h, x: (jnp.tanh(h @ params["w"] + x), h[0]), example["x"][0], example["x"], reverse=True, unroll=2)


def transposed(params, example):
  """One kernel, transposed in the loop and used before it as it is."""
  start = jnp.tanh(example["x"][1] @ params["w"])
  return loop(lambda h, x: (jnp.tanh(params["w"] @ h + x @ params["w"].T), None), start, example["x"])


def counted(params, example):
  """No example is scanned, and what is scanned and carried is the same for all of them."""

  def body(carry, scale):
    count, h = carry
    return (count + 1, jnp.tanh(h @ params["w"]) * scale + count), None

  return loop(body, (0.5, example["x"][0]), jnp.linspace(0.5, 1, STEPS))


def table(params, example):
  """Rows of a table that the loop gathers, and scores against after it."""

  def body(h, token):
    h = jnp.tanh(h + params["w"][token])
    return h, h

  carry, stacked = jax.lax.scan(body, jnp.zeros(WIDTH), example["token"])
  return jnp.sum(jnp.sin(stacked @ params["w"].T)) + jnp.sum(carry)


def images(params, example):
  """A convolution in the loop: its positions are those of every step."""

  def body(h, x):
    h = jnp.tanh(conv(h, params["kernel"]) + x[None, None, :1, None])
    return h, None

  return loop(body, jnp.zeros((1, 2, 3, 1)), example["x"])


def invariant(params, example):
  """The product with u is the same at every step; d_t of all steps add up before it."""
  return loop(
    lambda h, x: (jnp.tanh(h @ params["w"] + jnp.sin(example["x"][2] @ params["u"]) + x), None),
    example["x"][0],
    example["x"],
  )


def nothing_batched_but_the_loss(params, example):
  """A loop over parameters alone is not looked into."""
  return loop(lambda h, _: (jnp.tanh(h @ params["w"]), None), jnp.ones(WIDTH), length=2) * jnp.sum(example["x"])


def in_turn(params, example):
  """A kernel times a number that changes from step to step: a use of its own at every step, not a fixed image of the kernel."""

  def body(carry, x):
    count, h = carry
    return (count + 1, jnp.tanh(h @ (params["w"] * count) + x)), None

  return loop(body, (1.0, example["x"][0]), example["x"])


def in_a_function(params, example):
  """Called functions are not taken apart before the loop: one uses u beside a value that it computes itself, and transposes w."""

  @jax.jit
  def layer(u, w, h):
    return jnp.tanh(h * jnp.where(h > 0, u, jnp.cos(jnp.arange(3.0)))) @ w.T

  return loop(lambda h, x: (layer(params["u"], params["w"], h + x), None), example["x"][0], example["x"])


def carried(params, example):
  """A learned start is carried; the kernel beside it is understood."""
  return loop(lambda h, x: (jnp.tanh(h @ params["w"] + x), None), params["b"], example["x"])


def handed_on(params, example):
  """A parameter that the loop returns as it is, at every step."""
  carry, stacked = jax.lax.scan(lambda h, x: (jnp.tanh(h + x), params["b"]), example["x"][0], example["x"])
  return jnp.sum(jnp.sin(carry)) + jnp.sum(jnp.sin(stacked @ carry))


def never(params, example):
  """A loop of no steps: no gradient."""
  return loop(lambda h, x: (jnp.tanh(h @ params["w"] + x), None), example["x"][0], example["x"][:0])


def nested(params, example):
  def body(h, x):
    inner, _ = jax.lax.scan(lambda k, _: (jnp.tanh(k @ params["w"]), None), h + x, None, length=2)
    return inner @ params["u"], None

  return loop(body, example["x"][0], example["x"])


SQUARE = {"w": (WIDTH, WIDTH)}
CASES = {
  recurrent: ({"w": (WIDTH, WIDTH), "u": (WIDTH, WIDTH), "b": (WIDTH,)}, {"w": "direct", "u": "direct", "b": "sum"}),
  backwards: (SQUARE, {"w": "direct"}),
  transposed: (SQUARE, {"w": "direct"}),
  counted: (SQUARE, {"w": "direct"}),
  table: ({"w": (40, WIDTH)}, {"w": "direct"}),
  images: ({"kernel": (3, 3, 1, 1)}, {"kernel": "direct"}),
  invariant: ({"w": (WIDTH, WIDTH), "u": (WIDTH, WIDTH)}, {"w": "direct", "u": "rank one"}),
  nothing_batched_but_the_loss: (SQUARE, {"w": "vmap: flows into scan"}),
  in_turn: (SQUARE, {"w": "sum"}),
  in_a_function: ({"w": (WIDTH, WIDTH), "u": (WIDTH,)}, {"w": "vmap: flows into transpose", "u": "direct"}),
  carried: ({"w": (WIDTH, WIDTH), "b": (WIDTH,)}, {"w": "direct", "b": "vmap: is carried through scan"}),
  handed_on: ({"b": (WIDTH,)}, {"b": "vmap: is carried through scan"}),
  never: (SQUARE, {"w": "vmap: flows into scan"}),
  nested: ({"w": (WIDTH, WIDTH), "u": (WIDTH, WIDTH)}, {"w": "vmap: flows into scan", "u": "direct"}),
}


def made_up(shapes):
  draw = np.random.default_rng(0)
  params = {name: jnp.asarray(draw.normal(size=shape)) for name, shape in shapes.items()}
  examples = {
    "x": jnp.asarray(draw.normal(size=(5, STEPS, WIDTH))),
    "token": jnp.asarray(draw.integers(0, 7, (5, STEPS))),  # some of them twice
  }
  return params, examples


def squared(grads):
  return {name: np.sum(np.square(leaf).reshape(len(leaf), -1), axis=1) for name, leaf in grads.items()}


@pytest.mark.parametrize("loss_fn", CASES, ids=lambda loss_fn: loss_fn.__name__)
def test_norms_gradient_and_projections(loss_fn):
  shapes, routes = CASES[loss_fn]
  with jax.enable_x64(True):
    params, examples = made_up(shapes)
    direction = jax.tree.map(jnp.cos, params)

    @jax.jit
    def measure(params, examples):
      return (
        ghost_norms(loss_fn, params, examples, chunk_size=5),
        ghost_projections(loss_fn, params, examples, direction, chunk_size=5),
        per_example_grads(loss_fn, params, examples),
      )

    got, projections, grads = jax.device_get(measure(params, examples))
    assert ghost_routes(loss_fn, params, examples) == routes
  for name, want in squared(grads).items():
    np.testing.assert_allclose(got.sq_norms[name], want, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got.mean_grad[name], np.mean(grads[name], axis=0), rtol=1e-11, atol=1e-14)
    wanted = np.tensordot(grads[name], direction[name], axes=direction[name].ndim)
    np.testing.assert_allclose(projections[name], wanted, rtol=1e-11, atol=1e-13)


def test_a_wide_kernel_in_a_loop_takes_the_gram_form():
  """Gram costs 2 T^2 (K + M + 1) FLOP, direct 4 K M: of 4 steps of a [64, 64] kernel 4,128 against 16,384."""

  def loss_fn(params, example):
    return loop(lambda h, x: (jnp.tanh(h @ params["w"]) + x[0], None), jnp.ones(64), example["x"])

  with jax.enable_x64(True):
    params, examples = made_up({"w": (64, 64)})
    params = {"w": params["w"] / 8}
    assert ghost_routes(loss_fn, params, examples) == {"w": "gram"}
    got = jax.jit(lambda *data: ghost_norms(loss_fn, *data, chunk_size=5).sq_norms)(params, examples)
    grads = jax.jit(lambda *data: per_example_grads(loss_fn, *data))(params, examples)
  np.testing.assert_allclose(got["w"], squared(grads)["w"], rtol=1e-12)


def test_norms_in_a_metric():
  """A kernel scaled outside the loop and transposed in it: the scale is transposed with it, before the loop."""
  with jax.enable_x64(True):
    params, examples = made_up(SQUARE)
    metric = {"w": jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, (WIDTH, WIDTH)))}
    scaled_loss, coordinates = in_metric(transposed, params, metric)
    assert ghost_routes(scaled_loss, coordinates, examples) == {"w": "direct"}
    got = jax.jit(lambda *data: ghost_norms(scaled_loss, *data, chunk_size=5).sq_norms)(coordinates, examples)
    grads = jax.jit(lambda *data: per_example_grads(transposed, *data))(params, examples)
  want = np.sum(np.square(grads["w"]) * np.asarray(metric["w"]), axis=(1, 2))
  np.testing.assert_allclose(got["w"], want, rtol=1e-12)
