"""The figures of loss landscapes: between two solutions, around each of them, and along the way to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bsjax.analysis import Finding
from bsjax.analysis.claims_landscape import NEIGHBOURHOOD, PATHS, SOLUTIONS
from bsjax.figures import style
from bsjax.figures.series import column, columns, no_data, scalar

LOSS_COLOR, ACCURACY_COLOR = style.BLUE, style.VERMILION
COLORS = {"small": style.BLUE, "large": style.VERMILION}
MARKERS = {"small": "o", "large": "s"}
"""Tell the solutions apart in grey too."""
SPLITS = {"train": "-", "test": "--"}
MARK_EVERY = 3
THREE_PANELS, SQUARE_PANEL, COLOR_BAR = 13.4, 4.4, 1.0
SURFACE_WIDTH, SURFACE_HEIGHT = 5.0, 4.7
"""Inches."""
LOSS = "training loss (log scale)"
LEVEL_DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
FEWEST_LEVELS = 9
"""Contours at these digits of every decade, the coarsest that gives so many; evenly spaced where none does."""
EDGE = 0.04
"""No number is written so close to the frame, in parts of its width."""
FEWEST_IN_A_ROW = 3
"""A surface needs as many points along each axis."""
NOTHING = "this landscape was not computed"
Plane = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The axes x f64[X] and y f64[Y], and a metric f64[Y, X] on their grid, NaN where it is not known."""


def draw_sharper_line(finding: Finding) -> Figure:
  """Draw loss and accuracy along the line and the curve between the two solutions, and how the loss rises around each.

  Every seed is a faint curve, the mean over seeds a bold one. The third panel shows what is judged, on a linear scale: on the logarithmic
  scale of the others a solution of small loss looks steeper than it is.
  """
  question = "Is the loss steeper around the large-batch solution?"
  path, (seed, alpha, train_loss) = column(finding, "path", str), columns(finding, "seed alpha train_loss")
  if not np.any(train_loss > 0):
    return no_data(question, finding)
  figure, (*panels, last) = style.new_figure(question, num_panels=len(PATHS) + 1)
  figure.set_size_inches(THREE_PANELS, style.PANEL_HEIGHT)
  limits = _log_limits(np.concatenate([column(finding, f"{split}_loss") for split in SPLITS]))
  accuracies = [axes.twinx() for axes in panels]
  for axes, right, (name, words) in zip(panels, accuracies, PATHS.items(), strict=True):
    at = path == name
    for panel, metric, color, marker in (
      (axes, "loss", LOSS_COLOR, ""),
      (right, "accuracy", ACCURACY_COLOR, "D"),
    ):
      for split, line in SPLITS.items():
        values = column(finding, f"{split}_{metric}")[at]
        label = f"{split} {metric}"
        _draw_repeats(panel, alpha[at], values, seed[at], color=color, line=line, marker=marker, label=label)
    for place in range(len(SOLUTIONS)):
      axes.axvspan(place - NEIGHBOURHOOD, place + NEIGHBOURHOOD, color=style.RULE, alpha=0.6, linewidth=0, zorder=0)
    axes.set_ylim(limits)
    style.log_axis(axes)
    _dress_accuracy(right)
    style.describe(axes, caption=words, x_label="α: 0 = small batch, 1 = large batch", y_label="")
    axes.tick_params(axis="y", which="both", labelcolor=LOSS_COLOR)
  panels[0].set_ylabel("cross-entropy (log scale)", fontsize=10, color=LOSS_COLOR)
  accuracies[-1].set_ylabel("accuracy", fontsize=10, color=ACCURACY_COLOR)
  _draw_rises(last, finding)
  count = len(np.unique(seed))
  seeds = f"each of {count} seeds; bold: their mean" if count > 1 else "one seed"
  faint = Line2D([], [], color=style.MUTED, alpha=0.6, linewidth=0.8, label=seeds)
  band = Patch(color=style.RULE, alpha=0.6, linewidth=0, label="around a solution")
  remarks = _remarks(finding)
  style.add_legend(figure, num_columns=5, extra=[faint, band, *remarks])
  return figure


def _dress_accuracy(right: Axes) -> None:
  right.set_ylim(-0.02, 1.02)
  right.grid(False)
  right.spines[["top", "left"]].set_visible(False)
  right.spines[["right", "bottom"]].set_color(style.MUTED)
  right.tick_params(labelcolor=ACCURACY_COLOR, color=style.INK, labelsize=9)


def _draw_rises(axes: Axes, finding: Finding) -> None:
  """Draw the training loss above that of each solution, on the straight line around it: the numbers that are judged."""
  seed, alpha, loss = columns(finding, "seed alpha train_loss")
  on_line = column(finding, "path", str) == "line"
  for place, solution in enumerate(SOLUTIONS):
    near = on_line & (np.abs(alpha - place) <= NEIGHBOURHOOD + 1e-9)
    here = {each: loss[on_line & (seed == each) & (np.abs(alpha - place) < 1e-9)] for each in np.unique(seed[near])}
    at = near & np.array([len(here.get(each, ())) == 1 for each in seed], bool)
    above = loss[at] - np.array([here[each][0] for each in seed[at]])
    words = _solution_words(finding, solution)
    _draw_repeats(
      axes,
      alpha[at] - place,
      above,
      seed[at],
      color=COLORS[solution],
      line="-",
      marker=MARKERS[solution],
      every=1,
      label=f"around {words}",
    )
  axes.axhline(0, color=style.MUTED, linewidth=0.9)
  style.describe(
    axes,
    caption=_factor_words(finding),
    x_label="α − α of the solution, on the line",
    y_label="training loss − that of the solution",
  )


def _factor_words(finding: Finding) -> str:
  """Say by which factor the rises on the line differ."""
  at = column(finding, "factor_path", str) == "line"
  factor, low, high = (values[at] for values in columns(finding, "factor factor_low factor_high"))
  if not np.isfinite(factor).any():
    return "the two rises have no ratio"
  interval = f" [{low[0]:.2f}, {high[0]:.2f}]" if np.isfinite([low[0], high[0]]).all() else ""
  return f"mean rise, large / small: {factor[0]:.2f}{interval}"


def _draw_repeats(
  axes: Axes,
  x: np.ndarray,
  y: np.ndarray,
  repeat: np.ndarray,
  *,
  color: str,
  line: str,
  marker: str,
  label: str,
  every: int = MARK_EVERY,
) -> None:
  """Draw each repeat as a faint curve and the mean over all of them, with gaps where a value is missing."""
  if not np.isfinite(y).any():
    return
  for each in np.unique(repeat):
    order = np.flatnonzero(repeat == each)[np.argsort(x[repeat == each])]
    axes.plot(x[order], y[order], line, color=color, alpha=0.25, linewidth=0.8)
  at = np.unique(x)
  means = [np.mean(y[x == place]) for place in at]
  face = "white" if line == SPLITS["test"] else color
  axes.plot(
    at, means, line, marker=marker, markevery=every, markersize=4.5, mfc=face, color=color, linewidth=1.9, label=label
  )


def _log_limits(values: np.ndarray) -> tuple[float, float]:
  """Return limits of a logarithmic axis that shows all positive values with a margin."""
  positive = values[np.isfinite(values) & (values > 0)]
  low, high = positive.min(), positive.max()
  margin = max((high / low) ** 0.04, 1.05)
  return low / margin, high * margin


def _remarks(finding: Finding, *texts: str) -> list[Line2D]:
  """Return entries of a legend without marks: texts, and which statistics of batch norm were used."""
  words = (*texts, str(np.asarray(finding.series.get("batch_norm", ""))))
  return [Line2D([], [], linestyle="none", label=text) for text in words if text]


def _solution_words(finding: Finding, solution: str) -> str:
  size = scalar(finding, f"{solution}_batch_size")
  return f"{solution} batch" + (f", B = {size:,.0f}" if size > 0 else "")


def _grid(finding: Finding, prefix: str, solution: str) -> Plane:
  """Arrange the training loss on the plane of a solution as a grid."""
  at = column(finding, f"{prefix}_solution", str) == solution
  x, y, values = (array[at] for array in columns(finding, "x y train_loss", prefix=f"{prefix}_"))
  x_axis, y_axis = np.unique(x), np.unique(y)
  grid = np.full((len(y_axis), len(x_axis)), np.nan)
  grid[np.searchsorted(y_axis, y), np.searchsorted(x_axis, x)] = np.where(values > 0, values, np.nan)
  return x_axis, y_axis, grid


def _planes(finding: Finding, prefix: str) -> dict[str, Plane]:
  """Return the planes that can be drawn as surfaces."""
  planes = {solution: _grid(finding, prefix, solution) for solution in SOLUTIONS}
  return {
    solution: plane
    for solution, plane in planes.items()
    if min(plane[2].shape) >= FEWEST_IN_A_ROW and np.isfinite(plane[2]).sum() >= FEWEST_IN_A_ROW**2
  }


def _color_map() -> Colormap:
  """Return viridis without its darkest part: it reads in grey, and lines and labels on it stay legible."""
  return ListedColormap(colormaps["viridis"](np.linspace(0.12, 1, 256)))


def _levels(planes: Iterable[Plane]) -> np.ndarray:
  """Return round numbers that enclose all values, close enough to show the shape."""
  values = np.concatenate([grid[np.isfinite(grid)] for *_, grid in planes])
  low, high = values.min(), values.max()
  decades = 10.0 ** np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 2)
  for digits in LEVEL_DIGITS:
    levels = np.outer(decades, digits).ravel()
    first, last = np.searchsorted(levels, low, side="right") - 1, np.searchsorted(levels, high)
    if last - first >= FEWEST_LEVELS:
      return levels[first : last + 1]
  return np.asarray(MaxNLocator(FEWEST_LEVELS + 3).tick_values(low, high))


def _plain(value: float) -> str:
  """Write a level without a power of ten where that is short: 0.0015, 1.5, 300."""
  return f"{value:.3g}" if value < 100 else style.format_tick(value)


def _draw_contours(axes: Axes, plane: Plane, levels: np.ndarray) -> Any:
  """Draw filled contours with labelled lines on them."""
  x, y, grid = plane
  shown = np.ma.masked_invalid(grid)
  norm = LogNorm(levels[0], levels[-1])
  filled = axes.contourf(x, y, shown, levels=levels, norm=norm, cmap=_color_map())
  lines = axes.contour(x, y, shown, levels=levels, colors=style.INK, linewidths=0.5, alpha=0.75)
  _label(axes, lines, levels)
  axes.grid(False)
  axes.set_aspect("equal")
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
  return filled


def _label(axes: Axes, lines: Any, levels: np.ndarray) -> None:
  """Write the level on every contour, except where the frame would cut the number."""
  x_limits, y_limits = np.sort(axes.get_xlim()), np.sort(axes.get_ylim())
  for text in axes.clabel(lines, levels, fmt=_plain, fontsize=6.5, inline=False) or []:
    inside = [
      limits[0] + EDGE * np.ptp(limits) < place < limits[1] - EDGE * np.ptp(limits)
      for place, limits in zip(text.get_position(), (x_limits, y_limits), strict=True)
    ]
    text.set_path_effects([withStroke(linewidth=1.8, foreground="white", alpha=0.85)])
    text.set_visible(all(inside))


def _color_bar(figure: Figure, filled: Any, panels: Sequence[Axes], levels: np.ndarray) -> None:
  bar = figure.colorbar(filled, ax=list(panels), pad=0.015, aspect=28)
  stride = int(np.ceil(len(levels) / style.MAX_TICKS))
  bar.set_ticks(FixedLocator(list(levels[::stride])))
  bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
  bar.ax.yaxis.set_minor_locator(NullLocator())
  bar.ax.tick_params(labelsize=9, colors=style.INK)
  bar.outline.set_visible(False)
  bar.set_label(LOSS, fontsize=9, color=style.INK)


def draw_landscape_planes(finding: Finding) -> Figure:
  """Draw the training loss on a random plane around each solution, as filled contours on one common scale."""
  question = "How wide is the valley around each solution?"
  planes = _planes(finding, "plane")
  if not planes:
    return style.no_data_figure(question, NOTHING)
  figure, panels = style.new_figure(question, num_panels=len(planes))
  figure.set_size_inches(SQUARE_PANEL * len(planes) + COLOR_BAR, style.PANEL_HEIGHT)
  levels = _levels(planes.values())
  for axes, (solution, plane) in zip(panels, planes.items(), strict=True):
    filled = _draw_contours(axes, plane, levels)
    axes.plot(0, 0, "P", color="white", markeredgecolor=style.INK, markersize=8, label="the solution", clip_on=False)
    style.describe(
      axes,
      caption=_solution_words(finding, solution),
      x_label="filter-normalised random direction 1",
      y_label="filter-normalised random direction 2",
    )
  _color_bar(figure, filled, panels, levels)
  style.add_legend(figure, extra=_remarks(finding, "one unit: every filter moves by its own norm"))
  return figure


def draw_landscape_surfaces(finding: Finding) -> Figure:
  """Draw the planes as surfaces over the directions, on one common scale."""
  question = "What do the two valleys look like?"
  planes = _planes(finding, "plane")
  if not planes:
    return style.no_data_figure(question, NOTHING)
  figure, flat = style.new_figure(question, num_panels=len(planes))
  figure.set_size_inches(SURFACE_WIDTH * len(planes), SURFACE_HEIGHT)
  levels = _levels(planes.values())
  low, high = np.log10(levels[[0, -1]])
  for index, (axes, (solution, (x, y, grid))) in enumerate(zip(flat, planes.items(), strict=True)):
    axes.remove()
    space: Any = figure.add_subplot(1, len(planes), index + 1, projection="3d")
    height = np.log10(grid)
    mesh = np.meshgrid(x, y)
    colors = _color_map()(np.clip((height - low) / (high - low), 0, 1))
    space.plot_surface(
      *mesh, height, facecolors=colors, rcount=len(y), ccount=len(x), linewidth=0.2, edgecolor=style.INK, shade=False
    )
    space.set_zlim(low, high)
    space.view_init(elev=30, azim=-52)
    space.set_box_aspect((1, 1, 0.75), zoom=0.92)
    for axis in (space.xaxis, space.yaxis):
      axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    decades = np.arange(np.ceil(low), np.floor(high) + 1)
    ticks = decades if len(decades) > 1 else np.linspace(low, high, 4)
    space.zaxis.set_major_locator(FixedLocator(list(ticks)))
    space.zaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(10.0**value)))
    for axis in (space.xaxis, space.yaxis, space.zaxis):
      axis.set_pane_color((1, 1, 1, 0))
      axis.line.set_color(style.MUTED)
    space.tick_params(labelsize=8, colors=style.INK)
    style.describe(
      space, caption=_solution_words(finding, solution), x_label="random direction 1", y_label="random direction 2"
    )
    space.set_zlabel(LOSS, fontsize=9, color=style.INK)
  style.add_legend(figure, extra=_remarks(finding, "one unit: every filter moves by its own norm"))
  return figure


def draw_landscape_random_lines(finding: Finding) -> Figure:
  """Draw loss and accuracy along filter-normalised random directions from each solution: every direction, and their mean."""
  question = "How fast does the loss rise in a random direction?"
  solution = column(finding, "random_solution", str)
  direction, x, loss = columns(finding, "direction x train_loss", prefix="random_")
  if not np.any(loss > 0):
    return style.no_data_figure(question, NOTHING)
  figure, panels = style.new_figure(question, num_panels=2)
  for axes, metric in zip(panels, ("loss", "accuracy"), strict=True):
    for name in SOLUTIONS:
      at = solution == name
      for split, line in SPLITS.items():
        values = column(finding, f"random_{split}_{metric}")[at]
        label = f"{_solution_words(finding, name)}: {split}"
        _draw_repeats(
          axes, x[at], values, direction[at], color=COLORS[name], line=line, marker=MARKERS[name], label=label
        )
  panels[0].set_ylim(_log_limits(np.concatenate([column(finding, f"random_{split}_loss") for split in SPLITS])))
  style.log_axis(panels[0])
  count = len(np.unique(direction))
  caption = f"each of {count} directions, and their mean" if count > 1 else "one direction"
  label = "distance; 1 = every filter moves by its own norm"
  style.describe(panels[0], caption=caption, x_label=label, y_label="cross-entropy (log scale)")
  style.describe(panels[1], caption=caption, x_label=label, y_label="accuracy")
  style.add_legend(figure, num_columns=3, extra=_remarks(finding))
  return figure


def draw_landscape_trajectory(finding: Finding) -> Figure:
  """Draw the training loss on the plane that fits each trajectory best, and the trajectory on it."""
  question = "Which way did training go?"
  planes = _planes(finding, "trajectory")
  if not planes:
    return style.no_data_figure(question, NOTHING)
  figure, panels = style.new_figure(question, num_panels=len(planes))
  levels = _levels(planes.values())
  of_solution = column(finding, "checkpoint_solution", str)
  for axes, (solution, plane) in zip(panels, planes.items(), strict=True):
    filled = _draw_contours(axes, plane, levels)
    at = of_solution == solution
    x, y, step, explained_x, explained_y = (
      values[at] for values in columns(finding, "x y step explained_x explained_y", prefix="checkpoint_")
    )
    order = np.argsort(step)
    if len(order):
      outline = [withStroke(linewidth=3, foreground="white")]
      axes.plot(x[order], y[order], "-", color=style.INK, linewidth=1.3, path_effects=outline)
      axes.plot(x[order], y[order], "o", color=style.INK, markersize=2.6, label="checkpoints")
      for index, marker, label in ((order[0], "o", "start of training"), (order[-1], "P", "its end")):
        axes.plot(x[index], y[index], marker, color="white", markeredgecolor=style.INK, markersize=8, label=label)
    shares = [f": {100 * share[0]:.2g} %" if len(order) else "" for share in (explained_x, explained_y)]
    style.describe(
      axes,
      caption=_solution_words(finding, solution),
      x_label=f"first direction{shares[0]}",
      y_label=f"second direction{shares[1]}",
    )
  _color_bar(figure, filled, panels, levels)
  share = "%: of the checkpoints' squared distance from the end"
  style.add_legend(figure, num_columns=3, extra=_remarks(finding, share))
  return figure


FIGURES: dict[str, Callable[[Finding], Figure]] = {"sharper_line": draw_sharper_line}

FURTHER_FIGURES: dict[str, dict[str, Callable[[Finding], Figure]]] = {
  "sharper_line": {
    "landscape_planes": draw_landscape_planes,
    "landscape_surfaces": draw_landscape_surfaces,
    "landscape_random_lines": draw_landscape_random_lines,
    "landscape_trajectory": draw_landscape_trajectory,
  }
}
"""Figures that stand below a claim's own, drawn from the same finding."""
