"""The squared norm of a sum of products, in the form that costs least."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.conv import Geometry, convolution_p, image_patches
from bsjax.probes.chunks import scan_over_chunks
from bsjax.probes.leaves import sum_squares, wide
from bsjax.probes.trace import Use, Weight
from bsjax.types import Array

WORD_FLOPS = 4
"""What a per-example product costs per entry beyond its multiplications, in FLOP: written, read, squared and added. Measured on
one CPU core with about 30 shapes: the two forms break even between 3 and 6 up to 2^18 entries, and near 20 at 2^20."""
PRODUCT_NUMBERS = {"cpu": 2**16}
"""Entries of per-example products held at once: on a CPU as many as stay in its cache (docs/bench_noise.md)."""
MOST_PRODUCT_NUMBERS = 2**24
"""The same on other devices: 64 MB. A guess, not measured."""
ELEMENTWISE = ("add", "add_any", "sub", "mul", "div")


class Form(NamedTuple):
  """How the per-example gradients of one parameter array are squared."""

  name: str
  yields_grad: bool
  """Whether `evaluate` also returns the sum of the per-example gradients."""
  evaluate: Callable[[Array, list[tuple[list[Array], Array]]], tuple[Array, Array | None]]
  """`(parameter, [(batched operands, cotangents) of each use]) -> (|g_i|^2 f[n], sum_i g_i or None)`."""


class _Matrix(NamedTuple):
  """A use as a product of matrices: g_i = rows_i' columns_i, [K, M], a sum over T positions."""

  num_rows: int
  num_columns: int
  num_positions: int
  one_hot: bool
  """Whether rows are one-hot and given by their index."""
  factors: Callable[[list[Array], Array], tuple[Array, Array]]
  """`(batched operands, cotangents) -> (f[n, T, K] or i32[n, T], f[n, T, M])`."""
  of_weight: Callable[[Array], Array]
  """The weight as [K, M]: a permutation of its entries."""
  weight: Weight
  split: tuple[tuple[int, ...], tuple[int, ...]] | None
  """Which axes of the parameter are rows and which are columns; None where it is reshaped."""


def choose_form(uses: Sequence[Use]) -> Form:
  """Choose the cheapest exact form for a parameter array with these uses, by counted FLOP."""
  if all(use.eqn.primitive.name in ELEMENTWISE for use in uses):
    return Form("sum", True, _direct_of(uses))
  matrices = _aligned([_as_matrix(use) for use in uses])
  if matrices is None:
    return Form("direct", True, _direct_of(uses))
  num_positions = sum(matrix.num_positions for matrix in matrices)
  first = matrices[0]
  if num_positions == 1:
    return Form("rank one", False, lambda _, inputs: (_rank_one(first, inputs[0]), None))
  inner = first.num_columns + 1 + sum(1 if m.one_hot else m.num_rows for m in matrices) / len(matrices)
  if (
    all(m.weight.scale is None for m in matrices)
    and 2 * num_positions**2 * inner < WORD_FLOPS * first.num_rows * first.num_columns
  ):
    return Form("gram", False, lambda _, inputs: (_gram(matrices, inputs), None))
  return Form("direct", True, lambda parameter, inputs: _direct(matrices, parameter, inputs))


# Uses as matrices.


def _as_matrix(use: Use) -> _Matrix | None:
  if use.steps:
    matrix = _as_matrix(use.first_step())
    return None if matrix is None else _over_steps(matrix, use.steps)
  name = use.eqn.primitive.name
  if not use.weight.isometric or len(use.others) != 1 or use.others[0] is not None:
    return None
  if name == "dot_general":
    return _dot_matrix(use)
  if name == convolution_p.name and use.position == 1:
    return _convolution_matrix(use, use.eqn.params["geometry"], lanes=True)
  if name == "conv_general_dilated" and use.position == 1:
    geometry = _plain_geometry(use)
    return None if geometry is None else _convolution_matrix(use, geometry, lanes=False)
  if name == "gather" and use.position == 0:
    return _gather_matrix(use)
  return None


def _over_steps(matrix: _Matrix, steps: int) -> _Matrix:
  """Makes the positions of all steps of a loop positions of one use; operands and cotangents are `[n, steps, ...]`."""

  def factors(batched: list[Array], cotangents: Array) -> tuple[Array, Array]:
    flat, flat_cotangents = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batched, cotangents))
    rows, columns = matrix.factors(flat, flat_cotangents)
    n = cotangents.shape[0]
    return rows.reshape(n, -1, *rows.shape[2:]), columns.reshape(n, -1, *columns.shape[2:])

  return matrix._replace(num_positions=steps * matrix.num_positions, factors=factors)


def _dot_matrix(use: Use) -> _Matrix | None:
  contracting, batch = use.eqn.params["dimension_numbers"]
  if batch[0]:
    return None
  at = use.position
  summed_w, summed_x = contracting[at], contracting[1 - at]
  shape_w, shape_x = use.weight.value.shape, use.batched[0].shape[1:]
  free_w = tuple(axis for axis in range(len(shape_w)) if axis not in summed_w)
  free_x = tuple(axis for axis in range(len(shape_x)) if axis not in summed_x)
  rows, columns = _size(shape_w, summed_w), _size(shape_w, free_w)
  positions = _size(shape_x, free_x)

  def factors(batched: list[Array], cotangents: Array) -> tuple[Array, Array]:
    (x,) = batched
    n = x.shape[0]
    x = x.transpose(0, *(axis + 1 for axis in (*free_x, *summed_x))).reshape(n, positions, rows)
    if at == 1:
      return x, cotangents.reshape(n, positions, columns)
    return x, cotangents.reshape(n, columns, positions).swapaxes(1, 2)

  def of_weight(weight: Array) -> Array:
    return weight.transpose(*summed_w, *free_w).reshape(rows, columns)

  axes = use.weight.axes
  split = None if axes is None else (tuple(axes[i] for i in summed_w), tuple(axes[i] for i in free_w))
  return _Matrix(rows, columns, positions, False, factors, of_weight, use.weight, split)


def _convolution_matrix(use: Use, geometry: Geometry, *, lanes: bool) -> _Matrix | None:
  kernel, images = use.weight.value.shape, use.batched[0].shape[1:]
  if lanes:
    if kernel[0] != 1:
      return None
    kernel, images = kernel[1:], images[1:]
  rows, columns = int(np.prod(kernel[:3])), kernel[3]
  positions = images[0] * int(np.prod(geometry.output_size))

  def factors(batched: list[Array], cotangents: Array) -> tuple[Array, Array]:
    (x,) = batched
    n = x.shape[0]
    patches = image_patches(x.reshape(-1, *images[1:]), geometry)
    return patches.reshape(n, positions, rows), cotangents.reshape(n, positions, columns)

  def of_weight(weight: Array) -> Array:
    return weight.reshape(rows, columns)

  return _Matrix(rows, columns, positions, False, factors, of_weight, use.weight, None)


def _plain_geometry(use: Use) -> Geometry | None:
  """Reads off a convolution NHWC, HWIO without groups and dilations; None for any other."""
  options = use.eqn.params
  numbers, strides = options["dimension_numbers"], options["window_strides"]
  plain = (
    tuple(numbers.lhs_spec) == (0, 3, 1, 2)
    and tuple(numbers.rhs_spec) == (3, 2, 0, 1)
    and tuple(numbers.out_spec) == (0, 3, 1, 2)
    and options["feature_group_count"] == options["batch_group_count"] == 1
    and set(options["lhs_dilation"]) == set(options["rhs_dilation"]) == {1}
    and len(set(strides)) == 1
    and min(edge for pads in options["padding"] for edge in pads) >= 0
  )
  if not plain:
    return None
  padding = tuple(tuple(pads) for pads in options["padding"])
  return Geometry(tuple(use.batched[0].shape[2:4]), use.weight.value.shape[:2], strides[0], padding)  # type: ignore[arg-type]


def _gather_matrix(use: Use) -> _Matrix | None:
  """Reads off an embedding: whole rows of a table, taken by one index each."""
  numbers, sizes, mode = (use.eqn.params[name] for name in ("dimension_numbers", "slice_sizes", "mode"))
  table, indices = use.weight.value.shape, use.batched[0].shape[1:]
  rank = len(use.output.shape) - 1
  embedding = (
    len(table) > 1
    and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
    and not numbers.operand_batching_dims
    and tuple(sizes) == (1, *table[1:])
    and numbers.offset_dims == tuple(range(rank - len(table) + 1, rank))
    and indices[-1:] == (1,)
  )
  if not embedding:
    return None
  rows, columns, positions = table[0], int(np.prod(table[1:])), int(np.prod(indices[:-1]))
  clipped = mode == jax.lax.GatherScatterMode.CLIP

  def factors(batched: list[Array], cotangents: Array) -> tuple[Array, Array]:
    (index,) = batched
    n = index.shape[0]
    index, cotangents = index.reshape(n, positions), cotangents.reshape(n, positions, columns)
    if clipped:
      return jnp.clip(index, 0, rows - 1), cotangents
    inside = (index >= 0) & (index < rows)
    return jnp.where(inside, index, 0), jnp.where(inside[..., None], cotangents, 0)

  def of_weight(weight: Array) -> Array:
    return weight.reshape(rows, columns)

  axes = use.weight.axes
  split = None if axes is None else ((axes[0],), axes[1:])
  return _Matrix(rows, columns, positions, True, factors, of_weight, use.weight, split)


def _aligned(matrices: list[_Matrix | None]) -> list[_Matrix] | None:
  """Brings all uses of one parameter to the same rows and columns, transposing some; None if that is impossible."""
  known = [matrix for matrix in matrices if matrix is not None]
  if len(known) < len(matrices):
    return None
  if len(known) == 1:
    return known
  reference = next((matrix for matrix in known if matrix.one_hot), known[0])
  aligned = []
  for matrix in known:
    if matrix.split is None or reference.split is None:
      return None
    if matrix.split == reference.split:
      aligned.append(matrix)
    elif matrix.split == reference.split[::-1] and not matrix.one_hot:
      aligned.append(_transposed(matrix))
    else:
      return None
  return aligned


def _transposed(matrix: _Matrix) -> _Matrix:
  return matrix._replace(
    num_rows=matrix.num_columns,
    num_columns=matrix.num_rows,
    factors=lambda batched, cotangents: matrix.factors(batched, cotangents)[::-1],
    of_weight=lambda weight: matrix.of_weight(weight).T,
    split=matrix.split and matrix.split[::-1],
  )


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
  return int(np.prod([shape[axis] for axis in axes], dtype=np.int64))


# The forms.


def _rank_one(matrix: _Matrix, inputs: tuple[list[Array], Array]) -> Array:
  rows, columns = map(wide, matrix.factors(*inputs))
  rows, columns = rows[:, 0], jnp.square(columns[:, 0])
  if matrix.weight.scale is not None:
    weights = jnp.square(wide(matrix.of_weight(matrix.weight.scale)))
    return jnp.sum((weights[rows] if matrix.one_hot else jnp.square(rows) @ weights) * columns, axis=1)
  sq_norms = jnp.sum(columns, axis=1)
  return sq_norms if matrix.one_hot else jnp.sum(jnp.square(rows), axis=1) * sq_norms


def _gram(matrices: Sequence[_Matrix], inputs: Sequence[tuple[list[Array], Array]]) -> Array:
  """Sums (x_s . x_t) (d_s . d_t) over all pairs of positions, of the same and of different uses."""
  factors = [tuple(map(wide, matrix.factors(*given))) for matrix, given in zip(matrices, inputs, strict=True)]
  total: Any = 0.0
  for first, (rows, columns) in enumerate(factors):
    for second, (other_rows, other_columns) in enumerate(factors[: first + 1]):
      products = _row_products(rows, other_rows) * jnp.einsum("nsm,ntm->nst", columns, other_columns)
      total += (1 if first == second else 2) * jnp.sum(products, axis=(1, 2))
  return total


def _row_products(rows: Array, others: Array) -> Array:
  """Multiplies all pairs of rows, f[n, S, T]; one-hot rows are given by their index, [n, S]."""
  if rows.ndim == others.ndim == 2:
    return (rows[:, :, None] == others[:, None, :]).astype(jnp.float32)
  if rows.ndim == 2:
    return jnp.take_along_axis(others, rows[:, None, :], axis=2).swapaxes(1, 2)
  if others.ndim == 2:
    return jnp.take_along_axis(rows, others[:, None, :], axis=2)
  return jnp.einsum("nsk,ntk->nst", rows, others)


def _direct(
  matrices: Sequence[_Matrix], parameter: Array, inputs: list[tuple[list[Array], Array]]
) -> tuple[Array, Array]:
  first = matrices[0]

  def products(inputs: list[tuple[list[Array], Array]]) -> Array:
    total: Any = 0.0
    for matrix, given in zip(matrices, inputs, strict=True):
      rows, columns = map(wide, matrix.factors(*given))
      if matrix.one_hot:
        blank = jnp.zeros((matrix.num_rows, matrix.num_columns), columns.dtype)
        product = jax.vmap(lambda index, columns, blank=blank: blank.at[index].add(columns))(rows, columns)
      else:
        product = jnp.einsum("ntk,ntm->nkm", rows, columns)
      scale = matrix.weight.scale
      total += product if scale is None else product * matrix.of_weight(scale)
    return total

  sq_norms, total = _square_and_sum(products, inputs, first.num_rows * first.num_columns)
  blank = jnp.zeros(parameter.shape, total.dtype)
  _, laid_back = jax.vjp(lambda parameter: first.of_weight(first.weight.layout(parameter)), blank)
  return sq_norms, laid_back(total)[0].astype(parameter.dtype)


def _direct_of(uses: Sequence[Use]) -> Callable[..., tuple[Array, Array]]:
  """The form for any linear use: the operation transposed, example by example."""

  def evaluate(parameter: Array, inputs: list[tuple[list[Array], Array]]) -> tuple[Array, Array]:
    def products(inputs: list[tuple[list[Array], Array]]) -> Array:
      total: Any = 0.0
      for use, (batched, cotangents) in zip(uses, inputs, strict=True):

        def one(cotangent: Array, *batched: Array, use: Use = use) -> Array:
          return jax.vjp(lambda parameter: use.apply_one(parameter, *batched), parameter)[1](cotangent)[0]

        total += wide(jax.vmap(one)(cotangents, *batched))
      return total

    sq_norms, grad = _square_and_sum(products, inputs, parameter.size)
    return sq_norms, grad.astype(parameter.dtype)

  return evaluate


def _square_and_sum(
  products: Callable[[Any], Array], inputs: list[tuple[list[Array], Array]], size: int
) -> tuple[Array, Array]:
  """Forms products of some examples at a time; returns the squared norm of each and the sum of all."""

  def some(inputs: Any) -> tuple[Array, Array]:
    formed = products(inputs)
    return jnp.sum(formed, axis=0), jax.vmap(sum_squares)(formed)

  numbers = PRODUCT_NUMBERS.get(jax.default_backend(), MOST_PRODUCT_NUMBERS)
  total, sq_norms = scan_over_chunks(some, inputs, chunk_size=max(1, numbers // max(size, 1)))
  return sq_norms, total
