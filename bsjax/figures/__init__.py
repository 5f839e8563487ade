"""Figures: one pure function `Finding -> Figure` per claim, and how a figure is saved."""

from bsjax.figures import (
  dynamics,
  estimators,
  landscape,
  large_batch,
  noise,
  pretrain,
  scaling,
  sharpness,
  steps,
  study,
)
from bsjax.figures.study import save_figure as save_figure

FIGURES = (
  study.FIGURES
  | noise.FIGURES
  | estimators.FIGURES
  | sharpness.FIGURES
  | landscape.FIGURES
  | dynamics.FIGURES
  | steps.FIGURES
  | large_batch.FIGURES
  | scaling.FIGURES
  | pretrain.FIGURES
)
"""What draws the figure of each claim."""
FURTHER_FIGURES = noise.FURTHER_FIGURES | sharpness.FURTHER_FIGURES | landscape.FURTHER_FIGURES | steps.FURTHER_FIGURES
FURTHER_FIGURES |= large_batch.FURTHER_FIGURES | scaling.FURTHER_FIGURES
"""Figures that stand below a claim's own, drawn from the same finding."""
