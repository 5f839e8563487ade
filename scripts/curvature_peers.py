"""The opponents of scripts/bench_curvature.py for eigenvalues, densities and traces: SciPy and matfree
on our product, curvlinops and PyHessian on PyTorch's.

What is not in requirements.txt is imported inside functions, so that the benchmark runs without it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from bsjax.probes.spectrum import Matvec
from bsjax.types import Array, Key, Params
from scripts.curvature_problems import (
  ACCURACY,
  Estimate,
  Side,
  flat_product,
  mean_and_sem,
  moments,
  normal_like,
  relative_error,
)
from scripts.noise_peers import torch_network
from scripts.noise_problems import SEED, Problem

MAX_STEPS = 100
"""Lanczos steps that matfree may need."""
PYHESSIAN_ITERATIONS = 1000
"""Power iterations per eigenvalue; its default of 100 ends before the values are accurate to 1e-4."""

Pairs = tuple[np.ndarray, np.ndarray]
"""Eigenvalues f[K] and vectors f[P, K], in any order."""


def largest_first(pairs: Pairs) -> Pairs:
  order = np.argsort(pairs[0])[::-1]
  return np.asarray(pairs[0])[order], np.asarray(pairs[1])[:, order]


def pairs_side(
  call: Callable[[], Pairs], product: Callable[[np.ndarray], np.ndarray], notes: Callable[[Any], dict[str, Any]]
) -> Side:
  """Makes a side of a function that finds eigenpairs, and of the product that it used."""

  def residuals(pairs: Pairs) -> np.ndarray:
    values, vectors = largest_first(pairs)
    norms = [
      np.linalg.norm(product(vector) - value * vector) / np.linalg.norm(vector)
      for value, vector in zip(values, vectors.T, strict=True)
    ]
    return np.asarray(norms) / np.abs(values)

  return Side(call, lambda pairs: largest_first(pairs)[0], residuals, notes)


def eigsh_side(product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, num_top: int, tolerance: float) -> Side:
  """ARPACK's restarted Lanczos by SciPy."""
  count = 0

  def counted(vector: np.ndarray) -> np.ndarray:
    nonlocal count
    count += 1
    return product(vector.reshape(-1))

  operator = LinearOperator((start.size,) * 2, matvec=counted, dtype=start.dtype)

  def call() -> Pairs:
    nonlocal count
    count = 0
    try:
      return eigsh(operator, k=num_top, which="LA", v0=start, tol=tolerance)
    except ArpackNoConvergence as failure:  # too tight for float32: it has to do with what it has
      found = failure.eigenvalues
      missing = num_top - len(found)
      return np.append(found, [np.nan] * missing), np.pad(failure.eigenvectors, ((0, 0), (0, missing)))

  return pairs_side(call, product, lambda _: {"their_tolerance": tolerance, "their_matvecs": count})


def scipy_side(problem: Problem, num_top: int, tolerance: float) -> Side:
  jitted = flat_product(problem)
  start = np.asarray(ravel_pytree(normal_like(problem))[0])
  return eigsh_side(lambda vector: np.asarray(jitted(vector)), start, num_top, tolerance)


def matfree_side(problem: Problem, num_top: int, truth: np.ndarray) -> Side:
  """matfree's Lanczos, which wants the number of steps beforehand: here the smallest that suffices, found by a longer run."""
  from matfree import decomp

  product = flat_product(problem)
  start = ravel_pytree(normal_like(problem))[0]
  data = problem.params, problem.examples

  def multiply(vector: jax.Array, params: Any, examples: Any) -> jax.Array:
    return flat_product(problem._replace(params=params, examples=examples))(vector)

  def decompose(num_steps: int) -> Callable[..., Any]:
    def run(start: jax.Array, params: Any, examples: Any) -> Any:
      found = decomp.tridiag_sym(num_steps)(multiply, start, params, examples)
      values, weights = jnp.linalg.eigh(found.J_small)
      return values[-num_top:], weights[:, -num_top:].T @ found.Q_tall, found.J_small

    return jax.jit(run).lower(start, *data).compile()

  matrix = np.asarray(decompose(MAX_STEPS)(start, *data)[2], np.float64)
  num_steps = next(
    (
      size
      for size in range(num_top, MAX_STEPS)
      if relative_error(np.linalg.eigvalsh(matrix[:size, :size])[::-1][:num_top], truth) <= ACCURACY
    ),
    MAX_STEPS,
  )
  compiled = decompose(num_steps)

  def call() -> Pairs:
    values, vectors, _ = jax.block_until_ready(compiled(start, *data))
    return np.asarray(values), np.asarray(vectors).T

  return pairs_side(call, lambda vector: np.asarray(product(vector)), lambda _: {"their_matvecs": num_steps})


def matfree_density(num_probes: int, num_matvecs: int) -> Estimate:
  """matfree's Lanczos from one random vector after the other, each from the signs that ours takes."""
  from matfree import decomp, stochtrace

  def estimate(matvec: Matvec, like: Params, key: Key) -> tuple[Array, Array]:
    flat, unravel = ravel_pytree(like)
    draw = stochtrace.sampler_signs(flat, num=1)

    def multiply(vector: Array) -> Array:
      return ravel_pytree(matvec(unravel(vector)))[0]

    def of_probe(key: Key) -> tuple[Array, Array]:
      matrix = decomp.tridiag_sym(num_matvecs, custom_vjp=False)(multiply, draw(key)[0]).J_small
      nodes, vectors = jnp.linalg.eigh(matrix)
      return nodes, vectors[0] ** 2

    return moments(*jax.lax.map(of_probe, jax.random.split(key, num_probes)))

  return estimate


def matfree_trace(num_probes: int) -> Estimate:
  """matfree's estimator as it is: all probes at once."""
  from matfree import stochtrace

  def estimate(matvec: Matvec, like: Params, key: Key) -> tuple[Array, Array]:
    draw = stochtrace.sampler_signs(like, num=num_probes)
    value, sem = stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace(), draw)(matvec, key)
    return value[None], sem[None]

  return estimate


def matfree_map_trace(num_probes: int) -> Estimate:
  """The parts of matfree's estimator in a loop: one probe after the other."""
  from matfree import stochtrace

  def estimate(matvec: Matvec, like: Params, key: Key) -> tuple[Array, Array]:
    draw, integrand = stochtrace.sampler_signs(like, num=1), stochtrace.monte_carlo_trace()

    def of_probe(key: Key) -> Array:
      return integrand(matvec, jax.tree.map(lambda x: x[0], draw(key)))[None]

    return mean_and_sem(jax.lax.map(of_probe, jax.random.split(key, num_probes)))

  return estimate


def torch_chunks(problem: Problem) -> tuple[Any, list[tuple[Any, Any]]]:
  """Builds the network in PyTorch, and the data in the same chunks."""
  import torch

  network, _, inputs = torch_network(problem)
  labels = torch.tensor(np.asarray(problem.examples["label"])).long()
  size = problem.torch_chunk_size
  return network, list(zip(inputs.split(size), labels.split(size), strict=True))


def curvlinops_side(problem: Problem, num_top: int, tolerance: float) -> Side:
  """curvlinops' Hessian as an operator for SciPy's eigsh, as its documentation does it."""
  import torch
  from curvlinops import HessianLinearOperator

  network, chunks = torch_chunks(problem)
  parameters = list(network.parameters())
  hessian = HessianLinearOperator(
    network,
    torch.nn.CrossEntropyLoss(),
    parameters,
    chunks,
    num_data=len(problem.examples["label"]),
    check_deterministic=False,
  ).to_scipy()
  start = np.asarray(ravel_pytree(normal_like(problem))[0])
  return eigsh_side(lambda vector: hessian @ vector, start, num_top, tolerance)


def pyhessian_side(problem: Problem, num_top: int, tolerance: float) -> Side:
  """PyHessian's power iteration, one eigenvalue after the other."""
  import pyhessian
  import torch

  network, chunks = torch_chunks(problem)
  hessian = pyhessian.hessian(network, torch.nn.CrossEntropyLoss(), dataloader=chunks, cuda=False)
  count = 0
  multiply = hessian.dataloader_hv_product

  def counted(vector: list[Any]) -> Any:
    nonlocal count
    count += 1
    return multiply(vector)

  hessian.dataloader_hv_product = counted

  def flat(vector: list[Any]) -> np.ndarray:
    return torch.cat([part.reshape(-1) for part in vector]).detach().numpy()

  def product(vector: np.ndarray) -> np.ndarray:
    parts = torch.tensor(vector).split([p.numel() for p in hessian.params])
    return flat(multiply([part.reshape(p.shape) for part, p in zip(parts, hessian.params, strict=True)])[1])

  def call() -> Pairs:
    nonlocal count
    count = 0
    torch.manual_seed(SEED)
    values, vectors = hessian.eigenvalues(maxIter=PYHESSIAN_ITERATIONS, tol=tolerance, top_n=num_top)
    return np.asarray(values), np.stack([flat(vector) for vector in vectors], axis=1)

  return pairs_side(call, product, lambda _: {"their_tolerance": tolerance, "their_matvecs": count})


def loosest(make: Callable[[float], Side], tolerances: tuple[float, ...], truth: np.ndarray) -> Side:
  """Finds the loosest tolerance at which a side is accurate enough; else the tightest, whose error the row shows."""
  for tolerance in tolerances:
    side = make(tolerance)
    if relative_error(side.read(side.call()), truth) <= ACCURACY:
      break
  return side
