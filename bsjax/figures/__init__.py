"""Figures: one pure function `Finding -> Figure` per claim, and how a figure is saved."""

from bsjax.figures import dynamics, estimators, landscape, noise, sharpness, study
from bsjax.figures.study import save_figure as save_figure

FIGURES = study.FIGURES | noise.FIGURES | estimators.FIGURES | sharpness.FIGURES | landscape.FIGURES | dynamics.FIGURES
"""What draws the figure of each claim."""
FURTHER_FIGURES = noise.FURTHER_FIGURES | sharpness.FURTHER_FIGURES | landscape.FURTHER_FIGURES
"""Figures that stand below a claim's own, drawn from the same finding."""
