"""The flatness measures of one workload as compiled programs: names, constants, and which data and statistics a measure sees."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bsjax.probes import (
  LossFn,
  average_sharpness,
  batch_sharpness,
  eigenpairs,
  fisher_vector_product,
  gauss_newton_vector_product,
  gradient_curvature,
  hessian_vector_product,
  hutchinson_trace,
  keskar_sharpness,
  layer_loss,
  mean_gradient,
  over_mesh,
  preconditioned,
  sam_sharpness,
  spectral_quadrature,
)
from bsjax.probes.chunks import count_examples
from bsjax.study.preconditioner import PRECONDITIONED, preconditioner_scale
from bsjax.study.sharp_plan import SharpPlan, Statistics
from bsjax.train import TrainState
from bsjax.types import Array, Batch, Hparams, Key, ModelState, Params
from bsjax.workloads import Workload

CHUNK = 1024
"""Examples per pass of a probe."""
GROUP_SIZES = {"batch": 5000, "ghost": 32}
"""Examples that batch-norm statistics are taken over: as Keskar et al.'s code evaluates, and Goyal et al.'s (2017) per worker."""
MAX_MATVECS, TOLERANCE = 60, 1e-3
DEFLATED = 5
"""Top eigenpairs that steady the estimate of the trace."""
TRACE_PROBES, DENSITY_PROBES, DENSITY_MATVECS = 24, 6, 48
LAYER_MATVECS, LAYER_PROBES = 40, 12
"""A network has many layers: each is looked at with fewer products."""
KESKAR_STEPS, SUBSPACE_DIM, SUBSPACE_RESTARTS = 10, 100, 1
"""In a subspace the box has local maxima; in the full space one start found higher maxima than L-BFGS-B in every case of
docs/bench_curvature.md."""
KESKAR_EPS = {"1e-3": 1e-3, "5e-4": 5e-4}
SAM_RADIUS, ADAPTIVE_SAM_RADIUS = 0.05, 0.5
"""The defaults of Foret et al. (2021) and of Kwon et al. (2021)."""
AVERAGE_STD, ADAPTIVE_AVERAGE_STD, AVERAGE_DRAWS = 0.01, 0.05, 16
BATCH_EXAMPLES, FEWEST_BATCHES, MOST_BATCHES = 8192, 16, 256
"""Minibatches for the batch sharpness: as many as hold `BATCH_EXAMPLES` between these bounds."""
NO_ERROR = math.nan
RESIDUAL, SEM = "residual", "sem"
"""Kinds of error: how far an approximate eigenpair is from one; the standard error of a random estimate."""


def group_size(num_examples: int, most: int) -> int:
  """Chooses how many examples share batch statistics: all, if at most `most`; else a divisor of at least half of `most`, or `most` itself.

  Every group is then whole, at the price of a remainder left out where there is no such divisor.

  >>> group_size(10_000, 32), group_size(1024, 5000), group_size(9_973, 32)
  (25, 1024, 32)
  """
  most = min(most, num_examples)
  return next((size for size in range(most, (most - 1) // 2, -1) if num_examples % size == 0), most)


class View(NamedTuple):
  """A data set as a measure sees it: with batch statistics it is grouped, and one "example" is a whole group."""

  loss_fn: Callable[[ModelState], LossFn]
  examples: Batch
  chunk_size: int
  num_examples: int
  grouped: bool


def make_view(workload: Workload, statistics: Statistics, num_examples: int, group: int | None = None) -> View:
  """Takes the first training examples, one by one for running statistics and in groups for batch statistics.

  Args:
    group: examples that share batch statistics; `GROUP_SIZES` where not given.
  """
  grouped = statistics != "running" and workload.batch_norm != "none"
  size = group_size(num_examples, group or GROUP_SIZES[statistics]) if grouped else 1
  num_examples -= num_examples % size
  examples = {name: jnp.asarray(array) for name, array in workload.train.first(num_examples).arrays.items()}
  if not grouped:

    def example_loss(model_state: ModelState) -> LossFn:
      return lambda params, example: workload.example_loss(params, model_state, example)

    return View(example_loss, examples, CHUNK, num_examples, grouped=False)
  groups = {name: array.reshape(-1, size, *array.shape[1:]) for name, array in examples.items()}

  def group_loss(model_state: ModelState) -> LossFn:
    return lambda params, group: workload.train_loss(params, model_state, group, jax.random.key(0))[0]

  return View(group_loss, groups, max(1, CHUNK // size), num_examples, grouped=True)


Found = tuple[Any, Any]
"""A value, and how far off it may be; NaN where nothing is stated."""


class At(NamedTuple):
  """Where a measure is made: the traced arguments of a program, and what it is compiled for."""

  view: View
  workload: Workload
  mesh: Mesh
  optimizer: str
  minibatch_size: int
  state: TrainState
  examples: Batch
  key: Key
  hparams: Hparams

  @property
  def loss_fn(self) -> LossFn:
    return self.view.loss_fn(self.state.model_state)

  @property
  def data(self) -> dict[str, Any]:
    """The arguments that every sharpness measure begins with."""
    return {"loss_fn": self.loss_fn, "params": self.state.params, "examples": self.examples}

  def over_data(self, product: Callable[..., Params], *functions: Callable[..., Array]) -> Callable[[Params], Params]:
    """Returns a product of a curvature matrix with a vector, spread over the mesh."""
    mean_fn = over_mesh(functools.partial(product, *functions, chunk_size=self.view.chunk_size), self.mesh)
    return lambda vector: mean_fn(self.state.params, self.examples, vector)

  def hessian(self) -> Callable[[Params], Params]:
    return self.over_data(hessian_vector_product, self.loss_fn)

  def start(self) -> Params:
    return optax.tree.random_like(self.key, self.state.params, sampler=jax.random.normal)


def _top(at: At, matvec: Callable[[Params], Params]) -> Found:
  found = eigenpairs(matvec, at.start(), max_matvecs=MAX_MATVECS, tolerance=TOLERANCE)
  return found.values[0], found.residuals[0]


def _hessian(at: At) -> dict[str, Found]:
  """Finds both ends of the spectrum in one Krylov space, and the trace with the help of the top eigenpairs."""
  num_params = count_parameters(at.state.params)
  num_top = min(DEFLATED, num_params - 1)
  pairs = eigenpairs(
    at.hessian(),
    at.start(),
    num_top=num_top,
    num_bottom=1,
    max_matvecs=min(MAX_MATVECS, num_params + 1),
    tolerance=TOLERANCE,
  )
  trace = hutchinson_trace(at.hessian(), at.state.params, at.key, num_probes=TRACE_PROBES, deflate=pairs)
  return {
    "top_eigenvalue": (pairs.values[0], pairs.residuals[0]),
    "bottom_eigenvalue": (pairs.values[-1], pairs.residuals[-1]),
    "trace": (trace.value, trace.sem),
  }


def _gauss_newton(at: At) -> dict[str, Found]:
  outputs_fn, output_loss = at.workload.example_outputs, at.workload.output_loss
  assert outputs_fn is not None
  assert output_loss is not None
  model_state = at.state.model_state

  def outputs(params: Params, example: Batch) -> Array:
    return outputs_fn(params, model_state, example)

  return {"gauss_newton_top": _top(at, at.over_data(gauss_newton_vector_product, outputs, output_loss))}


def _fisher(at: At) -> dict[str, Found]:
  return {"fisher_top": _top(at, at.over_data(fisher_vector_product, at.loss_fn))}


def _preconditioned(at: At) -> dict[str, Found]:
  _, mean_grad = mean_gradient(**at.data, chunk_size=at.view.chunk_size)
  scale = preconditioner_scale(at.optimizer, at.hparams, at.state, mean_grad)
  return {"preconditioned_top": _top(at, preconditioned(at.hessian(), scale))}


def _keskar(at: At, subspace: bool) -> dict[str, Found]:
  """Looks for the highest loss in boxes of both sizes: in the same subspace, from the same starts, at every solution."""
  dim = min(SUBSPACE_DIM, count_parameters(at.state.params)) if subspace else None

  def of_size(eps: Array) -> Array:
    key = jax.random.key(0)
    found = keskar_sharpness(
      **at.data,
      key=key,
      eps=eps,
      subspace_dim=dim,
      num_steps=KESKAR_STEPS,
      num_restarts=SUBSPACE_RESTARTS if subspace else 0,
      chunk_size=at.view.chunk_size,
    )
    return found.value

  values = jax.lax.map(of_size, jnp.array(list(KESKAR_EPS.values())))
  name = "keskar_subspace" if subspace else "keskar"
  return {f"{name}_{eps}": (value, NO_ERROR) for eps, value in zip(KESKAR_EPS, values, strict=True)}


def _sam(at: At, name: str, radius: float, adaptive: bool) -> dict[str, Found]:
  found = sam_sharpness(**at.data, key=at.key, radius=radius, adaptive=adaptive, chunk_size=at.view.chunk_size)
  return {name: (found.value, NO_ERROR)}


def _average(at: At, name: str, radius: float, adaptive: bool) -> dict[str, Found]:
  found = average_sharpness(
    **at.data, key=at.key, radius=radius, adaptive=adaptive, num_draws=AVERAGE_DRAWS, chunk_size=at.view.chunk_size
  )
  return {name: (found.value, found.sem)}


def _batch_sharpness(at: At) -> dict[str, Found]:
  """Draws minibatches; where examples are groups that share statistics, each is a minibatch already."""
  num_examples = count_examples(at.examples)
  size = 1 if at.view.grouped else min(at.minibatch_size, num_examples)
  count = min(max(BATCH_EXAMPLES // at.minibatch_size, FEWEST_BATCHES), MOST_BATCHES)

  def draw(key: Key) -> Array:
    return jax.random.permutation(key, num_examples)[:size]

  indices = jax.lax.map(draw, jax.random.split(at.key, count))
  found = batch_sharpness(**at.data, indices=indices, chunk_size=at.view.chunk_size)
  return {"batch_sharpness": (found.value, found.sem)}


def _gradient_curvature(at: At) -> dict[str, Found]:
  found = gradient_curvature(**at.data, chunk_size=at.view.chunk_size)
  return {"gradient_curvature": (found.value, NO_ERROR)}


def gradient(at: At) -> tuple[Array, Array]:
  """Measures the mean loss and the norm of its gradient."""
  loss, grad = mean_gradient(**at.data, chunk_size=at.view.chunk_size)
  return loss, optax.tree.norm(grad)


def layer_block(at: At, layer: str) -> tuple[Array, Array, Array, Array]:
  """Measures a layer's diagonal block of the Hessian: largest eigenvalue with its residual, trace with its standard error."""
  loss_fn, params = layer_loss(at.loss_fn, at.state.params, layer)
  product = functools.partial(hessian_vector_product, loss_fn, chunk_size=at.view.chunk_size)
  matvec = functools.partial(over_mesh(product, at.mesh), params, at.examples)
  start = optax.tree.random_like(at.key, params, sampler=jax.random.normal)
  pairs = eigenpairs(matvec, start, max_matvecs=LAYER_MATVECS, tolerance=TOLERANCE)
  trace = hutchinson_trace(matvec, params, at.key, num_probes=LAYER_PROBES, deflate=pairs)
  return pairs.values[0], pairs.residuals[0], trace.value, trace.sem


def spectral_nodes(at: At) -> tuple[Array, Array]:
  """Returns the nodes and weights of the spectral density, f32[DENSITY_PROBES, M] each."""
  num_matvecs = min(DENSITY_MATVECS, count_parameters(at.state.params))
  return spectral_quadrature(at.hessian(), at.state.params, at.key, num_probes=DENSITY_PROBES, num_matvecs=num_matvecs)


def count_parameters(params: Params) -> int:
  """Counts the numbers of a pytree, P."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


PROGRAMS: dict[str, Callable[[At], dict[str, Found]]] = {
  "hessian": _hessian,
  "hessian_top": lambda at: {"top_eigenvalue": _top(at, at.hessian())},
  "gauss_newton": _gauss_newton,
  "fisher": _fisher,
  "preconditioned": _preconditioned,
  "keskar": functools.partial(_keskar, subspace=False),
  "keskar_subspace": functools.partial(_keskar, subspace=True),
  "sam": functools.partial(_sam, name="sam", radius=SAM_RADIUS, adaptive=False),
  "adaptive_sam": functools.partial(_sam, name="adaptive_sam", radius=ADAPTIVE_SAM_RADIUS, adaptive=True),
  "batch_sharpness": _batch_sharpness,
  "gradient_curvature": _gradient_curvature,
  "average": functools.partial(_average, name="average", radius=AVERAGE_STD, adaptive=False),
  "adaptive_average": functools.partial(_average, name="adaptive_average", radius=ADAPTIVE_AVERAGE_STD, adaptive=True),
}
"""What is compiled and run as one, and finds one measure or several of `ERROR_KINDS`."""
ERROR_KINDS: dict[str, str | None] = {
  "top_eigenvalue": RESIDUAL,
  "bottom_eigenvalue": RESIDUAL,
  "trace": SEM,
  "gauss_newton_top": RESIDUAL,
  "fisher_top": RESIDUAL,
  "preconditioned_top": RESIDUAL,
  "keskar_1e-3": None,
  "keskar_5e-4": None,
  "keskar_subspace_1e-3": None,
  "keskar_subspace_5e-4": None,
  "sam": None,
  "adaptive_sam": None,
  "batch_sharpness": SEM,
  "gradient_curvature": None,
  "average": SEM,
  "adaptive_average": SEM,
}
"""Every measure, in the order of the report, and what kind of error it states: those that are lower bounds state none."""


def program_names(workload: Workload, plan: SharpPlan) -> tuple[str, ...]:
  """Names the programs that are defined for a workload, an optimizer and batch-norm statistics."""
  missing = {"hessian_top"}  # contained in "hessian"
  if plan.optimizer not in PRECONDITIONED:
    missing.add("preconditioned")
  if workload.example_outputs is None or plan.statistics != "running":
    missing.add("gauss_newton")
  if plan.statistics != "running":
    missing.add("fisher")  # batch statistics leave a single example without a gradient
  return tuple(name for name in PROGRAMS if name not in missing)
