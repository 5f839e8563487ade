"""Optimizers by name, each an Optax chain of array hyperparameters."""

import jax
import optax

from bsjax.optim.schedules import Schedule
from bsjax.types import Hparams, Params

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adamw", "lars", "lamb")


def make_optimizer(name: str, hparams: Hparams, schedule: Schedule) -> optax.GradientTransformation:
  """Build the optimizer `name` from hyperparameters that may be traced.

  With w a parameter, g its gradient, t the step counted from 0, eta_t = learning_rate * schedule(t), m = momentum,
  lambda = weight_decay, b2 = beta2, and d = g + lambda w:

      sgd       w <- w - eta_t d
      momentum  u <- m u + d;  w <- w - eta_t u
      nesterov  u <- m u + d;  w <- w - eta_t (d + m u)
      lars      v <- m v + eta_t (0.001 |w| / |d|) d;  w <- w - v
      adamw     p <- m p + (1 - m) g;  q <- b2 q + (1 - b2) g^2;  p' = p / (1 - m^(t+1));  q' = q / (1 - b2^(t+1))
                r = p' / (sqrt(q') + 1e-8) + lambda w;  w <- w - eta_t r
      lamb      r as for adamw, with 1e-6 instead of 1e-8;  w <- w - eta_t (|w| / |r|) r

  Norms are those of one parameter array (one "layer"); where one of the two is 0, the whole factor (0.001 |w| / |d| or
  |w| / |r|) is 1.

  Args:
    name: one of `OPTIMIZERS`.
    hparams: scalars; build the optimizer inside the traced function, so that one program serves every value.
    schedule: unit-peak factor of the rate, see `make_schedule`.

  Returns:
    The transformation. `update` needs the parameters as its third argument.

  Raises:
    ValueError: the name is unknown.

  Holds: parameters with fewer than two axes (biases, scales of a normalisation) get neither weight decay nor a trust
  ratio. This is a convention of most published code and part of none of the formulas; they then follow plain momentum
  (lars, without the factor 0.001) or Adam (lamb) at the full rate.

  Source and variants:
    momentum: the form with the rate outside the buffer, Goyal et al. (2017), section 3, remark 2, which needs no
      correction when the rate changes. Weight decay is added to the gradient, their equation 8, so the rate scales it.
    adamw: Loshchilov and Hutter (2019), algorithm 2, but with the decay multiplied by the rate, as in common code.
    lars: You, Gitman and Ginsburg (2017) as in `optax.lars`: the rate inside the buffer, without Goyal's correction,
      and a denominator |g + lambda w| where the common reading of the paper has |g| + lambda |w|.
    lamb: You et al. (2019, v3), algorithm 2, with phi(z) = z, and with Adam's bias correction, which v3 lacks.
  """
  eta, decay = hparams.learning_rate, hparams.weight_decay
  momentum, beta2 = hparams.momentum, hparams.beta2

  def rate(step):
    return eta * schedule(step)

  coupled_decay = optax.add_decayed_weights(decay, mask=has_several_axes)
  if name == "sgd":
    return optax.chain(coupled_decay, optax.sgd(rate))
  if name == "momentum":
    return optax.chain(coupled_decay, optax.sgd(rate, momentum))
  if name == "nesterov":
    return optax.chain(coupled_decay, optax.sgd(rate, momentum, nesterov=True))
  if name == "adamw":
    return optax.adamw(rate, momentum, beta2, weight_decay=decay, mask=has_several_axes)
  if name == "lars":
    return optax.lars(rate, decay, has_several_axes, trust_ratio_mask=has_several_axes, momentum=momentum)
  if name == "lamb":
    return optax.chain(
      optax.scale_by_adam(momentum, beta2, eps=1e-6),
      coupled_decay,
      optax.masked(optax.scale_by_trust_ratio(), has_several_axes),
      optax.scale_by_learning_rate(rate),
    )
  raise ValueError(f"Unknown optimizer {name!r}; use one of {', '.join(OPTIMIZERS)}.")


def has_several_axes(params: Params) -> Params:
  """Mark the parameters that weight decay and trust ratios apply to: those with two axes or more."""
  return jax.tree.map(lambda param: param.ndim > 1, params)
