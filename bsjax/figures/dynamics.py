"""The figures of sharpness along training, after a switch and at the edge of stability: pure functions `Finding -> Figure`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from bsjax.analysis import Finding
from bsjax.analysis.claims_edge import PEAK_HIGH, PEAK_LOW
from bsjax.analysis.claims_escape import CONTROLS, SETTLED_FRACTION
from bsjax.figures import style
from bsjax.figures.series import column, columns, no_data, scalar

PANEL_WIDTH, PANEL_HEIGHT = 4.1, 4.7
PALETTE = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE)
ORIGINS = {"large": style.VERMILION, "small": style.BLUE}
"""Where a branch starts, and its colour; a solid line is switched, a dashed one goes on as before."""


def _new_figure(question: str) -> tuple[Figure, list[Axes]]:
  """Start a figure of three panels that are narrower than those of a pair, so that it can be read at the width of a page."""
  figure, panels = style.new_figure(question, num_panels=3)
  figure.set_size_inches(3 * PANEL_WIDTH, PANEL_HEIGHT)
  return figure, panels


def draw_noise_escapes(finding: Finding) -> Figure:
  """Draw sharpness, distance and test accuracy along the four branches, against examples seen since the switch."""
  question = "Do small batches lead out of sharp minima, and large ones into them?"
  branch, seed = column(finding, "branch", str), column(finding, "seed")
  examples, size, top, distance, accuracy = columns(
    finding, "examples_seen batch_size top_eigenvalue distance test_accuracy"
  )
  converged = column(finding, "converged", bool)
  sharpness = np.where(converged & (top > 0), top, np.nan)
  if not any(np.isfinite(values).any() for values in (sharpness, distance, accuracy)):
    return no_data(question, finding)
  figure, panels = _new_figure(question)
  settled = ((1 - SETTLED_FRACTION) * examples.max(), examples.max())
  for axes, values in zip(panels, (sharpness, distance, accuracy), strict=True):
    for name in (name for pair in CONTROLS.items() for name in pair):
      at = branch == name
      if at.any():
        origin, target = name.split("_")
        switched = name in CONTROLS
        _draw_seeds(
          axes,
          examples[at],
          values[at],
          seed[at],
          color=ORIGINS[origin],
          line="-" if switched else "--",
          label=f"{origin}-batch minimiser, {'switched to' if switched else 'goes on with'} B = {size[at][0]:,.0f}",
          geometric=axes is panels[0],
        )
    axes.axvspan(*settled, color=style.RULE, alpha=0.45, linewidth=0, label="compared: the second half")
    style.symlog_axis(axes, examples)
    if not _say_where_nothing_was_measured(axes, values) and axes is panels[0]:
      _log_axis(axes)
  left_out = int(np.isfinite(top).sum() - np.isfinite(sharpness).sum())
  seeds = len(np.unique(seed))
  mean = f"mean of {seeds} seeds (faint)"
  for axes, caption, y_label in zip(
    panels,
    (f"geometric {mean}" + (f"; {left_out} not converged, left out" if left_out else ""), mean, mean),
    ("largest Hessian eigenvalue (log scale)", "distance from the minimiser", "test accuracy"),
    strict=True,
  ):
    style.describe(axes, caption=caption, x_label="examples seen since the switch", y_label=y_label)
  style.add_legend(figure, num_columns=3)
  return figure


def draw_edge_of_stability(finding: Finding) -> Figure:
  """Draw the largest eigenvalue of full-batch descent towards 2 / rate; beside it, for one rate, how near every batch size comes.

  Source: Cohen et al. (2021), Fig. 1; the right panel after Andreyev and Beneventano (2024).
  """
  question = "Does descent go to the edge of stability, and stay?"
  size, rate, seed, step, top, ratio, batch_ratio = columns(
    finding, "batch_size learning_rate seed step top_eigenvalue ratio batch_ratio"
  )
  if not np.isfinite(ratio).any() and not np.isfinite(batch_ratio).any():
    return no_data(question, finding)
  figure, (left, middle, right) = _new_figure(question)
  right.sharey(middle)
  full = size == scalar(finding, "full_batch_size")
  rates = np.unique(rate[full])
  for hue, each in zip(PALETTE * len(rates), rates, strict=False):
    at = full & (rate == each)
    _draw_seeds(left, step[at], top[at], seed[at], color=hue, line="-", label=None)
    left.axhline(2 / each, color=hue, linestyle="--", linewidth=1.2)
    left.annotate(
      f"2 / {each:.3g}",
      (0, 2 / each),
      xycoords=("axes fraction", "data"),
      xytext=(3, 2),
      textcoords="offset points",
      fontsize=8,
      color=hue,
    )
  shown = _shown_rate(size, rate)
  sizes = np.unique(size[rate == shown])
  for axes, values in ((middle, ratio), (right, batch_ratio)):
    axes.axhspan(PEAK_LOW, PEAK_HIGH, color=style.RULE, alpha=0.45, linewidth=0)
    axes.axhline(1, color=style.INK, linestyle="--", linewidth=1.2)
    for color, each in zip(style.shades(len(sizes)), sizes, strict=True):
      at = (rate == shown) & (size == each)
      _draw_seeds(axes, step[at], values[at], seed[at], color=color, line="-", label=f"B = {each:,.0f}")
  for axes, values in ((left, top[full]), (middle, ratio[rate == shown]), (right, batch_ratio[rate == shown])):
    style.symlog_axis(axes, step)
    if not _say_where_nothing_was_measured(axes, values):
      _log_axis(axes)
  seeds = f"geometric mean of {len(np.unique(seed))} seeds"
  for axes, caption, y_label in (
    (left, f"full batch, by rate; {seeds}", "largest Hessian eigenvalue λ₁ (log scale)"),
    (middle, f"rate {shown:.3g}; {seeds}", "λ₁ × rate / 2 (log scale)"),
    (right, f"rate {shown:.3g}; {seeds}", "batch sharpness × rate / 2 (log scale)"),
  ):
    style.describe(axes, caption=caption, x_label="step", y_label=y_label)
  edge = Line2D([], [], linestyle="--", color=style.INK, linewidth=1.2, label="edge of stability: 2 / rate")
  band = Patch(color=style.RULE, alpha=0.45, linewidth=0, label=f"at the edge: {PEAK_LOW:g} to {PEAK_HIGH:g}")
  style.add_legend(figure, num_columns=6, extra=[edge, band])
  return figure


def _draw_seeds(
  axes: Axes,
  x: np.ndarray,
  y: np.ndarray,
  seed: np.ndarray,
  *,
  color: Any,
  line: str,
  label: str | None,
  geometric: bool = True,
) -> None:
  """Draw each seed as a faint line, and the mean over seeds at the points that all of them have as a strong one."""
  known = np.isfinite(y)
  x, y, seed = x[known], y[known], seed[known]
  seeds = np.unique(seed)
  for each in seeds if len(seeds) > 1 else []:
    axes.plot(x[seed == each], y[seed == each], line, color=color, alpha=0.25, linewidth=0.8)
  at, count = np.unique(x, return_counts=True)
  at = at[count == len(seeds)]
  means = [np.mean(np.log(y[x == each]) if geometric else y[x == each]) for each in at]
  axes.plot(
    at, np.exp(means) if geometric else means, line, color=color, marker="o", markersize=3, linewidth=1.8, label=label
  )


def _log_axis(axes: Axes) -> None:
  """Make y logarithmic; where fewer than two of the usual ticks are in sight, the ones between them are labelled too."""
  style.log_axis(axes)
  low, high = axes.get_ylim()
  if np.sum((low <= axes.get_yticks()) & (axes.get_yticks() <= high)) < 2:
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: style.format_tick(value)))
    axes.tick_params(which="minor", labelsize=9)


def _say_where_nothing_was_measured(axes: Axes, values: np.ndarray) -> bool:
  """Write into a panel without a number that there is none, and tell whether there is one."""
  if np.isfinite(values).any():
    return False
  axes.text(
    0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", fontsize=11, color=style.MUTED
  )
  axes.tick_params(labelleft=False)
  return True


def _shown_rate(batch_size: np.ndarray, rate: np.ndarray) -> float:
  """Return the middle one of the rates that were run at the most batch sizes."""
  rates = np.unique(rate)
  counts = np.array([len(np.unique(batch_size[rate == each])) for each in rates])
  most = rates[counts == counts.max()]
  return float(most[len(most) // 2])


FIGURES: dict[str, Callable[[Finding], Figure]] = {
  "noise_escapes": draw_noise_escapes,
  "edge_of_stability": draw_edge_of_stability,
}
