"""How the gradients of single examples differ from their mean: exactly, by one of two routes."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bsjax.probes.chunks import count_examples
from bsjax.probes.ghost import ghost_norms, ghost_projections
from bsjax.probes.leaves import dot, leaf_names, leaf_sq_norms
from bsjax.probes.per_example import LossFn, mean_gradient
from bsjax.types import Array, Batch, Example, Params

Route = Literal["exact", "ghost"]
ROUTES = ("exact", "ghost")


class GradientMoments(NamedTuple):
  """What the gradients g_i of N examples are, relative to their mean G: one entry for each leaf of the parameters.

  Leaves are named by path, "Dense_0/kernel". Every moment of a group of leaves is the sum of theirs.
  """

  loss: Array
  """Mean loss, f32[]."""
  mean_grad: Params
  """G = (1/N) sum_i g_i, like the parameters."""
  mean_grad_sq_norm: dict[str, Array]
  """|G|^2, f32[]: not corrected for the noise in G."""
  sq_norms: dict[str, Array]
  """|g_i|^2, f32[N]."""
  deviations: dict[str, Array]
  """|g_i - G|^2, f32[N]."""
  projections: dict[str, Array]
  """(g_i - G) . G, f32[N]: centred, so that small noise is not lost beside |G|^2."""


def gradient_moments(
  loss_fn: LossFn,
  params: Params,
  examples: Batch,
  *,
  chunk_size: int,
  route: Route = "ghost",
  axis_name: str | None = None,
) -> GradientMoments:
  """Compare each example's gradient with the mean over all, exactly, in two passes over the examples.

  Args:
    loss_fn: the loss of one example.
    params: where to evaluate.
    examples: a pytree with leading axis N.
    chunk_size: examples per pass, static; N need not be a multiple.
    route: "ghost" takes norms and projections from the layers' inputs and cotangents: under 2 gradients of the data set
      (docs/bench_noise.md). "exact" forms every g_i by vmap, `chunk_size` of them at once, and subtracts G before it squares: a
      hundred times slower on wide layers, and the choice where noise is small.
    axis_name: inside `shard_map`, the mesh axis over which the examples are spread in equal parts: loss and G are then those of
      all devices, and the rest is of each device's own examples. See `sharded_moments`.

  Returns:
    The moments, N of each kind. The first pass finds G, the second compares with it: E[g^2] - E[g]^2 over examples would
    lose small noise to rounding. "exact": a deviation is off by about 1e-7 |G| |g_i - G| in float32, a relative 1e-4 where the noise is a
    thousandth of the gradient. "ghost": deviations are |g_i|^2 - 2 g_i . G + |G|^2, off by about 1e-7 |G|^2, a relative 1e-4 where
    |g_i - G| is a thirtieth of |G|: no matter unless the noise scale is below a thousandth of an example.

  Holds: an example whose gradient is not finite makes every moment that contains G not finite, and no other `sq_norms`: see
  `gradient_noise` for how it is named and left out.
  """
  if route not in ROUTES:
    raise ValueError(f"route={route!r} is unknown: use one of {', '.join(ROUTES)}")

  def mean_of_all(tree: Any) -> Any:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

  if route == "exact":
    loss, mean_grad = mean_of_all(mean_gradient(loss_fn, params, examples, chunk_size=chunk_size))
    return _by_vmap(loss_fn, params, examples, loss, mean_grad, chunk_size)
  loss, mean_grad, sq_norms = ghost_norms(loss_fn, params, examples, chunk_size=chunk_size)
  loss, mean_grad = mean_of_all((loss, mean_grad))
  mean_sq_norms = leaf_sq_norms(mean_grad)
  along = ghost_projections(loss_fn, params, examples, mean_grad, chunk_size=chunk_size)
  # (g_i - G) . G sums to 0: the empirical mean is |G|^2 with the rounding of these very numbers.
  projections = {leaf: values - mean_of_all(jnp.mean(values)) for leaf, values in along.items()}
  deviations = {leaf: sq_norms[leaf] - 2 * projections[leaf] - mean_sq_norms[leaf] for leaf in sq_norms}
  return GradientMoments(loss, mean_grad, mean_sq_norms, sq_norms, deviations, projections)


def sharded_moments(
  loss_fn: LossFn, params: Params, examples: Batch, *, mesh: Mesh, chunk_size: int, route: Route = "ghost"
) -> GradientMoments:
  """Compute `gradient_moments` with the examples spread over the mesh axis "data", each device working through its own.

  Two all-reduces of a gradient in all; on one device it is `gradient_moments`. N must be a multiple of the number of devices on
  "data": where it is not, all the work is done on every device.
  """
  devices = mesh.shape["data"]
  if devices == 1 or count_examples(examples) % devices:
    return gradient_moments(loss_fn, params, examples, chunk_size=chunk_size, route=route)

  def own(params: Params, examples: Batch) -> GradientMoments:
    return gradient_moments(loss_fn, params, examples, chunk_size=chunk_size, route=route, axis_name="data")

  spread: Any = P("data")
  whole: Any = P()
  specs = GradientMoments(whole, whole, whole, spread, spread, spread)
  # Types of varying arrays are not checked: the taps of the ghost route are zeros made inside.
  mapped = jax.shard_map(own, mesh=mesh, in_specs=(whole, spread), out_specs=specs, check_vma=False)
  return mapped(params, examples)


def _by_vmap(
  loss_fn: LossFn, params: Params, examples: Batch, loss: Array, mean_grad: Params, chunk_size: int
) -> GradientMoments:
  names = leaf_names(params)

  def compare(example: Example) -> tuple[dict[str, Array], ...]:
    grad = jax.grad(loss_fn)(params, example)
    deviation = optax.tree.sub(grad, mean_grad)
    along = map(dot, jax.tree.leaves(deviation), jax.tree.leaves(mean_grad))
    return leaf_sq_norms(grad), leaf_sq_norms(deviation), dict(zip(names, along, strict=True))

  sq_norms, deviations, projections = jax.lax.map(compare, examples, batch_size=chunk_size)
  return GradientMoments(loss, mean_grad, leaf_sq_norms(mean_grad), sq_norms, deviations, projections)


def in_metric(loss_fn: LossFn, params: Params, metric: Params) -> tuple[Callable[..., Array], Params]:
  """Change coordinates so that plain squared norms of gradients become weighted ones.

      w = m^(1/2) * u,        grad_u l = m^(1/2) * grad_w l,        |grad_u l|^2 = sum_j m_j (grad_w l)_j^2

  Args:
    metric: m, positive, like `params`.

  Returns:
    The loss as a function of (u, example), and u at `params`: arguments for `gradient_moments`.
  """
  root = jax.tree.map(jnp.sqrt, metric)
  return lambda u, example: loss_fn(jax.tree.map(jnp.multiply, root, u), example), jax.tree.map(
    jnp.divide, params, root
  )


def adam_metric(second_moment: Params, *, epsilon: float = 1e-8) -> Params:
  """Weigh each coordinate as Adam's step does: m_j = 1 / (sqrt(v_j) + epsilon).

  tr(m Sigma) / (G'mG) is then the noise scale of a step along the preconditioned gradient. A heuristic: v itself depends on the batch
  size it was collected at, and McCandlish et al. (2018, footnotes 7 and 10) report mixed results with it.

  Args:
    second_moment: v, the running mean of squared gradients, like the parameters. A common factor (Adam's bias correction)
      cancels in the ratio, but for epsilon.
  """
  return jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + epsilon), second_moment)
