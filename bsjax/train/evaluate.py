"""Metrics over a whole data set: sums and counts, no example dropped, none counted twice."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bsjax.data import RecordSource, Source, Spec, read_ahead
from bsjax.types import Array, Example, Metrics, ModelState, Params

EVAL_CHUNK = 1024
"""Examples evaluated at a time on a device, at most; a matter of memory, not of results."""
EVAL_BYTES = 2**28
"""The largest array that an evaluation makes of its examples, unless a single example's is larger; the same on every machine."""


class Chunked(NamedTuple):
  """A data set cut in equal chunks: arrays `[num_chunks, chunk, ...]`, weight 1 for an example and 0 for padding."""

  arrays: dict[str, Array]
  weight: Array


def chunked(arrays: Mapping[str, np.ndarray], chunk_size: int = EVAL_CHUNK, devices: int = 1) -> Chunked:
  """Cuts host arrays `[N, ...]` into the fewest equal chunks of at most `chunk_size` for each device, padding the last by zeros.

  Args:
    devices: those that share a chunk, as `spread_chunks` puts it: its size is a multiple of their number.
  """
  num_examples = len(next(iter(arrays.values())))
  num_chunks, size = _equal_chunks(num_examples, chunk_size, devices)

  def cut(array: np.ndarray) -> Any:
    padding = np.zeros((num_chunks * size - num_examples, *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding]).reshape(num_chunks, size, *array.shape[1:])

  return Chunked({name: cut(array) for name, array in arrays.items()}, cut(np.ones(num_examples, np.float32)))


def spread_chunks(mesh: Mesh) -> NamedSharding:
  """Spreads the examples of every chunk over the axis "data": each device holds and evaluates its part of a data set."""
  return NamedSharding(mesh, P(None, "data"))


def eval_chunk(
  example_metrics: Callable[[Params, ModelState, Example], Metrics],
  params: Params,
  model_state: ModelState,
  spec: Mapping[str, Spec],
) -> int:
  """Counts the examples to evaluate at a time: `EVAL_CHUNK`, or those whose largest intermediate array takes `EVAL_BYTES`.

  The metrics are traced for two and for three examples, nothing is computed: what grows between the two is one example's share (a text of
  256 tokens over 32,000 words has 33 MB of logits, so eight of them are evaluated at a time).

  Args:
    params, model_state: arrays, or their shapes.
    spec: shape and dtype of an example's arrays.
  """

  def sizes(count: int) -> list[int]:
    examples = {name: jax.ShapeDtypeStruct((count, *one.shape), one.dtype) for name, one in spec.items()}
    together = jax.vmap(example_metrics, in_axes=(None, None, 0))
    return list(_sizes_of_values(jax.make_jaxpr(together)(params, model_state, examples).jaxpr))

  largest = max(three - two for two, three in zip(sizes(2), sizes(3), strict=True))
  return min(EVAL_CHUNK, max(1, EVAL_BYTES // max(1, largest)))


def _sizes_of_values(jaxpr: Any) -> Iterator[int]:
  """Yields the bytes of all that a program computes, programs inside it included."""
  for equation in jaxpr.eqns:
    yield from (out.aval.size * out.aval.dtype.itemsize for out in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from _sizes_of_values(inner)


def evaluate(
  example_metrics: Callable[[Params, ModelState, Example], Metrics],
  params: Params,
  model_state: ModelState,
  data: Chunked,
) -> Metrics:
  """Averages `example_metrics` over a data set: sum over all examples / their number, divided once."""
  return _divide_once(jax.lax.map(functools.partial(_chunk_sums, example_metrics, params, model_state), data))


def evaluate_source(
  example_metrics: Callable[[Params, ModelState, Example], Metrics],
  params: Params,
  model_state: ModelState,
  source: Source | RecordSource,
  chunk_size: int | None = None,
) -> Metrics:
  """Averages as `evaluate`, over a split that is read ahead from the host; waits for the result.

  The chunks are those of `chunked`, one after the other through one compiled program; two are on the device at a time, the one that is
  computed and the next. Where `params` lie on a mesh with an axis "data", each chunk is spread over it and each process reads its own part.

  Args:
    chunk_size: None: `eval_chunk`, which traces the metrics anew in every call.

  Raises:
    DataError: a record that cannot be read.

  Holds: on the CPU bitwise what `evaluate` gives (a test).
  """
  if chunk_size is None:
    chunk_size = eval_chunk(example_metrics, params, model_state, source.spec)
  mesh = _mesh_of(params)
  devices = mesh.shape["data"] if mesh else 1
  processes = jax.process_count() if devices > 1 else 1
  num_chunks, size = _equal_chunks(len(source), chunk_size, devices)
  positions = np.arange(num_chunks * size).reshape(num_chunks, processes, -1)[:, jax.process_index() % processes]
  last = len(source) - 1
  # beyond the end the last example again, at weight 0
  chunks = read_ahead(
    source, lambda number: np.minimum(positions[number], last), count=num_chunks, size=positions.shape[1]
  )

  def put(array: np.ndarray) -> Array:
    if mesh is None:
      return jax.device_put(array)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), array, (size, *array.shape[1:]))

  sums: list[tuple[Metrics, Array]] = []
  for position, arrays in zip(positions, chunks, strict=True):
    weight = (position <= last).astype(np.float32)
    chunk = Chunked({name: put(array) for name, array in arrays.items()}, put(weight))
    sums.append(_jitted_chunk_sums(example_metrics, params, model_state, chunk))
    jax.block_until_ready(sums[-2:-1])
  return jax.device_get(_jitted_divide_once(jax.tree.map(lambda *values: np.stack(values), *jax.device_get(sums))))


def _mesh_of(params: Params) -> Mesh | None:
  """Finds the mesh with an axis "data" that the parameters lie on, if they lie on one."""
  shardings = (leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
  meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
  return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and "data" in mesh.shape), None)


def _equal_chunks(num_examples: int, chunk_size: int, devices: int) -> tuple[int, int]:
  """Finds the fewest chunks of at most `chunk_size` examples for each device, and their equal size."""
  num_chunks = -(-num_examples // (chunk_size * devices))
  return num_chunks, -(-num_examples // (num_chunks * devices)) * devices


def _chunk_sums(
  example_metrics: Callable[[Params, ModelState, Example], Metrics],
  params: Params,
  model_state: ModelState,
  chunk: Chunked,
) -> tuple[Metrics, Array]:
  values = jax.vmap(example_metrics, in_axes=(None, None, 0))(params, model_state, chunk.arrays)
  # where, not multiplication: a padded example may be anything, NaN included
  sums = jax.tree.map(lambda value: jnp.sum(jnp.where(chunk.weight > 0, value, 0)), values)
  return sums, jnp.sum(chunk.weight)


def _divide_once(sums: tuple[Metrics, Array]) -> Metrics:
  totals, counts = sums
  return jax.tree.map(lambda total: jnp.sum(total) / jnp.sum(counts), totals)


_jitted_chunk_sums = jax.jit(_chunk_sums, static_argnums=0)
_jitted_divide_once = jax.jit(_divide_once)
