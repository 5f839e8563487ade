"""Language modelling: sequences of tokens and a causal network become a `Workload`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsjax.data import RecordSource, Source, load_source
from bsjax.models import BILLION_WORD_LSTMS, TRANSFORMERS, Model, language_model, lstm
from bsjax.types import Array, Example, Metrics, ModelState, Params
from bsjax.workloads.workload import Preset, Target, Workload, mean_train_loss

Sources = tuple[Source | RecordSource, Source | RecordSource, Source | RecordSource]
"""The train, validation and test splits."""

BYTES = 256
"""Tokens of tiny_shakespeare."""
SHAKESPEARE_LENGTH = 64
SHAKESPEARE_PRESET = Preset(
  batch_sizes=(4, 16, 64, 256),
  base_learning_rate=0.1,
  num_epochs=1,
  num_steps=512,
  num_rates=3,
  tuning_seeds=2,
  final_seeds=2,
  train_loss=2.3,
)
LM1B_VOCABULARY = 32_000
"""Subwords of lm1b, as `bsjax.data` learns them. McCandlish et al. (2018) have 40,000 of their own."""
LM1B_TRANSFORMER_LENGTH = 64
"""Ours: the paper's was not found."""
LM1B_LSTM_LENGTH = 20
"""McCandlish et al. (2018), appendix A.4."""
LM1B_PRESET = Preset(
  batch_sizes=tuple(2**k for k in range(4, 16)),
  base_learning_rate=0.1,
  reference_batch_size=256,
  num_epochs=1,
  num_steps=65536,
  train_loss=3.9,
)


def language_modelling(
  name: str,
  dataset: str | Sources,
  model: Model,
  *,
  length: int,
  target: Target,
  preset: Preset,
  data_dir: str | None = None,
  manual_dir: str | None = None,
) -> Workload:
  """Builds a workload in which an example is one sequence, and its loss the mean cross-entropy of its predictions in nats.

      l = -(1/L) sum_t log softmax(z_t)[token_{t+1}],        z = model(tokens 0 to L - 1), f32[L, V]

  Batch sizes count sequences. All have the same L = `length`, so the mean over examples is also the mean over tokens, and
  `tokens_per_example` = L lets records count tokens.

  Args:
    dataset: what `load_source` knows, or the three splits themselves: examples `{"tokens": [L + 1]}` of any integer dtype.
    model: of sequences of L tokens (`language_model`, `lstm`), without dropout.

  Returns:
    A workload with metrics `loss`; `accuracy`, the share of predictions whose largest logit is right; `last_token_loss`, that of the
    prediction from the longest context (its exponential is the perplexity that McCandlish et al. (2018) report); and, where tokens
    are unsigned bytes, `bits_per_byte` = loss / log 2.

  Raises:
    ValueError: a split whose examples are not L + 1 integers.
  """
  sources: list[Source | RecordSource]
  if isinstance(dataset, str):
    names = ("train", "validation", "test")
    sources = [load_source(dataset, split, data_dir=data_dir, manual_dir=manual_dir) for split in names]
  else:
    sources = list(dataset)
  for source in sources:
    _check_tokens(source, length)
  train, validation, test = sources
  are_bytes = train.spec["tokens"].dtype == np.uint8

  def example_logits(params: Params, model_state: ModelState, example: Example) -> Array:
    inputs = example["tokens"][:-1].astype(jnp.int32)
    return model.apply(params, model_state, inputs[None], train=False)[0][0]

  def token_losses(logits: Array, example: Example) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["tokens"][1:].astype(jnp.int32))

  def output_loss(logits: Array, example: Example) -> Array:
    return jnp.mean(token_losses(logits, example))

  def example_loss(params: Params, model_state: ModelState, example: Example) -> Array:
    return output_loss(example_logits(params, model_state, example), example)

  def example_metrics(params: Params, model_state: ModelState, example: Example) -> Metrics:
    logits = example_logits(params, model_state, example)
    losses = token_losses(logits, example)
    loss = jnp.mean(losses)
    metrics = {
      "loss": loss,
      "accuracy": jnp.mean((jnp.argmax(logits, axis=-1) == example["tokens"][1:]).astype(jnp.float32)),
      "last_token_loss": losses[-1],
    }
    return metrics | ({"bits_per_byte": loss / np.log(2)} if are_bytes else {})

  return Workload(
    name=name,
    init=jax.jit(model.init),
    example_loss=example_loss,
    train_loss=mean_train_loss(example_loss),
    example_metrics=example_metrics,
    train=train,
    validation=validation,
    test=test,
    target=target,
    preset=preset,
    example_outputs=example_logits,
    output_loss=output_loss,
    tokens_per_example=length,
  )


def _check_tokens(source: Source | RecordSource, length: int) -> None:
  spec = source.spec.get("tokens")
  if spec is None or spec.shape != (length + 1,) or not np.issubdtype(spec.dtype, np.integer):
    found = ", ".join(f"{name} {one.dtype}{list(one.shape)}" for name, one in source.spec.items())
    raise ValueError(
      f"examples of {source.name} {source.split} hold {found}; wanted tokens, {length + 1} integers for length={length}: "
      "cut the text anew or choose another length."
    )


def shakespeare_lm(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """A decoder of two blocks of width 128 on the bytes of tiny_shakespeare, in sequences of 64; P = 437,504."""
  return language_modelling(
    "shakespeare_lm",
    "tiny_shakespeare",
    language_model(BYTES, SHAKESPEARE_LENGTH),
    length=SHAKESPEARE_LENGTH,
    target=Target("validation_loss", 2.3, "min"),
    preset=SHAKESPEARE_PRESET,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def shakespeare_lstm(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """An LSTM of 128 units on the bytes of tiny_shakespeare, in sequences of 64; P = 197,376."""
  return language_modelling(
    "shakespeare_lstm",
    "tiny_shakespeare",
    lstm(BYTES, SHAKESPEARE_LENGTH),
    length=SHAKESPEARE_LENGTH,
    target=Target("validation_loss", 2.3, "min"),
    preset=SHAKESPEARE_PRESET,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def lm1b_transformer(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """Shallue et al. (2019), Transformer on LM1B: the "base" of `TRANSFORMERS` in bfloat16; P = 35,329,024.

  Their goal is a validation cross-entropy of 3.9 nats, which depends on their vocabulary; ours is another.
  """
  return language_modelling(
    "lm1b_transformer",
    "lm1b",
    language_model(LM1B_VOCABULARY, LM1B_TRANSFORMER_LENGTH, **TRANSFORMERS["base"], dtype=jnp.bfloat16),
    length=LM1B_TRANSFORMER_LENGTH,
    target=Target("validation_loss", 3.9, "min"),
    preset=LM1B_PRESET,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def lm1b_lstm(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """McCandlish et al. (2018), LSTM on the Billion Word benchmark: "2048" of `BILLION_WORD_LSTMS` in bfloat16, sequences
  of 20; P = 102,931,712.

  Trained there by Adam with momentum 0.5 to goals of the last token's perplexity, the least of them 45; the target here is 50.
  """
  return language_modelling(
    "lm1b_lstm",
    "lm1b",
    lstm(LM1B_VOCABULARY, LM1B_LSTM_LENGTH, **BILLION_WORD_LSTMS["2048"], dtype=jnp.bfloat16),
    length=LM1B_LSTM_LENGTH,
    target=Target("validation_last_token_loss", float(np.log(50)), "min"),
    preset=LM1B_PRESET,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )
