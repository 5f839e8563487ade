"""The figures of pre-training and fine-tuning: pure functions `Finding -> Figure`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bsjax.analysis import Finding
from bsjax.analysis.large_batch import NAMES
from bsjax.figures import style
from bsjax.figures.large_batch import LOOKS
from bsjax.figures.series import column, columns, no_data, scalar


def draw_pretrain_large(finding: Finding) -> Figure:
  """Draw the test loss of each way to pre-train against the batch size, with the gradient noise scale as a band."""
  question = "Does pre-training with large batches lose anything?"
  names = column(finding, "mean_arm", str)
  if not len(column(finding, "loss")):
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  noise, low, high = (scalar(finding, f"noise_scale{end}") for end in ("", "_low", "_high"))
  if np.isfinite(noise):
    axes.axvline(noise, color=style.MUTED, linestyle="--", linewidth=1.2, label="gradient noise scale")
    if np.isfinite([low, high]).all():
      axes.axvspan(low, high, color=style.RULE, alpha=0.6, linewidth=0)
  for name in dict.fromkeys(names.tolist()):
    color, marker = LOOKS[name]
    _draw_outcomes(axes, finding, name, color=color, marker=marker, label=NAMES[name])
  style.batch_size_axis(axes, np.unique(column(finding, "mean_batch_size")))
  style.describe(
    axes, caption="equal epochs; seeds faint, mean with its 95 % interval", x_label="batch size", y_label="test loss"
  )
  style.add_legend(figure)
  return figure


def draw_finetune_small(finding: Finding) -> Figure:
  """Draw the test error of fine-tuning against its batch size, for each of the two starts."""
  question = "Do small batches fine-tune better?"
  starts = column(finding, "start", str).tolist()
  if not len(column(finding, "loss")):
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  looks = zip(starts, column(finding, "pretrain_batch_size"), (style.BLUE, style.VERMILION), ("o", "s"), strict=False)
  for name, size, color, marker in looks:
    label = f"pre-trained at batch size {size:,.0f}"
    _draw_outcomes(axes, finding, name, color=color, marker=marker, label=label)
  style.batch_size_axis(axes, np.unique(column(finding, "mean_batch_size")))
  style.describe(
    axes,
    caption="equal epochs; seeds faint, mean with its 95 % interval",
    x_label="batch size of fine-tuning",
    y_label="test error, %" if scalar(finding, "in_percent") else "test loss",
  )
  style.add_legend(figure)
  return figure


def _draw_outcomes(axes: Axes, finding: Finding, name: str, *, color: str, marker: str, label: str) -> None:
  at = column(finding, "seed_arm", str) == name
  size, loss = columns(finding, "seed_batch_size loss")
  axes.plot(size[at], loss[at], marker, color=color, alpha=0.3, markersize=4, markeredgewidth=0)
  size, mean, low, high = columns(finding, "mean_batch_size mean mean_low mean_high")
  here = (column(finding, "mean_arm", str) == name) & np.isfinite(mean)
  bars = np.nan_to_num([mean[here] - low[here], high[here] - mean[here]])
  axes.errorbar(
    size[here],
    mean[here],
    yerr=bars,
    fmt=f"-{marker}",
    color=color,
    markersize=5.5,
    linewidth=1.6,
    capsize=3,
    label=label,
  )


FIGURES: dict[str, Callable[[Finding], Figure]] = {
  "pretrain_large": draw_pretrain_large,
  "finetune_small": draw_finetune_small,
}
