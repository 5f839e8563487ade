"""Metrics over a whole data set: sums and counts, no example dropped, none counted twice."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.types import Array, Example, Metrics, ModelState, Params

EVAL_CHUNK = 1024
"""Examples evaluated at a time; a matter of memory, not of results."""


class Chunked(NamedTuple):
  """A data set cut in equal chunks: arrays `[num_chunks, chunk, ...]`, weight 1 for an example and 0 for padding."""

  arrays: dict[str, Array]
  weight: Array


def chunked(arrays: Mapping[str, np.ndarray], chunk_size: int = EVAL_CHUNK) -> Chunked:
  """Cuts host arrays `[N, ...]` into the fewest equal chunks of at most `chunk_size`, padding the last by zeros."""
  num_examples = len(next(iter(arrays.values())))
  num_chunks = -(-num_examples // chunk_size)
  size = -(-num_examples // num_chunks)

  def cut(array: np.ndarray) -> Any:
    padding = np.zeros((num_chunks * size - num_examples, *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding]).reshape(num_chunks, size, *array.shape[1:])

  return Chunked({name: cut(array) for name, array in arrays.items()}, cut(np.ones(num_examples, np.float32)))


def evaluate(
  example_metrics: Callable[[Params, ModelState, Example], Metrics],
  params: Params,
  model_state: ModelState,
  data: Chunked,
) -> Metrics:
  """Averages `example_metrics` over a data set: sum over all examples / their number, divided once."""

  def chunk_sums(chunk: Chunked) -> tuple[Metrics, Array]:
    values = jax.vmap(example_metrics, in_axes=(None, None, 0))(params, model_state, chunk.arrays)
    # where, not multiplication: a padded example may be anything, NaN included
    sums = jax.tree.map(lambda value: jnp.sum(jnp.where(chunk.weight > 0, value, 0)), values)
    return sums, jnp.sum(chunk.weight)

  sums, counts = jax.lax.map(chunk_sums, data)
  return jax.tree.map(lambda total: jnp.sum(total) / jnp.sum(counts), sums)
