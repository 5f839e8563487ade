"""Schedules of unit peak, scaling rules in batch size, and optimizers built from array hyperparameters."""

from bsjax.optim.optimizers import OPTIMIZERS, epsilon_of, make_optimizer
from bsjax.optim.scaling import SCALING_RULES, half_life_beta2, noise_limited_rate, scale_adam, scale_learning_rate
from bsjax.optim.schedules import SCHEDULES, WARMUPS, Schedule, complete_schedule, make_schedule
from bsjax.optim.transforms import AbsorbedMomentumState

__all__ = [
  "OPTIMIZERS",
  "SCALING_RULES",
  "SCHEDULES",
  "WARMUPS",
  "AbsorbedMomentumState",
  "Schedule",
  "complete_schedule",
  "epsilon_of",
  "half_life_beta2",
  "make_optimizer",
  "make_schedule",
  "noise_limited_rate",
  "scale_adam",
  "scale_learning_rate",
]
