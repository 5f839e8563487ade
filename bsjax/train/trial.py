"""What a trial is: static configuration, array hyperparameters, a seed."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from bsjax.optim import OPTIMIZERS, SCHEDULES
from bsjax.records import trial_id
from bsjax.types import Hparams


@dataclass(frozen=True)
class TrialConfig:
  """All that changes shapes or Python control flow; one compiled segment serves every trial with the same config.

  Attributes:
    batch_size: examples per update over all devices.
    num_steps: updates; a multiple of `eval_every`.
    eval_every: steps between evaluations on the validation set, each of which writes one row.
    probes: names of the measurements made at `probe_steps`.
    probe_steps: ascending multiples of `eval_every` from 0 to `num_steps`.
  """

  workload: str
  batch_size: int
  num_steps: int
  eval_every: int
  optimizer: str = "sgd"
  schedule: str = "constant"
  warmup_steps: int = 0
  probes: tuple[str, ...] = ()
  probe_steps: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    for name in ("batch_size", "num_steps", "eval_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}, wanted at least 1")
    if self.optimizer not in OPTIMIZERS:
      raise ValueError(f"optimizer={self.optimizer!r} is unknown: use one of {', '.join(OPTIMIZERS)}")
    if self.schedule not in SCHEDULES:
      raise ValueError(f"schedule={self.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")
    for step in (self.num_steps, *self.probe_steps):
      if step % self.eval_every or not 0 <= step <= self.num_steps:
        raise ValueError(f"step {step} is not a multiple of eval_every={self.eval_every} in 0..{self.num_steps}")


class Trial(NamedTuple):
  """One training run."""

  config: TrialConfig
  hparams: Hparams
  seed: int

  @property
  def description(self) -> dict[str, Any]:
    """The trial as JSON: all that decides its numbers."""
    config = dataclasses.asdict(self.config) | {
      "probes": list(self.config.probes),
      "probe_steps": list(self.config.probe_steps),
    }
    return {"config": config, "hparams": self.hparams._asdict(), "seed": self.seed}

  @property
  def id(self) -> str:
    """The hash of its canonical JSON: the name of its folder."""
    return trial_id(self.description)


def make_trial(config: TrialConfig, hparams: Hparams, seed: int) -> Trial:
  """Builds a trial with hyperparameters as plain floats.

  Raises:
    ValueError: a learning rate that is not finite and positive.
  """
  plain = Hparams(*(float(value) for value in hparams))
  if not (math.isfinite(plain.learning_rate) and plain.learning_rate > 0):
    raise ValueError(f"learning_rate={plain.learning_rate}, wanted a finite number above 0")
  return Trial(config, plain, seed)
