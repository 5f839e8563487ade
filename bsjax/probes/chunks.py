"""Sums over a data set that is too large for one pass."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Tree = TypeVar("Tree")


def sum_over_chunks(chunk_fn: Callable[[Any], Tree], examples: Any, *, chunk_size: int) -> Tree:
  """Add up `chunk_fn(chunk)` over consecutive chunks of the examples.

  Args:
    chunk_fn: maps a chunk of any length to a pytree of sums over its examples.
    examples: a pytree with leading axis N.
    chunk_size: examples per chunk, static: memory grows with it.

  Returns:
    The sum over all N examples.

  Raises:
    ValueError: `chunk_size` is not positive, or the leading axes disagree.

  Holds: every example counts once. Where N is not a multiple of `chunk_size` the remainder is a shorter chunk of its
  own, compiled beside the loop. The data are sliced in place, not copied.
  """
  return scan_over_chunks(lambda chunk: (chunk_fn(chunk), ()), examples, chunk_size=chunk_size)[0]


def scan_over_chunks(
  chunk_fn: Callable[[Any], tuple[Tree, Any]], examples: Any, *, chunk_size: int
) -> tuple[Tree, Any]:
  """Add up the first result of `chunk_fn(chunk)` over consecutive chunks, and string the second together.

  As `sum_over_chunks`, with a second pytree of one entry per example, `[chunk, ...]`, returned as `[N, ...]`.
  """
  if chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
  num_examples = count_examples(examples)
  if num_examples <= chunk_size:
    return chunk_fn(examples)
  num_full, remainder = divmod(num_examples, chunk_size)

  def at(start, size):
    return chunk_fn(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), examples))

  def add_chunk(total, index):
    sums, each = at(index * chunk_size, chunk_size)
    return optax.tree.add(total, sums), each

  if remainder:
    start, last = at(num_full * chunk_size, remainder)
  else:
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: at(0, chunk_size)[0]))
  total, stacked = jax.lax.scan(add_chunk, start, jnp.arange(num_full))
  each = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)
  if remainder:
    each = jax.tree.map(lambda most, rest: jnp.concatenate([most, rest]), each, last)
  return total, each


def count_examples(examples: Any) -> int:
  """Read N off the leading axes, which must agree."""
  lengths = {x.shape[0] for x in jax.tree.leaves(examples)}
  if len(lengths) != 1 or lengths == {0}:
    raise ValueError(f"examples have leading axes {sorted(lengths)}; wanted one common, positive length.")
  return lengths.pop()


def over_mesh(mean_fn: Callable[..., Tree], mesh: Mesh) -> Callable[..., Tree]:
  """Spread a mean over examples across the mesh axis "data": every device takes its own, and one all-reduce averages.

  Args:
    mean_fn: `(params, examples, *rest) -> tree`, a mean over the examples, such as
      `functools.partial(hessian_vector_product, loss_fn, chunk_size=...)`.

  Returns:
    The same function of the same arguments. On one device it is `mean_fn` itself. The number of examples must be a multiple of
    the devices on "data": where it is not, all the work is done on every device.
  """
  devices = mesh.shape["data"]
  if devices == 1:
    return mean_fn

  def spread(params: Any, examples: Any, *rest: Any) -> Tree:
    if count_examples(examples) % devices:
      return mean_fn(params, examples, *rest)

    def own(params: Any, examples: Any, *rest: Any) -> Tree:
      return jax.lax.pmean(mean_fn(params, examples, *rest), "data")

    specs = (P(), P("data"), *(P() for _ in rest))
    # Types of varying arrays are not checked: the sums start from zeros made inside.
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(params, examples, *rest)

  return spread
