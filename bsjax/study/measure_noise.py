"""What is measured of the gradient noise of a trained state: in total and by layer, in other metrics, and by every route."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bsjax.probes import (
  Estimate,
  GradientMoments,
  HessianMoments,
  LossFn,
  NoiseStatistics,
  adam_metric,
  device_sq_norms,
  finite_moments,
  flat_row,
  ghost_routes,
  hessian_moments,
  hessian_noise,
  in_metric,
  microbatch_sq_norms,
  noise_by_group,
  noise_of,
  randomised_hessian_moments,
  sharded_moments,
  two_batch_noise,
)
from bsjax.probes.leaves import group_leaves
from bsjax.train import PROBE_STREAM, TrainState, Trial, examples_that_fit, stream
from bsjax.types import Array, Batch, Key, ModelState, Params
from bsjax.workloads import Workload, num_params

NOISE_CHUNK = 256
"""Examples per pass of the ghost route."""
MOST_GRADIENT_NUMBERS = 4e9
"""The exact route forms every per-example gradient, N P numbers; above this the routes are compared on the first examples alone."""
CHUNK_NUMBERS = 4e6
"""Numbers of per-example gradients held at once on the exact route."""
EXACT_HESSIAN_FLOPS = 2e9
"""The exact Hessian form costs about 12 P N^2 FLOP; above this it is randomised."""
HESSIAN_PROBES = 32
ROUTE_BATCHES, ROUTE_MICROBATCHES = 64, 8
"""The sampled routes average over so many batches at fixed parameters, each cut in so many microbatches."""
ROUTE_BATCH = 64
TRAINING_MODE_MESSAGE = (
  "workload {name!r} evaluates with batch_norm={batch_norm!r}: the loss of an example then depends on the others in its batch, and has no "
  "gradient of its own; use batch_norm='running', which evaluates with the running averages"
)


def check_example_loss(workload: Workload) -> None:
  """Refuses a workload whose loss of one example is not defined.

  Raises:
    ValueError: batch norm in training mode.
  """
  if workload.batch_norm not in ("none", "running"):
    raise ValueError(TRAINING_MODE_MESSAGE.format(name=workload.name, batch_norm=workload.batch_norm))


def route_population(workload: Workload) -> int:
  """Counts the training examples on which the routes are compared: all that fit, or the first as `MOST_GRADIENT_NUMBERS` allows."""
  return int(min(examples_that_fit(workload.train), max(ROUTE_BATCH, MOST_GRADIENT_NUMBERS // num_params(workload))))


class NoiseMeasurements:
  """The noise probes of one workload, with their compiled programs; calling it is the `probe` of `run_trials`.

  Batch norm: `example_loss` uses the running statistics of the state. "The whole training set" of one that does not fit the device is
  its first examples (`examples_that_fit`); every row has their number, `num_examples`.
  """

  def __init__(self, workload: Workload, mesh: Mesh) -> None:
    check_example_loss(workload)
    self.workload, self.mesh = workload, mesh
    self.num_examples, size = examples_that_fit(workload.train), num_params(workload)
    first = workload.train.first(self.num_examples)
    self.examples: Batch = {name: jnp.asarray(array) for name, array in first.arrays.items()}
    self._forms: dict[str, str] = {}
    self.exact_hessian = 12 * size * self.num_examples**2 <= EXACT_HESSIAN_FLOPS
    self.exact_chunk = int(max(8, min(512, CHUNK_NUMBERS // size)))
    self._ghost = jax.jit(functools.partial(self._moments, route="ghost", chunk_size=NOISE_CHUNK))
    self._exact = jax.jit(functools.partial(self._moments, route="exact", chunk_size=self.exact_chunk))
    self._adam = jax.jit(self._adam_moments)
    self._hessian = jax.jit(self._hessian_moments)
    self._microbatches = jax.jit(functools.partial(self._sq_norms, route="microbatch"))
    self._devices = jax.jit(functools.partial(self._sq_norms, route="device"))

  def __call__(self, trial: Trial, state: TrainState) -> list[dict[str, Any]]:
    """Makes the measurements named in `trial.config.probes` and returns their rows."""
    probes = {
      "noise": self.noise,
      "hessian_noise": self.hessian_noise,
      "adam_noise": self.adam_noise,
      "routes": self.routes,
    }
    step = int(state.step)
    return [
      {"probe": row.pop("probe", name), "step": step, **row}
      for name in trial.config.probes
      for row in probes[name](trial, state)
    ]

  def noise(self, trial: Trial, state: TrainState) -> Iterator[dict[str, Any]]:
    """Measures the noise of all parameters ("all") and of each layer, over the whole training set; `norms_by` says how a layer's
    per-example norms were taken."""
    del trial
    moments, nonfinite = finite_moments(functools.partial(self._ghost, state.model_state), state.params, self.examples)
    bad = {"num_nonfinite": len(nonfinite), "first_nonfinite": nonfinite[0] if nonfinite else None}
    yield {"group": "all"} | flat_row(noise_of(moments)) | bad
    if not self._forms:
      routes = ghost_routes(self._loss_fn(state.model_state), state.params, self.examples)
      layers = group_leaves(routes).items()
      self._forms = {layer: ", ".join(dict.fromkeys(routes[leaf] for leaf in leaves)) for layer, leaves in layers}
    for layer, statistics in noise_by_group(moments).items():
      yield {"group": layer} | flat_row(statistics) | bad | {"norms_by": self._forms[layer]}

  def hessian_noise(self, trial: Trial, state: TrainState) -> Iterator[dict[str, Any]]:
    """Measures the noise scale in the metric of the Hessian, over the whole training set."""
    key = jax.random.fold_in(stream(jnp.uint32(trial.seed), PROBE_STREAM), state.step)
    found = hessian_noise(jax.device_get(self._hessian(state, self.examples, key)))
    yield {
      "route": "exact" if self.exact_hessian else "randomised",
      "num_examples": self.num_examples,
      "num_probes": self.num_examples if self.exact_hessian else HESSIAN_PROBES,
      **_with_interval("hessian_noise_scale", found.noise_scale),
      "hessian_dataset_noise_scale": found.dataset_noise_scale,
      **_with_interval("hessian_cov_trace", found.cov_trace),
      "grad_curvature": found.curvature,
      "max_learning_rate": found.max_learning_rate,
      "verdict": found.noise_scale.verdict,
    }

  def adam_noise(self, trial: Trial, state: TrainState) -> Iterator[dict[str, Any]]:
    """Measures the noise scale in the metric of Adam's preconditioner; nothing where the optimizer keeps no second moment."""
    del trial
    second_moment = optax.tree.get(state.opt_state, "nu", None)
    if second_moment is None or int(state.step) == 0:
      return
    found = noise_of(jax.device_get(self._adam(state, self.examples, second_moment))).noise_scale
    yield {"num_examples": self.num_examples, **_with_interval("adam_noise_scale", found), "verdict": found.verdict}

  def routes(self, trial: Trial, state: TrainState) -> Iterator[dict[str, Any]]:
    """Measures the same noise by every route, on the same examples.

    "exact" and "ghost" are exact for these examples, so their standard errors are 0; the sampled routes draw batches from them, without
    replacement within a batch; which ones is a function of (seed, step). "device" needs a mesh with several devices on "data".
    """
    count = route_population(self.workload)
    examples = {name: array[:count] for name, array in self.examples.items()}
    for route, measure in (("exact", self._exact), ("ghost", self._ghost)):
      statistics = noise_of(jax.device_get(measure(state.model_state, state.params, examples)))
      yield {"probe": "route", "route": route, **_exact_route_row(statistics)}
    batch_size = min(ROUTE_BATCH, count // ROUTE_MICROBATCHES * ROUTE_MICROBATCHES)
    draw = np.random.default_rng((trial.seed, int(state.step)))
    indices = np.stack([draw.permutation(count)[:batch_size] for _ in range(ROUTE_BATCHES)])
    sampled = [("microbatch", self._microbatches, ROUTE_MICROBATCHES)]
    if self.mesh.shape["data"] > 1 and batch_size % self.mesh.shape["data"] == 0:
      sampled.append(("device", self._devices, self.mesh.shape["data"]))
    for route, measure_norms, parts in sampled:
      small, big = jax.device_get(measure_norms(state, examples, indices))
      found = two_batch_noise(small, big, microbatch_size=batch_size // parts, batch_size=batch_size)
      yield {
        "probe": "route",
        "route": route,
        "num_examples": count,
        "grad_cov_trace": found.grad_cov_trace,
        "grad_cov_trace_sem": found.grad_cov_trace_sem,
        "grad_sq_norm": found.grad_sq_norm,
        "grad_sq_norm_sem": found.grad_sq_norm_sem,
        **_with_interval("noise_scale", found.noise_scale),
        "verdict": found.noise_scale.verdict,
      }

  def _loss_fn(self, model_state: ModelState) -> LossFn:
    return lambda params, example: self.workload.example_loss(params, model_state, example)

  def _moments(
    self, model_state: ModelState, params: Params, examples: Batch, *, route: Any, chunk_size: int
  ) -> GradientMoments:
    loss_fn = self._loss_fn(model_state)
    return sharded_moments(loss_fn, params, examples, mesh=self.mesh, chunk_size=chunk_size, route=route)

  def _adam_moments(self, state: TrainState, examples: Batch, second_moment: Params) -> GradientMoments:
    loss_fn, coordinates = in_metric(self._loss_fn(state.model_state), state.params, adam_metric(second_moment))
    return sharded_moments(loss_fn, coordinates, examples, mesh=self.mesh, chunk_size=NOISE_CHUNK)

  def _hessian_moments(self, state: TrainState, examples: Batch, key: Key) -> HessianMoments:
    loss_fn = self._loss_fn(state.model_state)
    if self.exact_hessian:
      return hessian_moments(loss_fn, state.params, examples, chunk_size=NOISE_CHUNK)
    return randomised_hessian_moments(
      loss_fn, state.params, examples, key, num_probes=HESSIAN_PROBES, chunk_size=NOISE_CHUNK
    )

  def _sq_norms(self, state: TrainState, examples: Batch, indices: Array, *, route: str) -> tuple[Array, Array]:
    loss_fn = self._loss_fn(state.model_state)

    def one(index: Array) -> tuple[Array, Array]:
      batch = jax.tree.map(lambda x: jnp.take(x, index, axis=0), examples)
      if route == "microbatch":
        small, big, _ = microbatch_sq_norms(loss_fn, state.params, batch, num_microbatches=ROUTE_MICROBATCHES)
      else:
        small, big, _ = device_sq_norms(loss_fn, state.params, batch, mesh=self.mesh)
      return small, big

    return jax.lax.map(one, indices)


def _with_interval(name: str, estimate: Estimate) -> dict[str, Any]:
  return {name: estimate.value, f"{name}_ci_low": estimate.ci_low, f"{name}_ci_high": estimate.ci_high}


def _exact_route_row(statistics: NoiseStatistics) -> dict[str, Any]:
  return {
    "num_examples": statistics.noise_scale.n_examples,
    "grad_cov_trace": statistics.grad_cov_trace.value,
    "grad_cov_trace_sem": 0.0,
    "grad_sq_norm": statistics.grad_sq_norm.value,
    "grad_sq_norm_sem": 0.0,
    **_with_interval("noise_scale", statistics.noise_scale),
    "verdict": statistics.noise_scale.verdict,
  }
