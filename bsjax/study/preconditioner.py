"""The preconditioner that an optimizer's next step applies to the gradient, read off its state."""

import jax
import jax.numpy as jnp
import optax

from bsjax.optim import epsilon_of
from bsjax.probes import adam_preconditioner, trust_ratio_preconditioner
from bsjax.train import TrainState
from bsjax.types import Hparams, Params

PRECONDITIONED = ("adam", "adamw", "lars", "lamb")
LARS_COEFFICIENT = 0.001
"""As `bsjax.optim.make_optimizer` has them."""


def preconditioner_scale(optimizer: str, hparams: Hparams, state: TrainState, mean_grad: Params) -> Params:
  """Returns s, like the parameters, with which the next step is w <- w - eta s^2 * (smoothed gradient), up to weight decay.

  Args:
    optimizer: of `PRECONDITIONED`.
    mean_grad: the gradient over the data set, which LARS divides by; the optimizer itself takes a minibatch's. LAMB divides by Adam's
      smoothed direction, which its state holds. Weight decay is left out of both.

  Holds: Adam's moments are corrected for as many updates as were made, at least one.
  """
  if optimizer == "lars":
    return trust_ratio_preconditioner(state.params, mean_grad, coefficient=LARS_COEFFICIENT)
  is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
  adam = next(node for node in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(node))
  count = jnp.maximum(adam.count, 1)
  scale = adam_preconditioner(adam.nu, count, beta2=hparams.beta2, epsilon=epsilon_of(optimizer, hparams))
  if optimizer in ("adam", "adamw"):
    return scale
  smoothed = optax.tree.scale(1 / (1 - hparams.momentum**count), adam.mu)
  direction = jax.tree.map(lambda s, m: s**2 * m, scale, smoothed)
  return optax.tree.mul(scale, trust_ratio_preconditioner(state.params, direction, coefficient=1.0))
