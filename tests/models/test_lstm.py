"""The LSTM against its definition in numpy, and what it promises: causality, memory, a start that keeps the cell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.models import BILLION_WORD_LSTMS, lstm

KEY = jax.random.key(5)
VOCAB, LENGTH, WIDTH, EMBEDDING = 11, 5, 4, 3
MODEL = lstm(VOCAB, LENGTH, width=WIDTH, embedding=EMBEDDING)
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(3, LENGTH))


@functools.cache
def params_of(dtype):
  """Uniform values in [-1, 1), so that none is at its initial 0 or 1 and every gate is moved."""
  generator = np.random.default_rng(1)
  shapes = jax.eval_shape(MODEL.init, KEY).params
  return jax.tree.map(lambda leaf: generator.uniform(-1, 1, leaf.shape).astype(dtype), shapes)


def applied(model, params, tokens):
  return np.asarray(jax.jit(functools.partial(model.apply, train=True))(params, {}, tokens)[0])


def logistic(x):
  return 1 / (1 + np.exp(-x))


def one_step(h, c, x, p):
  """One step for one sequence: the four gates in their order, each of WIDTH columns."""
  z = x @ p["input"]["kernel"] + h @ p["recurrent"]["kernel"] + p["input"]["bias"]
  i, f, g, o = (z[gate * WIDTH : (gate + 1) * WIDTH] for gate in range(4))
  c = logistic(f) * c + logistic(i) * np.tanh(g)
  return logistic(o) * np.tanh(c), c


def test_it_is_its_definition():
  p = params_of(np.float64)
  expected = np.zeros((*TOKENS.shape, VOCAB))
  for row, sequence in enumerate(TOKENS):
    h = c = np.zeros(WIDTH)
    for t, token in enumerate(sequence):
      h, c = one_step(h, c, p["tokens"]["embedding"][token], p)
      expected[row, t] = h @ p["logits"]["kernel"] + p["logits"]["bias"]
  with jax.enable_x64(True):
    logits = applied(MODEL, p, TOKENS)
  np.testing.assert_allclose(logits, expected, rtol=1e-13, atol=1e-14)


def test_logits_depend_on_no_later_token():
  """With all tokens different, row s of the table enters at position s only: its gradient at t is zero exactly where s > t."""
  params, tokens = params_of(np.float32), np.arange(LENGTH)

  def logits(table):
    return MODEL.apply(params | {"tokens": {"embedding": table}}, {}, tokens[None], train=True)[0][0]

  jacobian = np.asarray(jax.jit(jax.jacrev(logits))(params["tokens"]["embedding"]))[:, :, :LENGTH]  # [t, V, s, W]
  np.testing.assert_array_equal(np.abs(jacobian).sum((1, 3)) > 0, np.tri(LENGTH, dtype=bool))


def lstm_size(vocab_size, embedding, width):
  """Table, input's map with bias, recurrent map, and the logits' map with bias."""
  gates = 4 * width
  return vocab_size * embedding + (embedding + 1) * gates + width * gates + (width + 1) * vocab_size


@pytest.mark.parametrize(
  ("model", "expected"),
  [
    (MODEL, 11 * 3 + 4 * 16 + 4 * 16 + 5 * 11),
    (lstm(256, 64), lstm_size(256, 128, 128)),
    (lstm(40_000, 20, **BILLION_WORD_LSTMS["512"]), lstm_size(40_000, 256, 512)),
    (lstm(40_000, 20, **BILLION_WORD_LSTMS["1024"]), lstm_size(40_000, 512, 1024)),
    (lstm(40_000, 20, **BILLION_WORD_LSTMS["2048"], dtype=jnp.bfloat16), 123_419_712),
  ],
)
def test_number_of_parameters(model, expected):
  variables = jax.eval_shape(model.init, KEY)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables.params)) == expected
  assert variables.model_state == {}


def test_initial_values():
  params = jax.device_get(lstm(500, 4, width=64, embedding=32).init(KEY).params)
  for entries, variance in (
    (params["tokens"]["embedding"], 1),
    (params["input"]["kernel"], 1 / 32),
    (params["recurrent"]["kernel"], 1 / 64),
    (params["logits"]["kernel"], 1 / 64),
  ):
    # The standard error of the variance of n normal values is sqrt(2 / n) of it.
    np.testing.assert_allclose(np.var(entries), variance, rtol=4 * np.sqrt(2 / entries.size))
  np.testing.assert_array_equal(params["input"]["bias"], np.repeat([0, 1, 0, 0], 64))
  np.testing.assert_array_equal(params["logits"]["bias"], np.zeros(500))


def test_the_cell_adds_up_in_float32():
  """Open gates and an input of tanh(g) = 2^-9: after 400 steps c = 400 / 512, where a bfloat16 sum stops growing at 0.5.

  sigmoid(20) is 1 to 2e-9, and 2^-9 is half of the spacing of bfloat16 in [0.5, 1), so a sum rounds back to even.
  """
  params = {
    "tokens": {"embedding": jnp.zeros((2, 1))},
    "input": {"kernel": jnp.zeros((1, 4)), "bias": jnp.array([20.0, 20.0, np.arctanh(2**-9), 20.0])},
    "recurrent": {"kernel": jnp.zeros((1, 4))},
    "logits": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.zeros(2)},
  }
  model = lstm(2, 400, width=1, embedding=1, dtype=jnp.bfloat16)
  logits = applied(model, params, np.zeros((1, 400), int))
  np.testing.assert_allclose(logits[0, -1, 0], np.tanh(400 / 512), rtol=2**-8)


def test_it_learns_to_remember():
  """Asked at the last of three tokens for the first: a network without memory stays at log 4."""
  model = lstm(4, 3, width=8, embedding=4)
  optimizer = optax.adam(0.03)

  def loss(params, tokens):
    logits = model.apply(params, {}, tokens, train=True)[0][:, -1]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 0]))

  def step(carry, key):
    params, state = carry
    value, grad = jax.value_and_grad(loss)(params, jax.random.randint(key, (32, 3), 0, 4))
    updates, state = optimizer.update(grad, state, params)
    return (optax.apply_updates(params, updates), state), value

  params = model.init(KEY).params
  keys = jax.random.split(KEY, 80)
  losses = np.asarray(jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[1])(params))
  assert abs(losses[0] - np.log(4)) < 0.5
  assert np.mean(losses[-10:]) < np.log(4) / 5


def test_token_outside_the_vocabulary_is_nan_from_there_on_in_its_sequence_only():
  params = params_of(np.float32)
  tokens = TOKENS.copy()
  tokens[1, 2] = VOCAB
  logits = applied(MODEL, params, tokens)
  np.testing.assert_array_equal(np.isnan(logits).any(axis=2)[1], [False, False, True, True, True])
  np.testing.assert_array_equal(np.delete(logits, 1, axis=0), np.delete(applied(MODEL, params, TOKENS), 1, axis=0))


@pytest.mark.parametrize("tokens", [TOKENS.astype(np.float32), TOKENS[:, :-1]])
def test_tokens_that_are_none_are_refused(tokens):
  with pytest.raises(ValueError, match=r"tokens are .*; wanted integers of shape \[B, 5\]: cut"):
    MODEL.apply(params_of(np.float32), {}, tokens, train=False)
