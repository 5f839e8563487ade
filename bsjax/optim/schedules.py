"""Learning-rate schedules with peak 1, to be multiplied by the rate; their numbers are arrays, only their names are static."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from bsjax.types import Array, Hparams

Schedule = Callable[[Array], Array]
"""Maps the number of updates already made, i32[], to the factor of the next one, f32[]."""

SCHEDULES = ("constant", "linear", "cosine", "step", "inverse_sqrt")
WARMUPS = ("none", "gradual", "constant")


def make_schedule(name: str, hparams: Hparams, *, warmup: str = "none", milestones: tuple[int, ...] = ()) -> Schedule:
  """Build a schedule of unit peak from hyperparameters that may be traced.

  With t the step counted from 0, W = `hparams.warmup_steps`, D = `hparams.decay_steps`, c = `hparams.decay_factor`,
  s = `hparams.warmup_factor`, and s_0 = s, or 1 / (W + 1) where s is 0,

      t <  W:  s_0 + (1 - s_0) t / W                          warmup "gradual"
               s                                              warmup "constant"
      t >= W, with x = min((t - W) / D, 1):
               1                                              "constant"
               1 - (1 - c) x                                  "linear"
               c + (1 - c) (1 + cos(pi x)) / 2                "cosine"
               c^(number of milestones <= t)                  "step"
               sqrt(D / (D + t - W))                          "inverse_sqrt"

  Args:
    name: one of `SCHEDULES`.
    hparams: scalars. Where `decay_steps` or `decay_factor` is not read it may be anything; `complete_schedule` fills in defaults.
    warmup: one of `WARMUPS`; W is not read without.
    milestones: steps at which "step" multiplies by c, ascending; static.

  Returns:
    A function of the step, which may be traced.

  Raises:
    ValueError: a name is unknown.

  Holds: the peak is exactly 1 and is reached at t = W. A gradual warm-up adds the same amount at every step, and wastes
  none on a factor of 0. Linear and cosine reach c at t = W + D: with D what the warm-up leaves of a run, one step after the last update.

  Source: Goyal et al. (2017), section 2.2, for both warm-ups; s = 1 / k starts theirs from the rate of the reference batch, k times
  smaller. Shallue et al. (2019), section 4.1, for linear decay to a fraction c (their alpha) in D steps (their T) and constant afterwards.
  Loshchilov and Hutter (2017), equation 5, for the cosine. Vaswani et al. (2017), equation 3, for the inverse square root: D = W.

  >>> ramp = make_schedule("constant", Hparams(0.1, warmup_steps=3), warmup="gradual")
  >>> [float(ramp(step)) for step in range(5)]
  [0.25, 0.5, 0.75, 1.0, 1.0]
  """
  if name not in SCHEDULES:
    raise ValueError(f"Unknown schedule {name!r}; use one of {', '.join(SCHEDULES)}.")
  if warmup not in WARMUPS:
    raise ValueError(f"Unknown warm-up {warmup!r}; use one of {', '.join(WARMUPS)}.")
  warmup_steps = 0 if warmup == "none" else jnp.asarray(hparams.warmup_steps, jnp.float32)

  def decay(step: Array) -> Array:
    if name == "constant":
      return jnp.ones((), jnp.float32)
    if name == "step":
      return hparams.decay_factor ** jnp.sum(step >= np.asarray(milestones, np.float32))
    since, length = step - warmup_steps, hparams.decay_steps
    if name == "inverse_sqrt":
      return jnp.sqrt(length / (length + jnp.maximum(since, 0)))
    rest = 1 - jnp.clip(since / length, 0, 1)
    if name == "cosine":
      rest = (1 - jnp.cos(jnp.pi * rest)) / 2
    return hparams.decay_factor + (1 - hparams.decay_factor) * rest

  def factor(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32)
    if warmup == "none":
      return decay(step)
    start = jnp.asarray(hparams.warmup_factor, jnp.float32)
    if warmup == "gradual":
      start = jnp.where(start > 0, start, 1 / (warmup_steps + 1))
      start += (1 - start) * step / jnp.maximum(warmup_steps, 1)
    return jnp.where(step < warmup_steps, start, decay(step))

  return factor


def complete_schedule(
  name: str, hparams: Hparams, *, num_steps: int, warmup: str = "none", milestones: tuple[int, ...] = ()
) -> Hparams:
  """Fill in what a schedule needs and `hparams` leaves at 0, and check it: the decay spans what the warm-up leaves of a run.

  Args:
    hparams: plain numbers.
    num_steps: updates of the whole run, warm-up included.

  Returns:
    The same with `decay_steps` set, where the schedule reads it and it was 0: to `num_steps` minus the warm-up; for "inverse_sqrt" to
    the warm-up (or 1).

  Raises:
    ValueError: a number out of range; the message names it.
  """
  warmup_steps, decay_factor = hparams.warmup_steps, hparams.decay_factor
  if warmup == "none" and (warmup_steps or hparams.warmup_factor):
    raise ValueError(
      f"warmup_steps={warmup_steps:g}, warmup_factor={hparams.warmup_factor:g} without a warm-up: choose gradual or constant"
    )
  if not 0 <= warmup_steps < num_steps:
    raise ValueError(f"warmup_steps={warmup_steps:g} is not in [0, num_steps={num_steps}): warm up for fewer steps")
  if not 0 <= hparams.warmup_factor <= 1 or (warmup == "constant" and hparams.warmup_factor == 0):
    raise ValueError(
      f"warmup_factor={hparams.warmup_factor:g}, wanted 0 < warmup_factor <= 1 (0, for a gradual warm-up from one increment)"
    )
  if not (0 <= decay_factor <= 1) or (name == "step" and decay_factor == 0):
    raise ValueError(f"decay_factor={decay_factor:g}, wanted a fraction from 0 to 1, above 0 for the schedule 'step'")
  ascending = list(milestones) == sorted({*milestones}) and all(step > 0 for step in milestones)
  if bool(milestones) != (name == "step") or not ascending:
    raise ValueError(
      f"milestones={list(milestones)} with schedule {name!r}: wanted ascending steps for 'step', none for others"
    )
  if not (math.isfinite(hparams.decay_steps) and hparams.decay_steps >= 0):
    raise ValueError(f"decay_steps={hparams.decay_steps:g}, wanted a number above 0, or 0 for the rest of the run")
  if name in ("constant", "step") or hparams.decay_steps:
    return hparams
  whole = max(warmup_steps, 1) if name == "inverse_sqrt" else num_steps - warmup_steps
  return hparams._replace(decay_steps=float(whole))
