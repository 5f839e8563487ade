"""Optimizers by name, each an Optax chain of array hyperparameters."""

import jax
import jax.numpy as jnp
import optax

from bsjax.optim.schedules import Schedule
from bsjax.optim.transforms import absorb_momentum, scale_by_lars_2017, scale_by_uncorrected_adam, scale_to
from bsjax.types import Array, Hparams, Params

OPTIMIZERS = (
  "sgd",
  "momentum",
  "momentum_absorbed",
  "nesterov",
  "nesterov_absorbed",
  "adam",
  "adamw",
  "lars",
  "lars_2017",
  "lars_2019",
  "lamb",
  "lamb_v3",
  "sam",
  "muon",
  "adafactor",
)


def make_optimizer(name: str, hparams: Hparams, schedule: Schedule) -> optax.GradientTransformationExtraArgs:
  """Build the optimizer `name` from hyperparameters that may be traced.

  With w a parameter, g its gradient, t the step counted from 0, eta_t = learning_rate * schedule(t), m = momentum,
  lambda = weight_decay, b2 = beta2, e = `epsilon_of`, d = g + lambda w, and p', q' Adam's averages:

      sgd        w <- w - eta_t d
      momentum   u <- m u + d;  w <- w - eta_t u
      nesterov   u <- m u + d;  w <- w - eta_t (d + m u)
      adamw      p <- m p + (1 - m) g;  q <- b2 q + (1 - b2) g^2;  p' = p / (1 - m^(t+1));  q' = q / (1 - b2^(t+1))
                 r = p' / (sqrt(q') + e) + lambda w;  w <- w - eta_t r
      adam       the same of d in place of g, without lambda w in r
      lars       v <- m v + eta_t (0.001 |w| / |d|) d;  w <- w - v
      lars_2017  v <- m v + eta_t (0.001 |w| / (|g| + lambda |w|)) d;  w <- w - v
      lars_2019  p <- m p + (1 - m) d;  w <- w - eta_t (|w| / |p|) p
      lamb       r as for adamw;  w <- w - eta_t (|w| / |r|) r
      lamb_v3    the same with p, q in place of p', q'
      sam        momentum, with the gradient at w + rho G / |G| of the same batch, G the gradient of all parameters, rho = radius
      muon       p <- m p + (1 - m) g;  o = O(m p / (1 - m^(t+2)) + (1 - m) g / (1 - m^(t+1)))
                 w <- w - eta_t (sqrt(max(1, columns / rows)) o + lambda w);  O(M) is near the orthogonal factor of M, by 5
                 Newton-Schulz steps; parameters that are no matrices follow adamw with m = 0.9 and o's
                 average in place of p'
      adafactor  optax.adafactor (second moments factored, updates clipped and relative to the parameter's size), plus lambda w

  "momentum_absorbed" and "nesterov_absorbed" keep eta_t inside the buffer and correct it when the rate changes: other
  arithmetic, the same numbers. Norms are those of one parameter array (one "layer"); where one of the two is 0, the whole factor
  (0.001 |w| / |d| or |w| / |r|) is 1.

  Args:
    name: one of `OPTIMIZERS`.
    hparams: scalars; build the optimizer inside the traced function, so that one program serves every value.
    schedule: unit-peak factor of the rate, see `make_schedule`.

  Returns:
    The transformation. `update` needs the parameters as its third argument, and for "sam" `grad_fn(params, 0) -> grads`.

  Raises:
    ValueError: the name is unknown.

  Holds: parameters with fewer than two axes (biases, scales of a normalisation) get neither weight decay nor a trust
  ratio. This is a convention of most published code and part of none of the formulas; they then follow plain momentum
  (lars, without the factor 0.001; lars_2019 its average p) or Adam (lamb) at the full rate.

  Source and variants:
    momentum: the form with the rate outside the buffer, Goyal et al. (2017), section 3, remark 2, which needs no
      correction when the rate changes. Weight decay is added to the gradient, their equation 8, so the rate scales it.
    adam: Kingma and Ba (2015), algorithm 1. adamw: Loshchilov and Hutter (2019), algorithm 2, but with the decay multiplied by the rate,
      as in common code.
    lars: You, Gitman and Ginsburg (2017) as in `optax.lars`: the rate inside the buffer, without Goyal's correction,
      and a denominator |g + lambda w|. lars_2017: the common reading of the paper. lars_2019: You et al. (2019, v3), algorithm 1, which
      normalises the momentum.
    lamb: You et al. (2019, v3), algorithm 2, with phi(z) = z, and with Adam's bias correction; lamb_v3: without, as printed there.
    sam: Foret et al. (2021), algorithm 1, over momentum. muon: Jordan et al. (2024), `optax.contrib.muon`.
    adafactor: Shazeer and Stern (2018).
  """
  rate_fn, descend = _rate(hparams, schedule)
  decay, momentum, beta2 = hparams.weight_decay, hparams.momentum, hparams.beta2
  epsilon = epsilon_of(name, hparams)
  decayed = optax.add_decayed_weights(decay, mask=has_several_axes)
  trusted = optax.masked(optax.scale_by_trust_ratio(), has_several_axes)
  adam = optax.scale_by_adam(momentum, beta2, eps=epsilon)
  builders = {
    "sgd": lambda: (decayed, descend),
    "momentum": lambda: (decayed, optax.trace(momentum), descend),
    "momentum_absorbed": lambda: (decayed, absorb_momentum(rate_fn, momentum)),
    "nesterov": lambda: (decayed, optax.trace(momentum, nesterov=True), descend),
    "nesterov_absorbed": lambda: (decayed, absorb_momentum(rate_fn, momentum, nesterov=True)),
    "adam": lambda: (decayed, adam, descend),
    "adamw": lambda: (adam, decayed, descend),
    "lars": lambda: (
      optax.lars(rate_fn, decay, has_several_axes, trust_ratio_mask=has_several_axes, momentum=momentum),
    ),
    "lars_2017": lambda: (scale_by_lars_2017(decay, has_several_axes), descend, optax.trace(momentum)),
    "lars_2019": lambda: (decayed, optax.ema(momentum, debias=False), trusted, descend),
    "lamb": lambda: (adam, decayed, trusted, descend),
    "lamb_v3": lambda: (scale_by_uncorrected_adam(momentum, beta2, epsilon), decayed, trusted, descend),
    "sam": lambda: (_sam(optax.chain(decayed, optax.trace(momentum), descend), hparams.radius),),
    "muon": lambda: (
      optax.contrib.muon(
        rate_fn,
        beta=momentum,
        weight_decay=decay,
        weight_decay_mask=has_several_axes,
        adam_b2=beta2,
        eps=epsilon,
      ),
    ),
    "adafactor": lambda: (
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.scale_by_param_block_rms(),
      decayed,
      descend,
    ),
  }
  if name not in builders:
    raise ValueError(f"Unknown optimizer {name!r}; use one of {', '.join(OPTIMIZERS)}.")
  return optax.with_extra_args_support(optax.chain(*builders[name]()))


def epsilon_of(name: str, hparams: Hparams) -> Array:
  """Return what an optimizer adds to the root of the second moment: `hparams.epsilon`, or where it is 0 the published 1e-8, LAMB's 1e-6."""
  published = 1e-6 if name.startswith("lamb") else 1e-8
  return jnp.where(jnp.asarray(hparams.epsilon) > 0, hparams.epsilon, published)


def _rate(hparams: Hparams, schedule: Schedule) -> tuple[Schedule, optax.GradientTransformation]:
  def rate(step):
    return hparams.learning_rate * schedule(step)

  return rate, optax.scale_by_learning_rate(rate)


def _sam(base: optax.GradientTransformation, radius) -> optax.GradientTransformationExtraArgs:
  """Take the gradient of the same batch a step of length `radius` uphill; `base` makes the update with it."""
  return optax.contrib.sam(base, optax.chain(scale_to(radius), optax.scale(-1)), opaque_mode=True)


def has_several_axes(params: Params) -> Params:
  """Mark the parameters that weight decay and trust ratios apply to: those with two axes or more."""
  return jax.tree.map(lambda param: param.ndim > 1, params)
