"""Rules that carry hyperparameters from one batch size to another."""

import math

from bsjax.types import Hparams

SCALING_RULES = ("none", "linear", "sqrt")
"""Rules of the learning rate alone."""


def scale_learning_rate(rule: str, base_learning_rate: float, *, batch_size: int, reference_batch_size: int) -> float:
  """Carry a learning rate from the reference batch size to `batch_size`.

  With k = batch_size / reference_batch_size, the base rate is multiplied by 1 ("none"), k ("linear") or sqrt(k)
  ("sqrt"). A rule is applied where a sweep is built, in the open, and never inside an optimizer.

  Args:
    rule: one of `SCALING_RULES`.
    base_learning_rate: the rate at `reference_batch_size`.
    batch_size: examples per update.
    reference_batch_size: examples per update for which the base rate is meant.

  Raises:
    ValueError: the rule is unknown, or a batch size is not positive.

  Source: Goyal et al. (2017), section 2.1, "linear scaling rule", an argument about SGD; You et al. (2019, v3),
  tables 5 and 6, for the square root, with LAMB. Neither holds for every batch size: a sweep finds out which does where.

  >>> [scale_learning_rate(rule, 0.1, batch_size=1024, reference_batch_size=256) for rule in SCALING_RULES]
  [0.1, 0.4, 0.2]
  """
  ratio = _ratio(batch_size, reference_batch_size)
  if rule == "none":
    return base_learning_rate
  if rule == "linear":
    return base_learning_rate * ratio
  if rule == "sqrt":
    return base_learning_rate * math.sqrt(ratio)
  raise ValueError(f"Unknown scaling rule {rule!r}; use one of {', '.join(SCALING_RULES)}.")


def noise_limited_rate(
  base_learning_rate: float, noise_scale: float, *, batch_size: int, reference_batch_size: int
) -> float:
  """Carry a learning rate along the optimum of a quadratic with gradient noise.

      rate(B) = rate_max / (1 + noise_scale / B),        rate_max fixed by the base rate at the reference batch size

  Linear in B far below the noise scale, constant far above it.

  Args:
    noise_scale: in examples, `hessian_noise` or its cheap proxy `gradient_noise`; 0 gives the base rate everywhere.

  Raises:
    ValueError: a batch size is not positive, or the noise scale is negative or not finite.

  Source: McCandlish et al. (2018), equation 2.6.

  >>> noise_limited_rate(0.1, 300.0, batch_size=300, reference_batch_size=100)
  0.2
  """
  _ratio(batch_size, reference_batch_size)
  if not (math.isfinite(noise_scale) and noise_scale >= 0):
    raise ValueError(f"noise_scale={noise_scale} must be a finite number of examples, 0 or more.")
  return base_learning_rate * (1 + noise_scale / reference_batch_size) / (1 + noise_scale / batch_size)


def scale_adam(hparams: Hparams, *, batch_size: int, reference_batch_size: int) -> Hparams:
  """Carry Adam's hyperparameters, all of them, by the square-root rule.

      rate sqrt(k),  1 - k (1 - beta1),  1 - k (1 - beta2),  epsilon / sqrt(k),        k = batch_size / reference_batch_size

  So that the averages remember as many examples as before, and the noise of a step relative to its length stays.

  Args:
    hparams: plain numbers; `epsilon` not 0, which would stand for a published value.

  Returns:
    The same with `learning_rate`, `momentum` (beta1), `beta2` and `epsilon` changed.

  Raises:
    ValueError: k (1 - beta) >= 1 for one of the betas, where the rule has no meaning; the message says up to which batch size it has.

  Source: Malladi et al. (2022), "On the SDEs and scaling rules for adaptive gradient algorithms", the square-root scaling rule for Adam,
  for gradients that are mostly noise.

  >>> scale_adam(Hparams(0.001, 0.9, 0.999, epsilon=1e-8), batch_size=1024, reference_batch_size=256)[:3]
  (0.002, 0.6, 0.996)
  """
  ratio = _ratio(batch_size, reference_batch_size)
  momentum, beta2 = (round(1 - ratio * (1 - beta), 12) for beta in (float(hparams.momentum), float(hparams.beta2)))
  if min(momentum, beta2) <= 0:
    largest = math.ceil(round(reference_batch_size / float(1 - min(hparams.momentum, hparams.beta2)), 6)) - 1
    raise ValueError(
      f"batch_size={batch_size} gives beta1={momentum:g}, beta2={beta2:g}: from {reference_batch_size} the rule holds up to {largest}."
    )
  return hparams._replace(
    learning_rate=hparams.learning_rate * math.sqrt(ratio),
    momentum=momentum,
    beta2=beta2,
    epsilon=hparams.epsilon / math.sqrt(ratio),
  )


def half_life_beta2(half_life: float, *, batch_size: int, tokens_per_example: int = 1) -> float:
  """Compute the beta2 with which Adam's second moment forgets half in a given number of tokens (or examples), at any batch size.

      beta2 = 2^(-B T / half_life),        T = tokens_per_example

  Raises:
    ValueError: a number that is not positive.

  Source: Marek et al. (2025), "Small batch size training for language models".

  >>> [round(half_life_beta2(1e7, batch_size=size, tokens_per_example=512), 8) for size in (1, 4096)]
  [0.99996451, 0.86470791]
  """
  if not min(half_life, batch_size, tokens_per_example) > 0:
    raise ValueError(f"{half_life=}, {batch_size=} and {tokens_per_example=} must all be positive.")
  return 0.5 ** (batch_size * tokens_per_example / half_life)


def _ratio(batch_size: int, reference_batch_size: int) -> float:
  if batch_size <= 0 or reference_batch_size <= 0:
    raise ValueError(f"{batch_size=} and {reference_batch_size=} must both be positive.")
  return batch_size / reference_batch_size
