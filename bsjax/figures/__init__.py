"""Figures: one pure function `Finding -> Figure` per claim of the study, and how a figure is saved."""

from bsjax.figures.study import FIGURES as FIGURES
from bsjax.figures.study import save_figure as save_figure
