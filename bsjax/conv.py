"""A convolution that stays fast inside loops and differentiates in every mode, its transpose, and a max pool of slices.

XLA's CPU compiler brings a convolution into the form of its fast kernel only in the entry computation of a module; in the
body of `scan`, `while` or `map` a convolution with any other order of dimensions runs in a naive loop nest, 10 to 100 times
slower (jax-ml/jax#12868). The gradients that JAX derives for a convolution have such orders. So the convolution and its two
gradients are primitives here, each lowered on the CPU from a plain function whose convolution is in the fast form from the
start (input NHWC, kernel HWIO, output NHWC), with transposes around it. Elsewhere they lower to `lax.conv_general_dilated`
and the gradients JAX derives from it.

The three maps are bilinear, and closed under transposition and batching, so any composition of `grad`, `jvp`, `linearize`
and `vmap` consists of these three primitives again:

  convolution      y[n, i, j, o]  = sum_{a, b, c} x[n, s i + a - p, s j + b - q, c] w[a, b, c, o]
  input_gradient   x'[n, u, v, c] = sum_{a, b, o} dy[n, (u - a + p) / s, (v - b + q) / s, o] w[a, b, c, o]
  filter_gradient  w'[a, b, c, o] = sum_{n, i, j} x[n, s i + a - p, s j + b - q, c] dy[n, i, j, o]

with stride s and leading padding (p, q). Each operand and result has one more leading axis, the lanes V: pairs that are
convolved independently. A `vmap` over one operand only is folded into its examples or its channels; a `vmap` over both
adds lanes.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from bsjax.types import Array


class Geometry(NamedTuple):
  """What the three maps share besides their operands: it fixes every spatial shape."""

  input_size: tuple[int, int]
  kernel_size: tuple[int, int]
  stride: int
  padding: tuple[tuple[int, int], tuple[int, int]]

  @property
  def output_size(self) -> tuple[int, int]:
    height, width = (
      (size + low + high - kernel) // self.stride + 1
      for size, kernel, (low, high) in zip(self.input_size, self.kernel_size, self.padding, strict=True)
    )
    return height, width


Padding = Literal["SAME", "VALID"] | int
"""`"SAME"` pads with zeros to an output of `ceil(H / stride)`, `"VALID"` does not pad, a number pads every edge by so many."""


FILTER_GRADIENT_COLUMNS = 32
"""Columns of `dy`, of several examples if need be, that the CPU sums at once for a filter gradient. Its kernel does not block the sum over
examples and positions, but reads all of one operand for every few rows of the other: in such blocks 128 examples of 16x16 and
32x32 positions were 1.4 to 1.7 times faster than at once (`docs/bench_train.md`)."""

SLOW_CHANNELS = 16
"""The CPU's fast kernel does not take a convolution with so many channels, or fewer, both in its input and in its output."""

SLOW_INPUTS, SLOW_OUTPUTS = 3, 32
"""From exactly so many channels to so many, or fewer, that kernel is 3 to 9 times slower than from one more (with AVX-512)."""


def conv(x: Array, w: Array, *, stride: int = 1, padding: Padding = "SAME") -> Array:
  """Convolves images with a kernel (a cross-correlation, as in every deep-learning library).

  Args:
    x: `float[B, H, W, I]`.
    w: `float[kh, kw, I, O]`, of the dtype of `x`.
    stride: The step in both directions.
    padding: As `Padding` says.

  Returns:
    `float[B, H', W', O]`, equal to `lax.conv_general_dilated` in value and in all derivatives up to rounding.

  Raises:
    ValueError: If ranks, channels or dtypes do not match, or the kernel is larger than an unpadded image.
  """
  if x.ndim != 4 or w.ndim != 4 or x.shape[3] != w.shape[2]:
    raise ValueError(f"conv got x{x.shape} and w{w.shape}; wanted x[B, H, W, I] and w[kh, kw, I, O] with equal I.")
  if x.dtype != w.dtype:
    raise ValueError(f"conv got x of {x.dtype} and w of {w.dtype}; cast one of them so that both are the same.")
  geometry = _geometry(x, (w.shape[0], w.shape[1]), stride, padding)
  return _bind(convolution_p, x[None], w[None], geometry)[0]


def transposed_conv(x: Array, w: Array) -> Array:
  """Doubles height and width by a transposed convolution of stride 2 with a 4x4 kernel.

      y[n, 2 i + a - 1, 2 j + b - 1, o]  +=  sum_c x[n, i, j, c] w[a, b, c, o]        for all i, j and 0 <= a, b < 4

  It is the transpose of the convolution of stride 2 and "SAME" padding with the same kernel, its channels exchanged. Computed as one
  convolution of stride 1: an output at (2 m + p, 2 n + q) sees a 2x2 window of `x` that starts at (m + p - 1, n + q - 1), so the four
  kernels 2x2, one for each parity (p, q), are convolved side by side as 4 O channels, which are then interleaved.

  Args:
    x: `float[B, H, W, I]`.
    w: `float[4, 4, I, O]`, of the dtype of `x`.

  Returns:
    `float[B, 2 H, 2 W, O]`.
  """
  (batch, height, width, _), (_, _, inputs, outputs) = x.shape, w.shape
  # Read backwards, entry 2 s + p of the kernel belongs to parity p and to place s of its window.
  by_parity = w[::-1, ::-1].reshape(2, 2, 2, 2, inputs, outputs).transpose(0, 2, 4, 1, 3, 5)
  z = conv(x, by_parity.reshape(2, 2, inputs, 4 * outputs), padding=1)
  z = z.reshape(batch, height + 1, width + 1, 2, 2, outputs)
  rows = [jnp.stack([z[:, p : p + height, q : q + width, p, q] for q in (0, 1)], axis=3) for p in (0, 1)]
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, outputs)


def max_pool(x: Array, *, window: int = 2, stride: int = 2, padding: Padding = "VALID") -> Array:
  """Takes the maximum of each square window; by default of 2x2 with stride 2, where an odd last row or column is dropped.

  Pairwise maxima of strided slices: the gradient of `lax.reduce_window` is a `select_and_scatter`, which was 6 to 15
  times slower than theirs on the CPU.

  Holds: where the maximum is unique, value and gradient are those of `nn.max_pool`. Ties share the gradient here
  (`jnp.maximum` halves it each time it meets two equal entries: of a 2x2 window two equal entries get 1/2 each, four get 1/4 each),
  whereas `select_and_scatter` gives all of it to the first. After a ReLU ties are at zero, where no gradient passes either way.

  Args:
    x: `float[B, H, W, C]`.
    window: Rows, and columns, of a window. Windows may overlap.
    stride: From one window to the next.
    padding: As `Padding` says, but padded entries are never a maximum; less than `window` at each edge.

  Returns:
    `float[B, H', W', C]`; by default `H' = H // 2`.

  Raises:
    ValueError: If a window is larger than the padded image.
  """
  geometry = _geometry(x, (window, window), stride, padding)
  if any(edge for edges in geometry.padding for edge in edges):
    x = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)), constant_values=-jnp.inf)
  seen = _strided_slices(x, geometry)
  rows = [reduce(jnp.maximum, seen[a : a + window]) for a in range(0, window**2, window)]
  return reduce(jnp.maximum, rows)


def image_patches(x: Array, geometry: Geometry) -> Array:
  """Lays out what each position of the kernel sees: `[N, H, W, C] -> [N, H', W', kh kw C]`.

  With `w` as a matrix `[kh kw I, O]` the convolution is `image_patches(x, geometry) @ w`. Made of slices, `kh kw` times the memory of `x`.
  """
  edges = [(0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0)]
  padded = lax.pad(x, jnp.zeros((), x.dtype), edges)
  return jnp.concatenate(_strided_slices(padded, geometry), axis=-1)


def _geometry(x: Array, kernel_size: tuple[int, int], stride: int, padding: Padding) -> Geometry:
  size = x.shape[1:3]
  if isinstance(padding, int):
    pads = [(padding, padding)] * 2
  else:
    pads = lax.padtype_to_pads(size, kernel_size, (stride, stride), padding)
  geometry = Geometry((size[0], size[1]), kernel_size, stride, (pads[0], pads[1]))
  if min(geometry.output_size) < 1:
    raise ValueError(
      f"a window of {kernel_size} is larger than the image x{x.shape} with {padding=}; use padding='SAME'."
    )
  return geometry


def _strided_slices(padded: Array, geometry: Geometry) -> list[Array]:
  """Lists, for each position of the kernel, row by row, the entries it meets: each `[N, H', W', C]`."""
  height, width = geometry.output_size
  stride = geometry.stride
  return [
    padded[:, a : a + stride * (height - 1) + 1 : stride, b : b + stride * (width - 1) + 1 : stride]
    for a in range(geometry.kernel_size[0])
    for b in range(geometry.kernel_size[1])
  ]


# The three maps, one lane each: the plain form, and the form of XLA's fast CPU kernel.


def _convolve(x: Array, w: Array, **options: Any) -> Array:
  return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def _convolution_of(geometry: Geometry, x: Array, w: Array) -> Array:
  return _convolve(x, w, window_strides=(geometry.stride,) * 2, padding=geometry.padding)


def _plain_input_gradient_of(geometry: Geometry, dy: Array, w: Array) -> Array:
  x = jax.ShapeDtypeStruct((dy.shape[0], *geometry.input_size, w.shape[2]), dy.dtype)
  return jax.linear_transpose(lambda x: _convolution_of(geometry, x, w), x)(dy)[0]


def _plain_filter_gradient_of(geometry: Geometry, x: Array, dy: Array) -> Array:
  w = jax.ShapeDtypeStruct((*geometry.kernel_size, x.shape[3], dy.shape[3]), dy.dtype)
  return jax.linear_transpose(lambda w: _convolution_of(geometry, x, w), w)(dy)[0]


def _canonical_convolution_of(geometry: Geometry, x: Array, w: Array) -> Array:
  return _canonical_convolve(x, w, geometry.stride, geometry.padding)


def _canonical_convolve(x: Array, w: Array, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
  """Convolves; where there are few channels, with m neighbouring columns of the output as the channels of one.

  With stride s and a kernel k wide, the m columns see (m - 1) s + k columns of the input, the next m as many, m s further. Entry b of the
  kernel of column p is at p s + b of these, the rest is zero: for m = 2, s = 1 and k = 3 a third more is multiplied. For s = 2 it is two
  thirds, which pays only where the input has the fewer channels. Three channels of the input get zeros as a fourth.

  An image with fewer positions than the kernel is a matrix of what each position sees: XLA would exchange image and kernel, into a form
  that its fast kernel does not take and that was 13 and 77 times slower in two cases (`docs/bench_train.md`).
  """
  (kernel_height, kernel_width, inputs, outputs), (rows, (low, high)) = w.shape, padding
  if x.shape[1] * x.shape[2] < kernel_height * kernel_width:
    geometry = Geometry((x.shape[1], x.shape[2]), (kernel_height, kernel_width), stride, padding)
    return image_patches(x, geometry) @ w.reshape(-1, outputs)

  output_width = (x.shape[2] + low + high - kernel_width) // stride + 1
  columns = SLOW_CHANNELS // outputs + 1
  pays = stride == 1 or inputs < outputs
  if max(inputs, outputs) > SLOW_CHANNELS or columns > output_width or not pays:
    columns = 1
  if inputs == SLOW_INPUTS and SLOW_CHANNELS < columns * outputs <= SLOW_OUTPUTS:
    x, w = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1))), jnp.pad(w, ((0, 0), (0, 0), (0, 1), (0, 0)))
  if columns == 1:
    return _convolve(x, w, window_strides=(stride, stride), padding=padding)

  before = [p * stride for p in range(columns)]
  places = [jnp.pad(w, ((0, 0), (zeros, before[-1] - zeros), (0, 0), (0, 0))) for zeros in before]
  kernel = jnp.stack(places, axis=3).reshape(kernel_height, -1, x.shape[3], columns * outputs)
  steps = -(-output_width // columns)
  seen = (low, max(0, (steps * columns - 1) * stride + kernel_width - x.shape[2] - low))
  y = _convolve(x, kernel, window_strides=(stride, stride * columns), padding=(rows, seen))
  return y.reshape(*y.shape[:2], -1, outputs)[:, :, :output_width]


def _canonical_input_gradient_of(geometry: Geometry, dy: Array, w: Array) -> Array:
  """Computes the rows of each remainder r modulo the stride s, and the columns, by a convolution with what of the kernel reaches them.

  x'[s m + r] = sum_t dy[m + k - t] w[a + s t],        a = (r + p) mod s,  k = (r + p - a) / s
  """
  stride = geometry.stride
  counts = [-(-size // stride) for size in geometry.input_size]

  def of_remainders(*remainders: int) -> Array:
    shifted = [r + low for r, (low, _) in zip(remainders, geometry.padding, strict=True)]
    kernel = w[shifted[0] % stride :: stride, shifted[1] % stride :: stride]
    if not kernel.size:  # a kernel smaller than the stride
      return jnp.zeros_like(dy, shape=(dy.shape[0], *counts, w.shape[2]))
    padding = [
      (taps - 1 - at // stride, count - output + at // stride)
      for taps, at, count, output in zip(kernel.shape[:2], shifted, counts, geometry.output_size, strict=True)
    ]
    return _canonical_convolve(dy, kernel[::-1, ::-1].swapaxes(2, 3), 1, (padding[0], padding[1]))

  rows = [jnp.stack([of_remainders(r, q) for q in range(stride)], axis=3) for r in range(stride)]
  height, width = geometry.input_size
  whole = jnp.stack(rows, axis=2).reshape(dy.shape[0], counts[0] * stride, counts[1] * stride, w.shape[2])
  return whole[:, :height, :width]


def _canonical_filter_gradient_of(geometry: Geometry, x: Array, dy: Array) -> Array:
  """Sums the filter gradients of blocks of examples, in float32 at least."""
  block = -(-FILTER_GRADIENT_COLUMNS // geometry.output_size[1])
  if len(x) <= block:
    return _filter_gradient_of_block(geometry, x, dy)

  rest = ((0, -len(x) % block), (0, 0), (0, 0), (0, 0))
  x, dy = jnp.pad(x, rest), jnp.pad(dy, rest)

  def add(number: Array, total: Array) -> Array:
    of_block = (lax.dynamic_slice_in_dim(operand, number * block, block) for operand in (x, dy))
    return total + _filter_gradient_of_block(geometry, *of_block)

  shape = (*geometry.kernel_size, x.shape[3], dy.shape[3])
  zeros = jnp.zeros_like(x, shape=shape, dtype=jnp.promote_types(x.dtype, jnp.float32))
  return lax.fori_loop(0, len(x) // block, add, zeros).astype(x.dtype)


def _filter_gradient_of_block(geometry: Geometry, x: Array, dy: Array) -> Array:
  """Convolves the rows of `x` with those of `dy`: what is summed in each row, its columns of each example, are the channels.

  Of the two, the one with more entries per position is the kernel, whose entries are the channels of the result: `dy`, or the columns of
  `x` that meet each column of `dy`; with a stride always `dy`, its rows spread out by it. The others it calls columns.
  """
  (height, width), (rows, columns), stride = geometry.kernel_size, geometry.output_size, geometry.stride
  seen = ((rows - 1) * stride + height, (columns - 1) * stride + width)  # a stride can leave the last ones unseen
  edges = [
    (low, max(0, size - whole - low))
    for size, whole, (low, _) in zip(seen, x.shape[1:3], geometry.padding, strict=True)
  ]
  padded = jnp.pad(x, ((0, 0), *edges, (0, 0)))[:, : seen[0], : seen[1]]
  met = jnp.concatenate([padded[:, :, b : b + (columns - 1) * stride + 1 : stride] for b in range(width)], axis=3)
  inputs, outputs = x.shape[3], dy.shape[3]
  if stride == 1 and width * inputs >= outputs:
    kernel = met.transpose(1, 2, 0, 3).reshape(seen[0], 1, -1, width * inputs)
    images = dy.transpose(1, 3, 2, 0).reshape(1, rows, outputs, -1)
    padding = ((height - 1, height - 1), (0, 0))
    gradient = _convolve(images, kernel, window_strides=(1, 1), padding=padding)[0, ::-1]
    return gradient.reshape(height, outputs, width, inputs).transpose(0, 2, 3, 1)
  images = met.transpose(1, 3, 2, 0).reshape(1, seen[0], width * inputs, -1)
  kernel = dy.transpose(1, 2, 0, 3).reshape(rows, 1, -1, outputs)
  gradient = _convolve(images, kernel, window_strides=(1, 1), padding="VALID", rhs_dilation=(stride, 1))
  return gradient.reshape(height, width, inputs, outputs)


# The primitives. Operands have a leading axis of lanes.


def _bind(primitive: Primitive, lhs: Array, rhs: Array, geometry: Geometry) -> Array:
  """Applies the primitive; under `shard_map`, both operands first become varying over the axes that either varies over."""
  axes = [jax.typeof(operand).manual_axis_type.varying for operand in (lhs, rhs)]
  lhs, rhs = (
    lax.pcast(operand, tuple(missing), to="varying") if (missing := (axes[0] | axes[1]) - own) else operand
    for operand, own in zip((lhs, rhs), axes, strict=True)
  )
  return primitive.bind(lhs, rhs, geometry=geometry)


def _make_primitive(
  name: str,
  plain: Callable[[Geometry, Array, Array], Array],
  canonical: Callable[[Geometry, Array, Array], Array],
  shape: Callable[[Geometry, Any, Any], tuple[int, ...]],
  lhs_fold: tuple[int, int],
  rhs_fold: tuple[int, int],
  *,
  sums_examples: bool = False,
) -> Primitive:
  """Makes a primitive of a bilinear map.

  Args:
    name: As printed in a jaxpr.
    plain: The map for one lane, for any platform.
    canonical: The same map for the CPU.
    shape: The shape of its result, from those of its operands, all of one lane.
    lhs_fold: The axis of the first operand, and of the result, into which a vmapped axis of that operand alone is folded.
    rhs_fold: The same for the second operand.
    sums_examples: Whether both operands have examples and the result has not; else the first operand and the result have.

  Returns:
    The primitive; it has no derivatives yet.
  """
  primitive = Primitive(name)

  def plain_lanes(lhs: Array, rhs: Array, *, geometry: Geometry) -> Array:
    return jax.vmap(partial(plain, geometry))(lhs, rhs)

  def canonical_lanes(lhs: Array, rhs: Array, *, geometry: Geometry) -> Array:
    if lhs.shape[0] == 1:
      return canonical(geometry, lhs[0], rhs[0])[None]
    # One lane after another: on the CPU a grouped convolution is several times slower.
    return lax.map(lambda lane: canonical(geometry, *lane), (lhs, rhs))

  def on_every_device(lhs: Array, rhs: Array, *, geometry: Geometry) -> Array:
    return _on_every_device(partial(canonical_lanes, geometry=geometry), lhs, rhs, sums_examples)

  def batch(operands: tuple[Array, Array], axes: tuple[Any, Any], *, geometry: Geometry) -> tuple[Array, int]:
    (lhs, rhs), (lhs_axis, rhs_axis) = operands, axes
    if rhs_axis is None:
      size, (lhs_at, at) = lhs.shape[lhs_axis], lhs_fold
      lhs = _fold(lhs, lhs_axis, lhs_at)
    elif lhs_axis is None:
      size, (rhs_at, at) = rhs.shape[rhs_axis], rhs_fold
      rhs = _fold(rhs, rhs_axis, rhs_at)
    else:
      size, at = lhs.shape[lhs_axis], 0
      lhs, rhs = _fold(lhs, lhs_axis, 0), _fold(rhs, rhs_axis, 0)
    out = _bind(primitive, lhs, rhs, geometry)
    return out.reshape(*out.shape[:at], size, -1, *out.shape[at + 1 :]), at

  def type_of_result(lhs: Any, rhs: Any, *, geometry: Geometry) -> Any:
    return lhs.update(shape=(lhs.shape[0], *shape(geometry, lhs.shape[1:], rhs.shape[1:])))

  primitive.def_impl(jax.jit(primitive.bind, static_argnames="geometry"))
  primitive.def_abstract_eval(type_of_result)
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, mlir.lower_fun(plain_lanes, multiple_results=False))
  mlir.register_lowering(primitive, mlir.lower_fun(on_every_device, multiple_results=False), platform="cpu")
  return primitive


def _on_every_device(lanes_fn: Callable[..., Array], lhs: Array, rhs: Array, sums_examples: bool) -> Array:
  """Lets each device of a mesh with axes "trial" and "data" compute its own lanes and examples, where they can be divided.

  Left to itself, the partitioner would have every device do all turns of a loop over lanes or over blocks of examples.
  """
  mesh = jax.typeof(lhs).sharding.mesh
  if set(mesh.auto_axes) != {"trial", "data"} or mesh.size == 1:  # no mesh, or one device's part of a `shard_map`
    return lanes_fn(lhs, rhs)
  lanes, examples = (
    axis if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(("trial", "data"), lhs.shape[:2], strict=True)
  )

  def on_device(lhs: Array, rhs: Array) -> Array:
    out = lanes_fn(lhs, rhs)
    return lax.psum(out, examples) if sums_examples and examples else out

  spread, whole = P(lanes, examples), P(lanes)
  in_specs, out_specs = ((spread, spread), whole) if sums_examples else ((spread, whole), spread)
  return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(lhs, rhs)


def _fold(x: Array, mapped_axis: int, axis: int) -> Array:
  """Merges the mapped axis into `axis`, numbered without it; the mapped index varies slowest."""
  x = jnp.moveaxis(x, mapped_axis, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


# Axes with lanes: images are [V, N, H, W, C], kernels [V, kh, kw, I, O].
convolution_p = _make_primitive(
  "loop_safe_convolution",
  _convolution_of,
  _canonical_convolution_of,
  lambda geometry, x, w: (x[0], *geometry.output_size, w[3]),
  (1, 1),
  (4, 4),
)
_input_gradient = _make_primitive(
  "loop_safe_input_gradient",
  _plain_input_gradient_of,
  _canonical_input_gradient_of,
  lambda geometry, dy, w: (dy[0], *geometry.input_size, w[2]),
  (1, 1),
  (3, 4),
)
_filter_gradient = _make_primitive(
  "loop_safe_filter_gradient",
  _plain_filter_gradient_of,
  _canonical_filter_gradient_of,
  lambda geometry, x, dy: (*geometry.kernel_size, x[3], dy[3]),
  (4, 3),
  (4, 4),
  sums_examples=True,
)

ad.defbilinear(
  convolution_p,
  lambda ct, x, w, geometry: _bind(_input_gradient, ct, w, geometry),
  lambda ct, x, w, geometry: _bind(_filter_gradient, x, ct, geometry),
)
ad.defbilinear(
  _input_gradient,
  lambda ct, dy, w, geometry: _bind(convolution_p, ct, w, geometry),
  lambda ct, dy, w, geometry: _bind(_filter_gradient, ct, dy, geometry),
)
ad.defbilinear(
  _filter_gradient,
  lambda ct, x, dy, geometry: _bind(_input_gradient, dy, ct, geometry),
  lambda ct, x, dy, geometry: _bind(convolution_p, x, ct, geometry),
)
