"""What is measured of a trained state: test metrics, sharpness, gradient noise."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsjax.data import RecordSource, Source
from bsjax.probes import (
  Eigenpairs,
  GradientMoments,
  LossFn,
  eigenpairs,
  finite_moments,
  flat_row,
  gradient_moments,
  hessian_vector_product,
  minibatch_statistics,
  noise_of,
)
from bsjax.study.measure_noise import NOISE_CHUNK, check_example_loss
from bsjax.train import PROBE_STREAM, TrainState, Trial, eval_chunk, evaluate_source, examples_that_fit, stream
from bsjax.types import Array, Batch, Key, ModelState, Params
from bsjax.workloads import Workload

HESSIAN_EXAMPLES, HESSIAN_CHUNK = 10_000, 1024
"""The Hessian is that of the mean loss over the first training examples, at most so many, taken so many at a time."""
FEWEST_MINIBATCHES, MOST_MINIBATCHES, MINIBATCH_EXAMPLES = 64, 1024, 4096
"""Minibatches sampled per batch size and checkpoint: as many as hold `MINIBATCH_EXAMPLES` between these bounds. Late in training single
examples' gradients are heavy-tailed, and 64 of them say little about their variance."""
LANCZOS_STEPS, LANCZOS_TOLERANCE = 60, 1e-3


def split_metrics(workload: Workload) -> Callable[[TrainState], dict[str, Any]]:
  """Builds the row of probe "test": the metrics on the test set, which nothing else ever reads, and on the whole training set."""
  return metrics_of("test", workload, {"test": workload.test, "train": workload.train})


def metrics_of(
  probe: str, workload: Workload, splits: Mapping[str, Source | RecordSource]
) -> Callable[[TrainState], dict[str, Any]]:
  """Builds the row of a probe that measures the metrics on some splits, whose names go before those of the metrics.

  They are read ahead from the host, chunk by chunk: none needs to fit the device, or memory.
  """
  shapes = jax.eval_shape(workload.init, jax.random.key(0))
  sizes = {
    split: eval_chunk(workload.example_metrics, shapes.params, shapes.model_state, source.spec)
    for split, source in splits.items()
  }

  def measure(state: TrainState) -> dict[str, Any]:
    row: dict[str, Any] = {"probe": probe, "step": int(state.step)}
    for split, source in splits.items():
      metrics = evaluate_source(workload.example_metrics, state.params, state.model_state, source, sizes[split])
      row |= {f"{split}_{name}": value for name, value in metrics.items()}
    return row

  return measure


class Measurements:
  """The probes of one workload, with their compiled programs; calling it is the `probe` of `run_trials`.

  Batch norm: `example_loss` uses the running statistics of the state ("running"), in which a per-example gradient is
  defined and the Hessian is that of the trained function.
  """

  def __init__(self, workload: Workload, batch_sizes: tuple[int, ...]) -> None:
    check_example_loss(workload)
    self.workload, self.batch_sizes = workload, batch_sizes
    self.num_examples = examples_that_fit(workload.train)
    self._split_metrics = split_metrics(workload)
    self._moments = jax.jit(self._gradient_moments)
    self._minibatches = jax.jit(self._minibatch_statistics)
    self._top = jax.jit(self._top_eigenvalue)

  def __call__(self, trial: Trial, state: TrainState) -> list[dict[str, Any]]:
    """Makes the measurements named in `trial.config.probes` and returns their rows."""
    probes = {"test": self.test, "sharpness": self.sharpness, "noise": self.noise}
    return [row for name in trial.config.probes for row in probes[name](trial, state)]

  def test(self, trial: Trial, state: TrainState) -> Iterator[dict[str, Any]]:
    """Measures the metrics on the test set and on the whole training set."""
    del trial
    yield self._split_metrics(state)

  def sharpness(self, trial: Trial, state: TrainState) -> Iterator[dict[str, Any]]:
    """Measures the largest eigenvalue of the Hessian of the mean training loss, with its residual norm."""
    count = min(self.num_examples, HESSIAN_EXAMPLES)
    top = self._top(state, self._first_examples(count), stream(jnp.uint32(trial.seed), PROBE_STREAM))
    value, residual, num_matvecs = jax.device_get((top.values[0], top.residuals[0], top.num_matvecs))
    yield {
      "probe": "sharpness",
      "step": int(state.step),
      "sharpness": value,
      "residual": residual,
      "num_matvecs": num_matvecs,
      "num_examples": count,
    }

  def noise(self, trial: Trial, state: TrainState) -> Iterator[dict[str, Any]]:
    """Measures the gradient noise exactly over the training set, and that of sampled minibatches of every batch size below its size.

    Of a training set that does not fit the device it is that of its first `num_examples`, which every row has. Minibatches are drawn
    without replacement, as in training; which ones is a function of (seed, step). One of all examples would have no noise.
    """
    examples = self._first_examples(self.num_examples)
    moments, _ = finite_moments(functools.partial(self._moments, state.model_state), state.params, examples)
    yield {"probe": "noise", "step": int(state.step)} | flat_row(noise_of(moments))
    draw = np.random.default_rng((trial.seed, int(state.step)))
    for batch_size in self.batch_sizes:
      if batch_size >= self.num_examples:
        continue
      count = min(max(MINIBATCH_EXAMPLES // batch_size, FEWEST_MINIBATCHES), MOST_MINIBATCHES)
      indices = np.stack([draw.permutation(self.num_examples)[:batch_size] for _ in range(count)])
      deviations, cosines = jax.device_get(self._minibatches(state, examples, indices, moments.mean_grad))
      yield {
        "probe": "minibatch",
        "step": int(state.step),
        "batch_size": batch_size,
        "num_samples": count,
        "num_examples": self.num_examples,
        "variance": np.mean(deviations, dtype=np.float64),
        "variance_sem": np.std(deviations, ddof=1, dtype=np.float64) / count**0.5,
        "cosine": np.mean(cosines, dtype=np.float64),
        "cosine_sem": np.std(cosines, ddof=1, dtype=np.float64) / count**0.5,
      }

  def _first_examples(self, count: int) -> Batch:
    return {name: jnp.asarray(array) for name, array in self.workload.train.first(count).arrays.items()}

  def _loss_fn(self, model_state: ModelState) -> LossFn:
    return lambda params, example: self.workload.example_loss(params, model_state, example)

  def _gradient_moments(self, model_state: ModelState, params: Params, examples: Batch) -> GradientMoments:
    return gradient_moments(self._loss_fn(model_state), params, examples, chunk_size=NOISE_CHUNK)

  def _minibatch_statistics(
    self, state: TrainState, examples: Batch, indices: Array, mean_grad: Params
  ) -> tuple[Array, Array]:
    return minibatch_statistics(self._loss_fn(state.model_state), state.params, examples, indices, mean_grad)

  def _top_eigenvalue(self, state: TrainState, examples: Batch, key: Key) -> Eigenpairs:
    loss_fn = self._loss_fn(state.model_state)
    start = optax.tree.random_like(key, state.params, sampler=jax.random.normal)
    matvec = functools.partial(hessian_vector_product, loss_fn, state.params, examples, chunk_size=HESSIAN_CHUNK)
    return eigenpairs(matvec, start, max_matvecs=LANCZOS_STEPS, tolerance=LANCZOS_TOLERANCE)
