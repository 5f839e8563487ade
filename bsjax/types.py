"""Names for the pytrees that travel between the rooms."""

from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array
Params = Any
"""Trainable parameters: a pytree of float arrays."""
ModelState = Any
"""What a model carries besides parameters: batch-norm statistics, or an empty dict."""
Example = dict[str, Array]
"""One example, without a leading axis: `{"image": u8[H, W, C], "label": i32[]}`."""
Batch = dict[str, Array]
"""Examples stacked on a leading axis B."""
Metrics = dict[str, Array]
"""Sums over examples, to be divided once by their count."""


class Variables(NamedTuple):
  """What `Workload.init` returns."""

  params: Params
  model_state: ModelState


class Hparams(NamedTuple):
  """Hyperparameters that are arrays: they may be traced, vmapped over, and never force a new compilation.

  `learning_rate` multiplies a schedule of unit peak; `momentum` is also Adam's and LAMB's beta1; `beta2` is their second;
  `weight_decay` is decoupled for AdamW, LAMB, Muon and Adafactor, and added to the gradient otherwise; `epsilon` is what Adam's kind adds
  to the root of the second moment, 0 for the published value; `radius` is SAM's. The rest shapes the schedule
  (`bsjax.optim.make_schedule`), in steps and fractions.
  """

  learning_rate: float | Array
  momentum: float | Array = 0.9
  beta2: float | Array = 0.999
  weight_decay: float | Array = 0.0
  epsilon: float | Array = 0.0
  radius: float | Array = 0.05
  warmup_steps: float | Array = 0.0
  warmup_factor: float | Array = 0.0
  decay_steps: float | Array = 0.0
  decay_factor: float | Array = 0.0
