"""Names of parameter arrays, and sums over groups of them."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from bsjax.types import Array, Params


def leaf_names(params: Params) -> list[str]:
  """Name every array by its path, in the order of `jax.tree.leaves`: "Dense_0/kernel"; a bare array is "params"."""
  paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  return [jax.tree_util.keystr(path, simple=True, separator="/") or "params" for path in paths]


def layer_of(leaf: str) -> str:
  """Name the layer a leaf belongs to: its path without the last part."""
  return leaf.rpartition("/")[0] or leaf


def leaf_sq_norms(tree: Params) -> dict[str, Array]:
  """Sum the squares of each leaf, in float32 at least."""
  return dict(zip(leaf_names(tree), map(sum_squares, jax.tree.leaves(tree)), strict=True))


def wide(x: Array) -> Array:
  """Cast half precision to float32: squares overflow at 256 in float16."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def dot(x: Array, y: Array) -> Array:
  """Sum the products of all entries, in float32 at least."""
  return jnp.vdot(wide(x), wide(y))


def sum_squares(x: Array) -> Array:
  """Sum the squares of all entries, in float32 at least."""
  return dot(x, x)


def group_leaves(leaves: Mapping[str, object], group_of: Callable[[str], str] = layer_of) -> dict[str, list[str]]:
  """Collect the names of leaves by group, groups in order of appearance."""
  groups: dict[str, list[str]] = {}
  for leaf in leaves:
    groups.setdefault(group_of(leaf), []).append(leaf)
  return groups
