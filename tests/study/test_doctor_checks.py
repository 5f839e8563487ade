"""Each check of the doctor finds what it is there for, in a workload that is broken in one way, and nothing else."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import classifier

from bsjax.data import Source
from bsjax.models import lstm
from bsjax.types import Variables
from bsjax.workloads import Preset, Target
from bsjax.workloads.text import language_modelling
from tests.study.examined import CLASSES, FEATURES, HIDDEN, broken, diagnose, good, init, logits, source

TARGET = Target("validation_loss", 1.0, "min")


def with_params(**more: Callable[[], Any]) -> Callable[..., Variables]:
  return lambda key: Variables(init(key).params | {name: make() for name, make in more.items()}, {})


def losses(params, batch):
  return optax.softmax_cross_entropy_with_integer_labels(logits(params, {}, batch), batch["label"])


def dropped(params, model_state, batch, key, *, reduce=jnp.mean):
  keep = jax.random.bernoulli(key, 0.8, batch["x"].shape)
  return reduce(losses(params, batch | {"x": batch["x"] * keep / 0.8})), model_state


def normalised(params, model_state, batch, key):
  return jnp.mean(losses(params, batch | {"x": batch["x"] - jnp.mean(batch["x"], axis=0)})), model_state


def spoken(token: int) -> dict[str, Any]:
  """A text over 5 words, whose validation set has `token` in one place."""
  tokens = np.arange(36, dtype=np.int32).reshape(9, 4) % 5
  train = Source("made_up", "train", {"tokens": tokens})
  model = lstm(5, 3, width=2, embedding=2)
  workload = language_modelling(
    "text", (train, train, train), model, length=3, target=TARGET, preset=Preset((2,), base_learning_rate=0.1)
  )
  other = np.where(np.arange(36).reshape(9, 4) == 22, token, tokens)
  return vars(dataclasses.replace(workload, validation=Source("made_up", "validation", {"tokens": other})))


def altered(split: str, **changes: Callable[[np.ndarray], np.ndarray]) -> dict[str, Source]:
  """Changes arrays of one split of the good workload."""
  whole = getattr(good(), split)
  return {split: dataclasses.replace(whole, arrays={n: changes.get(n, np.array)(a) for n, a in whole.arrays.items()})}


def first_row(value: Any) -> Callable[[np.ndarray], np.ndarray]:
  return lambda array: np.concatenate([np.full_like(array[:1], value), array[1:]])


def mean_plus(extra: Callable[..., Any]) -> Callable[..., Any]:
  return lambda params, model_state, batch, key: (jnp.mean(losses(params, batch)) + extra(params, batch), model_state)


def metrics_with(**more: Callable[..., Any]) -> Callable[..., Any]:
  def example_metrics(params, model_state, example):
    metrics = good().example_metrics(params, model_state, example)
    return metrics | {name: make(metrics) for name, make in more.items()}

  return example_metrics


def rooted(params, model_state, example):
  return good().example_loss(params, model_state, example) + jnp.sum(jnp.sqrt(params["z"]))


def impure(params, model_state, example):
  return good().example_loss(params, model_state, example) * np.random.default_rng().uniform(1, 2)


BROKEN: dict[str, tuple[str, Callable[[], dict[str, Any]], str]] = {
  # what is wrong: (the check that finds it, what is replaced, what it says)
  "a counter among the parameters": (
    "arrays",
    lambda: {"init": with_params(count=lambda: jnp.zeros((), jnp.int32))},
    "count of params hold no floats",
  ),
  "a state that changes its dtype": (
    "arrays",
    lambda: {
      "init": lambda key: Variables(init(key).params, {"n": jnp.zeros(2, jnp.int32)}),
      "train_loss": lambda p, s, b, k: (good().train_loss(p, {}, b, k)[0], {"n": s["n"] + 0.5}),
    },
    "train_loss changes n int32[2] to float32[2]",
  ),
  "a state that grows": (
    "arrays",
    lambda: {"train_loss": lambda p, s, b, k: (good().train_loss(p, s, b, k)[0], {"n": jnp.zeros(1)})},
    "other entries",
  ),
  "a sum over examples": (
    "mean",
    lambda: {"train_loss": lambda p, s, b, k: (jnp.sum(losses(p, b)), s)},
    "jnp.mean instead of jnp.sum",
  ),
  "a sum with dropout": ("mean", lambda: {"train_loss": functools.partial(dropped, reduce=jnp.sum)}, "jnp.mean"),
  "a penalty for each example": (
    "mean",
    lambda: {"train_loss": mean_plus(lambda params, batch: 1e-4 * len(batch["label"]) * jnp.sum(params["w"] ** 2))},
    "a batch given twice changes train_loss",
  ),
  "a penalty that probes do not see": (
    "example_loss",
    lambda: {"train_loss": mean_plus(lambda params, batch: 1e-3 * jnp.sum(params["w"] ** 2))},
    "use mean_train_loss(example_loss)",
  ),
  "a parameter that is not used": (
    "gradients",
    lambda: {"init": with_params(unused=lambda: jnp.ones(3))},
    "zero: unused; the loss does not depend on them",
  ),
  "a logarithm of zero": (
    "gradients",
    lambda: {
      "init": with_params(z=lambda: jnp.zeros(2)),
      "train_loss": mean_plus(lambda params, batch: jnp.sum(jnp.sqrt(params["z"]))),
    },
    "not finite at initialisation: z",
  ),
  "numpy's randomness in the loss": (
    "key",
    lambda: {"train_loss": mean_plus(lambda params, batch: np.random.default_rng().uniform())},
    "differ between two runs with one key",
  ),
  "numpy's randomness in init": (
    "key",
    lambda: {"init": with_params(w=lambda: np.random.default_rng().normal(size=(FEATURES, HIDDEN)).astype("f4"))},
    "differ between two runs with one key",
  ),
  "numpy's randomness in an init that is compiled": (
    "key",
    lambda: {"init": jax.jit(with_params(w=lambda: np.random.default_rng().normal(size=(FEATURES, HIDDEN)).astype("f4")))},
    "differ between two runs with one key",
  ),
  "numpy's randomness in a loss that is compiled": (
    "key",
    lambda: {"train_loss": jax.jit(mean_plus(lambda params, batch: np.random.default_rng().uniform()))},
    "differ between two runs with one key",
  ),
  "numpy's randomness in the example's loss": ("key", lambda: {"example_loss": impure}, "differ between two runs"),
  "a loss that is no number": (
    "mean",
    lambda: {"train_loss": mean_plus(lambda params, batch: jnp.nan)},
    "train_loss is nan at initialisation: look for log or sqrt of 0",
  ),
  "a loss that is no number, of examples": (
    "example_loss",
    lambda: {"example_loss": lambda p, s, e: good().example_loss(p, s, e) + jnp.nan},
    "the mean of example_loss is nan at initialisation",
  ),
  "a loss that is no number is no batch norm": (
    "batch_norm",
    lambda: {"train_loss": mean_plus(lambda params, batch: jnp.nan)},
    "train_loss is nan at initialisation",
  ),
  "a gradient that is no number, of examples": (
    "gradients",
    lambda: {"example_loss": rooted, "init": with_params(z=lambda: jnp.zeros(2))},
    "not finite at initialisation in example_loss: z; look for log or sqrt of 0",
  ),
  "norms that are no numbers": (
    "ghost norms",
    lambda: {"example_loss": rooted, "init": with_params(z=lambda: jnp.zeros(2))},
    "gradients of example_loss are not finite at initialisation",
  ),
  "running statistics that no example's loss sees": (
    "batch_norm",
    lambda: {
      "init": lambda key: Variables(init(key).params, {"mean": jnp.zeros(2)}),
      "train_loss": lambda p, s, b, k: (normalised(p, s, b, k)[0], {"mean": s["mean"] + 1}),
      "batch_norm": "running",
    },
    "example_loss does not change with model_state: normalise with the running averages",
  ),
  "batch norm that is not stated": ("batch_norm", lambda: {"train_loss": normalised}, "which examples come together"),
  "statistics that are not stated": (
    "batch_norm",
    lambda: {"init": lambda key: Variables(init(key).params, {"mean": jnp.zeros(2)})},
    "model_state holds 1 arrays, though batch_norm is 'none'",
  ),
  "stated batch norm without statistics": (
    "batch_norm",
    lambda: {"train_loss": normalised, "batch_norm": "running"},
    "batch_norm is 'running', but model_state is empty",
  ),
  "running statistics that stand still": (
    "batch_norm",
    lambda: {
      "init": lambda key: Variables(init(key).params, {"mean": jnp.zeros(2)}),
      "train_loss": normalised,
      "batch_norm": "running",
    },
    "train_loss returns model_state unchanged",
  ),
  "a split of another shape": (
    "data",
    lambda: altered("validation", x=lambda x: x[:, :-1]),
    "validation holds {'x': 'float32[5]', 'label': 'int32[]'}, train {'x': 'float32[6]'",
  ),
  "a split of another dtype": ("data", lambda: altered("test", x=lambda x: x.astype("f8")), "test holds {'x': 'float64"),
  "labels that are missing": ("data", lambda: altered("test", label=lambda y: y[:-1]), "arrays of test hold [15, 16]"),
  "a pixel that is no number": ("data", lambda: altered("test", x=first_row(np.nan)), "test has numbers in x that are"),
  "batches larger than the data": (
    "data",
    lambda: {"preset": Preset(batch_sizes=(8, 65), base_learning_rate=0.1)},
    "preset.batch_sizes has 65, more than the 64 training examples",
  ),
  "training examples to validate": (
    "duplicates",
    lambda: altered("validation", x=lambda x: good().train.arrays["x"][5:21]),
    "16 of 16 examples of validation and 0 of 16 examples of test are in train too",
  ),
  "a label too large": (
    "labels",
    lambda: altered("validation", label=lambda y: np.where(np.arange(16) == 7, 3, y)),
    "1 examples have labels outside 0 to 2, first validation example 7 with 3; example_loss gives nan there",
  ),
  "a label too large, without logits": (
    "labels",
    lambda: altered("validation", label=lambda y: np.where(np.arange(16) == 7, 3, y)) | {"example_outputs": None, "output_loss": None},
    "1 examples of validation have no finite loss at initialisation, first example 7, whose label is 3: mend them",
  ),
  "a label below zero": ("labels", lambda: altered("train", label=lambda y: y - 1), "first train example 0 with -1; exam"),
  "a token without a logit": (
    "labels",
    lambda: spoken(5),
    "1 examples have tokens outside 0 to 4, first validation example 5 with [0 1 5 3]; example_loss gives nan there",
  ),
  "a metric for each class": (
    "metrics",
    lambda: {"example_metrics": metrics_with(hits=lambda metrics: jnp.zeros(3))},
    "hits [3] of one example: return scalars",
  ),
  "no loss among the metrics": (
    "metrics",
    lambda: {"example_metrics": lambda p, s, e: {"accuracy": jnp.zeros(())}},
    "example_metrics returns no loss, only accuracy",
  ),
  "a metric that is no number": (
    "metrics",
    lambda: {"example_metrics": metrics_with(entropy=lambda metrics: 0 * jnp.log(0 * metrics["loss"]))},
    "not finite at initialisation: validation_accuracy",
  ),
  "a target in the wrong direction": (
    "metrics",
    lambda: {"target": Target("validation_loss", 0.1, "max")},
    "the target validation_loss >= 0.1 is reached before training",
  ),
  "a loss that changes from call to call": ("ghost norms", lambda: {"example_loss": impure}, "make example_loss a pure"),
  "two parts of another loss": (
    "Gauss-Newton",
    lambda: {"output_loss": lambda outputs, example: 1.01 * good().output_loss(outputs, example)},  # type: ignore[misc]
    "make them the same loss",
  ),
  "parameters without a dtype": (
    "compilations",
    lambda: {"init": lambda key: Variables(init(key).params | {"w": jnp.full((FEATURES, HIDDEN), 0.1)}, {})},
    "2 for three calls of the training segment: params/w come from Python numbers without a dtype",
  ),
}  # fmt: skip


@pytest.mark.parametrize(("check", "changes", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_found(check: str, changes: Callable[[], dict[str, Any]], message: str) -> None:
  found = diagnose(check, broken(**changes()))
  assert found.check == check
  assert message in found.message
  assert found.status == "fix"
  assert "\n" not in str(found)


NOTES: dict[str, tuple[str, Callable[[], dict[str, Any]], str, str]] = {
  "batch norm is a mean": ("mean", lambda: vars(classifier("mlp_bn")), "ok", "a batch given twice changes the loss by"),
  "batch norm that is stated": ("batch_norm", lambda: vars(classifier("mlp_bn")), "ok", "'running': 4 arrays of statistics, which tr"),
  "batch norm is not compared": ("example_loss", lambda: vars(classifier("mlp_bn")), "note", "batch norm in training"),
  "norms with running statistics": ("ghost norms", lambda: vars(classifier("mlp_bn")), "ok", "all 10 arrays"),
  "a sum is no batch norm": ("batch_norm", lambda: {"train_loss": lambda p, s, b, k: (jnp.sum(losses(p, b)), s)}, "ok", "'none': no st"),
  "dropout is a mean": ("mean", lambda: {"train_loss": dropped}, "ok", "a batch given twice changes the loss by"),
  "dropout is no batch norm": ("batch_norm", lambda: {"train_loss": dropped}, "ok", "'none': no statistics"),
  "dropout depends on the key": ("key", lambda: {"train_loss": dropped}, "ok", "depends on the key (dropout"),
  "dropout is not compared": ("example_loss", lambda: {"train_loss": dropped}, "note", "randomness in training"),
  "a last layer that starts at zero": (
    "gradients",
    lambda: {"init": lambda key: Variables(init(key).params | {"v": jnp.zeros((HIDDEN, CLASSES), jnp.float32)}, {})},
    "note",
    "zero at initialisation for w, but not beside it",
  ),
  "a bias that all logits share": (
    "gradients",
    lambda: {
      "init": with_params(bias=lambda: jnp.zeros(1)),
      "train_loss": lambda p, s, b, k: (
        jnp.mean(
          optax.softmax_cross_entropy_with_integer_labels(
            jnp.tanh(b["x"] @ p["w"]) @ p["v"] + p["bias"], b["label"]
          )
        ),
        s,
      ),
    },
    "note",
    "no more than rounding for bias",
  ),
  "batch norm in training mode": (
    "batch_norm",
    lambda: {"init": lambda k: Variables(init(k).params, {"mean": jnp.zeros(2)}), "train_loss": normalised, "batch_norm": "batch"},
    "note",
    "no loss of one example exists",
  ),
  "no norms under it": ("ghost norms", lambda: {"batch_norm": "batch"}, "note", "use 'running'"),
  "one duplicate in many": (
    "duplicates",
    lambda: {"test": Source("made_up", "test", {name: np.concatenate([array, good().train.arrays[name][:1]])
                                                for name, array in source("test", 3, 200).arrays.items()})},
    "note",
    "1 of 201 examples of test are in train too",
  ),
  "classes that are never trained on": (
    "classes",
    lambda: altered("train", label=lambda y: np.minimum(y, 1)),
    "note",
    "2 in train, of 22 to 42 examples; always guessing the largest scores 0.656; labels 2 are never trained on",
  ),
  "tokens of the vocabulary": ("labels", lambda: spoken(4), "ok", "all within 0 to 4"),
  "labels without logits": ("labels", lambda: {"example_outputs": None, "output_loss": None}, "note", "each loss is finite"),
  "no Gauss-Newton": ("Gauss-Newton", lambda: {"example_outputs": None, "output_loss": None}, "note", "not measured"),
  "a parameter that falls back to vmap": (
    "ghost norms",
    lambda: {"example_loss": lambda p, s, e: good().example_loss(p | {"w": jnp.exp(p["w"])}, s, e)},
    "note",
    "1 rank one; 1 by vmap, which is slower: w (flows into exp)",
  ),
}  # fmt: skip


@pytest.mark.parametrize(("check", "changes", "status", "message"), NOTES.values(), ids=NOTES)
def test_what_is_good_to_know_is_not_to_be_fixed(check: str, changes, status: str, message: str) -> None:
  found = diagnose(check, broken(**changes()))
  assert message in found.message
  assert found.status == status


def test_ghost_batches_of_any_size_are_examined():
  """Of 24 of the training set's 64: no power of two is a multiple."""

  def train_loss(params, model_state, batch, key):
    assert len(batch["label"]) % 24 == 0, "not a multiple of 24"
    return jnp.mean(losses(params, batch)), model_state

  workload = broken(train_loss=train_loss, preset=Preset(batch_sizes=(24, 48), base_learning_rate=0.1))
  assert diagnose("mean", workload).status == "ok"
