"""Gradient noise as the curvature weighs it: the noise scale that the theory names, and the learning rates it predicts."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import stdtrit

from bsjax.probes.chunks import count_examples, sum_over_chunks
from bsjax.probes.estimate import Estimate, around, fieller_interval, noise_statistics, ratio_estimate
from bsjax.probes.ghost import ghost_projections
from bsjax.probes.hvp import hessian_vector_product
from bsjax.probes.noise import sq_norm
from bsjax.probes.per_example import LossFn, mean_gradient
from bsjax.types import Array, Batch, Key, Params


class HessianMoments(NamedTuple):
  """Gradients g_i of N examples, their mean G, and the Hessian H of the mean loss."""

  loss: Array
  mean_grad_sq_norm: Array
  """|G|^2, f32[]."""
  curvature: Array
  """G'HG, f32[]."""
  projections: Array
  """(g_i - G)'HG, f32[N]."""
  quadratic_forms: Array
  """"exact": (g_i - G)'H(g_i - G), f32[N]. "randomised": w_r'H w_r, f32[R], each of which has the expectation tr(H Sigma)."""


class HessianNoise(NamedTuple):
  """What N examples say about the noise in the metric of the Hessian. Python numbers."""

  noise_scale: Estimate
  """tr(H Sigma) / G'HG of the distribution, in examples, with H taken for known."""
  dataset_noise_scale: float | None
  """The same ratio for these N examples as all there is; None where G'HG <= 0."""
  cov_trace: Estimate
  """tr(H Sigma): given whatever it is, since a Hessian may make it negative."""
  curvature: float
  """G'HG of these N examples."""
  max_learning_rate: float | None
  """eps_max = |G|^2 / G'HG: the best rate of a step along the full gradient; None where G'HG <= 0."""


def hessian_moments(loss_fn: LossFn, params: Params, examples: Batch, *, chunk_size: int) -> HessianMoments:
  """Multiply the Hessian with the deviation of every example's gradient, exactly.

      q_i = (g_i - G)'H(g_i - G),          tr(H Sigma) = sum_i q_i / (N - 1)

  Costs N Hessian-vector products with the whole data set, so about 2 N^2 gradients of one example, one product after the
  other: for small data sets, and to check the randomised form. Memory is that of a gradient of `chunk_size` examples.
  """
  loss, mean_grad = mean_gradient(loss_fn, params, examples, chunk_size=chunk_size)
  matvec = functools.partial(hessian_vector_product, loss_fn, params, examples, chunk_size=chunk_size)
  along = matvec(mean_grad)

  def one(example: Batch) -> tuple[Array, Array]:
    deviation = optax.tree.sub(jax.grad(loss_fn)(params, example), mean_grad)
    return optax.tree.vdot(deviation, along), optax.tree.vdot(deviation, matvec(deviation))

  projections, forms = jax.lax.map(one, examples)
  return HessianMoments(loss, sq_norm(mean_grad), optax.tree.vdot(mean_grad, along), projections, forms)


def randomised_hessian_moments(
  loss_fn: LossFn, params: Params, examples: Batch, key: Key, *, num_probes: int, chunk_size: int
) -> HessianMoments:
  """Estimate tr(H Sigma) from random sums of deviations, one Hessian-vector product each.

  The examples are dealt at random to R = `num_probes` disjoint groups of n = N // R (a remainder is left out), with random signs z_i:

      w_r = (n (1 - 1/N))^(-1/2) sum_{i in group r} z_i (g_i - G),          E[w_r w_r'] = Sigma,          E[w_r'H w_r] = tr(H Sigma)

  so their mean is unbiased, and their scatter contains both the choice of signs and the choice of examples. Costs about
  3 + 3 R / 2 + 2 R gradients of the data set at most: one for all w_r, two for each product; memory as a gradient of a chunk.

  Raises:
    ValueError: fewer than 2 probes, or more than N/2.

  Source: Hutchinson (1990) for random signs; McCandlish et al. (2018), equation 2.8, for what is estimated.
  """
  num_examples = count_examples(examples)
  if not 2 <= num_probes <= num_examples // 2:
    raise ValueError(f"num_probes={num_probes}, wanted 2 to {num_examples // 2}, half the number of examples")
  loss, mean_grad = mean_gradient(loss_fn, params, examples, chunk_size=chunk_size)
  matvec = functools.partial(hessian_vector_product, loss_fn, params, examples, chunk_size=chunk_size)
  along = matvec(mean_grad)
  size = num_examples // num_probes
  order_key, sign_key = jax.random.split(key)
  groups = jax.random.permutation(order_key, num_examples)[: num_probes * size].reshape(num_probes, size)
  signs = jax.random.rademacher(sign_key, (num_probes, size), jnp.float32)

  def signed_sum(group: Array, signs: Array) -> Params:
    def chunk_fn(chunk: tuple[Array, Array]) -> Params:
      index, sign = chunk
      some = jax.tree.map(lambda x: jnp.take(x, index, axis=0), examples)

      def loss(params: Params) -> Array:
        return jnp.vdot(sign, jax.vmap(loss_fn, (None, 0))(params, some))

      return jax.grad(loss)(params)

    total = sum_over_chunks(chunk_fn, (group, signs), chunk_size=chunk_size)
    return jax.tree.map(lambda sums, mean: sums - jnp.sum(signs) * mean, total, mean_grad)

  def one(group_and_signs: tuple[Array, Array]) -> Array:
    probe = optax.tree.scale((size * (1 - 1 / num_examples)) ** -0.5, signed_sum(*group_and_signs))
    return optax.tree.vdot(probe, matvec(probe))

  forms = jax.lax.map(one, (groups, signs))
  per_leaf = ghost_projections(loss_fn, params, examples, along, chunk_size=chunk_size)
  projections = sum(per_leaf.values(), start=jnp.zeros(num_examples))
  return HessianMoments(
    loss, sq_norm(mean_grad), optax.tree.vdot(mean_grad, along), projections - jnp.mean(projections), forms
  )


def hessian_noise(moments: HessianMoments) -> HessianNoise:
  """Estimate the noise scale in the metric of the Hessian, with an interval, or refuse.

  As `noise_statistics`, with x'Hy in place of x'y: T = tr(H Sigma), Q = G'HG - T/N, and their ratio. With exact quadratic
  forms the errors are those of the examples. With R random ones, w_r,

      Var(T) = Var(w'Hw) / R,          Var(Q) = 4 Var((g_i - G)'HG) / N + Var(w'Hw) / N^2,          Cov(T, Q) = -Var(T) / N

  and Fieller's interval holds the ratio, with Student's quantile for R - 1 degrees of freedom.

  H is a matrix, not a metric, where it has negative eigenvalues: the noise scale is refused if T or Q may not be positive, and
  eps_max where G'HG <= 0: along such a gradient no step is too long.

  Source: McCandlish et al. (2018), equations 2.6 to 2.8.
  """
  forms, projections = (np.asarray(x, np.float64) for x in (moments.quadratic_forms, moments.projections))
  curvature, mean_sq_norm, n = float(moments.curvature), float(moments.mean_grad_sq_norm), projections.size
  if forms.size == n:
    trace = forms.sum() / (n - 1)
    sem = forms.std(ddof=1) / math.sqrt(n)
    noise_scale = noise_statistics(
      loss=float(moments.loss), mean_grad_sq_norm=curvature, deviations=forms, projections=projections
    ).noise_scale
  else:
    trace, sem = forms.mean(), forms.std(ddof=1) / math.sqrt(forms.size)
    value, var_value = curvature - trace / n, 4 * projections.var(ddof=1) / n + forms.var(ddof=1) / n**2
    parts = trace, value, sem**2, -(sem**2) / n, var_value
    noise_scale = ratio_estimate(*parts, n)
    if noise_scale.value is not None:
      low, high = fieller_interval(*parts, quantile=-float(stdtrit(forms.size - 1, 0.025)))
      noise_scale = noise_scale._replace(ci_low=max(low, 0.0), ci_high=high)
  refused = Estimate(None, None, None, n, "unidentifiable", None)
  cov_trace = (
    around(float(trace), float(sem) ** 2, forms.size)._replace(n_examples=n) if math.isfinite(sem) else refused
  )
  if cov_trace.ci_low is None or cov_trace.ci_low <= 0:
    noise_scale = refused
  return HessianNoise(
    noise_scale=noise_scale,
    dataset_noise_scale=float(trace / curvature) if curvature > 0 else None,
    cov_trace=cov_trace,
    curvature=curvature,
    max_learning_rate=mean_sq_norm / curvature if curvature > 0 else None,
  )


def optimal_learning_rate(max_learning_rate: float, noise_scale: float, batch_size: int) -> float:
  """Predict the best rate of one step with a batch of B examples: eps_max / (1 + noise_scale / B).

  Source: McCandlish et al. (2018), equation 2.6, with the Hessian's noise scale (2.8).
  """
  return max_learning_rate / (1 + noise_scale / batch_size)


def optimal_loss_decrease(grad_sq_norm: float, max_learning_rate: float, noise_scale: float, batch_size: int) -> float:
  """Predict how much that step lowers the loss: (1/2) eps_max |G|^2 / (1 + noise_scale / B).

  Source: McCandlish et al. (2018), equation 2.7.
  """
  return 0.5 * max_learning_rate * grad_sq_norm / (1 + noise_scale / batch_size)
