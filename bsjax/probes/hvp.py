"""Products of a data set's curvature with vectors: of the Hessian, the Gauss-Newton matrix and the empirical Fisher matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bsjax.probes.chunks import count_examples, sum_over_chunks
from bsjax.probes.per_example import LossFn, per_example_losses
from bsjax.types import Array, Batch, Example, Params

OutputsFn = Callable[[Params, Example], Array]
"""What the model says about one example, such as its logits f32[C]."""
OutputLossFn = Callable[[Array, Example], Array]
"""The loss of one example, f32[], given the model's outputs for it."""


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

  Holds: a matvec for `eigenpairs` is `functools.partial(hessian_vector_product, loss_fn, params, examples,
  chunk_size=...)`. Where the loss has kinks (ReLU), H is that of the smooth piece at hand. Over a mesh: `over_mesh`.

  Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian".
  """

  def chunk_fn(chunk):
    return jax.jvp(_grad_of_sum(loss_fn, chunk), (params,), (vector,))[1]

  return _mean(chunk_fn, examples, chunk_size)


def hessian_block_product(
  loss_fn: LossFn, params: Params, examples: Batch, vectors: Params, *, chunk_size: int
) -> Params:
  """Multiply the Hessian of the mean loss with each of K vectors.

  The gradient of a chunk is linearised once, and the linear map applied to one vector after the other: what does not depend
  on the vector is computed once for all K.

  Args:
    vectors: a pytree like `params` with a leading axis K on every leaf; the rest as for `hessian_vector_product`.

  Returns:
    H v_k like `vectors`. Cheaper than K single products from K = 2 on (docs/bench_curvature.md), for the memory of K results and of
    one chunk's intermediate values.
  """

  def chunk_fn(chunk):
    _, multiply = jax.linearize(_grad_of_sum(loss_fn, chunk), params)
    return jax.lax.map(multiply, vectors)

  return _mean(chunk_fn, examples, chunk_size)


def gauss_newton_vector_product(
  outputs_fn: OutputsFn,
  output_loss_fn: OutputLossFn,
  params: Params,
  examples: Batch,
  vector: Params,
  *,
  chunk_size: int,
) -> Params:
  """Multiply the Gauss-Newton matrix of the mean loss with a vector.

      C v = (1/N) sum_i J_i' (grad_z^2 l_i) J_i v,        z_i = outputs_fn(params, i),  J_i = dz_i/dparams,  l_i = output_loss_fn(z_i, i)

  The Hessian without the curvature of the model: positive semi-definite wherever the loss is convex in the outputs. For softmax
  cross-entropy of logits it is the Fisher matrix of the model's own predictions.

  Args:
    outputs_fn, output_loss_fn: the model and its loss, one example at a time; together the loss of the example.

  Returns:
    C v like `params`. Costs about two gradients of the data set.

  Source: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", equation 3.2.
  """

  def chunk_fn(chunk):
    return _gauss_newton(outputs_fn, output_loss_fn, params, chunk)(vector)

  return _mean(chunk_fn, examples, chunk_size)


def gauss_newton_block_product(
  outputs_fn: OutputsFn,
  output_loss_fn: OutputLossFn,
  params: Params,
  examples: Batch,
  vectors: Params,
  *,
  chunk_size: int,
) -> Params:
  """Multiply the Gauss-Newton matrix of the mean loss with each of K vectors.

  The model is linearised once a chunk, for all K.

  Args:
    vectors: a pytree like `params` with a leading axis K on every leaf; the rest as for `gauss_newton_vector_product`.

  Returns:
    C v_k like `vectors`.
  """

  def chunk_fn(chunk):
    return jax.lax.map(_gauss_newton(outputs_fn, output_loss_fn, params, chunk), vectors)

  return _mean(chunk_fn, examples, chunk_size)


def _gauss_newton(
  outputs_fn: OutputsFn, output_loss_fn: OutputLossFn, params: Params, chunk: Batch
) -> Callable[[Params], Params]:
  """Linearise the model at the parameters; return v -> sum_i J_i' (grad_z^2 l_i) J_i v over the chunk."""

  def outputs(params):
    return jax.vmap(outputs_fn, (None, 0))(params, chunk)

  def loss_grad(z):
    return jax.grad(lambda z: jnp.sum(jax.vmap(output_loss_fn)(z, chunk)))(z)

  z, push = jax.linearize(outputs, params)
  _, curve = jax.linearize(loss_grad, z)
  pull = jax.linear_transpose(push, params)

  def multiply(vector):
    return pull(curve(push(vector)))[0]

  return multiply


def fisher_vector_product(
  loss_fn: LossFn, params: Params, examples: Batch, vector: Params, *, chunk_size: int
) -> Params:
  """Multiply the empirical Fisher matrix, the uncentred covariance of the per-example gradients, with a vector.

      F v = (1/N) sum_i g_i (g_i'v),        g_i = grad l_i

  Positive semi-definite whatever the loss. It is not the Fisher matrix of the model's predictions, for which the labels would be
  drawn from them (that is `gauss_newton_vector_product` of a cross-entropy): near a minimum that fits every label it vanishes,
  where the other need not.

  Returns:
    F v like `params`. Costs about two gradients of the data set, and holds no per-example gradient.

  Source: Kunstner, Balles and Hennig (2019), "Limitations of the empirical Fisher approximation", equation 3.
  """

  def chunk_fn(chunk):
    def losses(params):
      return per_example_losses(loss_fn, params, chunk)

    _, push = jax.linearize(losses, params)
    return jax.linear_transpose(push, params)(push(vector))[0]

  return _mean(chunk_fn, examples, chunk_size)


def _grad_of_sum(loss_fn: LossFn, chunk: Batch) -> Callable[[Params], Params]:
  return jax.grad(lambda params: jnp.sum(per_example_losses(loss_fn, params, chunk)))


def _mean(chunk_fn: Callable[[Batch], Params], examples: Batch, chunk_size: int) -> Params:
  sums = sum_over_chunks(chunk_fn, examples, chunk_size=chunk_size)
  return optax.tree.scale(1 / count_examples(examples), sums)
