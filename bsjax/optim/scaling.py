"""Rules that carry a learning rate from one batch size to another."""

import math

SCALING_RULES = ("none", "linear", "sqrt")


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
  if batch_size <= 0 or reference_batch_size <= 0:
    raise ValueError(f"{batch_size=} and {reference_batch_size=} must both be positive.")
  ratio = batch_size / reference_batch_size
  if rule == "none":
    return base_learning_rate
  if rule == "linear":
    return base_learning_rate * ratio
  if rule == "sqrt":
    return base_learning_rate * math.sqrt(ratio)
  raise ValueError(f"Unknown scaling rule {rule!r}; use one of {', '.join(SCALING_RULES)}.")
