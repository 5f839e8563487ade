"""The gradient transformations of published optimizers that Optax does not have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bsjax.optim.schedules import Schedule
from bsjax.types import Array, Params


class AbsorbedMomentumState(NamedTuple):
  """A momentum buffer that holds steps instead of gradients."""

  step: Array
  """Updates made, i32[]."""
  rate: Array
  """Of the update before, f32[]."""
  velocity: Params


def absorb_momentum(
  rate_fn: Schedule, momentum: float | Array, *, nesterov: bool = False
) -> optax.GradientTransformation:
  """Keep the learning rate inside the momentum buffer, and correct the buffer when the rate changes.

      v <- m (eta_t / eta_(t-1)) v + eta_t g;      update: -v,  with Nesterov's momentum -(eta_t g + m v)

  Equal to `optax.sgd`, whose buffer holds gradients and is multiplied by the rate afterwards; without the quotient it is not, under a
  rate that changes.

  Args:
    rate_fn: eta_t, a function of the step.

  Holds: a rate of 0 forgets the buffer.

  Source: Goyal et al. (2017), section 3, equations 9 and 10, remark 2 ("momentum correction").
  """

  def init(params: Params) -> AbsorbedMomentumState:
    return AbsorbedMomentumState(jnp.zeros((), jnp.int32), jnp.zeros(()), optax.tree.zeros_like(params))

  def update(
    grads: Params, state: AbsorbedMomentumState, params: Params = None
  ) -> tuple[Params, AbsorbedMomentumState]:
    del params
    rate = rate_fn(state.step)
    kept = momentum * jnp.where(state.rate > 0, rate / jnp.where(state.rate > 0, state.rate, 1), 0)
    new = optax.tree.scale(rate, grads)
    velocity = optax.tree.add_scale(new, kept, state.velocity)
    ahead = optax.tree.add_scale(new, momentum, velocity) if nesterov else velocity
    return optax.tree.scale(-1, ahead), AbsorbedMomentumState(
      state.step + 1, jnp.asarray(rate, state.rate.dtype), velocity
    )

  return optax.GradientTransformation(init, update)


def scale_by_lars_2017(
  weight_decay: float | Array, is_layer: Callable[[Params], Any], *, coefficient: float = 0.001
) -> optax.GradientTransformation:
  """Add weight decay, and scale by LARS's local rate with the norms of gradient and weights apart.

      d <- c |w| / (|g| + lambda |w|) (g + lambda w)

  Args:
    is_layer: marks the parameters this applies to; the others keep g. Where the quotient's norms are 0 the factor is 1.

  Source: You, Gitman and Ginsburg (2017), "Large batch training of convolutional networks", algorithm 1, as commonly read.
  `optax.lars` divides by |g + lambda w| instead.
  """

  def scale(grad: Array, param: Array) -> Array:
    size = optax.safe_norm(param, 0.0)
    total = optax.safe_norm(grad, 0.0) + weight_decay * size
    ratio = jnp.where((size > 0) & (total > 0), coefficient * size / jnp.where(total > 0, total, 1), 1)
    return ratio * (grad + weight_decay * param)

  return optax.masked(optax.stateless_with_tree_map(scale), is_layer)


class UncorrectedAdamState(NamedTuple):
  """Exponential averages of gradients and of their squares."""

  mu: Params
  nu: Params


def scale_by_uncorrected_adam(
  beta1: float | Array, beta2: float | Array, epsilon: float | Array
) -> optax.GradientTransformation:
  """Scale as Adam does, without the correction of the averages' bias towards their start at 0.

      p <- b1 p + (1 - b1) g;  q <- b2 q + (1 - b2) g^2;  d <- p / (sqrt(q) + epsilon)

  Source: You et al. (2019, v3), "Large batch optimization for deep learning", algorithm 2. The first steps are
  (1 - b1) / sqrt(1 - b2) times Adam's: 3.2 with b1 = 0.9 and b2 = 0.999; the trust ratio of LAMB takes that away in layers.
  """

  def init(params: Params) -> UncorrectedAdamState:
    return UncorrectedAdamState(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

  def update(grads: Params, state: UncorrectedAdamState, params: Params = None) -> tuple[Params, UncorrectedAdamState]:
    del params
    mu = optax.tree.update_moment(grads, state.mu, beta1, 1)
    nu = optax.tree.update_moment(grads, state.nu, beta2, 2)
    return jax.tree.map(lambda p, q: p / (jnp.sqrt(q) + epsilon), mu, nu), UncorrectedAdamState(mu, nu)

  return optax.GradientTransformation(init, update)


def scale_to(radius: float | Array) -> optax.GradientTransformation:
  """Scale a gradient to the given length, as one vector; one that is zero stays so."""

  def scale(grads: Params, params: Params) -> Params:
    del params
    length = optax.tree.norm(grads)
    return optax.tree.scale(radius / jnp.where(length > 0, length, 1), grads)

  return optax.stateless(scale)
