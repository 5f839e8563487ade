"""The loop-safe convolution against the plain one, in value, in every kind of derivative, and in what it lowers to."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bsjax.conv import FILTER_GRADIENT_COLUMNS
from bsjax.models import conv, max_pool, transposed_conv

# Float64 sums of at most about 1,000 terms of order one, summed in another order: 1000 x 2.2e-16, with room for a factor 5.
TOLERANCE = 1e-12


def plain_conv(x, w, *, stride=1, padding="SAME"):
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=numbers)


def operands(size=(7, 6), kernel=(3, 3), dtype=jnp.float32, examples=3, channels=(2, 4)):
  generator = np.random.default_rng(0)
  x, w = generator.normal(size=(examples, *size, channels[0])), generator.normal(size=(*kernel, *channels))
  return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def assert_close(actual, expected, tolerance=TOLERANCE):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance)


def test_value_is_the_defining_sum():
  """Four nested sums, written out in numpy, for stride 2 with uneven "SAME" padding."""
  with jax.enable_x64(True):
    x, w = operands((6, 6), (3, 3), jnp.float64)
    y = np.asarray(conv(x, w, stride=2))
  padded = np.pad(np.asarray(x), ((0, 0), (0, 1), (0, 1), (0, 0)))  # (3 - 1) * 2 + 3 - 6 = 1 row, after the image
  expected = np.zeros((3, 3, 3, 4))
  for i, j, a, b in itertools.product(range(3), repeat=4):
    expected[:, i, j] += padded[:, 2 * i + a, 2 * j + b] @ np.asarray(w)[a, b]
  np.testing.assert_allclose(y, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_value_and_both_gradients_equal_the_plain_convolution(stride, padding):
  """Three examples are less than a block of the filter gradient, 25 are several and some over; of 1 channel to 8 the columns are paired."""
  kernels = [(1, 1), (3, 3), (5, 5), (2, 3)]
  geometries = list(itertools.product([(7, 6), (8, 5)], kernels, [3, 25], [(2, 4), (1, 8)]))

  def value_and_pullback(convolution, x, w):
    y, pullback = jax.vjp(lambda x, w: convolution(x, w, stride=stride, padding=padding), x, w)
    return y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))

  with jax.enable_x64(True):
    pairs = [operands(size, kernel, jnp.float64, *rest) for size, kernel, *rest in geometries]

    @jax.jit
    def of_all(pairs):
      return [[value_and_pullback(c, x, w) for c in (conv, plain_conv)] for x, w in pairs]

    for actual, expected in of_all(pairs):
      assert_close(actual, expected)


@pytest.mark.parametrize(
  ("size", "kernel", "stride", "padding"),
  [((1, 1), 3, 1, "SAME"), ((2, 2), 3, 1, "SAME"), ((4, 4), 5, 1, "SAME"), ((3, 2), 3, 2, "SAME"), ((2, 2), 3, 1, 3)],
)
def test_an_image_smaller_than_the_kernel_is_multiplied_on_the_cpu(size, kernel, stride, padding):
  """XLA would exchange the two, and no longer take its fast kernel; value and gradients are those of the convolution."""

  def value_and_gradients(convolution, x, w, padding):
    def loss(x, w):
      y = convolution(x, w, stride=stride, padding=padding)
      return jnp.sum(jnp.sin(y)), y

    return jax.grad(loss, (0, 1), has_aux=True)(x, w)

  with jax.enable_x64(True):
    x, w = operands(size, (kernel, kernel), jnp.float64)
    edges = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    actual, expected = value_and_gradients(conv, x, w, padding), value_and_gradients(plain_conv, x, w, edges)
    assert_close(actual, expected, tolerance=10 * TOLERANCE)  # products of two sums
    convolved = jax.jit(lambda x, w: conv(x, w, stride=stride, padding=padding))
    text = convolved.trace(x, w).lower(lowering_platforms=("cpu",)).as_text()
  assert "stablehlo.dot_general" in text
  assert "stablehlo.convolution" not in text


@pytest.mark.parametrize(("kernel", "padding"), [((7, 7), 3), ((3, 3), 1), ((1, 1), 0)])
def test_padding_by_a_number_pads_every_edge(kernel, padding):
  def value_and_pullback(convolution, padding, x, w):
    y, pullback = jax.vjp(lambda x, w: convolution(x, w, stride=2, padding=padding), x, w)
    return y, pullback(jnp.cos(y))

  with jax.enable_x64(True):
    x, w = operands((8, 7), kernel, jnp.float64)
    pads = [(padding, padding)] * 2
    assert_close(value_and_pullback(conv, padding, x, w), value_and_pullback(plain_conv, pads, x, w))
    assert conv(x, w, stride=2, padding=padding).shape == (3, 4, 4, 4)


def derivatives(convolution, x, w, dx, dw):
  """Every way to differentiate and batch a curved function of a convolution that the probes and the trainer use."""

  def outputs(x, w):
    return jnp.sin(convolution(x, jnp.tanh(w)))

  def loss(x, w):
    return jnp.sum(outputs(x, w) ** 2)

  def example_loss(example, w):
    return loss(example[None], w)

  grad = jax.grad(loss, (0, 1))
  _, forward = jax.linearize(outputs, x, w)
  tangent = jax.jvp(outputs, (x, w), (dx, dw))[1]
  kernels = jnp.stack([w, dw, w - dw])  # as many as there are examples
  return {
    "jvp": tangent,
    "linearize": forward(dx, dw),
    "gauss_newton": jax.vjp(outputs, x, w)[1](tangent),
    "forward_over_reverse": jax.jvp(grad, (x, w), (dx, dw))[1],
    "reverse_over_reverse": jax.grad(lambda x, w: sum(map(jnp.vdot, grad(x, w), (dx, dw))), (0, 1))(x, w),
    "reverse_over_forward": jax.grad(lambda x, w: jax.jvp(loss, (x, w), (dx, dw))[1], (0, 1))(x, w),
    "grad_of_mean": jax.grad(lambda w: jnp.mean(jax.vmap(example_loss, (0, None))(x, w)))(w),
    "per_example_grads": jax.vmap(jax.grad(example_loss, (0, 1)), (0, None))(x, w),
    "grads_per_kernel": jax.vmap(grad, (None, 0))(x, kernels),
    "grads_per_pair": jax.vmap(jax.grad(example_loss, (0, 1)))(x, kernels),
    "per_example_grads_per_kernel": jax.vmap(
      lambda w: jax.vmap(jax.grad(example_loss, 1), (0, None))(x, w), out_axes=1
    )(kernels),
    "hvp_per_example": jax.vmap(lambda e, t: jax.jvp(jax.grad(example_loss, 1), (e, w), (t, dw))[1])(x, dx),
    "vmap_over_last_axis": jax.vmap(convolution, (-1, -1), -1)(jnp.stack([x, dx], -1), jnp.stack([w, dw], -1)),
    "hessian_rows": jax.vmap(lambda t: jax.jvp(lambda w: jax.grad(loss, 1)(x, w), (w,), (t,))[1])(kernels),
    "steps_in_scan": jax.lax.scan(lambda w, t: (w - 0.1 * t * jax.grad(loss, 1)(x, w), loss(x, w)), w, jnp.ones(3)),
  }


@pytest.mark.parametrize(("kernel", "stride", "padding"), [((3, 3), 1, "SAME"), ((2, 3), 2, "VALID")])
def test_all_modes_of_differentiation_and_batching_equal_the_plain_convolution(kernel, stride, padding):
  with jax.enable_x64(True):
    x, w = operands((6, 5), kernel, jnp.float64)
    dx, dw = jnp.flip(x), jnp.flip(w)

    def of(convolution):
      curved = jax.jit(lambda *args: derivatives(lambda x, w: convolution(x, w, stride=stride, padding=padding), *args))
      return curved(x, w, dx, dw)

    actual, expected = of(conv), of(plain_conv)
    scale = {name: max(float(jnp.max(jnp.abs(a))) for a in jax.tree.leaves(e)) for name, e in expected.items()}
    assert min(scale.values()) > 0.1  # none of them is trivially zero
    for name, value in expected.items():
      # Three steps or two derivatives compound the rounding of a few sums: relative to the largest entry, as the sums cancel.
      rescaled = [jax.tree.map(lambda a, s=scale[name]: a / s, tree) for tree in (actual[name], value)]
      assert_close(*rescaled, tolerance=10 * TOLERANCE)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_shapes_are_inferred_without_computing(stride, padding):
  x, w = jax.ShapeDtypeStruct((5, 1000, 999, 3), jnp.float32), jax.ShapeDtypeStruct((3, 5, 3, 7), jnp.float32)
  y = jax.eval_shape(lambda x, w: conv(x, w, stride=stride, padding=padding), x, w)
  # ceil(H / s) with padding, floor((H - k) / s) + 1 without
  sizes = {("SAME", 1): (1000, 999), ("SAME", 2): (500, 500), ("VALID", 1): (998, 995), ("VALID", 2): (499, 498)}
  assert y.shape == (5, *sizes[padding, stride], 7)
  grads = jax.eval_shape(jax.grad(lambda x, w: jnp.sum(conv(x, w, stride=stride, padding=padding)), (0, 1)), x, w)
  assert [grad.shape for grad in grads] == [x.shape, w.shape]


def test_bfloat16_in_bfloat16_out():
  x, w = operands(dtype=jnp.bfloat16)
  value, grads = jax.value_and_grad(lambda x, w: jnp.sum(conv(x, w).astype(jnp.float32) ** 2) / 100, (0, 1))(x, w)
  wide = [operand.astype(jnp.float32) for operand in (x, w)]
  expected, wide_grads = jax.value_and_grad(lambda x, w: jnp.sum(plain_conv(x, w) ** 2) / 100, (0, 1))(*wide)
  assert conv(x, w).dtype == jnp.bfloat16
  # Rounding of each output, then of its cotangent and of the sum: 3 roundings of 2^-9 relative; sums of 100 terms may cancel.
  np.testing.assert_allclose(value, expected, rtol=3 * 2**-9)
  for grad, wide_grad in zip(grads, wide_grads, strict=True):
    assert grad.dtype == jnp.bfloat16
    error = np.abs(np.asarray(grad, np.float32) - wide_grad)
    assert np.max(error) <= 3 * 2**-9 * np.max(np.abs(wide_grad))


def test_a_filter_gradient_in_bfloat16_is_summed_in_float32():
  """A sum of 512 blocks of 64 in bfloat16 would stand still at 256 x 64, where one more block is half a unit of the last place."""
  x, w = jnp.ones((4 * 512, 2, 8, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16)
  assert FILTER_GRADIENT_COLUMNS == 4 * 8
  assert float(jax.grad(lambda w: jnp.sum(conv(x, w)))(w).squeeze()) == 512 * 64


def test_a_filter_gradient_on_the_cpu_loops_over_blocks():
  block = FILTER_GRADIENT_COLUMNS // 8
  for examples, loops in ((block, 0), (block + 1, 1)):
    x, w = operands((7, 8), examples=examples)
    text = jax.jit(jax.grad(lambda w, x=x: jnp.sum(conv(x, w)))).lower(w).as_text()
    assert text.count("stablehlo.while") == loops


def test_blocks_vary_over_the_axes_of_a_shard_map():
  """There the loop's sum has to be typed like its terms, on a mesh of one device too."""
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  x, w = operands((7, 8), examples=FILTER_GRADIENT_COLUMNS // 4)

  def grad(w, x):
    return jax.grad(lambda w: jnp.sum(jnp.sin(conv(x, w))))(w)

  data = jax.sharding.PartitionSpec("data")
  whole = jax.sharding.PartitionSpec()
  spread = jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=(whole, data), out_specs=whole))
  np.testing.assert_allclose(spread(w, x), grad(w, x), rtol=1e-5, atol=1e-4)  # float32 sums of 448 terms of order one


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_transposed_convolution_is_the_transpose_of_a_convolution_of_stride_2(size):
  with jax.enable_x64(True):
    x, w = operands(size, (4, 4), jnp.float64)
    dx, dw = jnp.flip(x), jnp.flip(w)

    def transpose(x, w):
      images = jax.ShapeDtypeStruct((len(x), 2 * size[0], 2 * size[1], w.shape[3]), x.dtype)
      return jax.linear_transpose(lambda y: plain_conv(y, w.swapaxes(2, 3), stride=2), images)(x)[0]

    @jax.jit
    def of_both(x, w, dx, dw):
      def of(doubled):
        def loss(x, w):
          return jnp.sum(jnp.sin(doubled(x, jnp.tanh(w))))

        grad = jax.grad(loss, (0, 1))
        per_example = jax.vmap(jax.grad(lambda example, w: loss(example[None], w), 1), (0, None))(x, w)
        return doubled(x, w), grad(x, w), jax.jvp(grad, (x, w), (dx, dw))[1], per_example

      return of(transposed_conv), of(transpose)

    actual, expected = of_both(x, w, dx, dw)
    assert actual[0].shape == (3, 2 * size[0], 2 * size[1], 4)
    assert_close(actual, expected, tolerance=10 * TOLERANCE)  # two derivatives, and entries up to about 10


@pytest.mark.parametrize(
  ("channels", "stride", "width", "together", "inputs"),
  [((1, 16), 1, 28, 2, 1), ((1, 6), 1, 28, 3, 1), ((16, 16), 1, 5, 2, 16), ((16, 6), 1, 28, 3, 16)]
  + [((8, 16), 3, 14, 2, 8), ((17, 16), 1, 28, 1, 17), ((1, 5), 1, 3, 1, 1), ((16, 16), 2, 28, 1, 16)]
  + [((3, 16), 1, 31, 2, 4), ((3, 16), 2, 28, 2, 4), ((3, 6), 2, 31, 3, 4), ((3, 17), 1, 28, 1, 4)]
  + [((3, 32), 2, 7, 1, 4), ((3, 33), 1, 28, 1, 3), ((3, 5), 1, 3, 1, 3)],
)
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_few_channels_are_convolved_with_columns_as_channels(channels, stride, width, together, inputs, padding):
  """In value too, for widths that columns do not divide, where a stride leaves the last columns unseen, and with a channel of zeros."""
  x, w = operands((5, width), (3, 3), examples=2, channels=channels)
  convolved = jax.jit(lambda x, w: conv(x, w, stride=stride, padding=padding))
  text = convolved.trace(x, w).lower(lowering_platforms=("cpu",)).as_text()
  (kernel,) = re.findall(r"stablehlo.convolution.*, tensor<(\w+)xf32>\) ->", text)
  kernel_size = [int(size) for size in kernel.split("x")][1:]
  assert kernel_size == [3 + (together - 1) * stride, inputs, together * channels[1]]
  # Float32 sums of some 150 terms of order one.
  expected = plain_conv(x, w, stride=stride, padding=padding)
  np.testing.assert_allclose(convolved(x, w), expected, rtol=1e-5, atol=1e-5)


CANONICAL = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"


def lowered_convolutions(convolution, platform):
  """The dimension numbers of all convolutions of training steps in a scan, as lowered for a platform."""
  x, w = operands()

  def steps(x, w):
    def step(w, stride_dependent):
      grads = jax.grad(lambda x, w: jnp.sum(jnp.sin(convolution(x, w, stride=2))), (0, 1))(x, w)
      return w - grads[1] * stride_dependent, grads[0]

    return jax.lax.scan(step, w, jnp.ones(2))

  text = jax.jit(steps).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
  return sorted(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text))


def test_cpu_lowering_has_only_the_form_of_the_fast_kernel():
  # The convolution, its filter gradient, and for each of four parities of rows and columns the input gradient of stride 2.
  assert lowered_convolutions(conv, "cpu") == [CANONICAL] * 6
  assert set(lowered_convolutions(plain_conv, "cpu")) != {CANONICAL}  # the reason for the rest of this file


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_lowering_for_accelerators_is_the_plain_one(platform):
  assert lowered_convolutions(conv, platform) == lowered_convolutions(plain_conv, platform)
  assert len(lowered_convolutions(conv, platform)) == 3


def test_vmap_over_one_operand_stays_one_dense_convolution():
  """Per-example losses, and probes of many kernels on one batch, must not become loops or grouped convolutions."""
  x, w = operands()
  for axes, operand in (((0, None), (jnp.stack([x, x]), w)), ((None, 0), (x, jnp.stack([w, w])))):
    for platform in ("cpu", "tpu"):
      text = jax.jit(jax.vmap(conv, axes)).trace(*operand).lower(lowering_platforms=(platform,)).as_text()
      assert text.count("stablehlo.convolution") == 1
      assert "while" not in text
      assert "feature_group_count = 1" in text


@pytest.mark.parametrize(
  ("x", "w", "message"),
  [
    (jnp.ones((4, 4, 1)), jnp.ones((3, 3, 1, 2)), r"x\(4, 4, 1\)"),
    (jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 1, 2)), "equal I"),
    (jnp.ones((1, 4, 4, 1), jnp.bfloat16), jnp.ones((3, 3, 1, 2)), "cast one"),
    (jnp.ones((1, 2, 4, 1)), jnp.ones((3, 3, 1, 2)), "larger than the image"),
  ],
)
def test_mismatched_operands_are_refused(x, w, message):
  with pytest.raises(ValueError, match=message):
    conv(x, w, padding="VALID")


@pytest.mark.parametrize("size", [(6, 4), (7, 5)])
def test_max_pool_equals_the_windowed_maximum_where_it_is_unique(size):
  x, _ = operands(size)
  assert len(np.unique(x)) == x.size

  def of(pool):
    return pool(x), jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))(x)

  # A maximum and a selected cotangent are copies: no rounding.
  assert_close(of(max_pool), of(lambda x: nn.max_pool(x, (2, 2), (2, 2))), tolerance=0)


@pytest.mark.parametrize(
  ("window", "stride", "padding"),
  [(3, 2, "SAME"), (3, 2, 1), (3, 2, "VALID"), (2, 2, "SAME"), (3, 1, "SAME"), (2, 3, "VALID")],
)
def test_max_pools_of_any_window_equal_the_windowed_maximum(window, stride, padding):
  """In value, gradient, Hessian product and gradients per example; negative entries, which a padding with zeros would beat."""
  with jax.enable_x64(True):
    x = operands((7, 6), dtype=jnp.float64)[0] - 10
    dx = jnp.flip(x)
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding

    @jax.jit
    def of_both(x, dx):
      def of(pool):
        def loss(x):
          return jnp.sum(jnp.sin(pool(x)))

        per_example = jax.vmap(jax.grad(lambda example: loss(example[None])))(x)
        return pool(x), jax.grad(loss)(x), jax.jvp(jax.grad(loss), (x,), (dx,))[1], per_example

      plain = of(lambda x: nn.max_pool(x, (window, window), (stride, stride), pads))
      return of(lambda x: max_pool(x, window=window, stride=stride, padding=padding)), plain

    # Where windows overlap, the cotangents of an entry are added in another order.
    assert_close(*of_both(x, dx), tolerance=TOLERANCE)


def test_a_window_larger_than_the_image_is_refused():
  with pytest.raises(ValueError, match=r"\(3, 3\) is larger than the image x\(1, 2, 4, 1\) with padding='VALID'"):
    max_pool(jnp.ones((1, 2, 4, 1)), window=3)


def test_max_pool_shares_the_gradient_of_ties():
  def weights(*entries):
    x = jnp.array(entries, jnp.float32).reshape(1, 2, 2, 1)
    return jax.grad(lambda x: jnp.sum(max_pool(x)))(x).ravel().tolist()

  assert weights(1, 1, 1, 1) == [0.25, 0.25, 0.25, 0.25]
  assert weights(2, 0, 0, 2) == [0.5, 0, 0, 0.5]
  assert weights(2, 2, 1, 0) == [0.5, 0.5, 0, 0]
