"""Figures: one pure function `Finding -> Figure` per claim, and how a figure is saved."""

from bsjax.figures import estimators, noise, study
from bsjax.figures.noise import FURTHER_FIGURES as FURTHER_FIGURES
from bsjax.figures.study import save_figure as save_figure

FIGURES = study.FIGURES | noise.FIGURES | estimators.FIGURES
"""What draws the figure of each claim."""
