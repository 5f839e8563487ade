"""The figures of sweeps: steps to result, what became of the trials, momentum, rates, quality. Pure functions `Finding -> Figure`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bsjax.analysis import Finding
from bsjax.figures import style
from bsjax.figures.series import column, columns, no_data, scalar

BATCH_SIZE = "batch size B (examples per update)"
PALETTE = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE)
MARKERS = "osD^v"
OUTCOMES = {
  "reached": ("reached the target", style.BLUE),
  "not_reached": ("never reached it", style.ORANGE),
  "incomplete": ("cut: cannot be first", style.RULE),
  "infeasible": ("diverged", style.VERMILION),
}


def _looks(names: np.ndarray) -> dict[str, tuple[str, str]]:
  """Give every optimizer its colour and marker, in the order of the study."""
  distinct = list(dict.fromkeys(names.tolist()))
  return {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(distinct)}


def draw_three_regimes(finding: Finding) -> Figure:
  """Draw steps to result against batch size with the line of perfect scaling and the fit, and the examples they take.

  Source: Shallue et al. (2019), Fig. 1; McCandlish et al. (2018), Fig. 6, for examples against batch size.
  """
  question = "How many steps does each batch size need?"
  name = column(finding, "optimizer", str)
  size, steps, low, high, perfect, train_steps = columns(
    finding, "batch_size steps steps_low steps_high perfect train_steps"
  )
  if not len(steps):
    return no_data(question, finding)
  trial_name = column(finding, "trial_optimizer", str)
  trial_size, trial_steps = columns(finding, "batch_size steps", prefix="trial_")
  figure, (left, right) = style.new_figure(question, num_panels=2)
  for each, (color, marker) in _looks(name).items():
    at, tried = name == each, trial_name == each
    left.plot(trial_size[tried], trial_steps[tried], marker, color=color, alpha=0.12, markersize=3, markeredgewidth=0)
    for axes, factor in ((left, 1.0), (right, size[at])):
      bars = np.abs(np.array([steps[at] - low[at], high[at] - steps[at]])) * factor
      axes.errorbar(
        size[at], steps[at] * factor, yerr=bars, fmt=marker, color=color, markersize=5.5, capsize=2.5, label=each
      )
      _draw_fit(axes, finding, each, size[at], color, examples=axes is right)
    left.plot(size[at], perfect[at], ":", color=color, linewidth=1.2)
    right.plot(size[at], train_steps[at] * size[at], marker, color=color, markersize=5.5, fillstyle="none")
  for axes in (left, right):
    style.batch_size_axis(axes, size)
  left.set_ylim(0.6 * min(steps.min(), low.min()), 1.6 * max(trial_steps.max(), high.max()))
  for axes in (left, right):
    style.log_axis(axes)
  style.describe(
    left,
    caption="fewest steps with 95 % interval; each trial (faint)",
    x_label=BATCH_SIZE,
    y_label="steps to the target",
  )
  style.describe(
    right, caption="steps x batch size; perfect scaling is flat", x_label=BATCH_SIZE, y_label="examples to the target"
  )
  extra = [
    Line2D([], [], linestyle=":", color=style.INK, label="perfect scaling from the smallest batch size"),
    Line2D([], [], linestyle="--", color=style.INK, label="fit: S_min (1 + B_crit / B)"),
    Line2D(
      [], [], linestyle="", marker="o", fillstyle="none", color=style.INK, label="to a training loss (McCandlish)"
    ),
  ]
  style.add_legend(figure, num_columns=3, extra=extra)
  return figure


def _draw_fit(axes: Axes, finding: Finding, name: str, sizes: np.ndarray, color: str, *, examples: bool) -> None:
  at = column(finding, "curve_optimizer", str) == name
  s_min, critical = (values[at] for values in columns(finding, "s_min critical"))
  if at.any() and np.isfinite(critical).all():
    x = np.geomspace(sizes.min(), sizes.max(), 100)
    y = s_min * (1 + critical / x)
    axes.plot(x, y * x if examples else y, "--", color=color, linewidth=1.4)


def draw_budget_curves(finding: Finding) -> Figure:
  """Draw the best metric that a budget of steps, or of epochs, buys at each batch size.

  Source: Shallue et al. (2019), Fig. 11.
  """
  question = "What does a budget of steps, or of epochs, buy?"
  unit = column(finding, "budget_unit", str)
  budget, size, best = columns(finding, "budget budget_batch_size budget_best")
  reached = column(finding, "budget_reached", bool)
  if not np.isfinite(best).any():
    return no_data(question, finding)
  optimizer, metric = (str(np.asarray(finding.series.get(f"budget_{name}", ""))) for name in ("optimizer", "metric"))
  figure, panels = style.new_figure(question, num_panels=2)
  for axes, each in zip(panels, ("steps", "epochs"), strict=True):
    budgets = np.unique(budget[unit == each])
    for color, marker, limit in zip(style.shades(len(budgets)), MARKERS, budgets, strict=False):
      at = (unit == each) & (budget == limit) & np.isfinite(best)
      axes.plot(size[at], best[at], "-", color=color, linewidth=1.2)
      for chosen, fill in ((at & ~reached, "full"), (at & reached, "none")):
        axes.plot(size[chosen], best[chosen], marker, color=color, markersize=5.5, fillstyle=fill)
      axes.plot([], [], f"-{marker}", color=color, label=f"{limit:,.3g} {each}")
    style.batch_size_axis(axes, size)
    caption = f"{optimizer}; hollow: at the target, where trials end"
    style.describe(
      axes, caption=caption, x_label=BATCH_SIZE, y_label=f"best {metric.replace('_', ' ')} within the budget"
    )
  style.add_legend(figure, num_columns=4)
  return figure


def draw_trial_states(finding: Finding) -> Figure:
  """Draw what became of the trials of each batch size, a panel for each optimizer."""
  question = "What became of the trials?"
  name, size = column(finding, "state_optimizer", str), column(finding, "state_batch_size")
  if not len(size):
    return no_data(question, finding)
  names = list(dict.fromkeys(name.tolist()))
  figure, panels = style.new_figure(question, num_panels=len(names))
  for axes, each in zip(panels, names, strict=True):
    at = name == each
    place, bottom = np.arange(at.sum()), np.zeros(at.sum())
    for outcome, (label, color) in OUTCOMES.items():
      count = column(finding, outcome)[at]
      axes.bar(place, count, bottom=bottom, color=color, width=0.75, label=label)
      bottom += count
    axes.set_xticks(place, [style.format_tick(value) for value in size[at]], rotation=45 if at.sum() > 8 else 0)
    axes.grid(False, axis="x")
    style.describe(axes, caption=each, x_label=BATCH_SIZE, y_label="trials")
  style.add_legend(figure, num_columns=4 if len(names) > 1 else 2)
  return figure


def draw_momentum_extends_scaling(finding: Finding) -> Figure:
  """Draw how many times more steps it takes without momentum, against batch size."""
  question = "What does momentum save, and where?"
  size, ratio, low, high = columns(finding, "batch_size ratio ratio_low ratio_high")
  if not len(size):
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  bars = np.abs(np.array([ratio - low, high - ratio]))
  axes.errorbar(
    size, ratio, yerr=bars, fmt="-o", color=style.BLUE, capsize=2.5, label="steps without / with, 95 % interval"
  )
  axes.axhline(1.0, linestyle="--", color=style.INK, linewidth=1.4, label="no difference")
  style.batch_size_axis(axes, size)
  for key, color, words in (
    ("critical_without", style.VERMILION, "without"),
    ("critical_with", style.GREEN, "with"),
  ):
    value = scalar(finding, key)
    if size.min() <= value <= size.max():
      axes.axvline(value, color=color, linewidth=1.2, label=f"critical batch size {words} momentum: {value:,.0f}")
  style.log_axis(axes)
  caption = f"both tuned at every batch size; n = {len(size)} batch sizes"
  style.describe(axes, caption=caption, x_label=BATCH_SIZE, y_label="steps without / with momentum")
  style.add_legend(figure, num_columns=2)
  return figure


def draw_lr_sensitivity(finding: Finding) -> Figure:
  """Draw the best learning rate against batch size with the exponents of the rules, and how wide the range of good rates is.

  Source: Shallue et al. (2019), Figs. 7 and 8.
  """
  question = "Which learning rates are good?"
  name = column(finding, "optimizer", str)
  size, best, best_low, best_high, width, width_low, width_high = columns(
    finding, "batch_size best best_low best_high width width_low width_high"
  )
  on_edge, truncated = column(finding, "on_edge", bool), column(finding, "truncated", bool)
  if not len(size):
    return no_data(question, finding)
  figure, (left, right) = style.new_figure(question, num_panels=2)
  for each, (color, marker) in _looks(name).items():
    at = name == each
    for axes, value, low, high, doubtful in (
      (left, best, best_low, best_high, on_edge),
      (right, np.exp(width), np.exp(width_low), np.exp(width_high), truncated),
    ):
      bars = np.abs(np.array([value[at] - low[at], high[at] - value[at]]))
      axes.errorbar(size[at], value[at], yerr=bars, fmt="-", color=color, capsize=2.5, linewidth=1.2)
      for chosen, fill in ((at & ~doubtful, "full"), (at & doubtful, "none")):
        axes.plot(size[chosen], value[chosen], marker, color=color, markersize=5.5, fillstyle=fill)
    left.plot([], [], f"-{marker}", color=color, label=each)
  middle = np.exp(np.log(best).mean()) / np.sqrt(size.min() * size.max()) ** np.array([0.5, 1.0])
  ends = np.array([size.min(), size.max()])
  for exponent, factor, line in ((0.5, middle[0], "--"), (1.0, middle[1], ":")):
    words = "square-root" if exponent == 0.5 else "linear"
    left.plot(ends, factor * ends**exponent, line, color=style.INK, linewidth=1.2, label=f"slope of the {words} rule")
  for axes in (left, right):
    style.batch_size_axis(axes, size)
    style.log_axis(axes)
  style.describe(
    left,
    caption="95 % interval; hollow: on the edge of the search",
    x_label=BATCH_SIZE,
    y_label="best effective learning rate",
  )
  style.describe(
    right,
    caption="within twice the fewest steps; hollow: may go on",
    x_label=BATCH_SIZE,
    y_label="highest / lowest good rate",
  )
  style.add_legend(figure, num_columns=4)
  return figure


def draw_same_best_error(finding: Finding) -> Figure:
  """Draw the test error that each batch size reached along a whole budget, each seed and their mean."""
  question = "Does any batch size cost quality?"
  name = column(finding, "optimizer", str)
  size, error = columns(finding, "batch_size error")
  if not len(size):
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  looks = _looks(name)
  for index, (each, (color, marker)) in enumerate(looks.items()):
    at = name == each
    shift = 2.0 ** (0.2 * (index - (len(looks) - 1) / 2))
    style.draw_seeds_and_mean(axes, size[at] * shift, error[at], color=color, marker=marker, label=each)
  style.batch_size_axis(axes, size)
  axes.set_ylim(bottom=0)
  caption = f"{style.count_phrase(size[name == name[0]], 'fresh seeds')} (faint); mean ± standard error"
  style.describe(axes, caption=caption, x_label=BATCH_SIZE, y_label="test error, stopped by validation")
  style.add_legend(figure, num_columns=3)
  return figure


FIGURES: dict[str, Callable[[Finding], Figure]] = {
  "three_regimes": draw_three_regimes,
  "momentum_extends_scaling": draw_momentum_extends_scaling,
  "lr_sensitivity": draw_lr_sensitivity,
  "same_best_error": draw_same_best_error,
}
FURTHER_FIGURES: dict[str, dict[str, Callable[[Finding], Figure]]] = {
  "three_regimes": {"budget_curves": draw_budget_curves, "trial_states": draw_trial_states}
}
