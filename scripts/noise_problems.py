"""What scripts/bench_noise.py measures on: three networks with data, and what a competitor has to offer."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsjax.models import conv, language_model, max_pool, mlp
from bsjax.probes import LossFn
from bsjax.types import Array, Batch, Example, Params

SEED = 0
VOCABULARY, LENGTH, WIDTH, DEPTH, HEADS, MLP_RATIO = 256, 128, 128, 2, 4, 4


class Problem(NamedTuple):
  """A loss of one example, with data."""

  loss_fn: LossFn
  params: Params
  examples: Batch
  chunk_size: int
  torch_chunk_size: int
  flops: float
  """Of one example's gradient: two per multiply-add, forward and for both gradients."""


Numbers = dict[str, np.ndarray]
"""What two sides are compared by: "leaf" |g_i|^2 of all examples, "G leaf" |G|^2; for segments the mean loss."""


class Side(NamedTuple):
  """One competitor, compiled and ready."""

  call: Callable[[], Any]
  """Does all the work and waits for it."""
  numbers: Callable[[Any], Numbers]
  temp_bytes: int | None = None
  note: dict[str, str] = {}


def mlp512() -> Problem:
  model = mlp((28, 28, 1), (512, 512), 10)
  params = model.init(jax.random.key(SEED)).params
  layers = [784 * 512, 512 * 512, 512 * 10]
  apply = functools.partial(_apply_model, model.apply)
  return Problem(_image_loss(apply), params, _images(1024), 128, 128, 2.0 * (3 * sum(layers) - layers[0]))


def cnn() -> Problem:
  """28x28 images, 5x5 convolutions to 32 and to 64 channels, each with ReLU and max pool, dense 1024, dense 10."""
  draw = np.random.default_rng(SEED)
  shapes = {"Conv_0": (5, 5, 1, 32), "Conv_1": (5, 5, 32, 64), "Dense_0": (7 * 7 * 64, 1024), "Dense_1": (1024, 10)}
  params = {
    name: {
      "kernel": jnp.asarray(draw.normal(size=shape) * math.sqrt(2 / math.prod(shape[:-1])), jnp.float32),
      "bias": jnp.zeros(shape[-1]),
    }
    for name, shape in shapes.items()
  }

  def apply(params: Params, images: Array) -> Array:
    x = images
    for name in ("Conv_0", "Conv_1"):
      x = max_pool(jax.nn.relu(conv(x, params[name]["kernel"]) + params[name]["bias"][None, None, None]))
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]

  positions = {"Conv_0": 28 * 28, "Conv_1": 14 * 14}
  layers = [positions.get(name, 1) * math.prod(shape) for name, shape in shapes.items()]
  return Problem(_image_loss(apply), params, _images(256), 64, 64, 2.0 * (3 * sum(layers) - layers[0]))


def transformer(*, tied: bool) -> Problem:
  """A causal language model of bytes; an example is a sequence, its loss the mean over next tokens.

  Of chunks of 1, 2, 4, 8 and 16 sequences, 2 is the fastest for every JAX side and 16 for PyTorch.
  """
  model = language_model(
    VOCABULARY, LENGTH, width=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=MLP_RATIO, tie_embeddings=tied
  )
  tokens = np.random.default_rng(SEED).integers(VOCABULARY, size=(64, LENGTH + 1))

  def loss_fn(params: Params, example: Example) -> Array:
    logits = _apply_model(model.apply, params, example["image"][None])[0]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, example["label"]))

  per_token = DEPTH * (4 + 2 * MLP_RATIO) * WIDTH**2 + VOCABULARY * WIDTH
  flops = 6.0 * LENGTH * (per_token + DEPTH * 2 * LENGTH * WIDTH)
  examples = {"image": jnp.asarray(tokens[:, :-1], jnp.int32), "label": jnp.asarray(tokens[:, 1:], jnp.int32)}
  return Problem(loss_fn, model.init(jax.random.key(SEED)).params, examples, 2, 16, flops)


def _apply_model(apply: Callable[..., Any], params: Params, inputs: Array) -> Array:
  return apply(params, {}, inputs, train=False)[0]


def _image_loss(apply: Callable[[Params, Array], Array]) -> LossFn:
  def loss_fn(params: Params, example: Example) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, example["image"][None])[0], example["label"])

  return loss_fn


def _images(number: int) -> Batch:
  draw = np.random.default_rng(SEED)
  images = draw.normal(size=(number, 28, 28, 1)).astype(np.float32)
  return {"image": jnp.asarray(images), "label": jnp.asarray(draw.integers(10, size=number), jnp.int32)}


def clock() -> float:
  return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def seconds(function: Callable[[], Any]) -> float:
  start = clock()
  function()
  return clock() - start
