"""Products of a data set's Hessian with vectors."""

import jax
import jax.numpy as jnp
import optax

from bsjax.probes.chunks import count_examples, sum_over_chunks
from bsjax.probes.per_example import LossFn, per_example_losses
from bsjax.types import Batch, Params


def hessian_vector_product(
  loss_fn: LossFn, params: Params, examples: Batch, vector: Params, *, chunk_size: int
) -> Params:
  """Multiply the Hessian of the mean loss over all examples with a vector.

      H v = (1/N) sum_i grad^2 l_i v,        grad^2 l v = d/de grad l(params + e v) at e = 0

  Forward over reverse: the derivative, along the vector, of the gradient of a chunk's summed loss.

  Args:
    loss_fn: the loss of one example.
    params: where to evaluate.
    examples: a pytree with leading axis N.
    vector: a pytree like `params`.
    chunk_size: examples per pass, static; N need not be a multiple of it.

  Returns:
    H v like `params`. Costs about two gradients of the data set, and no more memory than two gradients of a chunk.

  Holds: a matvec for `top_eigenvalue` is `functools.partial(hessian_vector_product, loss_fn, params, examples,
  chunk_size=...)`. Where the loss has kinks (ReLU), H is that of the smooth piece at hand.

  Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian".
  """

  def chunk_fn(chunk):
    def grad_sum(params):
      return jax.grad(lambda params: jnp.sum(per_example_losses(loss_fn, params, chunk)))(params)

    return jax.jvp(grad_sum, (params,), (vector,))[1]

  sums = sum_over_chunks(chunk_fn, examples, chunk_size=chunk_size)
  return optax.tree.scale(1 / count_examples(examples), sums)
