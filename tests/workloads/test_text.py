"""Language modelling against its definition, under every product that the laboratory takes, and what records say of tokens."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.data import Source
from bsjax.models import language_model, lstm
from bsjax.probes import (
  gauss_newton_vector_product,
  ghost_norms,
  hessian_vector_product,
  mean_gradient,
  per_example_grads,
)
from bsjax.records import read_record
from bsjax.train import TrialConfig, make_mesh, make_trial, run_trials
from bsjax.types import Hparams
from bsjax.workloads import Preset, Target, check_workload, num_params, text

VOCAB, LENGTH = 7, 4
PRESET = Preset(batch_sizes=(2, 4), base_learning_rate=0.1)
TARGET = Target("validation_loss", 1.0, "min")
MODELS = {
  "decoder": language_model(VOCAB, LENGTH, width=4, depth=1, num_heads=2, mlp_ratio=2),
  "lstm": lstm(VOCAB, LENGTH, width=3, embedding=4),
}


def splits(dtype=np.uint8, length=LENGTH, vocab=VOCAB, count=6):
  draw = np.random.default_rng(0)
  return tuple(
    Source("made_up", split, {"tokens": draw.integers(0, vocab, (count, length + 1)).astype(dtype)})
    for split in ("train", "validation", "test")
  )


@functools.cache
def workload_of(name, dtype=np.uint8):
  return text.language_modelling(name, splits(dtype), MODELS[name], length=LENGTH, target=TARGET, preset=PRESET)


def in_float64(name):
  """A workload, uniform float64 parameters in [-0.5, 0.5), and its training examples; under `jax.enable_x64`."""
  workload, draw = workload_of(name), np.random.default_rng(1)
  shapes = jax.eval_shape(workload.init, jax.random.key(0)).params
  params = jax.tree.map(lambda leaf: draw.uniform(-0.5, 0.5, leaf.shape), shapes)
  return workload, params, dict(workload.train.arrays)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_loss_and_metrics_are_their_definition(dtype):
  workload = workload_of("decoder", dtype)
  params = workload.init(jax.random.key(0)).params
  tokens = workload.train.arrays["tokens"]
  example = {"tokens": jnp.asarray(tokens)[2]}

  @jax.jit
  def measure(params, example):
    logits = MODELS["decoder"].apply(params, {}, example["tokens"][None, :-1], train=False)[0][0]
    example_loss = workload.example_loss(params, {}, example)
    joined = workload.output_loss(workload.example_outputs(params, {}, example), example)
    return logits, example_loss, joined, workload.example_metrics(params, {}, example)

  logits, example_loss, joined, metrics = measure(params, example)
  logits = np.asarray(logits, np.float64)
  assert logits.shape == (LENGTH, VOCAB)
  losses = [np.log(np.exp(logits[t]).sum()) - logits[t, tokens[2, t + 1]] for t in range(LENGTH)]
  for value, expected in (
    (example_loss, np.mean(losses)),
    (joined, np.mean(losses)),
    (metrics["loss"], np.mean(losses)),
    (metrics["last_token_loss"], losses[-1]),
    (metrics["accuracy"], np.mean(logits.argmax(axis=1) == tokens[2, 1:])),
  ):
    np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert ("bits_per_byte" in metrics) == (dtype == np.uint8)
  if dtype == np.uint8:
    np.testing.assert_allclose(metrics["bits_per_byte"], np.mean(losses) / np.log(2), rtol=1e-5)


def test_accuracy_counts_the_right_predictions():
  """A network that repeats its input is right wherever the next token is the same: at 3 of 4 places, then at 1."""
  table = jnp.eye(VOCAB)
  model = MODELS["decoder"]._replace(apply=lambda params, state, tokens, *, train, key=None: (table[tokens], state))
  workload = text.language_modelling("echo", splits(), model, length=LENGTH, target=TARGET, preset=PRESET)
  for tokens, expected in (([2, 2, 2, 2, 5], 0.75), ([0, 1, 1, 3, 0], 0.25)):
    assert workload.example_metrics({}, {}, {"tokens": jnp.array(tokens, jnp.uint8)})["accuracy"] == expected


@pytest.mark.parametrize("name", MODELS)
def test_training_loss_is_the_mean_over_tokens_and_starts_near_log_v(name):
  workload = workload_of(name)
  params = workload.init(jax.random.key(0)).params
  batch = jax.tree.map(jnp.asarray, dict(workload.train.arrays))

  @jax.jit
  def measure(params, batch):
    logits, _ = MODELS[name].apply(params, {}, batch["tokens"][:, :-1], train=True)
    return logits, workload.train_loss(params, {}, batch, jax.random.key(1))

  logits, (loss, state) = measure(params, batch)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
  np.testing.assert_allclose(loss, np.mean(np.asarray(losses, np.float64)), rtol=1e-6)
  assert state == {}
  assert abs(float(loss) - np.log(VOCAB)) < 0.7


@pytest.mark.parametrize("name", MODELS)
def test_products_with_curvature(name):
  """H v is the central difference of the gradient along v; the Gauss-Newton matrix is J' H_z J, formed, and so positive.

  The difference at 1e-5 is off by (1e-5)^2 / 6 of a third derivative of size one, and by 1e-16 / 1e-5 of rounding: 1e-10.
  """
  with jax.enable_x64(True):
    workload, params, examples = in_float64(name)
    vector = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=float)).reshape(leaf.shape), params)

    def loss_fn(params, example):
      return workload.example_loss(params, {}, example)

    def outputs_fn(params, example):
      return workload.example_outputs(params, {}, example)

    @jax.jit
    def measure(params, vector):
      def gradient(step):
        moved = jax.tree.map(lambda leaf, v: leaf + step * v, params, vector)
        return mean_gradient(loss_fn, moved, examples, chunk_size=6)[1]

      jacobian = jax.vmap(lambda example: jax.jvp(lambda p: outputs_fn(p, example), (params,), (vector,)))(examples)
      return (
        hessian_vector_product(loss_fn, params, examples, vector, chunk_size=6),
        jax.tree.map(lambda up, down: (up - down) / 2e-5, gradient(1e-5), gradient(-1e-5)),
        gauss_newton_vector_product(outputs_fn, workload.output_loss, params, examples, vector, chunk_size=6),
        jacobian,
      )

    product, difference, gauss_newton, (logits, pushed) = jax.device_get(measure(params, vector))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), product, difference)
  quadratic = sum(np.vdot(v, c) for v, c in zip(jax.tree.leaves(vector), jax.tree.leaves(gauss_newton), strict=True))
  # Of a cross-entropy of logits z that move by u: the variance of u under softmax(z), averaged over tokens and examples.
  shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  mean = (shares * pushed).sum(-1, keepdims=True)
  expected = (shares * (pushed - mean) ** 2).sum(-1).mean()
  np.testing.assert_allclose(quadratic, expected, rtol=1e-10)
  assert expected > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_norms_of_per_example_gradients(name):
  with jax.enable_x64(True):
    workload, params, examples = in_float64(name)

    def loss_fn(params, example):
      return workload.example_loss(params, {}, example)

    got, grads = jax.device_get(
      jax.jit(
        lambda p: (ghost_norms(loss_fn, p, examples, chunk_size=6).sq_norms, per_example_grads(loss_fn, p, examples))
      )(params)
    )
  for norms, leaf in zip(got.values(), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(norms, np.sum(np.square(leaf).reshape(6, -1), axis=1), rtol=1e-11)
    assert np.all(norms > 0)


@pytest.mark.parametrize(("vocab", "dtype", "first"), [(VOCAB + 1, np.uint8, 0), (VOCAB, np.int32, -1)])
def test_tokens_without_logits_are_refused(vocab, dtype, first):
  train, validation, test = splits(dtype)
  wrong = validation.arrays["tokens"].copy()
  wrong[2, 3] = vocab - 1 if first == 0 else first
  validation = Source("made_up", "validation", {"tokens": wrong})
  with pytest.raises(
    ValueError, match=r"of made_up validation go from (0 to 7|-1 to 6), .* for 0 to 6: give it a larger vocab"
  ):
    text.language_modelling(
      "x", (train, validation, test), MODELS["decoder"], length=LENGTH, target=TARGET, preset=PRESET
    )


def test_rows_count_tokens(tmp_path: Path) -> None:
  """Batches of 2 sequences of 4 predictions: 8 tokens a step."""
  workload = workload_of("lstm")
  trial = make_trial(TrialConfig("lstm", 2, 4, 2), Hparams(0.1), 0)
  run_trials(workload, [trial], tmp_path, mesh=make_mesh(data=1))
  rows = read_record(tmp_path / trial.id).metrics
  assert [(row["step"], row["examples_seen"], row["tokens_seen"]) for row in rows] == [(2, 4, 16), (4, 8, 32)]
  assert {"validation_bits_per_byte", "validation_last_token_loss"} <= rows[-1].keys()


@pytest.mark.parametrize(
  "source",
  [
    Source("made_up", "test", {"tokens": np.zeros((3, LENGTH), np.int32)}),
    Source("made_up", "test", {"tokens": np.zeros((3, LENGTH + 1), np.float32)}),
    Source("made_up", "test", {"image": np.zeros((3, LENGTH + 1), np.uint8)}),
  ],
)
def test_examples_that_are_no_sequences_of_this_length_are_refused(source):
  with pytest.raises(
    ValueError, match=r"examples of made_up test hold .*\[[45]\]; wanted tokens, 5 integers for length=4: cut"
  ):
    text.language_modelling(
      "decoder", (*splits()[:2], source), MODELS["decoder"], length=LENGTH, target=TARGET, preset=PRESET
    )


SIZES = {
  # tokens and positions, two blocks of 2 LayerNorms, 4 square maps with 3 biases and a perceptron, and a LayerNorm
  "shakespeare_lm": (256 + 64) * 128 + 2 * (4 * 128 + 4 * 128**2 + 3 * 128 + 8 * 128**2 + 5 * 128) + 2 * 128,
  "shakespeare_lstm": 256 * 128 + 129 * 512 + 128 * 512 + 129 * 256,
  "lm1b_transformer": (32_000 + 64) * 512 + 6 * (4 * 512 + 4 * 512**2 + 3 * 512 + 8 * 512**2 + 5 * 512) + 2 * 512,
  "lm1b_lstm": 32_000 * 512 + 513 * 8192 + 2048 * 8192 + 2049 * 32_000,
}


@pytest.mark.parametrize("name", text.TEXTS)
def test_workloads_on_paper(monkeypatch, name):
  """Data of the right shape stand in for the real ones; nothing is computed."""
  asked, length = [], 20 if name == "lm1b_lstm" else 64
  dataset, dtype = ("lm1b", np.uint16) if name.startswith("lm1b") else ("tiny_shakespeare", np.uint8)

  def load(name, split, **options):
    asked.append((name, split, options))
    return Source(name, split, {"tokens": np.zeros((2, length + 1), dtype)})

  monkeypatch.setattr("bsjax.workloads.splits.load_source", load)
  workload = text.text_workload(name, data_dir="here", manual_dir="there")
  options = {"data_dir": "here", "manual_dir": "there", "fake": False, "length": length}
  assert asked == [(dataset, split, options) for split in ("train", "validation", "test")]
  sources = (workload.train, workload.validation, workload.test)
  assert [source.split for source in sources] == ["train", "validation", "test"]
  assert check_workload(workload, "here") is workload
  assert (workload.name, workload.tokens_per_example) == (name, length)
  assert num_params(workload) == SIZES[name]
  assert text.TEXTS[name].about.endswith(f"P = {SIZES[name]:,}")
  assert text.text_workload(name, fake_data=True).name == f"fake_{name}"
  assert asked[-1] == (dataset, "test", {"data_dir": None, "manual_dir": None, "fake": True, "length": length})
