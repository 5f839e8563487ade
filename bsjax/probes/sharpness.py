"""Sharpness by other measures: the worst and the average neighbour, and the curvature along the gradients that training follows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bsjax.probes.ascent import BALL, highest
from bsjax.probes.chunks import count_examples, sum_over_chunks
from bsjax.probes.hvp import hessian_vector_product
from bsjax.probes.keskar import check_positive
from bsjax.probes.leaves import wide
from bsjax.probes.per_example import LossFn, mean_gradient, per_example_losses
from bsjax.types import Array, Batch, Key, Params


class SamSharpness(NamedTuple):
  """A lower bound of the highest rise of the loss within a ball."""

  value: Array
  """max L(w + e) - L(w), f32[], as high as it was found; never negative."""
  loss: Array
  """L(w), f32[]."""
  grad_norm: Array
  """|grad L(w)|, f32[]. Where it is not 0 the value holds a slope as well, about radius |grad L| without `adaptive`."""
  one_step: Array
  """L(w + e) - L(w) for the e of one step of SAM, f32[]: 0 where the gradient is zero, negative where the step overshoots."""
  gap: Array
  """By how much the linear model at the best e still rises within the ball, f32[]: 0 at a first-order maximum."""
  starts: Array
  """L(w + e) - L(w) from each start, f32[1 + R], SAM's own step first: where they differ, there are several local maxima."""
  num_evaluations: Array
  """Losses with gradients over all examples, i32[]."""


class AverageSharpness(NamedTuple):
  """The mean rise of the loss under Gaussian noise."""

  value: Array
  """E L(w + e) - L(w), f32[], estimated; negative where the curvature is on the whole."""
  sem: Array
  """Its standard error over the pairs of draws, f32[]."""
  loss: Array
  """L(w), f32[]."""
  grad_norm: Array
  """|grad L(w)|, f32[]. The pairs cancel the slope, so it does not enter the value."""


class BatchSharpness(NamedTuple):
  """The curvature of minibatches along their own gradients, over R batches."""

  value: Array
  """The mean of the ratios g_B'H_B g_B / |g_B|^2, f32[]."""
  sem: Array
  """Its standard error, f32[]; NaN for fewer than two batches."""
  ratio_of_means: Array
  """The mean of g_B'H_B g_B over the mean of |g_B|^2, f32[]."""
  ratio_of_means_sem: Array
  """Its standard error to first order, f32[]."""
  loss: Array
  """The loss of all examples, f32[]."""
  grad_norm: Array
  """The norm of its gradient, f32[]."""
  num_batches: Array
  """Batches with a gradient that is not zero, i32[]: only they have a ratio."""


class GradientCurvature(NamedTuple):
  """The curvature of the loss along its gradient."""

  value: Array
  """G'HG / |G|^2, f32[]; NaN where G = 0, which has no direction."""
  residual: Array
  """|H v - value v| for v = G / |G|, f32[]: some eigenvalue of H lies within it of `value`."""
  loss: Array
  grad_norm: Array
  """|G|, f32[]."""


def sam_sharpness(
  loss_fn: LossFn,
  params: Params,
  examples: Batch,
  key: Key,
  *,
  radius: float | Array,
  chunk_size: int,
  adaptive: bool = False,
  num_steps: int = 10,
  num_restarts: int = 1,
) -> SamSharpness:
  """Measure how high the loss rises within a ball around the parameters.

      max L(w + e) - L(w)   over   |e| <= radius,   adaptive: |e / |w|| <= radius elementwise, e_i = 0 where w_i = 0

  The first climb (`ascent.climb`) starts with SAM's step e = radius G / |G| (adaptive: radius w^2 G / |w G|), the others at random
  points of the sphere: at a minimiser G is zero, and the step with it.

  Args:
    radius: rho; an array may be traced. 0.05 in SAM's paper, 0.5 and more for the adaptive form in ASAM's.
    num_steps: most gradients of all examples in one climb.
    num_restarts: climbs from random points.

  Returns:
    The best of all climbs. Costs at most 1 + (1 + num_restarts) num_steps gradients.

  Raises:
    ValueError: `radius` (where it is concrete) is not positive and finite, or no steps.

  Holds: near a minimum about radius^2 / 2 times the largest eigenvalue of H, or of diag(|w|) H diag(|w|) in the adaptive form. The
  climb is then the power method: with the ratio q of the two largest eigenvalues the relative error falls as q^(2 steps) or
  faster. 0 at a maximum. NaN where the loss or the gradient at w is not finite.
  Reparametrisations: scaling the layers of a ReLU net (W1 -> a W1, W2 -> W2 / a), or any scaling of single parameters
  that keeps the function, leaves the adaptive form unchanged and changes the other.

  Source: Foret et al. (2021), "Sharpness-aware minimization", equations 1 and 2; Kwon et al. (2021), "ASAM", equations 3 and 7, without the
  0.01 that their code adds to |w| and that would break the invariance; Dinh et al. (2017), section 4.
  """
  check_positive("radius", radius)
  if num_steps < 1 or num_restarts < 0:
    raise ValueError(f"num_steps={num_steps}, num_restarts={num_restarts}: wanted at least 1 and 0.")
  centre, unravel = ravel_pytree(params)
  scale = radius * (jnp.abs(centre) if adaptive else jnp.ones_like(centre))

  def evaluate(point):
    loss, grads = mean_gradient(loss_fn, unravel(centre + scale * point), examples, chunk_size=chunk_size)
    return loss, ravel_pytree(grads)[0]

  def value_and_grad(point):
    loss, grad = evaluate(point)
    return loss, scale * grad

  loss, grad = evaluate(jnp.zeros_like(centre))
  sam_step = BALL.extreme(scale * grad, jnp.zeros_like(centre))
  normal = jax.random.normal(key, (num_restarts, centre.size), centre.dtype)
  starts = jnp.concatenate([sam_step[None], normal / jnp.linalg.norm(normal, axis=1, keepdims=True)])
  best, peaks = highest(value_and_grad, starts, BALL, num_steps=num_steps)
  grad_norm = jnp.linalg.norm(grad)
  return SamSharpness(
    value=jnp.where(jnp.isfinite(grad_norm), jnp.maximum(best.value - loss, 0), jnp.nan),
    loss=loss,
    grad_norm=grad_norm,
    one_step=peaks.start_value[0] - loss,
    gap=best.gap,
    starts=peaks.value - loss,
    num_evaluations=1 + jnp.sum(peaks.num_evaluations),
  )


def average_sharpness(
  loss_fn: LossFn,
  params: Params,
  examples: Batch,
  key: Key,
  *,
  radius: float | Array,
  num_draws: int,
  chunk_size: int,
  adaptive: bool = False,
) -> AverageSharpness:
  """Estimate how much Gaussian noise on the parameters raises the loss on average.

      E L(w + e) - L(w),    e ~ N(0, radius^2 I),   adaptive: e ~ N(0, radius^2 diag(w^2))

  Each draw is a pair +e and -e, in which the slope cancels exactly: what varies between pairs is curvature.

  Args:
    radius: the standard deviation of the noise on each parameter, absolute or (adaptive) relative to it; an array may be traced.
    num_draws: pairs, at least 2; the standard error falls with their square root.

  Returns:
    The estimate and its standard error. Costs 2 num_draws losses of all examples and one gradient.

  Raises:
    ValueError: `radius` (where it is concrete) is not positive and finite, or fewer than two draws.

  Holds: for small radius about radius^2 / 2 tr(H), adaptive radius^2 / 2 sum w_i^2 H_ii. The rounding of the losses, about
  1e-7 of them in float32, adds to the standard error. NaN where a loss is.
  Reparametrisations: scaling the layers of a ReLU net (W1 -> a W1, W2 -> W2 / a), or any scaling of single parameters
  that keeps the function, leaves the adaptive form unchanged and changes the other.

  Source: Neyshabur et al. (2017), "Exploring generalization in deep learning", section 2 (expected sharpness, from PAC-Bayes
  bounds); Dinh et al. (2017), section 4.
  """
  check_positive("radius", radius)
  if num_draws < 2:
    raise ValueError(f"num_draws={num_draws} must be at least 2, to have a standard error.")
  centre, unravel = ravel_pytree(params)
  scale = radius * (jnp.abs(centre) if adaptive else jnp.ones_like(centre))
  loss, grads = mean_gradient(loss_fn, params, examples, chunk_size=chunk_size)

  def loss_at(shift):
    return _mean_loss(loss_fn, unravel(centre + shift), examples, chunk_size)

  def rise(draw_key):
    shift = scale * jax.random.normal(draw_key, centre.shape, centre.dtype)
    return (loss_at(shift) - loss + loss_at(-shift) - loss) / 2

  rises = jax.lax.map(rise, jax.random.split(key, num_draws))
  return AverageSharpness(jnp.mean(rises), _sem(rises), loss, optax.tree.norm(grads))


def batch_sharpness(
  loss_fn: LossFn, params: Params, examples: Batch, indices: Array, *, chunk_size: int
) -> BatchSharpness:
  """Measure the curvature of minibatches along their own gradients.

      E_B [ g_B'H_B g_B / |g_B|^2 ]    and    E_B [ g_B'H_B g_B ] / E_B |g_B|^2

  g_B and H_B are gradient and Hessian of the mean loss of one batch. Versions of the paper differ in the order of mean and ratio:
  the first, `value`, weighs every batch alike, the second, `ratio_of_means`, weighs them by |g_B|^2.

  Args:
    examples: a pytree with leading axis N.
    indices: which examples make each batch, i32[R, B], drawn as training draws them: the expectation is over that.
    chunk_size: examples per pass, static.

  Returns:
    Both ratios with standard errors over the R batches, taken as independent. Costs R times three gradients of a batch, and one of all
    examples.

  Holds: compare with 2 / learning_rate: by the paper, SGD at a constant rate hovers where `value` reaches it, as full-batch
  descent does where the largest eigenvalue does. With the whole data set as the one batch it is `gradient_curvature`. Batches
  whose gradient is exactly zero have no ratio and are left out of `value` (NaN if all are). Both may be negative. NaN where a loss is.
  Reparametrisations: not invariant; scaling the layers of a ReLU net (W1 -> a W1, W2 -> W2 / a) changes both. The steps of
  gradient descent depend on the parametrisation in the same way.

  Source: Andreyev and Beneventano (2024), arXiv 2412.20553, definition 3 (the mean of ratios); Lee and Jang (2023), "A new
  characterization of the edge of stability based on a sharpness measure aware of batch gradient distribution", have a ratio of
  means with the Hessian of all examples in place of H_B; Dinh et al. (2017), section 4.
  """

  def one_batch(batch_indices):
    batch = jax.tree.map(lambda x: jnp.asarray(x)[batch_indices], examples)
    _, grad = mean_gradient(loss_fn, params, batch, chunk_size=chunk_size)
    product = hessian_vector_product(loss_fn, params, batch, grad, chunk_size=chunk_size)
    return optax.tree.vdot(grad, product), optax.tree.vdot(grad, grad)

  forms, sq_norms = jax.lax.map(one_batch, indices)
  loss, grads = mean_gradient(loss_fn, params, examples, chunk_size=chunk_size)
  defined = sq_norms != 0
  count = jnp.sum(defined)
  ratios = forms / jnp.where(defined, sq_norms, 1)
  mean_sq_norm = jnp.mean(sq_norms)
  ratio = jnp.mean(forms) / mean_sq_norm
  return BatchSharpness(
    value=jnp.mean(ratios, where=defined),
    sem=jnp.std(ratios, ddof=1, where=defined) / jnp.sqrt(count),
    ratio_of_means=ratio,
    ratio_of_means_sem=_sem(forms - ratio * sq_norms) / mean_sq_norm,
    loss=loss,
    grad_norm=optax.tree.norm(grads),
    num_batches=count,
  )


def gradient_curvature(loss_fn: LossFn, params: Params, examples: Batch, *, chunk_size: int) -> GradientCurvature:
  """Measure the curvature of the loss of all examples along its gradient.

      G'HG / |G|^2

  Returns:
    The value, with the gradient's norm. Costs about three gradients of all examples.

  Holds: a Rayleigh quotient, between the smallest and the largest eigenvalue. To second order, a step of full-batch descent
  lowers the loss exactly where this is below 2 / learning_rate, the threshold of stability; at the edge of stability it hovers
  there. 1 / value is the best rate of one step. NaN where G is zero or not finite.
  Reparametrisations: not invariant; scaling the layers of a ReLU net (W1 -> a W1, W2 -> W2 / a) changes it.

  Source: Cohen et al. (2021), "Gradient descent on neural networks typically occurs at the edge of stability", section 2;
  Dinh et al. (2017), section 4.
  """
  loss, grad = mean_gradient(loss_fn, params, examples, chunk_size=chunk_size)
  norm = optax.tree.norm(grad)
  direction = optax.tree.scale(1 / norm, grad)
  product = hessian_vector_product(loss_fn, params, examples, direction, chunk_size=chunk_size)
  value = optax.tree.vdot(direction, product)
  residual = optax.tree.norm(optax.tree.add_scale(product, -value, direction))
  return GradientCurvature(value, residual, loss, norm)


def _mean_loss(loss_fn: LossFn, params: Params, examples: Batch, chunk_size: int) -> Array:
  def chunk_fn(chunk):
    return jnp.sum(wide(per_example_losses(loss_fn, params, chunk)))

  return sum_over_chunks(chunk_fn, examples, chunk_size=chunk_size) / count_examples(examples)


def _sem(values: Array) -> Array:
  return jnp.std(values, ddof=1) / jnp.sqrt(values.size)
