"""The figures of gradient noise along training: pure functions `Finding -> Figure`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from bsjax.analysis import Finding
from bsjax.analysis.claims_temperature import UNCHANGED
from bsjax.figures import style
from bsjax.figures.series import column, columns, no_data

EXAMPLES = "examples seen"
NOISE_SCALE = "noise scale (examples, log scale)"
OPEN = "open: not identifiable for unseen data; that of the training set instead"
LINES = ("-", "--", ":", "-.")
MOST_LAYERS = 8
"""More layers than this and their lines cannot be told apart: those with the most noise are drawn."""


def _geometric_mean(values: np.ndarray) -> float:
  values = values[values > 0]
  return float(np.exp(np.mean(np.log(values)))) if len(values) else np.nan


def _draw_along(
  axes: Axes,
  examples: np.ndarray,
  value: np.ndarray,
  low: np.ndarray,
  high: np.ndarray,
  instead: np.ndarray,
  *,
  color: object,
  line: str,
  label: str,
) -> bool:
  """Draw one curve over checkpoints: geometric means over seeds of the values and of the ends of their intervals.

  Where a seed's value is missing (NaN), an open marker stands at the mean of `instead`, joined by a thin dotted line.

  Returns: whether an open marker was drawn.
  """
  at = np.unique(examples)
  groups = [examples == x for x in at]
  whole = np.array([bool(np.all(value[group] > 0)) for group in groups])
  middle, bottom, top, other = (
    np.array([_geometric_mean(array[group]) for group in groups]) for array in (value, low, high, instead)
  )
  shown = np.where(whole, middle, np.nan)
  axes.plot(at, shown, line, marker="o", color=color, markersize=4, linewidth=1.6, label=label)
  axes.fill_between(
    at, np.where(whole, bottom, np.nan), np.where(whole, top, np.nan), color=color, alpha=0.14, linewidth=0
  )
  hollow = ~whole & (other > 0)
  axes.plot(at, np.where(hollow, other, np.nan), ":", color=color, linewidth=0.9, alpha=0.7)
  axes.plot(at[hollow], other[hollow], "o", mfc="white", mec=color, mew=1.3, markersize=5)
  return bool(hollow.any())


def _open_marker(text: str = OPEN) -> Line2D:
  return Line2D([], [], linestyle="none", marker="o", mfc="white", mec=style.INK, mew=1.3, markersize=5, label=text)


def _settings(batch_size: np.ndarray, rate: np.ndarray) -> list[tuple[float, float]]:
  return sorted(set(zip(batch_size.tolist(), rate.tolist(), strict=True)))


def _middle_setting(settings: Sequence[tuple[float, float]]) -> tuple[float, float]:
  """Return the setting in the middle of the sorted ones: the one that is shown in detail."""
  return settings[len(settings) // 2]


def draw_noise_grows(finding: Finding) -> Figure:
  """Draw the noise scale along training for every batch size and rate; beside it its Hessian and Adam forms for one of them."""
  question = "Does the noise scale grow during training?"
  batch_size, rate, examples, value, low, high, dataset = columns(
    finding, "batch_size learning_rate examples_seen noise_scale low high dataset_noise_scale"
  )
  if not np.any(value > 0) and not np.any(dataset > 0):
    return no_data(question, finding)
  figure, (left, right) = style.new_figure(question, num_panels=2)
  sizes = np.unique(batch_size)
  colors = dict(zip(sizes, style.shades(len(sizes)), strict=True))
  hollow = False
  for size in sizes:
    rates = np.unique(rate[batch_size == size])
    for line, each in zip(LINES * len(rates), rates, strict=False):
      at = (batch_size == size) & (rate == each)
      hollow |= _draw_along(
        left,
        examples[at],
        value[at],
        low[at],
        high[at],
        dataset[at],
        color=colors[size],
        line=line,
        label=f"B = {size:,.0f}, rate {each:.3g}",
      )
  seeds = len(np.unique(column(finding, "seed")))
  style.symlog_axis(left, examples)
  style.log_axis(left)
  style.describe(
    left,
    caption=f"tr Σ / |G|²; mean of {seeds} seeds; band: 95 % interval of one measurement",
    x_label=EXAMPLES,
    y_label=NOISE_SCALE,
  )
  hollow |= _draw_forms(right, finding, (batch_size, rate, examples, value, low, high, dataset))
  style.add_legend(figure, num_columns=3, extra=[_open_marker()] if hollow else [])
  return figure


def _draw_forms(axes: Axes, finding: Finding, simple: Sequence[np.ndarray]) -> bool:
  """Draw the three forms of the noise scale along one setting that has them."""
  batch_size, rate, examples, value, low, high, dataset = simple
  form_batch_size, form_rate, form_examples, form_value, form_low, form_high, form_dataset = columns(
    finding, "batch_size learning_rate examples_seen value low high dataset", prefix="form_"
  )
  form = column(finding, "form", str)
  settings = _settings(form_batch_size, form_rate) or _settings(batch_size, rate)
  setting = _middle_setting(settings)
  at = (batch_size == setting[0]) & (rate == setting[1])
  shown = examples[at]
  hollow = _draw_along(
    axes, shown, value[at], low[at], high[at], dataset[at], color=style.INK, line="-", label="tr Σ / |G|²"
  )
  for name, color, label in (
    ("hessian", style.VERMILION, "Hessian form: tr(HΣ) / G'HG"),
    ("adam", style.BLUE, "in Adam's metric (heuristic)"),
  ):
    at = (form == name) & (form_batch_size == setting[0]) & (form_rate == setting[1])
    if np.any(form_value[at] > 0) or np.any(form_dataset[at] > 0):
      arrays = (array[at] for array in (form_examples, form_value, form_low, form_high, form_dataset))
      hollow |= _draw_along(axes, *arrays, color=color, line="-", label=label)
  style.symlog_axis(axes, shown)
  style.log_axis(axes)
  style.describe(
    axes,
    caption=f"the forms at B = {setting[0]:,.0f}, rate {setting[1]:.3g}",
    x_label=EXAMPLES,
    y_label=NOISE_SCALE,
  )
  return hollow


def draw_noise_layers(finding: Finding) -> Figure:
  """Draw the noise scale of every layer along training beside the total, for one batch size and rate."""
  question = "Which layers have the noise?"
  batch_size, rate, examples, value, low, high, dataset = columns(
    finding, "batch_size learning_rate examples_seen noise_scale low high dataset_noise_scale", prefix="layer_"
  )
  layer = column(finding, "layer", str)
  if not np.any(value > 0) and not np.any(dataset > 0):
    return style.no_data_figure(question, "no layer was measured by itself")
  setting = _middle_setting(_settings(batch_size, rate))
  here = (batch_size == setting[0]) & (rate == setting[1])
  figure, (axes,) = style.new_figure(question)
  total = columns(finding, "batch_size learning_rate examples_seen noise_scale low high dataset_noise_scale")
  at = (total[0] == setting[0]) & (total[1] == setting[1])
  hollow = _draw_along(axes, *(array[at] for array in total[2:]), color=style.INK, line="--", label="all parameters")
  names = sorted(set(layer[here]), key=lambda name: -_geometric_mean(dataset[here & (layer == name)]))
  shown = sorted(names[:MOST_LAYERS])
  for color, name in zip(style.shades(len(shown)), shown, strict=True):
    at = here & (layer == name)
    hollow |= _draw_along(
      axes, examples[at], value[at], low[at], high[at], dataset[at], color=color, line="-", label=name
    )
  style.symlog_axis(axes, examples[here])
  style.log_axis(axes)
  number = f"{len(names)} layers" if len(names) <= MOST_LAYERS else f"the noisiest {MOST_LAYERS} of {len(names)} layers"
  style.describe(
    axes,
    caption=f"{number} at B = {setting[0]:,.0f}, rate {setting[1]:.3g}; band: 95 % interval of one measurement",
    x_label=EXAMPLES,
    y_label=NOISE_SCALE,
  )
  style.add_legend(figure, num_columns=2, extra=[_open_marker()] if hollow else [])
  return figure


def draw_temperature(finding: Finding) -> Figure:
  """Draw the noise scale through a change of rate and batch size; beside it the measured factors against the predicted ones.

  Source: McCandlish et al. (2018), Fig. 15.
  """
  question = "Does the noise scale follow learning rate / batch size?"
  branch, phase = column(finding, "branch", str), column(finding, "phase", str)
  examples, noise_scale = columns(finding, "examples_seen noise_scale")
  names = column(finding, "factor_branch", str)
  if not np.any(noise_scale > 0) or not len(names):
    return no_data(question, finding)
  figure, (left, right) = style.new_figure(question, num_panels=2)
  palette = dict(
    zip(names, (style.BLUE, style.VERMILION, style.GREEN, style.ORANGE, style.PURPLE) * len(names), strict=False)
  )
  before, during = phase == "before", phase == "during"
  if before.any():
    _draw_seeds(left, examples[before], noise_scale[before], color=style.INK, label=None)
  left.axvspan(
    examples[during].min(), examples[during].max(), color=style.RULE, alpha=0.5, linewidth=0, label="changed"
  )
  for name in (UNCHANGED, *names):
    at = (branch == name) & ~before
    _draw_seeds(left, examples[at], noise_scale[at], color=palette.get(name, style.INK), label=name)
  style.log_axis(left)
  left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.format_tick(value)))
  seeds = len(np.unique(column(finding, "seed")))
  style.describe(
    left,
    caption=f"tr Σ / |G|² of the training set; geometric mean of {seeds} seeds",
    x_label=EXAMPLES,
    y_label=NOISE_SCALE,
  )
  predicted = column(finding, "predicted")
  places = np.arange(len(names))[::-1]
  for kind, offset, marker, label in (
    ("factor", 0.12, "o", "during the change: factor and 95 % interval"),
    ("after", -0.12, "s", "after it was undone"),
  ):
    value, low, high = columns(finding, f"{kind} {kind}_low {kind}_high")
    for index, name in enumerate(names):
      known = np.isfinite([low[index], high[index]]).all()
      right.errorbar(
        value[index],
        places[index] + offset,
        xerr=[[value[index] - low[index]], [high[index] - value[index]]] if known else None,
        fmt=marker,
        mfc=palette[name] if marker == "o" else "white",
        color=palette[name],
        markersize=6,
        capsize=2.5,
      )
    right.plot([], [], marker, color=style.INK, mfc=style.INK if marker == "o" else "white", label=label)
  right.plot(
    predicted, places + 0.12, "|", color=style.INK, markersize=20, markeredgewidth=2, label="predicted: T / T'"
  )
  right.axvline(1, color=style.MUTED, linewidth=1, linestyle=":")
  right.set_yticks(places, names)
  right.set_ylim(-0.6, len(names) - 0.4)
  right.set_xscale("log", base=2)
  right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.format_tick(value)))
  style.describe(
    right,
    caption="second half of each stretch; seeds paired with the unchanged run",
    x_label="noise scale / that of the unchanged run (log scale)",
    y_label="",
  )
  style.add_legend(figure, num_columns=5)
  return figure


def _draw_seeds(axes: Axes, x: np.ndarray, y: np.ndarray, *, color: str, label: str | None) -> None:
  """Draw each seed as a faint point and the geometric mean over seeds as a line."""
  axes.plot(x, y, "o", color=color, alpha=0.25, markersize=3, markeredgewidth=0)
  at = np.unique(x)
  axes.plot(at, [_geometric_mean(y[x == each]) for each in at], "-", color=color, linewidth=1.8, label=label)


def draw_layernorm_predicts_total(finding: Finding) -> Figure:
  """Draw the noise scale of all parameters against that of the normalisation layers, one point per checkpoint and trial."""
  question = "Do the normalisation layers tell the noise scale?"
  step, norms, total = columns(finding, "step layernorm total")
  if not np.any(total > 0):
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  order = np.unique(step)
  points = axes.scatter(
    norms,
    total,
    c=np.searchsorted(order, step),
    cmap="viridis",
    vmin=0,
    vmax=1.3 * max(len(order) - 1, 1),
    s=22,
    zorder=3,
  )
  bar = figure.colorbar(points, ax=axes, pad=0.02, aspect=30, boundaries=np.arange(len(order) + 1) - 0.5)
  marks = np.unique(np.linspace(0, len(order) - 1, min(len(order), 6)).round().astype(int))
  bar.set_ticks(list(marks), labels=[style.format_tick(order[i]) for i in marks])
  bar.outline.set_visible(False)
  bar.set_label("step", fontsize=9, color=style.INK)
  ends = np.array([norms.min(), norms.max()])
  style.draw_theory(axes, ends, ends, label="equal", style=":")
  slope, log_factor = (float(np.asarray(finding.series.get(name, np.nan))) for name in ("slope", "log_factor"))
  if np.isfinite(slope):
    style.draw_theory(
      axes,
      ends,
      np.exp(log_factor) * ends**slope,
      label=f"fit: {np.exp(log_factor):.3g} × (norms' noise scale)$^{{{slope:.2f}}}$",
      color=style.VERMILION,
    )
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.format_tick(value)))
  axes.xaxis.set_minor_formatter(NullFormatter())
  style.log_axis(axes)
  style.describe(
    axes,
    caption=f"{len(total)} points: one per checkpoint of each trial",
    x_label="noise scale of the normalisation layers (examples, log scale)",
    y_label="noise scale of all parameters",
  )
  style.add_legend(figure)
  return figure


FIGURES: dict[str, Callable[[Finding], Figure]] = {
  "noise_grows": draw_noise_grows,
  "temperature": draw_temperature,
  "layernorm_predicts_total": draw_layernorm_predicts_total,
}

FURTHER_FIGURES: dict[str, dict[str, Callable[[Finding], Figure]]] = {
  "noise_grows": {"noise_layers": draw_noise_layers},
}
"""Figures that stand below a claim's own, drawn from the same finding."""
