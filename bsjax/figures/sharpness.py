"""The figures of sharp minima: how every measure depends on the batch size, and how it ranks the test errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from bsjax.analysis import Finding
from bsjax.analysis.claims_sharpness import LEAST_TAU
from bsjax.analysis.claims_training import LEAST_SHARPNESS_SLOPE
from bsjax.analysis.solutions import PHASES, measure_label
from bsjax.figures import style
from bsjax.figures.series import column, columns, no_data, scalar
from bsjax.figures.spectra import draw_spectra

VERDICTS = {
  "holds": (style.GREEN, "o", style.GREEN, "holds: above 0"),
  "fails": (style.VERMILION, "X", style.VERMILION, "fails: below {least}"),
  "inconclusive": (style.MUTED, "o", "white", "open"),
}
"""Colour, marker, face and words of each verdict; the marker tells them apart in grey too."""
GRID_COLUMNS = 4
ROW_HEIGHT, CELL_WIDTH, CELL_HEIGHT = 0.27, 2.9, 2.3
"""Inches."""
PALETTE = (style.BLUE, style.VERMILION, style.GREEN, style.ORANGE, style.PURPLE)
SHAPES = "os^Dv"


def draw_flat_measures(finding: Finding) -> Figure:
  """Draw the slope of every measure against the batch size with its interval and verdict, in one panel for each phase."""
  question = "Do small batches end in flatter minima, by every measure?"
  phase, measure = column(finding, "slope_phase", str), column(finding, "slope_measure", str)
  verdict = column(finding, "slope_verdict", str)
  slope, low, high, points = columns(finding, "slope slope_low slope_high slope_points")
  if not np.isfinite(slope).any():
    return no_data(question, finding)
  figure, panels = style.new_figure(question, num_panels=len(PHASES))
  names = list(dict.fromkeys(measure))
  row_of = {key: row for row, key in enumerate(zip(phase, measure, strict=True))}
  _set_height(figure, len(names))
  reach = _reach(slope, low, high)
  for axes, (kind, words) in zip(panels, PHASES.items(), strict=True):
    for place, name in zip(_forest(axes, names, reach=reach), names, strict=True):
      if (kind, name) in row_of:
        row = row_of[kind, name]
        _draw_verdict(axes, place, (slope[row], low[row], high[row]), str(verdict[row]))
    axes.axvline(LEAST_SHARPNESS_SLOPE, color=style.MUTED, linewidth=0.9, linestyle=":")
    style.describe(
      axes,
      caption=f"{words}; {_count(points[phase == kind], 'solutions')} each",
      x_label="slope of log(measure) against log B, with 95 % interval",
      y_label="",
    )
  panels[1].tick_params(labelleft=False)
  style.add_legend(figure, num_columns=5, extra=[*_verdict_marks(LEAST_SHARPNESS_SLOPE), _remark(finding)])
  return figure


def _set_height(figure: Figure, num_rows: int) -> None:
  figure.set_size_inches(figure.get_size_inches()[0], max(3.0, 2.0 + ROW_HEIGHT * num_rows))


def _reach(*arrays: np.ndarray) -> tuple[float, float]:
  """Return the limits of an axis that shows all finite values, and 0."""
  values = np.concatenate([[0.0], *arrays])
  low, high = np.nanmin(values), np.nanmax(values)
  margin = 0.06 * (high - low) or 0.1
  return low - margin, high + margin


def _forest(axes: Axes, names: Sequence[str], *, reach: tuple[float, float]) -> np.ndarray:
  """Prepare one row for each name, the first at the top, and a line at zero; return the rows' places."""
  places = np.arange(len(names))[::-1]
  axes.axvline(0, color=style.INK, linewidth=1)
  axes.set_yticks(places, [measure_label(name) for name in names])
  axes.set_ylim(-0.7, len(names) - 0.3)
  axes.set_xlim(reach)
  return places


def _draw_row(axes: Axes, place: float, bounds: Sequence[float], *, color: str, marker: str, face: str) -> None:
  """Draw a value and its interval, if it has one, or say that it is not known."""
  value, low, high = bounds
  if not np.isfinite(value):
    transform = axes.get_yaxis_transform()
    axes.text(0.98, place, "not known", transform=transform, ha="right", va="center", fontsize=8, color=style.MUTED)
    return
  known = bool(np.isfinite([low, high]).all())
  axes.errorbar(
    value,
    place,
    xerr=[[value - low], [high - value]] if known else None,
    fmt=marker,
    color=color,
    mfc=face,
    markersize=6,
    linewidth=1.5,
    capsize=2.5,
  )


def _draw_verdict(axes: Axes, place: float, bounds: Sequence[float], verdict: str) -> None:
  color, marker, face, _ = VERDICTS[verdict]
  _draw_row(axes, place, bounds, color=color, marker=marker, face=face)


def _mark(marker: str, color: Any, label: str, *, face: Any = None) -> Line2D:
  """Return an entry of a legend that is a marker alone."""
  return Line2D([], [], linestyle="none", marker=marker, color=color, mfc=face or color, markersize=6, label=label)


def _verdict_marks(least: float) -> list[Line2D]:
  return [
    _mark(marker, color, words.format(least=least), face=face) for color, marker, face, words in VERDICTS.values()
  ]


def _rate_words(part: float) -> str:
  return f"{part:g} × the rule's rate"


def _remark(finding: Finding, *texts: str) -> Line2D:
  """Return an entry of a legend without a mark: texts, and which statistics of batch norm were used."""
  words = str(np.asarray(finding.series.get("batch_norm", "")))
  return Line2D([], [], linestyle="none", label="; ".join(filter(None, [*texts, words])))


def _count(numbers: np.ndarray, noun: str) -> str:
  """Write `40 solutions`, or `38–40 solutions` where it differs.

  >>> _count(np.array([40.0, 38.0]), "solutions")
  '38–40 solutions'
  """
  low, high = (int(ends) for ends in (min(numbers, default=0), max(numbers, default=0)))
  return f"{low} {noun}" if low == high else f"{low}–{high} {noun}"


def _grid(question: str, count: int, *, x_label: str, y_label: str) -> tuple[Figure, list[Axes]]:
  """Start a figure of small panels, `GRID_COLUMNS` to a row, labelled along its left and lower edge."""
  figure, panels = style.new_figure(question, num_panels=count)
  num_columns = min(GRID_COLUMNS, count)
  rows = -(-count // num_columns)
  cells = GridSpec(rows, num_columns, figure=figure)
  for index, axes in enumerate(panels):
    axes.set_subplotspec(cells[index // num_columns, index % num_columns])
    axes.tick_params(which="both", labelsize=8)
    if index % num_columns == 0:
      axes.set_ylabel(y_label, fontsize=9, color=style.INK)
    if index + num_columns >= count:
      axes.set_xlabel(x_label, fontsize=9, color=style.INK)
  figure.set_size_inches(CELL_WIDTH * max(num_columns, 3) + 0.6, CELL_HEIGHT * rows + 1.3)
  return figure, panels


def draw_measures_against_batch_size(finding: Finding) -> Figure:
  """Draw every measure against the batch size: seeds as faint points, geometric means joined, by rate and by phase."""
  question = "How does each measure depend on the batch size?"
  phase, measure = column(finding, "phase", str), column(finding, "measure", str)
  used = column(finding, "used", bool)
  batch_size, part, value = columns(finding, "batch_size rate_part value")
  names = [name for name in dict.fromkeys(column(finding, "slope_measure", str)) if np.any(used & (measure == name))]
  if not names:
    return no_data(question, finding)
  figure, panels = _grid(question, len(names), x_label="batch size B", y_label="value (log scale)")
  colors = dict(zip(np.unique(part), PALETTE * len(np.unique(part)), strict=False))
  for axes, name in zip(panels, names, strict=True):
    for kind, words in PHASES.items():
      for each, color in colors.items():
        at = (phase == kind) & (measure == name) & (part == each)
        _draw_cells(
          axes,
          batch_size[at & used],
          value[at & used],
          color=color,
          phase=kind,
          label=f"{_rate_words(each)}, {words}",
        )
    odd = (measure == name) & ~used & (value > 0)
    if odd.any():
      axes.plot(
        batch_size[odd], value[odd], "x", color=style.MUTED, markersize=4, label="left out: not known well enough"
      )
    style.batch_size_axis(axes, batch_size)
    _sparse_powers(axes, batch_size)
    style.log_axis(axes)
    axes.set_title(measure_label(name), loc="left", fontsize=9, color=style.INK)
  seeds = len(np.unique(column(finding, "seed")))
  style.add_legend(
    figure,
    num_columns=int(figure.get_figwidth() // 4),
    extra=[_remark(finding, f"{seeds} seeds (faint) and geometric means")],
  )
  return figure


def _draw_cells(axes: Axes, x: np.ndarray, y: np.ndarray, *, color: str, phase: str, label: str) -> None:
  """Draw the seeds of each batch size and a line through their geometric means: solid at equal loss, dashed at equal epochs."""
  if not len(x):
    return
  marker, line, face = {"level": ("o", "-", color), "budget": ("s", "--", "white")}[phase]
  axes.plot(x, y, marker, color=color, alpha=0.3, markersize=3, markeredgewidth=0)
  unique, means, _ = style.mean_and_error(x, y, geometric=True)
  axes.plot(unique, means, line, marker=marker, color=color, mfc=face, markersize=4.5, linewidth=1.4, label=label)


def _sparse_powers(axes: Axes, batch_sizes: np.ndarray) -> None:
  """Label only the batch sizes themselves, at most five: a small panel has no room for every power of two."""
  sizes = np.unique(batch_sizes)
  axes.set_xticks(sizes[:: -(-len(sizes) // 5)])


def draw_flat_generalizes(finding: Finding) -> Figure:
  """Draw Kendall's tau of every measure with the test error and its simultaneous interval; beside it the same tau in three other ways."""
  question = "Does a flatter minimum generalise better?"
  measure, verdict = column(finding, "tau_measure", str), column(finding, "tau_verdict", str)
  tau, low, high, points = columns(finding, "tau tau_low tau_high tau_points")
  if not np.isfinite(tau).any():
    return no_data(question, finding)
  figure, (left, right) = style.new_figure(question, num_panels=2)
  names = [*measure, "training loss (control)"]
  _set_height(figure, len(names))
  places = _forest(left, names, reach=(-1.04, 1.04))
  for place, bounds, kind in zip(places, zip(tau, low, high, strict=True), verdict, strict=False):
    _draw_verdict(left, place, bounds, str(kind))
  control = [scalar(finding, f"control_tau{end}") for end in ("", "_low", "_high")]
  _draw_row(left, places[-1], control, color=style.INK, marker="d", face=style.INK)
  left.axvline(LEAST_TAU, color=style.MUTED, linewidth=0.9, linestyle=":")
  style.describe(
    left,
    caption=f"{_count(points, 'solutions')} at equal training loss; joint 95 % intervals",
    x_label="Kendall's τ with the test error (positive: flatter is better)",
    y_label="",
  )
  _forest(right, names, reach=(-1.04, 1.04))
  for offset, (prefix, label, color, marker) in zip(
    (0.24, 0.0, -0.24),
    (
      ("test_loss_", "with the test loss", style.BLUE, "o"),
      ("granulated_", "with the test error, where batch size alone differs", style.ORANGE, "D"),
      ("partial_", "with the test error, given the training loss", style.PURPLE, "^"),
    ),
    strict=True,
  ):
    value, bottom, top = columns(finding, "tau tau_low tau_high", prefix=prefix)
    right.errorbar(
      value,
      places[: len(value)] + offset,
      xerr=np.nan_to_num([value - bottom, top - value]),
      fmt=marker,
      color=color,
      markersize=4,
      linewidth=1,
      label=label,
    )
  right.tick_params(labelleft=False)
  for axes in (left, right):
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.axhline(0.5, color=style.MUTED, linewidth=0.8)
  style.describe(right, caption="τ in three other ways", x_label="Kendall's τ", y_label="")
  style.add_legend(figure, num_columns=3, extra=[*_verdict_marks(LEAST_TAU), _remark(finding)])
  return figure


def draw_measures_against_test_error(finding: Finding) -> Figure:
  """Draw the test error of every solution at equal training loss against each measure, coloured by batch size."""
  question = "Which solutions have the smaller test error?"
  measure, used = column(finding, "measure", str), column(finding, "used", bool)
  batch_size, part, value, error = columns(finding, "batch_size rate_part value test_error")
  usable = used & np.isfinite(error)
  names = [name for name in dict.fromkeys(measure) if np.any(usable & (measure == name))]
  if not names:
    return no_data(question, finding)
  figure, panels = _grid(question, len(names), x_label="value of the measure", y_label="test error (%)")
  sizes, parts = np.unique(batch_size), np.unique(part)
  taus = dict(zip(column(finding, "tau_measure", str), column(finding, "tau"), strict=True))
  for axes, name in zip(panels, names, strict=True):
    for size, color in zip(sizes, style.shades(len(sizes)), strict=True):
      for each, shape in zip(parts, SHAPES * len(parts), strict=False):
        at = usable & (measure == name) & (batch_size == size) & (part == each)
        axes.plot(value[at], 100 * error[at], shape, color=color, markersize=4, alpha=0.8, markeredgewidth=0)
    _value_axis(axes, value[usable & (measure == name)])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    tau = taus.get(name, np.nan)
    words = f"\nτ = {tau:z.2f}" if np.isfinite(tau) else ""
    axes.set_title(measure_label(name) + words, loc="left", fontsize=9, color=style.INK)
  marks = [_mark("o", color, f"B = {size:,.0f}") for size, color in zip(sizes, style.shades(len(sizes)), strict=True)]
  marks += [_mark(shape, style.INK, _rate_words(each)) for each, shape in zip(parts, SHAPES * len(parts), strict=False)]
  style.add_legend(
    figure,
    num_columns=int(figure.get_figwidth() // 3),
    extra=[*marks, _remark(finding, "solutions at equal training loss")],
  )
  return figure


def _value_axis(axes: Axes, values: np.ndarray) -> None:
  """Make x logarithmic if all values are positive, with two to five labels: a small panel has no room for more."""
  if np.all(values > 0):
    low, high = values.min() / 1.15, values.max() * 1.15
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    choices = [
      [tick for decade in decades for tick in decade * np.array(digits) if low <= tick <= high]
      for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,))
    ]
    ticks = next((ticks for ticks in choices if 2 <= len(ticks) <= 5), choices[-1][:: -(-len(choices[-1]) // 5) or 1])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)
  else:
    axes.xaxis.set_major_locator(MaxNLocator(4))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.format_tick(value)))


FIGURES: dict[str, Callable[[Finding], Figure]] = {
  "flat_measures": draw_flat_measures,
  "flat_generalizes": draw_flat_generalizes,
}

FURTHER_FIGURES: dict[str, dict[str, Callable[[Finding], Figure]]] = {
  "flat_measures": {"measures_against_batch_size": draw_measures_against_batch_size, "spectra": draw_spectra},
  "flat_generalizes": {"measures_against_test_error": draw_measures_against_test_error},
}
"""Figures that stand below a claim's own, drawn from the same finding."""
