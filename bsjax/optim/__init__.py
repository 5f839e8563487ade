"""Schedules of unit peak, scaling rules in batch size, and optimizers built from array hyperparameters."""

from bsjax.optim.optimizers import OPTIMIZERS, make_optimizer
from bsjax.optim.scaling import SCALING_RULES, scale_learning_rate
from bsjax.optim.schedules import SCHEDULES, Schedule, make_schedule

__all__ = [
  "OPTIMIZERS",
  "SCALING_RULES",
  "SCHEDULES",
  "Schedule",
  "make_optimizer",
  "make_schedule",
  "scale_learning_rate",
]
