"""Learning-rate schedules with peak 1, to be multiplied by the rate."""

from collections.abc import Callable

import optax

from bsjax.types import Array

Schedule = Callable[[Array], Array]
"""Maps the number of updates already made, i32[], to the factor of the next one, f32[]."""

SCHEDULES = ("constant", "warmup_cosine")


def make_schedule(name: str, *, num_steps: int, warmup_steps: int = 0) -> Schedule:
  """Build a schedule of unit peak.

  With t the step counted from 0, W = `warmup_steps` and T = `num_steps`,

      t <  W:  (t + 1) / (W + 1)
      t >= W:  1                                           "constant"
               (1 + cos(pi (t - W) / (T - W))) / 2         "warmup_cosine"

  Args:
    name: one of `SCHEDULES`.
    num_steps: updates of the whole run, warm-up included.
    warmup_steps: updates of the linear ramp that precede the peak; 0 for none.

  Returns:
    A function of the step, which may be traced; the two counts are static.

  Raises:
    ValueError: the name is unknown, or `warmup_steps` is not in [0, num_steps).

  Holds: the peak is exactly 1 and is reached at t = W. Step 0 is never wasted on a factor of 0, and every step of the
  ramp adds the same amount, 1 / (W + 1). The cosine would reach 0 at t = T, one step after the last update.

  Source: Goyal et al. (2017), section 2.2, "gradual warmup", for the constant amount added at every iteration. They
  start the ramp from the rate of the reference batch; we start it from one increment, whatever the batch.
  Loshchilov and Hutter (2017), equation 5, for the cosine.

  >>> ramp = make_schedule("constant", num_steps=10, warmup_steps=3)
  >>> [float(ramp(step)) for step in range(5)]
  [0.25, 0.5, 0.75, 1.0, 1.0]
  """
  if not 0 <= warmup_steps < num_steps:
    raise ValueError(f"warmup_steps={warmup_steps} is not in [0, num_steps={num_steps}); warm up for fewer steps.")
  first = 1.0 / (warmup_steps + 1)
  if name == "constant":
    return optax.linear_schedule(first, 1.0, warmup_steps) if warmup_steps else optax.constant_schedule(1.0)
  if name == "warmup_cosine":
    return optax.warmup_cosine_decay_schedule(first, 1.0, warmup_steps, num_steps)
  raise ValueError(f"Unknown schedule {name!r}; use one of {', '.join(SCHEDULES)}.")
