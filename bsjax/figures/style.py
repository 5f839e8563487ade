"""The one look of every figure: colours, the batch-size axis, how seeds, means, theory and legends are drawn.

Only Matplotlib's object-oriented interface is used, so that drawing a figure changes no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

# Okabe and Ito (2008), "Color universal design": told apart by readers with any common colour-vision deficiency.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
INK, MUTED, RULE = "#222222", "#666666", "#dddddd"

MAX_TICKS = 12
PANEL_WIDTH, PANEL_HEIGHT = 5.4, 4.4


def new_figure(question: str, *, num_panels: int = 1) -> tuple[Figure, list[Axes]]:
  """Start a figure whose title is the question it answers, with panels side by side."""
  width = 7.2 if num_panels == 1 else PANEL_WIDTH * num_panels
  figure = Figure(figsize=(width, PANEL_HEIGHT), dpi=160, layout="constrained", facecolor="white")
  FigureCanvasAgg(figure)
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04)  # type: ignore[union-attr, call-arg]
  figure.suptitle(question, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
  panels = [figure.add_subplot(1, num_panels, index + 1) for index in range(num_panels)]
  for axes in panels:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.grid(True, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
  return figure, panels


def no_data_figure(question: str, reason: str) -> Figure:
  """Draw what remains to be said when a claim has nothing to draw: `no data: <reason>`."""
  figure, (axes,) = new_figure(question)
  axes.set_axis_off()
  axes.text(0.5, 0.5, f"no data: {reason}", ha="center", va="center", fontsize=11, color=MUTED, wrap=True)
  return figure


def describe(axes: Axes, *, caption: str, x_label: str, y_label: str) -> None:
  """Write a panel's caption (what one mark is and how many there are) and its axis labels with units."""
  axes.set_title(caption, loc="left", fontsize=9, color=MUTED)
  axes.set_xlabel(x_label, fontsize=10, color=INK)
  axes.set_ylabel(y_label, fontsize=10, color=INK)


def batch_size_axis(axes: Axes, batch_sizes: np.ndarray) -> None:
  """Make x a base-2 logarithmic axis over `batch_sizes`, labelled with the powers of two themselves."""
  axes.set_xscale("log", base=2)
  low, high = float(np.min(batch_sizes)), float(np.max(batch_sizes))
  powers = np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
  stride = int(np.ceil(len(powers) / MAX_TICKS)) if len(powers) else 1
  axes.xaxis.set_major_locator(FixedLocator(list(2.0 ** powers[::stride])))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.set_xlim(low / 2**0.4, high * 2**0.4)


def log_axis(axes: Axes) -> None:
  """Make y logarithmic with plain-number labels: over a few decades or less, 1-2-5 ticks are labelled too."""
  axes.set_yscale("log")
  low, high = axes.get_ylim()
  if high / low < 300:
    exponents = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.set_ylim(low, high)
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
  axes.yaxis.set_minor_formatter(NullFormatter())


def symlog_axis(axes: Axes, values: np.ndarray) -> None:
  """Make x logarithmic from the first checkpoint after the start on, and linear from 0 to there, so that the start has a place."""
  positive = values[values > 0]
  if len(positive):
    axes.set_xscale("symlog", linthresh=positive.min(), linscale=0.8)
    axes.set_xlim(-0.15 * positive.min(), positive.max() * 1.3)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
  axes.xaxis.set_minor_locator(NullLocator())


def format_tick(value: float) -> str:
  """Format a tick as people write it: 32, 4,096, 0.05, and powers of ten beyond ten million or below a thousandth.

  >>> [format_tick(value) for value in (32, 4096.0, 0.05, 1e-5)]
  ['32', '4,096', '0.05', '$10^{-5}$']
  """
  if value != 0 and not 1e-3 <= abs(value) < 1e7:
    exponent = int(np.floor(np.log10(abs(value)) + 1e-9))
    mantissa = f"{value / 10.0**exponent:.3g}"
    return f"$10^{{{exponent}}}$" if mantissa == "1" else f"${mantissa}\\times10^{{{exponent}}}$"
  return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def mean_and_error(
  keys: np.ndarray, values: np.ndarray, *, geometric: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Average values of equal key, and put one standard error, std(ddof=1)/sqrt(n), on either side.

  Args:
    geometric: average logarithms and transform back, as the fits in log-log do; the bar is then a factor each way.

  Returns: sorted unique keys `f64[K]`, means `f64[K]`, and lengths of the bars down and up `f64[2, K]`, which are 0 for a single value.
    Values that are not finite are left out.
  """
  usable = np.isfinite(values)
  unique = np.unique(keys[usable])
  groups = [values[usable & (keys == key)] for key in unique]
  groups = [np.log(group) for group in groups] if geometric else groups
  means = np.array([np.mean(group) for group in groups])
  sems = np.array([np.std(group, ddof=1) / np.sqrt(len(group)) if len(group) > 1 else 0.0 for group in groups])
  low, high = means - sems, means + sems
  if geometric:
    low, means, high = np.exp(low), np.exp(means), np.exp(high)
  return unique, means, np.array([means - low, high - means])


def draw_seeds_and_mean(
  axes: Axes, x: np.ndarray, y: np.ndarray, *, color: str, label: str, marker: str = "o", geometric: bool = False
) -> None:
  """Draw each seed as a faint point, and the mean over seeds with its standard error as a line."""
  axes.plot(x, y, marker, color=color, alpha=0.3, markersize=4, markeredgewidth=0)
  unique, means, bars = mean_and_error(x, y, geometric=geometric)
  axes.errorbar(
    unique, means, yerr=bars, fmt=f"-{marker}", color=color, markersize=5.5, linewidth=1.6, capsize=2.5, label=label
  )


def draw_measurements(
  axes: Axes, x: np.ndarray, y: np.ndarray, sem: np.ndarray, *, color: Any, label: str | None
) -> None:
  """Draw measurements that carry their own standard errors: each as a faint point, and per x their mean.

  The mean of n measurements with standard errors s_i has the standard error sqrt(sum s_i^2)/n: what sampling left open,
  without the spread between seeds.
  """
  axes.plot(x, y, "o", color=color, alpha=0.3, markersize=3.5, markeredgewidth=0)
  unique = np.unique(x)
  means = np.array([np.mean(y[x == at]) for at in unique])
  sems = np.array([np.sqrt(np.sum(sem[x == at] ** 2)) / np.sum(x == at) for at in unique])
  axes.errorbar(unique, means, yerr=sems, fmt="o", color=color, markersize=4.5, capsize=2.5, label=label)


def draw_theory(
  axes: Axes, x: np.ndarray, y: np.ndarray, *, label: str | None, color: Any = INK, style: str = "--"
) -> None:
  """Draw a prediction as a dashed line over sorted x."""
  order = np.argsort(x)
  axes.plot(x[order], y[order], style, color=color, linewidth=1.4, label=label)


def shades(count: int) -> list[tuple[float, ...]]:
  """Return `count` colours in an order that also reads in grey: from dark (early) to light (late)."""
  return [tuple(colormaps["viridis"](position)) for position in np.linspace(0.05, 0.75, max(count, 1))]


def count_phrase(x: np.ndarray, noun: str) -> str:
  """Say how many marks stand at each x: `3 seeds per batch size`, or `2-3 seeds` where it differs.

  >>> count_phrase(np.array([1, 1, 2, 2, 2]), "seeds")
  '2–3 seeds per batch size'
  """
  if len(x) == 0:
    return f"no {noun}"
  counts = np.unique(x, return_counts=True)[1]
  low, high = int(counts.min()), int(counts.max())
  number = str(low) if low == high else f"{low}–{high}"
  return f"{number} {noun} per batch size"


def add_legend(figure: Figure, *, num_columns: int = 2, extra: Sequence[Any] = ()) -> None:
  """Put one legend for all panels below them, where it can cover no data; a label that repeats is listed once."""
  handles: dict[str, Any] = {}
  for axes in figure.axes:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  for handle in extra:
    handles.setdefault(handle.get_label(), handle)
  if handles:
    figure.legend(
      list(handles.values()),
      list(handles),
      loc="outside lower left",
      ncols=min(num_columns, len(handles)),
      frameon=False,
      fontsize=9,
      labelcolor=INK,
    )
