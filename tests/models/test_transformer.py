"""The transformers against their definition in numpy, and what they promise: causality, patches as a set, one table twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.models import TRANSFORMERS, language_model, vit, vit_s16

KEY = jax.random.key(5)
VOCAB, LENGTH = 11, 5
VIT = vit((4, 6, 2), 3, patch_size=2, width=8, depth=2, num_heads=2, mlp_ratio=3)
TIED, UNTIED = (
  language_model(VOCAB, LENGTH, width=8, depth=2, num_heads=2, mlp_ratio=3, tie_embeddings=tied)
  for tied in (True, False)
)
MODELS = {"vit": VIT, "tied": TIED, "untied": UNTIED}
IMAGES = np.random.default_rng(0).normal(size=(4, 4, 6, 2))
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(4, LENGTH))
INPUTS = {"vit": IMAGES, "tied": TOKENS, "untied": TOKENS}


@pytest.fixture(autouse=True)
def float64():
  """The oracles are float64, and so are the networks here: a few hundred roundings of 1e-16 leave 12 digits."""
  with jax.enable_x64(True):
    yield


def params_of(model):
  """Fills the parameters with uniform float64 values in [-0.5, 0.5), so that none is at its initial 0 or 1."""
  generator = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: generator.uniform(-0.5, 0.5, leaf.shape), jax.eval_shape(model.init, KEY).params)


def applied(model, params, inputs):
  return jax.jit(functools.partial(model.apply, train=True))(params, {}, inputs)[0]


def leaf_names(tree):
  """Maps names such as "Block_0/Dense_0/kernel" to arrays on the host."""
  leaves = jax.tree.leaves_with_path(jax.device_get(tree))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def dense(x, p):
  return x @ p["kernel"] + p.get("bias", 0)


def layer_norm(x, p):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def attention(x, p, *, num_heads, causal):
  """One sequence `[L, W]`, one query at a time."""
  query, key, value = (dense(x, p[name]) for name in ("query", "key", "value"))
  size = x.shape[1] // num_heads
  mixed = np.zeros_like(x)
  for head in range(num_heads):
    columns = slice(head * size, (head + 1) * size)
    for t in range(len(x)):
      seen = slice(0, t + 1 if causal else len(x))
      weights = np.exp(key[seen, columns] @ query[t, columns] / np.sqrt(size))
      mixed[t, columns] = weights / weights.sum() @ value[seen, columns]
  return dense(mixed, p["out"])


def blocks(x, params, *, causal):
  for number in range(2):
    p = params[f"Block_{number}"]
    x = x + attention(layer_norm(x, p["LayerNorm_0"]), p["attention"], num_heads=2, causal=causal)
    hidden = dense(layer_norm(x, p["LayerNorm_1"]), p["Dense_0"])
    hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    x = x + dense(hidden, p["Dense_1"])
  return layer_norm(x, params["LayerNorm_0"])


def test_vit_is_its_definition():
  params = params_of(VIT)
  expected = []
  for image in IMAGES:
    patches = [image[row : row + 2, column : column + 2].ravel() for row in (0, 2) for column in (0, 2, 4)]
    tokens = blocks(
      dense(np.stack(patches), params["patches"]) + params["positions"]["embedding"], params, causal=False
    )
    expected.append(dense(tokens.mean(0), params["logits"]))
  np.testing.assert_allclose(applied(VIT, params, IMAGES), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_language_model_is_its_definition(name):
  params = params_of(MODELS[name])
  table = params["tokens"]["embedding"]
  hidden = np.stack([blocks(table[row] + params["positions"]["embedding"], params, causal=True) for row in TOKENS])
  expected = hidden @ table.T if name == "tied" else dense(hidden, params["logits"])
  np.testing.assert_allclose(applied(MODELS[name], params, TOKENS), expected, rtol=1e-12, atol=1e-12)


def block_size(width, mlp_ratio):
  """Two LayerNorms, four square maps with three biases, and a perceptron of `mlp_ratio * width` hidden units."""
  return 2 * 2 * width + 4 * width**2 + 3 * width + 2 * mlp_ratio * width**2 + (mlp_ratio + 1) * width


def decoder_size(width, depth):
  """32,000 tokens, 64 positions, blocks with a feed-forward layer of 4 widths, and a LayerNorm."""
  return (32_000 + 64) * width + depth * block_size(width, 4) + 2 * width


@pytest.mark.parametrize(
  ("model", "expected"),
  [
    (vit((8, 8, 1), 10), (4 * 32 + 32) + 16 * 32 + 2 * block_size(32, 2) + 2 * 32 + (32 * 10 + 10)),
    (VIT, (8 * 8 + 8) + 6 * 8 + 2 * block_size(8, 3) + 2 * 8 + (8 * 3 + 3)),
    (language_model(64, 32), 64 * 128 + 32 * 128 + 2 * block_size(128, 4) + 2 * 128),
    (TIED, 11 * 8 + 5 * 8 + 2 * block_size(8, 3) + 2 * 8),
    (UNTIED, 11 * 8 + 5 * 8 + 2 * block_size(8, 3) + 2 * 8 + (8 * 11 + 11)),
    (language_model(32_000, 64, **TRANSFORMERS["base"]), decoder_size(512, 6)),
    (language_model(32_000, 64, **TRANSFORMERS["shallow"]), decoder_size(512, 2)),
    (language_model(32_000, 64, **TRANSFORMERS["narrow_and_shallow"]), decoder_size(256, 2)),
    (language_model(32_000, 64, **TRANSFORMERS["wide"], dtype=jnp.bfloat16), decoder_size(1024, 6)),
    # Published with a class token of 384, its position, and a bias of 384 of the keys in each of 12 blocks: 22,050,664.
    (vit_s16(), 22_050_664 - 2 * 384 - 12 * 384),
  ],
)
def test_number_of_parameters(model, expected):
  variables = jax.eval_shape(model.init, KEY)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables.params)) == expected
  assert variables.model_state == {}


def test_initial_values():
  images, text = (
    leaf_names(model.init(KEY).params)
    for model in (vit((16, 16, 4), 10, width=64, depth=0), language_model(1000, 128, width=64, depth=0))
  )
  for entries, variance in (
    (images["positions/embedding"], 0.5**2),
    (images["patches/kernel"], 1 / 16),
    (images["logits/kernel"], 1 / 64),
    (text["positions/embedding"], 1 / 64),
    (text["tokens/embedding"], 1 / 64),
  ):
    # The standard error of the variance of n normal values is sqrt(2 / n) of it.
    np.testing.assert_allclose(np.var(entries), variance, rtol=4 * np.sqrt(2 / entries.size))
  for name, leaf in images.items():
    if name.endswith(("bias", "scale")):
      assert np.unique(leaf).tolist() == [1.0 if name.endswith("scale") else 0.0]


def test_init_is_a_pure_function_of_the_key():
  model = vit((4, 4, 1), 3, width=4, depth=0)
  keys = jax.random.split(KEY, 2)
  stacked = leaf_names(jax.vmap(model.init)(keys).params)
  for i, key in enumerate(keys):
    for name, leaf in leaf_names(model.init(key).params).items():
      np.testing.assert_array_equal(leaf, stacked[name][i])
      if name.endswith(("kernel", "embedding")):
        assert not np.array_equal(*stacked[name])


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_logits_depend_on_no_later_token(name):
  """The gradient of the logits at t with respect to the input at s is zero exactly where s is later than t."""
  model, params = MODELS[name], params_of(MODELS[name])

  def logits(positions):
    return model.apply(params | {"positions": {"embedding": positions}}, {}, TOKENS[:1], train=True)[0][0]

  jacobian = np.asarray(jax.jit(jax.jacrev(logits))(params["positions"]["embedding"]))  # [t, V, s, W]
  np.testing.assert_array_equal(np.abs(jacobian).sum((1, 3)) > 0, np.tri(LENGTH, dtype=bool))


def test_patches_are_a_set_but_for_their_positions():
  params = params_of(VIT)
  order = np.array([3, 5, 0, 4, 1, 2])
  patches = IMAGES.reshape(4, 2, 2, 3, 2, 2).swapaxes(2, 3).reshape(4, 6, 2, 2, 2)[:, order]
  shuffled = patches.reshape(4, 2, 3, 2, 2, 2).swapaxes(2, 3).reshape(IMAGES.shape)
  positions = params["positions"]["embedding"]
  moved = params | {"positions": {"embedding": positions[order]}}
  logits = applied(VIT, params, IMAGES)
  np.testing.assert_allclose(applied(VIT, moved, shuffled), logits, rtol=1e-12, atol=1e-12)
  assert np.max(np.abs(applied(VIT, params, shuffled) - logits)) > 1e-3


def loss_of(name):
  """A loss per example in which every logit counts with its own weight."""
  model = MODELS[name]

  def loss(params, inputs):
    logits = model.apply(params, {}, inputs, train=True)[0]
    weights = jnp.cos(jnp.arange(logits[0].size)).reshape(logits[0].shape)
    return jnp.mean(jnp.sum(jnp.sin(logits) * weights[None], axis=range(1, logits.ndim)))

  return loss


@pytest.mark.parametrize("name", ["vit", "tied"])
def test_batch_gradient_is_the_mean_of_per_example_gradients_and_no_parameter_is_without(name):
  params, loss = params_of(MODELS[name]), loss_of(name)
  per_example = jax.jit(jax.vmap(jax.grad(lambda p, x: loss(p, x[None])), (None, 0)))(params, INPUTS[name])
  batch = leaf_names(jax.jit(jax.grad(loss))(params, INPUTS[name]))
  for leaf, grads in leaf_names(per_example).items():
    np.testing.assert_allclose(batch[leaf], np.mean(grads, axis=0), rtol=1e-10, atol=1e-12, err_msg=leaf)
    assert np.linalg.norm(batch[leaf]) > 1e-4, leaf


def test_blank_image_has_finite_gradients():
  """Without positions all tokens of a blank image are the same constant, which LayerNorm divides by 1e-3."""
  params = params_of(VIT) | {"positions": {"embedding": jnp.zeros((6, 8))}}
  params["patches"]["bias"] = jnp.zeros(8)
  grads = jax.jit(jax.grad(loss_of("vit")))(params, np.zeros((2, 4, 6, 2)))
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
  assert np.any(grads["patches"]["bias"])


def table_gradient(name, token):
  """Gradient with respect to the token table of the sum over positions of the logit of `token`, for one sequence."""
  params = params_of(MODELS[name])

  def total(table):
    logits, _ = MODELS[name].apply(params | {"tokens": {"embedding": table}}, {}, SEQUENCE[None], train=True)
    return jnp.sum(logits[..., token])

  table = params["tokens"]["embedding"]
  value, grad = jax.jit(jax.value_and_grad(total))(table)
  return float(value), np.asarray(grad), table


SEQUENCE = np.array([3, 7, 7, 0, 3])


def test_tied_table_learns_as_input_and_as_output():
  """The logit of token 9 uses rows 0, 3 and 7 as inputs and row 9 as output; in row 9 it is linear, without a constant."""
  value, grad, table = table_gradient("tied", 9)
  assert np.flatnonzero(np.abs(grad).sum(1)).tolist() == [0, 3, 7, 9]
  np.testing.assert_allclose(table[9] @ grad[9], value, rtol=1e-12)
  _, grad, _ = table_gradient("untied", 9)
  assert np.flatnonzero(np.abs(grad).sum(1)).tolist() == [0, 3, 7]


def trained(model, params, draw, *, num_steps, rate):
  """Trains by Adam on fresh batches `draw(key) -> (inputs, labels)`; returns the loss of each step."""
  optimizer = optax.adam(rate)

  def loss(params, inputs, labels):
    logits = model.apply(params, {}, inputs, train=True)[0]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  def step(carry, key):
    params, state = carry
    value, grad = jax.value_and_grad(loss)(params, *draw(key))
    updates, state = optimizer.update(grad, state, params)
    return (optax.apply_updates(params, updates), state), value

  keys = jax.random.split(KEY, num_steps)
  return np.asarray(jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[1])(params))


def test_vit_learns_where_a_bright_patch_lies():
  """Which of six patches is bright can be told by its position only: a network blind to it stays at log 6."""

  def draw(key):
    labels = jax.random.randint(key, (16,), 0, 6)
    image = jnp.repeat(jnp.repeat(jax.nn.one_hot(labels, 6).reshape(16, 2, 3), 2, axis=1), 2, axis=2)
    return jnp.stack([image, image], axis=-1), labels

  model = vit((4, 6, 2), 6, width=8, depth=1)
  losses = trained(model, model.init(KEY).params, draw, num_steps=70, rate=0.03)
  assert abs(losses[0] - np.log(6)) < 1
  assert np.mean(losses[-10:]) < np.log(6) / 4


def test_language_model_learns_to_look_back():
  """In x[t] = x[t - 2] the last token says nothing of the next, so a decoder without attention stays at log 6.

  With it only the first of six predictions must be guessed: the least loss is (log 6) / 6, reached to twice that in 70 steps.
  """

  def draw(key):
    tokens = jnp.tile(jax.random.randint(key, (32, 2), 0, 6), (1, 4))
    return tokens[:, 1:-1], tokens[:, 2:]

  model = language_model(6, 6, width=16, depth=1, num_heads=2)
  losses = trained(model, model.init(KEY).params, draw, num_steps=70, rate=0.03)
  assert abs(losses[0] - np.log(6)) < 1
  assert np.mean(losses[-10:]) < np.log(6) / 3


def test_token_outside_the_vocabulary_is_nan_for_its_sequence_only():
  params = params_of(TIED)
  tokens = TOKENS.copy()
  tokens[1, 2] = VOCAB
  logits = applied(TIED, params, tokens)
  assert np.isnan(logits).all(axis=(1, 2)).tolist() == [False, True, False, False]
  np.testing.assert_array_equal(np.delete(logits, 1, axis=0), np.delete(applied(TIED, params, TOKENS), 1, axis=0))


@pytest.mark.parametrize("images", [np.zeros((5, 4, 6, 2), np.uint8), np.zeros((4, 6, 2)), np.zeros((5, 6, 4, 2))])
def test_unscaled_or_misshapen_images_are_refused(images):
  with pytest.raises(ValueError, match=r"images are .*; wanted floats of shape \[B, 4, 6, 2\]"):
    VIT.apply(params_of(VIT), {}, images, train=False)


@pytest.mark.parametrize("tokens", [TOKENS.astype(np.float32), TOKENS[0], TOKENS[:, :-1], TOKENS[None]])
def test_tokens_that_are_none_are_refused(tokens):
  with pytest.raises(ValueError, match=r"tokens are .*; wanted integers of shape \[B, 5\]: cut"):
    TIED.apply(params_of(TIED), {}, tokens, train=False)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: vit((8, 9, 1), 10), r"input_shape=\(8, 9, 1\) and patch_size=2; wanted"),
    (lambda: vit((9, 8, 1), 10, patch_size=4), r"input_shape=\(9, 8, 1\) and patch_size=4; wanted"),
    (lambda: vit((8, 8), 10), r"input_shape=\(8, 8\)"),
    (lambda: vit((8, 8, 1), 10, num_heads=5), "num_heads=5 does not divide width=32"),
    (lambda: language_model(10, 8, width=30), "num_heads=4 does not divide width=30"),
  ],
)
def test_sizes_that_do_not_divide_are_refused(build, message):
  with pytest.raises(ValueError, match=message):
    build()
