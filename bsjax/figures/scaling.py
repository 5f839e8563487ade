"""The figures of the scaling rules: what each costs, and the lattice of rates it was measured on; pure functions `Finding -> Figure`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bsjax.analysis import Finding
from bsjax.analysis.claims_scaling import ADAM_RULE, LEAST_LOSS
from bsjax.analysis.regret import POINTS_PER_OCTAVE, RULES
from bsjax.figures import style
from bsjax.figures.series import column, columns, no_data, scalar

PANEL_WIDTH, PANEL_HEIGHT = 4.1, 4.7
CELLS = "viridis_r"
MOST_TICKS = 7
TICKS = (0.5, 0.7, 1, 1.2, 1.5, 2, 3)
COLORS = dict(
  zip((*RULES, ADAM_RULE), (style.BLUE, style.GREEN, style.VERMILION, style.PURPLE, style.ORANGE), strict=True)
)
MARKERS = dict(zip((*RULES, ADAM_RULE), "osD^v", strict=True))
LABELS = {
  "none": "none: the same rate",
  "sqrt": "sqrt: rate × √(b / b₀)",
  "linear": "linear: rate × b / b₀",
  "noise": "noise: rate × (1 + N / b₀) / (1 + N / b)",
  ADAM_RULE: "Adam's sqrt: betas and epsilon, too",
}


def _new_figure(question: str, num_panels: int) -> tuple[Figure, list[Axes]]:
  """Start a figure of panels side by side, narrower where there are several."""
  figure, panels = style.new_figure(question, num_panels=num_panels)
  figure.set_size_inches(max(2, num_panels) * PANEL_WIDTH, PANEL_HEIGHT)
  return figure, panels


def draw_no_rule_fits_all(finding: Finding) -> Figure:
  """Draw the mean regret of each rule against the ratio of the batch sizes, one panel for each optimizer."""
  question = "What does each rule cost when the batch size changes?"
  optimizer, rule = column(finding, "curve_optimizer", str), column(finding, "curve_rule", str)
  factor, regret, low, high, pairs = columns(finding, "factor regret low high pairs", prefix="curve_")
  if not np.isfinite(regret).any():
    return no_data(question, finding)
  names = list(dict.fromkeys(optimizer.tolist()))
  figure, panels = _new_figure(question, len(names))
  limit = scalar(finding, "limit")
  for axes, name in zip(panels, names, strict=True):
    for each in RULES:
      at = (optimizer == name) & (rule == each)
      if at.any():
        x, y, lower, upper = (_through_one(factor[at], values[at]) for values in (factor, regret, low, high))
        axes.fill_between(x, lower, upper, color=COLORS[each], alpha=0.13, linewidth=0)
        axes.plot(
          x,
          y,
          marker=MARKERS[each],
          color=COLORS[each],
          markersize=4,
          linewidth=1.6,
          label=LABELS[each],
        )
    axes.axhline(1, color=style.INK, linewidth=1)
    axes.axhline(
      limit, color=style.INK, linestyle=":", linewidth=1.2, label=f"{limit:g}: trials end here, at least that"
    )
    axes.axhline(
      LEAST_LOSS, color=style.MUTED, linestyle="--", linewidth=1, label=f"{LEAST_LOSS:g}: a fifth more steps"
    )
    _ratio_axis(axes, factor)
    _regret_axis(axes, lowest=float(np.nanmin(low)), limit=limit)
    here = pairs[(optimizer == name) & (rule == RULES[0])]
    counts = "–".join(f"{count:.0f}" for count in sorted({here.min(), here.max()}))
    style.describe(
      axes,
      caption=f"{name}: means, 95 % bands; pairs at each ratio: {counts}",
      x_label="new batch size b / old batch size b₀",
      y_label="steps / steps at the best rate (log scale)" if axes is panels[0] else "",
    )
  style.add_legend(figure, num_columns=3)
  return figure


def _through_one(factor: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Insert 1 where the batch size does not change: there no rule costs anything."""
  return np.insert(values, np.searchsorted(factor, 1.0), 1.0)


def _regret_axis(axes: Axes, *, lowest: float, limit: float) -> None:
  """Make y logarithmic up to the limit, with ticks that regrets are read by."""
  axes.set_yscale("log")
  axes.set_ylim(min(0.8, 0.95 * lowest), 1.12 * limit)
  low, _ = axes.get_ylim()
  ticks = [tick for tick in (*TICKS, limit) if tick >= low]
  axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
  axes.minorticks_off()


def _batch_size_axis(axes: Axes, sizes: np.ndarray) -> None:
  """Make x the axis of batch sizes, with no more labels than fit a narrow panel."""
  style.batch_size_axis(axes, sizes)
  ticks = axes.get_xticks()
  axes.set_xticks(ticks[:: max(1, -(-len(ticks) // MOST_TICKS))])


def _ratio_axis(axes: Axes, ratio: np.ndarray) -> None:
  """Make x logarithmic, with ratios below 1 written as fractions."""
  axes.set_xscale("log", base=2)
  most = np.ceil(np.log2(max(ratio.max(), 1 / ratio.min())))
  stride = max(1, int(np.ceil(most / 4)))
  powers = np.arange(-(most // stride) * stride, most + 1, stride)
  axes.set_xticks(list(2.0**powers), [f"1/{2**-p:g}" if p < 0 else f"{2**p:g}" for p in powers])
  axes.minorticks_off()


def draw_scaling_lattice(finding: Finding) -> Figure:
  """Draw the steps to the target over batch size and rate, the best rates, and the rules' lines from the reference batch size."""
  question = "Which rate is best at which batch size, and where do the rules lead?"
  optimizer = column(finding, "lattice_optimizer", str)
  size, rate, steps, reached = columns(finding, "batch_size rate steps reached", prefix="lattice_")
  if not len(size):
    return no_data(question, finding)
  best_optimizer = column(finding, "best_optimizer", str)
  best_size, best_rate, best_steps = columns(finding, "batch_size rate steps", prefix="best_")
  names = list(dict.fromkeys(optimizer.tolist()))
  figure, panels = _new_figure(question, len(names))
  limit = scalar(finding, "limit")
  norm = LogNorm(1, limit)
  for axes, name in zip(panels, names, strict=True):
    at = optimizer == name
    best = dict(zip(best_size[best_optimizer == name], best_steps[best_optimizer == name], strict=True))
    fewest = np.array([best[each] for each in size[at]])
    sizes = np.unique(size[at])
    _draw_cells(axes, sizes, size[at], rate[at], steps[at] / fewest, reached[at], norm)
    mine = best_optimizer == name
    axes.plot(
      best_size[mine],
      best_rate[mine],
      "*",
      color="white",
      markeredgecolor=style.INK,
      markersize=10,
      label="best rate",
      zorder=5,
    )
    _draw_rules(axes, finding, name)
    axes.set_ylim(rate[at].min() / 1.3, rate[at].max() * 1.3)
    _batch_size_axis(axes, sizes)
    axes.set_xlim(sizes[0] / 2**0.7, sizes[-1] * 2**0.7)
    style.log_axis(axes)
    axes.grid(visible=False)
    style.describe(
      axes,
      caption=f"{name}: geometric mean over seeds",
      x_label="batch size",
      y_label="learning rate (log scale)" if axes is panels[0] else "",
    )
  ticks = [tick for tick in TICKS if tick >= 1]
  bar = figure.colorbar(
    ScalarMappable(norm, colormaps[CELLS]),
    ax=panels,
    fraction=0.03,
    pad=0.02,
    ticks=[*(ticks := [tick for tick in TICKS if tick >= 1]), limit],
  )
  bar.ax.set_yticklabels([*(f"{tick:g}" for tick in ticks), f"≥ {limit:g}"])
  bar.ax.minorticks_off()
  bar.set_label("steps / steps at the best rate", color=style.INK, fontsize=10)
  failed = Line2D([], [], linestyle="", marker="x", color=style.MUTED, markersize=5, label="no seed arrives in time")
  style.add_legend(figure, num_columns=3, extra=[failed])
  return figure


def _draw_cells(
  axes: Axes,
  sizes: np.ndarray,
  size: np.ndarray,
  rate: np.ndarray,
  ratio: np.ndarray,
  reached: np.ndarray,
  norm: LogNorm,
) -> None:
  """Draw one cell for each rate that some seed arrives at, as wide as half the way to the next batch size, and a cross elsewhere."""
  some = reached > 0
  tall = 2 ** (0.5 / POINTS_PER_OCTAVE)
  gaps = np.diff(np.log2(sizes))
  wide = 2 ** (0.46 * (gaps.min() if len(gaps) else 1))
  axes.bar(
    size[some] / wide,
    rate[some] * (tall - 1 / tall),
    width=size[some] * (wide - 1 / wide),
    bottom=rate[some] / tall,
    align="edge",
    color=colormaps[CELLS](norm(np.clip(ratio[some], 1, norm.vmax))),
    linewidth=0,
  )
  axes.plot(size[~some], rate[~some], "x", color=style.MUTED, markersize=4)


def _draw_rules(axes: Axes, finding: Finding, name: str) -> None:
  optimizer, rule = column(finding, "reference_optimizer", str), column(finding, "reference_rule", str)
  size, rate = columns(finding, "batch_size rate", prefix="reference_")
  for each in RULES:
    at = (optimizer == name) & (rule == each) & np.isfinite(rate)
    if at.any():
      axes.plot(size[at], rate[at], "-", color="white", linewidth=3.2, solid_capstyle="round")
      axes.plot(size[at], rate[at], "-", color=COLORS[each], linewidth=1.7, label=LABELS[each])


def draw_scaling_reference(finding: Finding) -> Figure:
  """Draw the regret of each rule from the reference batch size to every other, Adam's own rule among them."""
  question = f"What does each rule cost from batch size {scalar(finding, 'reference'):.0f}?"
  optimizer, rule = column(finding, "reference_optimizer", str), column(finding, "reference_rule", str)
  size, regret, low, high = columns(finding, "batch_size regret low high", prefix="reference_")
  if not np.isfinite(regret).any():
    return no_data(question, finding)
  names = list(dict.fromkeys(optimizer.tolist()))
  figure, panels = _new_figure(question, len(names))
  limit = scalar(finding, "limit")
  for axes, name in zip(panels, names, strict=True):
    shown = [each for each in COLORS if ((optimizer == name) & (rule == each) & np.isfinite(regret)).any()]
    for number, each in enumerate(shown):
      at = (optimizer == name) & (rule == each) & np.isfinite(regret)
      x = size[at] * 2 ** (0.13 * (number - (len(shown) - 1) / 2))
      axes.errorbar(
        x,
        regret[at],
        yerr=[regret[at] - low[at], high[at] - regret[at]],
        fmt=MARKERS[each],
        color=COLORS[each],
        markersize=4.5,
        linewidth=1,
        label=LABELS[each],
      )
    axes.axhline(1, color=style.INK, linewidth=1)
    axes.axhline(
      limit, color=style.INK, linestyle=":", linewidth=1.2, label=f"{limit:g}: trials end here, at least that"
    )
    _batch_size_axis(axes, size)
    _regret_axis(axes, lowest=float(np.nanmin(low)), limit=limit)
    style.describe(
      axes,
      caption=f"{name}: mean over seeds, 95 % intervals",
      x_label="new batch size",
      y_label="steps / steps at the best rate (log scale)" if axes is panels[0] else "",
    )
  style.add_legend(figure, num_columns=3)
  return figure


FIGURES: dict[str, Callable[[Finding], Figure]] = {"no_rule_fits_all": draw_no_rule_fits_all}
FURTHER_FIGURES: dict[str, dict[str, Callable[[Finding], Figure]]] = {
  "no_rule_fits_all": {"scaling_lattice": draw_scaling_lattice, "scaling_reference": draw_scaling_reference},
}
"""Figures that stand below the claim's own, drawn from the same finding."""
