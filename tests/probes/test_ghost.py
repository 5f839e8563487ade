"""Ghost norms against per-example gradients, in float64 for arithmetic and in float32 on every network of the project."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.models import cnn, language_model, lstm, mlp, vit
from bsjax.probes import ghost_norms, ghost_projections, ghost_routes, in_metric, mean_gradient, per_example_grads
from bsjax.probes.forms import PRODUCT_NUMBERS
from bsjax.probes.leaves import leaf_names

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Problem(NamedTuple):
  loss_fn: Callable[..., Any]
  params: Any
  examples: dict[str, jax.Array]


def wide(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def images(num: int, shape: tuple[int, ...] = (8, 8, 1), seed: int = 0) -> dict[str, jax.Array]:
  draw = np.random.default_rng(seed)
  image = draw.normal(size=(num, *shape)).astype(np.float32)
  return {"image": jnp.asarray(image), "label": jnp.asarray(draw.integers(0, 10, num))}


def tokens(num: int, length: int = 6, vocabulary: int = 11) -> dict[str, jax.Array]:
  draw = np.random.default_rng(0)
  return {
    "token": jnp.asarray(draw.integers(0, vocabulary, (num, length))),
    "label": jnp.asarray(draw.integers(0, 3, num)),
  }


def classifier(model: Any, num: int = 8) -> Problem:
  variables = model.init(jax.random.key(1))

  def loss_fn(params, example):
    dtype = jax.tree.leaves(params)[0].dtype
    model_state = jax.tree.map(lambda x: x.astype(dtype), variables.model_state)
    logits, _ = model.apply(params, model_state, example["image"][None], train=False)
    return cross_entropy(logits[0], example["label"])

  return Problem(loss_fn, variables.params, images(num))


def language(build: Callable[..., Any], **sizes: Any) -> Problem:
  model = build(11, 6, width=8, **sizes)
  variables = model.init(jax.random.key(1))

  def loss_fn(params, example):
    logits, _ = model.apply(params, {}, example["token"][None, :], train=False)
    return jnp.mean(cross_entropy(logits[0, :-1], example["token"][1:]))

  return Problem(loss_fn, variables.params, tokens(8))


def from_module(module: nn.Module, examples: dict[str, jax.Array], name: str) -> Problem:
  params = module.init(jax.random.key(2), examples[name][:1])["params"]

  def loss_fn(params, example):
    return cross_entropy(module.apply({"params": params}, example[name][None])[0], example["label"])

  return Problem(loss_fn, params, examples)


class Convolutions(nn.Module):
  """Flax's own convolutions: plain, strided, grouped, dilated, without padding, of one dimension, and transposed."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2))(x))
    x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2)(x))
    x = nn.relu(nn.Conv(4, (3, 3), kernel_dilation=(2, 2))(x))
    x = nn.relu(nn.Conv(6, (2, 2), padding="VALID")(x))
    x = nn.relu(nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x))
    x = x.reshape(x.shape[0], x.shape[1], -1)
    x = nn.relu(nn.Conv(4, (3,))(x))
    return nn.Dense(10)(x.mean(axis=1))


class Text(nn.Module):
  """Embedding used twice, LayerNorm, GroupNorm, attention, a layer applied twice, and a scale that is not used linearly."""

  @nn.compact
  def __call__(self, x):
    embed = nn.Embed(11, 8)
    x = embed(x)
    y = nn.LayerNorm()(x)
    y = nn.MultiHeadDotProductAttention(2)(y, y)
    twice = nn.Dense(8)
    x = x + twice(nn.gelu(twice(y)))
    x = nn.GroupNorm(2)(x)
    x = x * jnp.tanh(self.param("gate", nn.initializers.ones, (8,)))
    return nn.Dense(3)(embed.attend(nn.Dense(8)(x)).mean(axis=1))


class TwoPositions(nn.Module):
  """A wide layer applied to two halves of each image."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(x.shape[0], 2, 32))).mean(axis=1))


class Heads(nn.Module):
  """One matrix for each of four heads: a product with a batch axis that the parameter shares."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (4, 4, 5))
    x = jnp.einsum("nthd,hde->nthe", x.reshape(x.shape[0], 4, 4, 4), kernel)
    return nn.Dense(10)(nn.tanh(x).reshape(x.shape[0], -1))


class Twice(nn.Module):
  """One kernel, used as it is and transposed."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (12, 12))
    x = x.reshape(x.shape[0], 12)
    return nn.Dense(10)(nn.tanh(nn.tanh(x @ kernel) @ kernel.T))


DECODER = {"depth": 1, "num_heads": 2, "mlp_ratio": 2}
ZOO = {
  "mlp": lambda: classifier(mlp((8, 8, 1), (12, 9), 10)),
  "mlp with batch norm": lambda: classifier(mlp((8, 8, 1), (12,), 10, batch_norm="running")),
  "cnn": lambda: classifier(cnn((8, 8, 1), 10, channels=(3, 4, 5))),
  "vit": lambda: classifier(vit((8, 8, 1), 10, width=8, depth=1, num_heads=2)),
  "language model": lambda: language(language_model, **DECODER, tie_embeddings=False),
  "tied language model": lambda: language(language_model, **DECODER),
  "lstm": lambda: language(lstm, embedding=5),
}
USERS = {
  "flax convolutions": lambda: from_module(Convolutions(), images(8), "image"),
  "two positions": lambda: from_module(TwoPositions(), images(8), "image"),
  "a matrix per head": lambda: from_module(Heads(), images(8), "image"),
  "text": lambda: from_module(Text(), tokens(8), "token"),
  "kernel and its transpose": lambda: from_module(Twice(), images(9, (3, 4, 1)), "image"),
}


@functools.cache
def problem_of(name: str) -> Problem:
  return (ZOO | USERS)[name]()


def true_norms(problem: Problem) -> tuple[dict[str, np.ndarray], Any]:
  grads = jax.jit(lambda *data: per_example_grads(problem.loss_fn, *data))(*problem[1:])
  names = leaf_names(problem.params)
  return {
    name: np.sum(np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1) ** 2, axis=1)
    for name, leaf in zip(names, jax.tree.leaves(grads), strict=True)
  }, grads


@pytest.mark.parametrize("name", [*ZOO, *USERS])
def test_norms_gradient_and_projections_in_float64(name):
  problem = problem_of(name)
  with jax.enable_x64(True):
    problem = Problem(problem.loss_fn, wide(problem.params), wide(problem.examples))
    want, grads = true_norms(problem)
    direction = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape)), problem.params)

    @jax.jit
    def measure(params, examples):
      return (
        ghost_norms(problem.loss_fn, params, examples, chunk_size=4),
        ghost_projections(problem.loss_fn, params, examples, direction, chunk_size=4),
        mean_gradient(problem.loss_fn, params, examples, chunk_size=4),
      )

    got, projections, (loss, mean_grad) = measure(*problem[1:])
  np.testing.assert_allclose(got.loss, loss, rtol=1e-12)
  # A few thousand float64 operations of 1e-16 each.
  largest = max(norm.max() for norm in want.values())
  for leaf, norm in want.items():
    np.testing.assert_allclose(got.sq_norms[leaf], norm, rtol=1e-11, atol=1e-24 * largest, err_msg=leaf)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14), got.mean_grad, mean_grad)
  for leaf, grad, vector in zip(want, jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True):
    wanted = np.tensordot(grad, vector, axes=vector.ndim)
    np.testing.assert_allclose(projections[leaf], wanted, rtol=1e-9, atol=1e-13, err_msg=leaf)


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_agrees_with_vmap_in_float32(name):
  problem = problem_of(name)
  got = jax.jit(lambda *data: ghost_norms(problem.loss_fn, *data, chunk_size=8).sq_norms)(*problem[1:])
  with jax.enable_x64(True):
    want, _ = true_norms(Problem(problem.loss_fn, wide(problem.params), wide(problem.examples)))
  for leaf, norm in want.items():
    np.testing.assert_allclose(got[leaf], norm, rtol=1e-5, err_msg=leaf)
  assert set(got) == set(leaf_names(problem.params))


def test_routes_of_known_layers():
  """No layer of the zoo falls back to vmap, and a kernel takes a matrix form."""
  for name in ZOO:
    problem = problem_of(name)
    routes = ghost_routes(*problem)
    assert set(routes) == set(leaf_names(problem.params))
    for leaf, route in routes.items():
      assert route in ("rank one", "gram", "direct", "sum"), (name, leaf, route)
      if leaf.endswith("/kernel"):
        assert route != "sum", (name, leaf)
  routes = ghost_routes(*problem_of("mlp"))
  assert routes["Dense_0/kernel"] == "rank one"
  assert routes["Dense_0/bias"] == "sum"
  assert ghost_routes(*problem_of("cnn"))["Conv_0/kernel"] == "direct"
  # Gram costs 2 T^2 (K + M + 1) FLOP, direct 4 K M. 2 positions, [32, 64]: 776 against 8,192; 6, [8, 16]: 1,800 against 512.
  assert ghost_routes(*problem_of("two positions"))["Dense_1/kernel"] == "gram"
  assert ghost_routes(*problem_of("language model"))["Block_0/Dense_0/kernel"] == "direct"
  text = ghost_routes(*problem_of("text"))
  assert text["gate"] == "vmap: flows into tanh"


def linear(params, x):
  return x @ params["w"]


OPAQUE = {
  # every way in which a parameter may enter that is not understood, and the reason given
  "square": (lambda params, x: jnp.sum(linear(params, x) ** 2) + jnp.sum(params["w"] ** 2), "integer_pow"),
  "weight norm": (lambda params, x: jnp.sum((x @ (params["w"] / jnp.linalg.norm(params["w"]))) ** 2), "mul"),
  "product of two": (
    lambda params, x: jnp.sum((x @ (params["w"] * params["v"])) ** 2),
    "meets another parameter in mul",
  ),
  "scan": (
    lambda params, x: jnp.sum(jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), params["w"], None, length=3)[0] @ x),
    "scan",
  ),
  "own derivative": (lambda params, x: jnp.sum(jax.nn.relu(params["w"])) * jnp.sum(x), "custom_jvp_call"),
  "stopped": (lambda params, x: jnp.sum(linear(params, x) * jax.lax.stop_gradient(params["w"][0])), "stop_gradient"),
  "regulariser": (lambda params, x: jnp.sum(linear(params, x) ** 2) + params["w"][0, 0], None),
  "nothing else": (lambda params, x: params["w"][1, 2], "is the loss itself"),
  "condition": (
    lambda params, x: jnp.sum(jax.lax.cond(x[0] > 0, lambda w: x @ w, lambda w: -x @ w, params["w"]) ** 2),
    "cond",
  ),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_not_understood_is_never_silently_wrong(name):
  loss_fn, reason = OPAQUE[name]
  with jax.enable_x64(True):
    draw = np.random.default_rng(0)
    params = {"v": jnp.asarray(draw.normal(size=(3, 3))), "w": jnp.asarray(draw.normal(size=(3, 3)))}
    problem = Problem(loss_fn, params, jnp.asarray(draw.normal(size=(5, 3))))
    want, grads = true_norms(problem)
    got, projections = jax.jit(
      lambda *data: (
        ghost_norms(loss_fn, *data, chunk_size=3),
        ghost_projections(loss_fn, *data, params, chunk_size=3),
      )
    )(*problem[1:])
    for leaf, norm in want.items():
      np.testing.assert_allclose(got.sq_norms[leaf], norm, rtol=1e-12, atol=1e-14)
      wanted = np.tensordot(grads[leaf], params[leaf], axes=2)
      np.testing.assert_allclose(projections[leaf], wanted, rtol=1e-12, atol=1e-12)
    routes = ghost_routes(*problem)
  if reason:
    assert routes["w"].startswith("vmap: ")
    assert reason in routes["w"]
  if name != "product of two":
    assert routes["v"] == "unused"


def test_out_of_range_and_repeated_tokens():
  """A token twice in a sentence adds its gradients before they are squared; one outside the table has none."""

  def loss_fn(params, token):
    return jnp.sum(jnp.sin(jnp.take(params, token, axis=0, mode="clip")))

  def dropping(params, token):
    return jnp.sum(jnp.nan_to_num(jnp.take(params, token, axis=0, fill_value=0.0, mode="fill")) * 2)

  with jax.enable_x64(True):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(200, 3)))
    sentence = jnp.array([[1, 1, 1, 4], [0, 199, 500, 199], [2, -1, 3, 7]])
    for loss in (loss_fn, dropping):
      problem = Problem(loss, table, sentence)
      assert ghost_routes(*problem)["params"] == "gram"
      got = jax.jit(lambda *data, loss=loss: ghost_norms(loss, *data, chunk_size=2))(*problem[1:])
      np.testing.assert_allclose(got.sq_norms["params"], true_norms(problem)[0]["params"], rtol=1e-12)


def tied_table_loss(table, sentence):
  """A table of 2,000 words that reads three of them and scores all."""
  words = jnp.take(table, sentence, axis=0)
  return jnp.mean(cross_entropy(jnp.tanh(words) @ table.T, jnp.roll(sentence, 1)))


def twice_loss(kernel, vector):
  """One kernel in two layers."""
  return jnp.sum(jnp.tanh(jnp.tanh(vector @ kernel) @ kernel) ** 2)


@pytest.mark.parametrize("loss_fn", [tied_table_loss, twice_loss])
def test_two_uses_by_gram(loss_fn):
  """The pairs of positions of different uses count, twice."""
  draw = np.random.default_rng(0)
  with jax.enable_x64(True):
    if loss_fn is twice_loss:
      problem = Problem(loss_fn, jnp.asarray(draw.normal(size=(64, 64)) / 8), jnp.asarray(draw.normal(size=(5, 64))))
    else:
      problem = Problem(loss_fn, jnp.asarray(draw.normal(size=(2000, 16))), jnp.asarray(draw.integers(0, 9, (5, 3))))
    assert ghost_routes(*problem)["params"] == "gram"
    got = jax.jit(lambda *data: ghost_norms(loss_fn, *data, chunk_size=5))(*problem[1:])
    np.testing.assert_allclose(got.sq_norms["params"], true_norms(problem)[0]["params"], rtol=1e-12)
    _, mean_grad = mean_gradient(*problem, chunk_size=5)
    np.testing.assert_allclose(got.mean_grad, mean_grad, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied language model", "two positions"])
def test_norms_in_a_metric(name):
  """Coordinates scaled by m^(1/2) give sum_j m_j g_j^2, for every form."""
  loss_fn, params, examples = problem_of(name)
  with jax.enable_x64(True):
    params, examples = wide(params), wide(examples)
    metric = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).uniform(0.5, 2, x.shape)), params)
    scaled_loss, coordinates = in_metric(loss_fn, params, metric)
    got = jax.jit(lambda *data: ghost_norms(scaled_loss, *data, chunk_size=8))(coordinates, examples)
    _, grads = true_norms(Problem(loss_fn, params, examples))
    for leaf, grad, weight in zip(got.sq_norms, jax.tree.leaves(grads), jax.tree.leaves(metric), strict=True):
      want = np.tensordot(np.square(grad), weight, axes=weight.ndim)
      np.testing.assert_allclose(got.sq_norms[leaf], want, rtol=1e-10, atol=1e-24, err_msg=leaf)
    plain = ghost_routes(loss_fn, params, examples)
    scaled = ghost_routes(scaled_loss, coordinates, examples)
  assert all(scaled[leaf] == route for leaf, route in plain.items() if route in ("rank one", "direct"))


def test_a_bad_example_spoils_no_other_norm():
  problem = problem_of("cnn")
  measure = jax.jit(lambda *data: ghost_norms(problem.loss_fn, *data, chunk_size=8).sq_norms)
  clean = measure(*problem[1:])
  image = problem.examples["image"].at[5, 2, 3, 0].set(jnp.nan)
  got = measure(problem.params, problem.examples | {"image": image})
  assert np.isnan(sum(got.values())[5])
  for leaf, norms in got.items():
    np.testing.assert_array_equal(np.delete(norms, 5), np.delete(clean[leaf], 5))


def test_half_precision_is_summed_in_float32():
  """One gradient entry of 300: its square overflows float16, and so would a sum of 1,000 of them."""

  def loss_fn(params, x):
    return params["w"] @ x

  params = {"w": jnp.zeros(2, jnp.float16)}
  examples = jnp.full((1000, 2), 300.0, jnp.float16)
  got = ghost_norms(loss_fn, params, examples, chunk_size=100)
  np.testing.assert_allclose(got.sq_norms["w"], 2 * 300.0**2)
  np.testing.assert_allclose(got.mean_grad["w"], 300.0)
  assert got.mean_grad["w"].dtype == jnp.float32


def test_big_products_are_formed_a_few_at_a_time(monkeypatch):
  problem = problem_of("cnn")

  def measure():
    return jax.jit(lambda *data: ghost_norms(problem.loss_fn, *data, chunk_size=8))(*problem[1:])

  whole = measure()
  monkeypatch.setitem(PRODUCT_NUMBERS, "cpu", 400)  # two products of the largest kernel, 5 x 4 x 9 = 180
  parts = measure()
  for leaf, norms in whole.sq_norms.items():
    np.testing.assert_allclose(parts.sq_norms[leaf], norms, rtol=2e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts.mean_grad, whole.mean_grad)


def test_no_product_of_all_examples_is_held():
  """What the ghost route is for: at 256 examples its temporaries stay near a gradient pass's, far from N gradients."""
  model = mlp((8, 8, 1), (256, 256), 10)
  problem = classifier(model, num=256)
  size = sum(leaf.size for leaf in jax.tree.leaves(problem.params))

  def temporaries(fun):
    return jax.jit(fun).lower(*problem[1:]).compile().memory_analysis().temp_size_in_bytes

  ghost = temporaries(lambda *data: ghost_norms(problem.loss_fn, *data, chunk_size=128))
  plain = temporaries(lambda *data: mean_gradient(problem.loss_fn, *data, chunk_size=128))
  assert ghost <= 1.2 * plain
  assert ghost < 128 * size * 4 / 10
