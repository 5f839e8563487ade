"""What a trial is: static configuration, array hyperparameters, a seed."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bsjax.optim import OPTIMIZERS, SCHEDULES, WARMUPS, complete_schedule
from bsjax.records import trial_id
from bsjax.types import Hparams

NoiseRoute = Literal["", "microbatch", "device"]
NOISE_ROUTES = ("", "microbatch", "device")
ALWAYS_DESCRIBED = (
  "learning_rate",
  "momentum",
  "beta2",
  "weight_decay",
  "probes",
  "probe_steps",
  "optimizer",
  "schedule",
)
"""What `Trial.description` holds even at its default. It leaves out others, so that a field may be added without changing ids."""


@dataclass(frozen=True)
class TrialConfig:
  """All that changes shapes or Python control flow; one compiled segment serves every trial with the same config.

  Attributes:
    batch_size: examples per update over all devices.
    num_steps: updates; a multiple of `eval_every`.
    eval_every: steps between evaluations on the validation set, each of which writes one row.
    probes: names of the measurements made at `probe_steps`.
    probe_steps: ascending multiples of `eval_every` from 0 to `num_steps`.
    microbatch_size: examples per gradient, which are averaged over the batch; it divides `batch_size`. 0: the whole batch.
    noise_route: how the squared norms of the gradients of microbatches and batch are logged in every row, if at all.
      "microbatch" accumulates one microbatch after the other; "device" puts one on each device of the mesh axis "data".
    noise_every: steps between those that are logged, from the first step on.
    with_replacement: draw every batch independently; False: epoch after epoch, each in a fresh order.
    warmup: how the rate comes up to its peak, if at all: one of `bsjax.optim.WARMUPS`. Lengths and factors are hyperparameters.
    milestones: steps at which the schedule "step" multiplies the rate.
    stop_at_target: end at the first evaluation that reaches the workload's target; `num_steps` is then the most steps.
    parent: id of the trial whose final parameters and optimizer state are the start; "" for a fresh start.
  """

  workload: str
  batch_size: int
  num_steps: int
  eval_every: int
  optimizer: str = "sgd"
  schedule: str = "constant"
  warmup: str = "none"
  milestones: tuple[int, ...] = ()
  probes: tuple[str, ...] = ()
  probe_steps: tuple[int, ...] = ()
  microbatch_size: int = 0
  noise_route: NoiseRoute = ""
  noise_every: int = 0
  parent: str = ""
  with_replacement: bool = False
  stop_at_target: bool = False

  def __post_init__(self) -> None:
    for name in ("batch_size", "num_steps", "eval_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}, wanted at least 1")
    for name, value, known in (
      ("optimizer", self.optimizer, OPTIMIZERS),
      ("schedule", self.schedule, SCHEDULES),
      ("warmup", self.warmup, WARMUPS),
    ):
      if value not in known:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(known)}")
    for step in (self.num_steps, *self.probe_steps):
      if step % self.eval_every or not 0 <= step <= self.num_steps:
        raise ValueError(f"step {step} is not a multiple of eval_every={self.eval_every} in 0..{self.num_steps}")
    size = self.microbatch_size
    if size < 0 or (size and self.batch_size % size):
      raise ValueError(
        f"microbatch_size={size} does not divide batch_size={self.batch_size}: use a divisor, or 0 for none"
      )
    if self.noise_route not in NOISE_ROUTES:
      raise ValueError(f"noise_route={self.noise_route!r} is unknown: use one of {', '.join(map(repr, NOISE_ROUTES))}")
    if self.noise_every < 0 or bool(self.noise_route) != bool(self.noise_every):
      raise ValueError(
        f"noise_route={self.noise_route!r} with noise_every={self.noise_every}: set both, a route and a number from 1, or neither"
      )
    if self.noise_route and size in (0, self.batch_size):
      raise ValueError(
        f"noise_route={self.noise_route!r} compares microbatches with the batch of {self.batch_size}, got "
        f"microbatch_size={size}: use a smaller divisor of the batch"
      )


class Trial(NamedTuple):
  """One training run."""

  config: TrialConfig
  hparams: Hparams
  seed: int

  @property
  def description(self) -> dict[str, Any]:
    """The trial as JSON: all that decides its numbers."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrialConfig)}
    return {
      "config": _told(dataclasses.asdict(self.config), defaults),
      "hparams": _told(self.hparams._asdict(), Hparams._field_defaults),
      "seed": self.seed,
    }

  @property
  def id(self) -> str:
    """The hash of its canonical JSON: the name of its folder."""
    return trial_id(self.description)


def _told(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
  told = {name: value for name, value in values.items() if name in ALWAYS_DESCRIBED or value != defaults.get(name)}
  return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


def make_trial(config: TrialConfig, hparams: Hparams, seed: int) -> Trial:
  """Builds a trial with hyperparameters as plain floats; what shapes its schedule and was left at 0 is filled in.

  Raises:
    ValueError: a learning rate that is not finite and positive, or a schedule that does not fit the run (`complete_schedule`).
  """
  plain = Hparams(*(float(value) for value in hparams))
  if not (math.isfinite(plain.learning_rate) and plain.learning_rate > 0):
    raise ValueError(f"learning_rate={plain.learning_rate}, wanted a finite number above 0")
  complete = complete_schedule(
    config.schedule, plain, num_steps=config.num_steps, warmup=config.warmup, milestones=config.milestones
  )
  return Trial(config, complete, seed)
