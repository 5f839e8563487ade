"""What scripts/bench_curvature.py measures on: trained networks, what their products cost at least, and what a side has to offer."""

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bsjax.data import load_source
from bsjax.probes import hessian_vector_product, mean_gradient
from bsjax.probes.spectrum import Matvec
from bsjax.types import Array, Batch, Key, Params
from scripts import noise_problems
from scripts.noise_problems import DEPTH, LENGTH, MLP_RATIO, SEED, VOCABULARY, WIDTH, Problem

ACCURACY = 1e-4
"""What every eigensolver has to reach: the largest relative error of the values asked for, against float64."""
TRAIN_STEPS = 100


class Side(NamedTuple):
  """One competitor, compiled and ready."""

  call: Callable[[], Any]
  """Does all the work and waits for it."""
  read: Callable[[Any], np.ndarray]
  """What it found: eigenvalues, the largest first, or estimates, or a product or gradient as one vector."""
  residuals: Callable[[Any], np.ndarray] | None = None
  """|A v - lambda v| / |lambda| of every pair, by the side's own product."""
  notes: Callable[[Any], dict[str, Any]] = lambda _: {}


Estimate = Callable[[Matvec, Params, Key], tuple[Array, Array]]
"""Takes a product, a vector's shapes and a key; returns values f[n] and standard errors f[n]."""


class Work(NamedTuple):
  """Multiply-adds of one example's forward pass, by what a gradient and a Hessian product need of their derivatives."""

  first: float
  """x W of the first layer, where x is data."""
  second: float
  """h W of the layer behind it, with nothing but piecewise linear operations between."""
  inner: float
  """h W of the others."""
  attention: float = 0
  """Products of two activations."""

  def gradient(self) -> float:
    """FLOP of a gradient: each product again for either factor's cotangent, but for the data's."""
    return 2 * (2 * self.first + 3 * (self.second + self.inner + self.attention))

  def products(self, num_vectors: int) -> float:
    """FLOP of Hessian-vector products, forward over reverse, that share what does not depend on the vector.

    With t for the derivative along the vector and ' for cotangents, y = h W has ty = th W + h tW, and on the way back h' = y' W',
    th' = ty' W' + y' tW' and tW' = th y' + h ty', each term one product. y and h' are shared; W's cotangent is not needed, but of two
    activations both are. Data have neither t nor a cotangent; so the second layer's h' has no use, unless a curved
    activation lies before it.
    """
    shared = self.first + self.second + 2 * self.inner + 3 * self.attention
    own = 2 * self.first + 6 * (self.second + self.inner + self.attention)
    return 2 * (shared + num_vectors * own)


WORK = {
  "mlp512": Work(784 * 512, 512 * 512, 512 * 10),
  "cnn": Work(28 * 28 * 25 * 32, 14 * 14 * 25 * 32 * 64, 7 * 7 * 64 * 1024 + 1024 * 10),
  "transformer": Work(
    0, 0, LENGTH * (DEPTH * (4 + 2 * MLP_RATIO) * WIDTH**2 + VOCABULARY * WIDTH), LENGTH * DEPTH * 2 * LENGTH * WIDTH
  ),
}


@functools.cache
def images(data: str, data_dir: str | None, number: int) -> Batch:
  """Takes the first training examples, enlarged to 28x28 where they are smaller, with pixels from 0 to 1."""
  arrays = load_source(data, "train", data_dir=data_dir).arrays
  if len(arrays["label"]) < number:
    raise ValueError(f"{data} has {len(arrays['label'])} training images, not {number}; use fewer, or --data=mnist.")
  pixels = arrays["image"][:number].astype(np.float32)
  pixels = jax.image.resize(pixels / (16 if data == "digits" else 255), (number, 28, 28, 1), "linear")
  return {"image": pixels, "label": jnp.asarray(arrays["label"][:number], jnp.int32)}


def mlp512(data: str, data_dir: str | None, num_examples: int) -> Problem:
  """784-512-512-10 with ReLU on some images in chunks of 256, trained."""
  problem = noise_problems.mlp512()._replace(chunk_size=256, torch_chunk_size=256)
  return trained(problem._replace(examples=images(data, data_dir, num_examples)), SEED)


def cnn(data: str, data_dir: str | None) -> Problem:
  """Two 5x5 convolutions and two dense layers on 256 images in chunks of 64, trained."""
  return trained(noise_problems.cnn()._replace(examples=images(data, data_dir, 256)), SEED)


def transformer() -> Problem:
  return noise_problems.transformer(tied=False)


def trained(problem: Problem, seed: int) -> Problem:
  """Draws the weights anew (He et al.'s normal, biases 0) and trains them: SGD, momentum 0.9, 100 steps of one chunk each."""
  solution = _train(problem.loss_fn, problem.params, problem.examples, jax.random.key(seed), problem.chunk_size)
  return problem._replace(params=solution)


@functools.partial(jax.jit, static_argnames=("loss_fn", "chunk_size"))
def _train(loss_fn: Any, like: Params, examples: Batch, key: Key, chunk_size: int) -> Params:
  weights_key, order_key = jax.random.split(key)
  flat, unravel = ravel_pytree(like)
  normal = unravel(jax.random.normal(weights_key, flat.shape))
  params = jax.tree.map(lambda x: x * math.sqrt(2 / math.prod(x.shape[:-1])) if x.ndim > 1 else 0 * x, normal)
  optimizer = optax.sgd(0.05, momentum=0.9)

  def step(state: Any, key: Key) -> Any:
    params, moments = state
    chosen = jax.random.choice(key, len(examples["label"]), (chunk_size,), replace=False)
    batch = jax.tree.map(lambda x: x[chosen], examples)
    _, grads = mean_gradient(loss_fn, params, batch, chunk_size=chunk_size)
    updates, moments = optimizer.update(grads, moments)
    return (optax.apply_updates(params, updates), moments), None

  (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(order_key, TRAIN_STEPS))
  return params


def normal_like(problem: Problem, number: int | None = None) -> Params:
  """Draws a normal vector like the parameters, or so many of them on a leading axis."""
  flat, unravel = ravel_pytree(problem.params)
  if number is None:
    return unravel(jax.random.normal(jax.random.key(1), flat.shape))
  return jax.vmap(unravel)(jax.random.normal(jax.random.key(1), (number, flat.size)))


def flat_product(problem: Problem) -> Callable[[Array], Array]:
  """Makes the jitted product H v of vectors f32[P] (or f64[P] with a problem in float64)."""
  _, unravel = ravel_pytree(problem.params)

  @jax.jit
  def product(params: Params, examples: Batch, vector: Array) -> Array:
    tree = hessian_vector_product(problem.loss_fn, params, examples, unravel(vector), chunk_size=problem.chunk_size)
    return ravel_pytree(tree)[0]

  return functools.partial(product, problem.params, problem.examples)  # as arguments: closed over they are constants


def estimating_side(problem: Problem, estimate: Estimate) -> Side:
  """Compiles an estimate from random probes of the problem's Hessian."""

  def run(params: Params, examples: Batch, key: Key) -> tuple[Array, Array]:
    def matvec(vector: Params) -> Params:
      return hessian_vector_product(problem.loss_fn, params, examples, vector, chunk_size=problem.chunk_size)

    return estimate(matvec, params, key)

  arguments = problem.params, problem.examples, jax.random.key(SEED)
  compiled = jax.jit(run).lower(*arguments).compile()
  mebibytes = compiled.memory_analysis().temp_size_in_bytes / 2**20
  return Side(
    lambda: jax.block_until_ready(compiled(*arguments)),
    lambda found: np.asarray(found[0]),
    notes=lambda found: {"values": found[0].tolist(), "sems": found[1].tolist(), "mib": mebibytes},
  )


def moments(nodes: Array, weights: Array) -> tuple[Array, Array]:
  """Averages the mean and the mean square of densities f[R, M] over their probes: f[2], with standard errors f[2]."""
  samples = jnp.sum(weights[..., None] * jnp.stack([nodes, nodes**2], -1), axis=1)
  return mean_and_sem(samples)


def mean_and_sem(samples: Array) -> tuple[Array, Array]:
  return jnp.mean(samples, 0), jnp.std(samples, 0, ddof=1) / len(samples) ** 0.5


def in_float64(tree: Any) -> Any:
  """Copies a pytree in double precision; call it and use what it returns under `jax.enable_x64(True)`."""
  return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, jax.tree.map(np.asarray, tree))


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
  """The largest relative error of eigenvalues."""
  return float(np.max(np.abs(found - truth) / np.abs(truth)))


def compared(mine: list[Any], others: list[Any]) -> dict[str, Any]:
  """Compares Keskar's sharpness of the same solutions, as `KeskarSharpness`, by two methods."""
  maxima = [[float(result.value) for result in side] for side in (mine, others)]
  return {
    "no_lower": float(np.mean(np.asarray(maxima[0]) >= np.asarray(maxima[1]))),
    "our_maxima": maxima[0],
    "their_maxima": maxima[1],
    "our_error": max(float(result.gap) for result in mine),
    "their_error": max(float(result.gap) for result in others),
    "our_evaluations": statistics.median(int(result.num_evaluations) for result in mine),
    "their_evaluations": statistics.median(int(result.num_evaluations) for result in others),
    "loss": statistics.median(float(result.loss) for result in mine),
    "grad_norm": statistics.median(float(result.grad_norm) for result in mine),
  }
