"""The density of the Hessian's eigenvalues at solutions of different batch sizes: `Finding -> Figure`."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bsjax.analysis import Finding, density
from bsjax.figures import style
from bsjax.figures.series import column, no_data

QUESTION = "How are all eigenvalues of the Hessian distributed?"
WIDTH = 0.01
"""Standard deviation of the smoothing, as a part of the largest eigenvalue in the picture."""
GRID_POINTS = 800
FLOOR = 1e-5
"""Densities below this part of the highest are beyond what a few probe vectors see."""


def draw_spectra(finding: Finding) -> Figure:
  """Draw the spectral density at equal training loss, one panel per part of the rule's rate, for the smallest and the largest batch size.

  Curve: mean over the probe vectors of stochastic Lanczos quadrature; band: its 95 % interval over them.
  """
  sizes, parts, draws, nodes, weights = (
    column(finding, f"spectrum_{name}") for name in ("batch_size", "rate_part", "draw", "node", "weight")
  )
  known = np.isfinite(nodes) & np.isfinite(weights)
  if not known.any():
    return no_data(QUESTION, finding)
  unique_parts, ends = np.unique(parts[known]), np.unique([sizes[known].min(), sizes[known].max()])
  figure, panels = style.new_figure(QUESTION, num_panels=len(unique_parts))
  largest = np.max(np.abs(nodes[known]))
  grid = np.linspace(nodes[known].min() - 4 * WIDTH * largest, nodes[known].max() + 4 * WIDTH * largest, GRID_POINTS)
  for axes, part in zip(panels, unique_parts, strict=True):
    heights = []
    for size, color in zip(ends, (style.BLUE, style.VERMILION), strict=False):
      here = known & (parts == part) & (sizes == size)
      if here.any():
        label = f"B = {int(size):,}"
        heights.append(
          _draw_density(axes, draws[here], nodes[here], weights[here], grid, WIDTH * largest, color, label)
        )
    axes.set_yscale("log")
    axes.set_ylim(FLOOR * max(heights), 2 * max(heights))
    axes.set_xscale("symlog", linthresh=WIDTH * largest, linscale=0.5)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(grid, WIDTH * largest)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.format_tick(value)))
    style.describe(
      axes,
      caption=f"{part:g} × the rule's rate; one solution each, {len(np.unique(draws))} probe vectors",
      x_label="eigenvalue (symmetric log scale)",
      y_label="density (log scale)",
    )
  style.add_legend(figure)
  return figure


def _draw_density(
  axes: Axes,
  draws: np.ndarray,
  nodes: np.ndarray,
  weights: np.ndarray,
  grid: np.ndarray,
  width: float,
  color: object,
  label: str,
) -> float:
  """Draw one curve and its band, and return the highest point of the curve."""
  rows = [draws == draw for draw in np.unique(draws)]
  mean, low, high = density(
    np.stack([nodes[row] for row in rows]), np.stack([weights[row] for row in rows]), grid, width
  )
  shown = np.maximum(mean, np.finfo(float).tiny)
  axes.plot(grid, shown, color=color, linewidth=1.4, label=label)
  axes.fill_between(grid, np.maximum(low, np.finfo(float).tiny), high, color=color, alpha=0.15, linewidth=0)
  return float(mean.max())


def _ticks(grid: np.ndarray, linear: float) -> list[float]:
  """Return 0 and the powers of ten on either side that lie clear of the linear part of the axis."""
  powers = 10.0 ** np.arange(np.ceil(np.log10(3 * linear)), np.floor(np.log10(np.max(np.abs(grid)))) + 1)
  return [0.0, *(tick for power in powers for tick in (power, -power) if grid[0] <= tick <= grid[-1])]
