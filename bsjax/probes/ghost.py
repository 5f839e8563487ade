"""Norms of per-example gradients without the gradients: at the price of about one gradient of the data set."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr

from bsjax.probes.chunks import count_examples, scan_over_chunks
from bsjax.probes.forms import Form, choose_form
from bsjax.probes.leaves import dot, leaf_names, sum_squares, wide
from bsjax.probes.per_example import LossFn
from bsjax.probes.trace import Use, evaluate_loss, trace_loss
from bsjax.types import Array, Batch, Params

OPAQUE_NUMBERS = 2**22
"""Entries of per-example gradients of opaque parameters held at once."""


class GhostNorms(NamedTuple):
  """What one backward pass tells of the gradients g_i of N examples; leaves are named by path, "Dense_0/kernel"."""

  loss: Array
  """Mean loss, f32[]."""
  mean_grad: Params
  """G = (1/N) sum_i g_i, like the parameters."""
  sq_norms: dict[str, Array]
  """|g_i|^2 of each leaf, f32[N]; their sum over leaves is that of the whole gradient."""


class _Plan(NamedTuple):
  """How each parameter array is treated, decided from one chunk's shapes."""

  uses: dict[int, list[int]]
  """The uses of each parameter array that is not opaque, by number."""
  forms: dict[int, Form]
  opaque: dict[int, str]


def ghost_norms(loss_fn: LossFn, params: Params, examples: Batch, *, chunk_size: int) -> GhostNorms:
  """Compute the mean gradient and, for every leaf of the parameters, the squared norm of each example's gradient.

  One backward pass yields, for every operation y_i = x_i * W that is linear in a parameter W, the input x_i and the cotangent
  d_i = dl_i/dy_i (see `trace`). With x_i and d_i as matrices of T positions,

      g_i = sum_t x_it d_it',          |g_i|^2 = |x_i|^2 |d_i|^2                                    "rank one", T = 1
                                               = sum_{s,t} (x_is . x_it) (d_is . d_it)              "gram"
                                               = the sum of squares of the product, formed          "direct"

  A convolution is such a product of image patches; an embedding has one-hot x_it; a bias, a scale or a shift is a "sum" over
  positions; the steps of a `scan` are positions, too. Between the Gram form, 2 T^2 (K + M) FLOP for a matrix [K, M], and the direct
  form the cheaper is taken by count; the direct product replaces the one that the backward pass would make for G. A parameter that is
  used more than once has the products of all its uses added before they are squared.

  Args:
    loss_fn: the loss of one example.
    params: where to evaluate.
    examples: a pytree with leading axis N.
    chunk_size: examples per pass, static: memory is that of a gradient of so many, and of at most a few million numbers more.

  Returns:
    Mean loss and gradient as from `mean_gradient`, and the norms, equal to those of `jax.vmap(jax.grad(loss_fn))` to rounding.
    `ghost_routes` tells which form every leaf takes. A leaf whose use is not understood takes "vmap": its per-example
    gradients, and no others, are formed a few at a time.

  Holds: an example whose gradient is not finite spoils G, but no other example's norms.

  Source: Goodfellow (2015), "Efficient per-example gradient computations", for T = 1; Li et al. (2022), "Large language models
  can be strong differentially private learners", section 4, for the Gram form; Gray et al. (2024), "Normalization layer
  per-example gradients are sufficient to predict gradient noise scale in transformers", for scales, shifts and embeddings.
  There the layers of a framework are instrumented; here the products are read off the traced loss.
  """
  leaves, structure = jax.tree.flatten(params)
  jaxpr = trace_loss(loss_fn, params, examples)

  def chunk_fn(chunk: Batch) -> tuple[tuple[Array, list[Array]], list[Array]]:
    flat = jax.tree.leaves(chunk)
    plan, uses = _plan(jaxpr, leaves, flat)
    # Where per-example products are formed they are summed to G, and the backward pass need not form it again.
    formed = {at for at, form in plan.forms.items() if form.yields_grad}

    def loss_sum(params: Sequence[Array], taps: Sequence[Array]) -> tuple[Array, list[list[Array]]]:
      held = [jax.lax.stop_gradient(array) if at in formed else array for at, array in enumerate(params)]
      traced = evaluate_loss(jaxpr, held, flat, taps=taps)
      return jnp.sum(wide(traced.losses)), [use.batched for use in traced.uses]

    (total, batched), (grads, cotangents) = jax.value_and_grad(loss_sum, argnums=(0, 1), has_aux=True)(
      leaves, [jnp.zeros(use.output.shape, use.output.dtype) for use in uses]
    )
    opaque = _opaque_sq_norms(loss_fn, params, chunk, sorted(plan.opaque))
    norms = []
    for at, array in enumerate(leaves):
      if at in plan.opaque:
        norms.append(opaque[at])
      elif at not in plan.forms:  # an array that the loss does not read
        norms.append(jnp.zeros(flat[0].shape[0], jnp.promote_types(array.dtype, jnp.float32)))
      else:
        inputs = [(batched[number], cotangents[number]) for number in plan.uses[at]]
        sq_norms, grad = plan.forms[at].evaluate(array, inputs)
        norms.append(sq_norms)
        grads[at] = grads[at] if grad is None else grad
    return (total, [wide(grad) for grad in grads]), norms

  (total, grads), norms = scan_over_chunks(chunk_fn, examples, chunk_size=chunk_size)
  loss, mean_grads = optax.tree.scale(1 / count_examples(examples), (total, grads))
  return GhostNorms(loss, jax.tree.unflatten(structure, mean_grads), dict(zip(leaf_names(params), norms, strict=True)))


def ghost_projections(
  loss_fn: LossFn, params: Params, examples: Batch, direction: Params, *, chunk_size: int
) -> dict[str, Array]:
  """Project each example's gradient onto a direction v, leaf by leaf, without forming it.

      g_i . v = sum over uses of (x_i * v) . d_i

  for an operation y_i = x_i * W with cotangent d_i; v is the part of the direction that belongs to W. The arguments are those
  of `ghost_norms`. Costs about a gradient of the data set: a forward pass, the backward pass to the activations only, and
  one more product per operation.

  Returns:
    f32[N] for each leaf; their sum is the derivative of each loss along v.
  """
  leaves, directions = jax.tree.leaves(params), jax.tree.leaves(direction)
  jaxpr = trace_loss(loss_fn, params, examples)

  def chunk_fn(chunk: Batch) -> tuple[tuple[()], list[Array]]:
    flat = jax.tree.leaves(chunk)
    plan, uses = _plan(jaxpr, leaves, flat)

    def loss_sum(taps: Sequence[Array]) -> tuple[Array, list[list[Array]]]:
      traced = evaluate_loss(jaxpr, leaves, flat, taps=taps)
      return jnp.sum(wide(traced.losses)), [use.batched for use in traced.uses]

    cotangents, batched = jax.grad(loss_sum, has_aux=True)(
      [jnp.zeros(use.output.shape, use.output.dtype) for use in uses]
    )
    opaque = _opaque_projections(loss_fn, params, chunk, sorted(plan.opaque), directions)
    projections = []
    for at, array in enumerate(leaves):
      total = jnp.zeros(flat[0].shape[0], jnp.promote_types(array.dtype, jnp.float32))
      for number in plan.uses.get(at, ()):
        total += _project(uses[number], array, directions[at], batched[number], cotangents[number])
      projections.append(opaque.get(at, total))
    return (), projections

  _, projections = scan_over_chunks(chunk_fn, examples, chunk_size=chunk_size)
  return dict(zip(leaf_names(params), projections, strict=True))


def ghost_routes(loss_fn: LossFn, params: Params, examples: Batch) -> dict[str, str]:
  """Tell how `ghost_norms` treats each leaf: "rank one", "gram", "direct", "sum", "unused", or "vmap: " and the reason.

  Costs nothing: shapes are enough for `params` and `examples`.
  """
  routes: dict[int, str] = {}

  def look(leaves: list[Array], flat: list[Array]) -> None:
    plan, _ = _plan(trace_loss(loss_fn, jax.tree.unflatten(structure, leaves), examples), leaves, flat)
    routes.update({at: form.name for at, form in plan.forms.items()})
    routes.update({at: f"vmap: {reason}" for at, reason in plan.opaque.items()})

  leaves, structure = jax.tree.flatten(params)
  jax.eval_shape(look, leaves, jax.tree.leaves(examples))
  return {name: routes.get(at, "unused") for at, name in enumerate(leaf_names(params))}


def _plan(jaxpr: ClosedJaxpr, leaves: Sequence[Array], flat: Sequence[Array]) -> tuple[_Plan, list[Use]]:
  """Evaluates the loss once without taps, for what can be read off it; its numbers are not used, so jit drops them."""
  traced = evaluate_loss(jaxpr, leaves, flat)
  uses: dict[int, list[int]] = {}
  for number, use in enumerate(traced.uses):
    if use.weight.leaf not in traced.opaque:
      uses.setdefault(use.weight.leaf, []).append(number)
  forms = {at: choose_form([traced.uses[number] for number in numbers]) for at, numbers in uses.items()}
  return _Plan(uses, forms, traced.opaque), traced.uses


def _project(use: Use, array: Array, direction: Array, batched: list[Array], cotangents: Array) -> Array:
  half = jnp.finfo(array.dtype).bits < 32
  # In half precision x * v overflows easily, so v gets length 1 first.
  length = jnp.maximum(jnp.sqrt(sum_squares(direction)), jnp.finfo(jnp.float32).tiny) if half else 1.0
  tangent = (direction / length).astype(array.dtype)

  def one(cotangent: Array, *batched: Array) -> Array:
    # A use may be affine (y = x + W): its derivative is the linear part.
    _, moved = jax.jvp(lambda parameter: use.apply_one(parameter, *batched), (array,), (tangent,))
    return dot(moved, cotangent)

  return jax.vmap(one)(cotangents, *batched) * length


def _opaque_grads(loss_fn: LossFn, params: Params, chunk: Batch, opaque: list[int], reduce_fn: Any) -> dict[int, Any]:
  """Forms the per-example gradients of the opaque arrays only, a few at a time, and reduces each."""
  if not opaque:
    return {}
  leaves, structure = jax.tree.flatten(params)

  def partial_loss(some: list[Array], example: Any) -> Array:
    merged = list(leaves)
    for at, array in zip(opaque, some, strict=True):
      merged[at] = array
    return loss_fn(jax.tree.unflatten(structure, merged), example)

  def one(example: Any) -> list[Array]:
    return reduce_fn(jax.grad(partial_loss)([leaves[at] for at in opaque], example))

  numbers = max(1, sum(leaves[at].size for at in opaque))
  reduced = jax.lax.map(one, chunk, batch_size=max(1, min(OPAQUE_NUMBERS // numbers, count_examples(chunk))))
  return dict(zip(opaque, reduced, strict=True))


def _opaque_sq_norms(loss_fn: LossFn, params: Params, chunk: Batch, opaque: list[int]) -> dict[int, Array]:
  return _opaque_grads(loss_fn, params, chunk, opaque, lambda grads: [sum_squares(grad) for grad in grads])


def _opaque_projections(
  loss_fn: LossFn, params: Params, chunk: Batch, opaque: list[int], directions: list[Array]
) -> dict[int, Array]:
  def reduce(grads: list[Array]) -> list[Array]:
    return [dot(grad, directions[at]) for at, grad in zip(opaque, grads, strict=True)]

  return _opaque_grads(loss_fn, params, chunk, opaque, reduce)
