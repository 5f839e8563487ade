"""Losses and gradients of single examples, and their mean over a data set: what everything else is tested against."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bsjax.probes.chunks import count_examples, sum_over_chunks
from bsjax.probes.leaves import wide
from bsjax.types import Array, Batch, Example, Params

LossFn = Callable[[Params, Example], Array]
"""The loss of one example, f32[]; the example has no leading axis."""


def per_example_losses(loss_fn: LossFn, params: Params, examples: Batch) -> Array:
  """Compute the loss of each example, f32[B], all at once."""
  return jax.vmap(loss_fn, (None, 0))(params, examples)


def per_example_grads(loss_fn: LossFn, params: Params, examples: Batch) -> Params:
  """Compute the gradient of each example's loss, all at once.

  Returns:
    A pytree like `params` with leading axis B: B times the memory of the parameters.
  """
  return jax.vmap(jax.grad(loss_fn), (None, 0))(params, examples)


def mean_gradient(loss_fn: LossFn, params: Params, examples: Batch, *, chunk_size: int) -> tuple[Array, Params]:
  """Compute the mean loss over all examples, and its gradient.

      L = (1/N) sum_i l_i,        G = (1/N) sum_i grad l_i

  Args:
    loss_fn: the loss of one example.
    params: where to evaluate.
    examples: a pytree with leading axis N.
    chunk_size: examples per pass, static; N need not be a multiple of it.

  Returns:
    The loss f32[], and G like `params`: sums over all examples, in float32 at least, divided once.
  """

  def loss_sum(params, chunk):
    return jnp.sum(wide(per_example_losses(loss_fn, params, chunk)))

  def chunk_fn(chunk):
    return jax.tree.map(wide, jax.value_and_grad(loss_sum)(params, chunk))

  sums = sum_over_chunks(chunk_fn, examples, chunk_size=chunk_size)
  return optax.tree.scale(1 / count_examples(examples), sums)
