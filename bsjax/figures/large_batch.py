"""The figures of large batches: pure functions `Finding -> Figure`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bsjax.analysis import Finding
from bsjax.analysis.large_batch import NAMES, RECIPES
from bsjax.figures import style
from bsjax.figures.series import column, columns, no_data, scalar

SKY, BROWN = "#56B4E9", "#8C5A2B"
LOOKS = {
  "momentum_constant": (style.BLUE, "o"),
  "momentum_warmup": (SKY, "s"),
  "momentum_cosine": (style.VERMILION, "o"),
  "momentum_warmup_cosine": (style.ORANGE, "s"),
  "lars_warmup_cosine": (style.GREEN, "^"),
  "lamb_warmup_cosine": (style.PURPLE, "v"),
  "adamw_warmup_cosine": (BROWN, "D"),
  "rule_constant": (style.INK, "o"),
  "rule_warmup": (style.MUTED, "s"),
}
"""Colour and marker of each arm, the same in every figure; arms with a warm-up are squares where those without are circles."""
GROUP_WIDTH = 0.8
"""The arms of one batch size take up this part of its place on the axis."""
WORST_SHOWN = 10.0
"""Losses of a search beyond this multiple of the least one are drawn at this multiple."""


def draw_warmup_needed(finding: Finding) -> Figure:
  """Draw the errors of the arms with and without warm-up, and of the linear rule as it stands."""
  return _draw_errors("Do large batches need a warm-up?", finding)


def draw_cosine_helps(finding: Finding) -> Figure:
  """Draw the errors of the arms with and without a cosine."""
  return _draw_errors("Does a cosine help at large batches?", finding)


def draw_lars_lamb_help(finding: Finding) -> Figure:
  """Draw the errors of all tuned arms."""
  return _draw_errors("Do LARS and LAMB help at large batches?", finding)


def _draw_errors(question: str, finding: Finding) -> Figure:
  """Draw arms side by side at each batch size: each seed faint, their mean with its interval, the baseline as a band.

  The linear rule as it stands has a panel of its own, where it was compared: untuned, it may end far off.
  """
  present = column(finding, "mean_arm", str)
  arms = [name for name in NAMES if name in present]
  groups = [[name for name in arms if (name in RECIPES) == recipe] for recipe in (False, True)]
  shown = [group for group in groups if group]
  if not shown or not len(column(finding, "error")):
    return no_data(question, finding)
  figure, panels = style.new_figure(question, num_panels=len(shown))
  for axes, group in zip(panels, shown, strict=True):
    _draw_group(axes, finding, group)
    style.describe(
      axes,
      caption=f"{'the linear rule as it stands' if group[0] in RECIPES else 'tuned'}; seeds faint, mean with its 95 % interval",
      x_label="batch size",
      y_label="test error, %" if scalar(finding, "in_percent") else "test loss",
    )
  style.add_legend(figure, num_columns=1 + len(shown))
  return figure


def _draw_group(axes: Axes, finding: Finding, arms: Sequence[str]) -> None:
  """Draw some arms into a panel; an arm with diverged seeds has a cross on the upper edge, with their number."""
  seed_arm, mean_arm = column(finding, "arm", str), column(finding, "mean_arm", str)
  seed_size, error = columns(finding, "batch_size error")
  size, mean, low, high, diverged = columns(finding, "mean_batch_size mean mean_low mean_high mean_diverged")
  sizes = np.unique(size)
  for number, name in enumerate(arms):
    offset = (number - (len(arms) - 1) / 2) * GROUP_WIDTH / max(len(arms), 4)
    color, marker = LOOKS[name]
    at = seed_arm == name
    axes.plot(
      np.searchsorted(sizes, seed_size[at]) + offset,
      error[at],
      marker,
      color=color,
      alpha=0.3,
      markersize=4,
      markeredgewidth=0,
    )
    here = (mean_arm == name) & np.isfinite(mean)
    bars = np.nan_to_num([mean[here] - low[here], high[here] - mean[here]])
    axes.errorbar(
      np.searchsorted(sizes, size[here]) + offset,
      mean[here],
      yerr=bars,
      fmt=marker,
      color=color,
      markersize=5.5,
      linewidth=1.6,
      capsize=3,
      label=NAMES[name],
    )
    lost = (mean_arm == name) & (diverged > 0)
    for place, count in zip(np.searchsorted(sizes, size[lost]), diverged[lost], strict=True):
      axes.annotate(
        f"×\n{count:.0f}",
        (place + offset, 0.99),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="top",
        fontsize=9,
        color=color,
      )
  if (diverged[np.isin(mean_arm, arms)] > 0).any():
    axes.plot([], [], marker="$×$", color=style.INK, linestyle="none", label="so many seeds diverged")
  _draw_baseline(axes, finding)
  axes.set_xticks(range(len(sizes)), [f"{each:,.0f}" for each in sizes])
  axes.set_xlim(-0.5, len(sizes) - 0.5)
  axes.grid(False, axis="x")


def _draw_baseline(axes: Axes, finding: Finding) -> None:
  """Draw the small-batch baseline as a line with a band, where there is one."""
  value, low, high = (scalar(finding, name) for name in ("baseline", "baseline_low", "baseline_high"))
  if np.isfinite(value):
    label = f"tuned baseline, batch size {scalar(finding, 'baseline_batch_size'):,.0f}"
    axes.axhline(value, color=style.MUTED, linestyle="--", linewidth=1.2, label=label)
    if np.isfinite([low, high]).all():
      axes.axhspan(low, high, color=style.RULE, alpha=0.6, linewidth=0)


def draw_training_curves(finding: Finding) -> Figure:
  """Draw the validation loss along training: every arm at the largest batch size, and the baseline."""
  question = "How do the arms train at the largest batch size?"
  arm = column(finding, "curve_arm", str)
  size, epoch, loss = columns(finding, "curve_batch_size curve_epoch curve_loss")
  reference = scalar(finding, "baseline_batch_size")
  large = size[size > reference]
  if not len(large):
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  for name, (color, marker) in LOOKS.items():
    at = (arm == name) & (size == large.max())
    if at.any():
      axes.plot(
        epoch[at], loss[at], color=color, linewidth=1.5, marker=marker, markevery=(0.05, 0.2), label=NAMES[name]
      )
  at = size == reference
  if at.any():
    label = f"tuned baseline, batch size {reference:,.0f}"
    axes.plot(epoch[at], loss[at], color=style.MUTED, linestyle="--", linewidth=1.5, label=label)
  style.log_axis(axes)
  style.describe(
    axes,
    caption=f"batch size {large.max():,.0f}, mean over the final seeds",
    x_label="epochs",
    y_label="validation loss (log scale)",
  )
  style.add_legend(figure)
  return figure


def draw_searches(finding: Finding) -> Figure:
  """Draw every trial of the searches at the largest batch size, and the point that was chosen."""
  question = "Was every arm tuned around its best rate?"
  arm, best = column(finding, "tuned_arm", str), column(finding, "tuned_best", bool)
  size, rate, loss = columns(finding, "tuned_batch_size tuned_learning_rate tuned_loss")
  if not np.isfinite(loss).any():
    return no_data(question, finding)
  largest = size.max()
  least = loss[size == largest].min()
  figure, (axes,) = style.new_figure(question)
  for name, (color, marker) in LOOKS.items():
    at = (arm == name) & (size == largest)
    if at.any():
      shown = np.minimum(loss[at], WORST_SHOWN * least)
      axes.plot(rate[at], shown, marker, color=color, markersize=4, alpha=0.6, markeredgewidth=0, label=NAMES[name])
      chosen = at & best
      axes.plot(
        rate[chosen], loss[chosen], marker, color=color, markersize=9, markeredgecolor=style.INK, markeredgewidth=1.2
      )
  axes.plot(
    [], [], "o", color="white", markeredgecolor=style.INK, markersize=9, linestyle="none", label="chosen by its repeats"
  )
  axes.set_xscale("log")
  axes.set_yscale("log")
  style.log_axis(axes)
  style.describe(
    axes,
    caption=f"batch size {largest:,.0f}; a trial that diverged, or ends {WORST_SHOWN:g} times above the best, is drawn at the top",
    x_label="learning rate (log scale)",
    y_label="validation loss (log scale)",
  )
  style.add_legend(figure)
  return figure


FIGURES: dict[str, Callable[[Finding], Figure]] = {
  "warmup_needed": draw_warmup_needed,
  "cosine_helps": draw_cosine_helps,
  "lars_lamb_help": draw_lars_lamb_help,
}
FURTHER_FIGURES: dict[str, dict[str, Callable[[Finding], Figure]]] = {
  "lars_lamb_help": {"training_curves": draw_training_curves, "large_batch_searches": draw_searches},
}
