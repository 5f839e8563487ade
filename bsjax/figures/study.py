"""The figures of the batch-size study: one pure function `Finding -> Figure` per claim."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bsjax.analysis import Finding
from bsjax.analysis.claims_training import MAX_RESIDUAL
from bsjax.figures import style
from bsjax.figures.series import column, no_data, scalar
from bsjax.records import write_atomically

BATCH_SIZE = "batch size B (examples per update)"
BUDGETS = (("epochs", style.BLUE, "o"), ("steps", style.VERMILION, "s"))


def draw_variance_inverse_b(finding: Finding) -> Figure:
  """Draw the variance of the minibatch gradient, and its ratio to the prediction, against batch size.

  Left: measured variance at each checkpoint over sigma^2/B (dashed). Right: measured over predicted; 1 is exact agreement.
  """
  question = "Does the gradient's variance fall as 1/B?"
  step, batch_size = column(finding, "step"), column(finding, "batch_size")
  variance, sem, predicted = (column(finding, name) for name in ("variance", "variance_sem", "predicted"))
  # Without replacement the full batch has no variance at all: nothing to show on a logarithmic axis.
  usable = (variance > 0) & (predicted > 0)
  if not usable.any():
    return no_data(question, finding)
  step, batch_size, variance, sem, predicted = (array[usable] for array in (step, batch_size, variance, sem, predicted))
  figure, (left, right) = style.new_figure(question, num_panels=2)
  steps = np.unique(step)
  for index, (color, at) in enumerate(zip(style.shades(len(steps)), steps, strict=True)):
    chosen = step == at
    x = batch_size[chosen] * 2.0 ** (0.16 * (index - (len(steps) - 1) / 2) / max(len(steps) - 1, 1))
    style.draw_measurements(left, x, variance[chosen], sem[chosen], color=color, label=f"measured, step {at:,.0f}")
    unique, level, _ = style.mean_and_error(batch_size[chosen], predicted[chosen])
    style.draw_theory(left, unique, level, color=color, label=None)
    ratio = variance[chosen] / predicted[chosen]
    style.draw_measurements(right, x, ratio, sem[chosen] / predicted[chosen], color=color, label=None)
  right.axhline(1.0, linestyle="--", color=style.INK, linewidth=1.4)
  for axes in (left, right):
    style.batch_size_axis(axes, batch_size)
  style.log_axis(left)
  style.describe(
    left,
    caption=f"{style.count_phrase(batch_size, 'measurements')} (faint); mean per step ± standard error",
    x_label=BATCH_SIZE,
    y_label="gradient variance (loss² / parameter²)",
  )
  style.describe(
    right,
    caption="1 is exact agreement with the prediction",
    x_label=BATCH_SIZE,
    y_label="measured / predicted variance",
  )
  prediction = Line2D(
    [], [], linestyle="--", color=style.INK, label="predicted: σ²/B, corrected for the finite data set"
  )
  style.add_legend(figure, num_columns=5, extra=[prediction])
  return figure


def draw_direction_stable(finding: Finding) -> Figure:
  """Draw the cosine between minibatch and full gradient against batch size, over the noise scale's prediction."""
  question = "Do large batches point along the true gradient?"
  step, batch_size = column(finding, "step"), column(finding, "batch_size")
  cosine, sem, predicted = (column(finding, name) for name in ("cosine", "cosine_sem", "predicted"))
  if not np.isfinite(cosine).any():
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  steps = np.unique(step)
  for color, at in zip(style.shades(len(steps)), steps, strict=True):
    chosen = step == at
    style.draw_measurements(
      axes, batch_size[chosen], cosine[chosen], sem[chosen], color=color, label=f"measured, step {at:,.0f}"
    )
    unique, level, _ = style.mean_and_error(batch_size[chosen], predicted[chosen])
    style.draw_theory(axes, unique, level, color=color, label=None)
  style.batch_size_axis(axes, batch_size)
  axes.set_ylim(min(0.0, float(np.nanmin(cosine)) - 0.02), 1.03)
  style.describe(
    axes,
    caption=f"{style.count_phrase(batch_size, 'measurements')} (faint); mean per step ± standard error",
    x_label=BATCH_SIZE,
    y_label="cosine(minibatch gradient, full gradient)",
  )
  prediction = Line2D([], [], linestyle="--", color=style.INK, label="predicted from the noise scale at that step")
  style.add_legend(figure, num_columns=2, extra=[prediction])
  return figure


def draw_oscillation(finding: Finding) -> Figure:
  """Draw the spread of the minibatch loss around its trend, relative to it, against batch size, beside a few loss curves."""
  question = "Do small batches make the training loss oscillate more?"
  batch_size, spread, sem = (column(finding, name) for name in ("batch_size", "spread", "spread_sem"))
  usable = spread > 0
  if not usable.any():
    return no_data(question, finding)
  batch_size, spread, sem = batch_size[usable], spread[usable], sem[usable]
  figure, (left, right) = style.new_figure(question, num_panels=2)
  order = np.argsort(batch_size)
  left.errorbar(
    batch_size[order],
    spread[order],
    yerr=np.nan_to_num(sem[order]),
    fmt="-o",
    color=style.BLUE,
    markersize=5.5,
    linewidth=1.6,
    capsize=2.5,
    label="mean spread ± standard error",
  )
  style.batch_size_axis(left, batch_size)
  style.log_axis(left)
  number = "" if finding.claim.n is None else f"; n = {finding.claim.n:,} trials in all"
  caption = f"mean over seeds at equal epochs{number}"
  style.describe(left, caption=caption, x_label=BATCH_SIZE, y_label="spread of the loss / its trend (fraction)")

  curve_batch_size, examples, loss, trend = (
    column(finding, f"curve_{name}") for name in ("batch_size", "examples", "loss", "trend")
  )
  sizes = np.unique(curve_batch_size)
  for color, size in zip(style.shades(len(sizes)), sizes, strict=True):
    chosen = np.flatnonzero(curve_batch_size == size)
    chosen = chosen[np.argsort(examples[chosen])]
    right.plot(examples[chosen], loss[chosen], color=color, alpha=0.35, linewidth=0.8)
    right.plot(examples[chosen], trend[chosen], color=color, linewidth=2, label=f"trend at B = {size:,.0f}")
  if np.any(trend > 0):
    # Single examples that are fitted well have losses far below any trend: they would take most of a logarithmic axis.
    right.set_ylim(np.nanmin(trend[trend > 0]) / 20, 1.3 * np.nanmax(loss))
    style.log_axis(right)
  style.describe(
    right,
    caption="loss of one seed (thin, cut off below) and its trend (thick)",
    x_label="examples seen",
    y_label="minibatch training loss (nats)",
  )
  right.xaxis.set_major_formatter(lambda value, _: style.format_tick(value))
  style.add_legend(figure, num_columns=5)
  return figure


def draw_more_steps(finding: Finding) -> Figure:
  """Draw steps to target against batch size: seeds, mean, perfect scaling, S = S_min (1 + B_crit/B), interval of B_crit.

  A mean is drawn only where every seed reached the target: the mean of those that happened to arrive would flatter.
  """
  question = "How many more updates do small batches need?"
  batch_size, steps = column(finding, "batch_size"), column(finding, "steps")
  reached = np.isfinite(steps)
  if not reached.any():
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  always = np.isin(batch_size, np.unique(batch_size[~reached]), invert=True)
  axes.plot(batch_size[reached], steps[reached], "o", color=style.BLUE, alpha=0.3, markersize=4, markeredgewidth=0)
  unique, means, bars = style.mean_and_error(batch_size[always], steps[always], geometric=True)
  mean_label = "geometric mean over seeds ± standard error"
  axes.errorbar(unique, means, yerr=bars, fmt="o", color=style.BLUE, markersize=5.5, capsize=2.5, label=mean_label)
  fit_batch_size, fit, perfect, low, high = (
    column(finding, name) for name in ("fit_batch_size", "fit_steps", "perfect_steps", "fit_low", "fit_high")
  )
  if len(fit_batch_size):
    order = np.argsort(fit_batch_size)
    if np.isfinite(low).any():
      axes.fill_between(fit_batch_size[order], low[order], high[order], color=style.BLUE, alpha=0.15, linewidth=0)
    if np.isfinite(fit).any():
      s_min = scalar(finding, "s_min")
      formula = "fit: S = S$_{min}$ (1 + B$_{crit}$/B)" + (
        f", S$_{{min}}$ = {s_min:,.3g}" if np.isfinite(s_min) else ""
      )
      axes.plot(fit_batch_size[order], fit[order], color=style.BLUE, linewidth=1.8, label=formula)
    style.draw_theory(axes, fit_batch_size, perfect, label="perfect scaling: twice the batch, half the steps")
  sizes = np.concatenate([batch_size, fit_batch_size])
  style.batch_size_axis(axes, sizes)
  finite = np.concatenate([steps[reached], fit[np.isfinite(fit)]])
  axes.set_ylim(finite.min() / 1.6, finite.max() * 1.8)
  style.log_axis(axes)
  _mark_critical_batch_size(axes, finding)
  if not reached.all():
    _mark_never(axes, batch_size[~reached])
  style.describe(
    axes,
    caption=style.count_phrase(batch_size, "seeds"),
    x_label=BATCH_SIZE,
    y_label="steps to target (updates, log scale)",
  )
  style.add_legend(figure)
  return figure


def _mark_critical_batch_size(axes: Axes, finding: Finding) -> None:
  """Shade the interval of B_crit and draw its value; keep the axis's limits, whatever the interval."""
  critical, low, high = (scalar(finding, f"critical_{name}") for name in ("batch_size", "low", "high"))
  limits = axes.get_xlim()
  if np.isfinite(low):
    shaded = (max(low, limits[0]), min(high, limits[1]) if np.isfinite(high) else limits[1])
    axes.axvspan(*shaded, color=style.ORANGE, alpha=0.18, linewidth=0, label="95 % interval of B$_{crit}$")
  if np.isfinite(critical):
    axes.axvline(critical, color=style.ORANGE, linewidth=1.8, label=f"B$_{{crit}}$ = {critical:,.3g}")
  axes.set_xlim(limits)


def _mark_never(axes: Axes, batch_sizes: np.ndarray) -> None:
  """Put a cross at the top edge for the seeds that never reached the target, with their number."""
  sizes, counts = np.unique(batch_sizes, return_counts=True)
  top = axes.get_xaxis_transform()
  axes.plot(
    sizes,
    np.full(len(sizes), 0.97),
    "x",
    color=style.VERMILION,
    markersize=6,
    transform=top,
    label="target never reached (seeds)",
  )
  for size, count in zip(sizes, counts, strict=True):
    axes.annotate(
      str(count),
      (size, 0.97),
      xycoords=top,
      xytext=(5, -3),
      textcoords="offset points",
      fontsize=8,
      color=style.VERMILION,
    )


def draw_generalizes(finding: Finding) -> Figure:
  """Draw test accuracy against batch size, at equal epochs and at equal steps."""
  question = "Do small batches generalise better?"
  accuracy = column(finding, "test_accuracy")
  return _draw_two_budgets(question, finding, accuracy, y_label="test accuracy (fraction correct)")


def draw_flat_minima(finding: Finding) -> Figure:
  """Draw the largest Hessian eigenvalue at the solutions against batch size, at equal epochs and at equal steps.

  Eigenvalues that the judge leaves out, because Lanczos has not converged, are crosses and enter no mean; a negative one has no place
  on a logarithmic axis and is counted only.
  """
  sharpness, residual = column(finding, "sharpness"), column(finding, "residual")
  converged = (sharpness > 0) & (residual <= MAX_RESIDUAL * sharpness)
  return _draw_two_budgets(
    "Do small batches end in flatter minima?",
    finding,
    np.where(converged, sharpness, np.nan),
    y_label="largest Hessian eigenvalue λ₁ (log scale)",
    left_out=np.where((sharpness > 0) & ~converged, sharpness, np.nan),
    remark=_residual_remark(sharpness, residual, converged),
  )


def _residual_remark(sharpness: np.ndarray, residual: np.ndarray, converged: np.ndarray) -> str:
  """Say how exact the eigenvalues are, and how many were left out."""
  worst = (
    f"; Lanczos residual at most {np.max(residual[converged] / sharpness[converged]):.1g} λ₁" if converged.any() else ""
  )
  return worst + (f"; {np.sum(~converged)} eigenvalues not converged" if not converged.all() else "")


def _draw_two_budgets(
  question: str,
  finding: Finding,
  values: np.ndarray,
  *,
  y_label: str,
  left_out: np.ndarray | None = None,
  remark: str = "",
) -> Figure:
  """Draw one value per trial, by budget; with `left_out` (crosses, NaN = none) the axis is logarithmic and the mean geometric."""
  budget, batch_size = column(finding, "budget", str), column(finding, "batch_size")
  crossed = np.isfinite(left_out) if left_out is not None else np.zeros(len(values), bool)
  if not np.isfinite(values).any() and not crossed.any():
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  logarithmic = left_out is not None
  mean = "geometric mean" if logarithmic else "mean"
  for kind, color, marker in BUDGETS:
    chosen = (budget == kind) & np.isfinite(values)
    if chosen.any():
      style.draw_seeds_and_mean(
        axes,
        batch_size[chosen],
        values[chosen],
        color=color,
        marker=marker,
        geometric=logarithmic,
        label=f"equal {kind}: {mean} ± standard error",
      )
  if left_out is not None and crossed.any():
    axes.plot(
      batch_size[crossed], left_out[crossed], "x", color=style.MUTED, label="not converged, left out of the means"
    )
  style.batch_size_axis(axes, batch_size)
  if logarithmic:
    style.log_axis(axes)
  caption = f"{style.count_phrase(batch_size[budget == budget[0]], 'seeds')} and budget (faint points){remark}"
  style.describe(axes, caption=caption, x_label=BATCH_SIZE, y_label=y_label)
  style.add_legend(figure)
  return figure


def draw_throughput(finding: Finding) -> Figure:
  """Draw examples per second and time per step against batch size: repeats, medians, linear growth and the knee."""
  question = "How far do examples per second grow with the batch?"
  batch_size, rate, seconds = (
    column(finding, name) for name in ("batch_size", "examples_per_second", "seconds_per_step")
  )
  if not np.any(rate > 0):
    return no_data(question, finding)
  figure, (left, right) = style.new_figure(question, num_panels=2)
  unique = np.unique(batch_size)
  for axes, values in ((left, rate), (right, seconds * 1e3)):
    axes.plot(batch_size, values, "o", color=style.BLUE, alpha=0.3, markersize=4, markeredgewidth=0)
    medians = np.array([np.median(values[batch_size == size]) for size in unique])
    axes.plot(unique, medians, "-o", color=style.BLUE, markersize=5.5, linewidth=1.6, label="median over repeats")
    axes.set_ylim(values.min() / 1.8, values.max() * 1.8)
    linear = medians[0] * unique / unique[0] if axes is left else np.full(len(unique), medians[0])
    style.draw_theory(axes, unique, linear, label="linear growth: every step takes equally long")
  knee = scalar(finding, "knee")
  for axes in (left, right):
    style.batch_size_axis(axes, batch_size)
    if np.isfinite(knee):
      axes.axvline(knee, color=style.ORANGE, linewidth=1.8, label=f"knee: B = {knee:,.3g}")
    style.log_axis(axes)
  caption = f"{style.count_phrase(batch_size, 'repeats')} (faint points)"
  style.describe(left, caption=caption, x_label=BATCH_SIZE, y_label="examples per second (log scale)")
  style.describe(
    right, caption="what one update costs", x_label=BATCH_SIZE, y_label="milliseconds per step (log scale)"
  )
  style.add_legend(figure, num_columns=3)
  return figure


def draw_linear_scaling(finding: Finding) -> Figure:
  """Draw the tuned learning rate against batch size over the whole grid, beside the linear and square-root rules."""
  question = "Does the best learning rate grow in proportion to B?"
  batch_size, rate, edge = (
    column(finding, "batch_size"),
    column(finding, "learning_rate"),
    column(finding, "edge", bool),
  )
  grid_batch_size, grid_rate, score = (
    column(finding, f"grid_{name}") for name in ("batch_size", "learning_rate", "score")
  )
  if not np.any(rate > 0) and not np.any(grid_rate > 0):
    return no_data(question, finding)
  figure, (axes,) = style.new_figure(question)
  slope = scalar(finding, "slope")
  label = "best rate" + (f" (slope {slope:.2f} in log-log)" if np.isfinite(slope) else "")
  axes.plot(batch_size[~edge], rate[~edge], "o", color=style.INK, markersize=8, zorder=5, label=label)
  if edge.any():
    hollow = "best rate at its grid's edge: the true best may lie beyond"
    axes.plot(
      batch_size[edge], rate[edge], "o", mfc="white", mec=style.INK, mew=1.6, markersize=8, zorder=5, label=hollow
    )
  rule_batch_size = column(finding, "rule_batch_size")
  if len(rule_batch_size):
    style.draw_theory(
      axes, rule_batch_size, column(finding, "linear"), label="linear rule: rate ∝ B", color=style.VERMILION
    )
    style.draw_theory(
      axes, rule_batch_size, column(finding, "sqrt"), label="square-root rule: rate ∝ √B", color=style.GREEN, style=":"
    )
  _draw_grid(figure, axes, grid_batch_size, grid_rate, score)
  style.batch_size_axis(axes, np.concatenate([batch_size, grid_batch_size]))
  shown = np.concatenate([rate, grid_rate])
  axes.set_ylim(shown.min() / 1.6, shown.max() * 1.6)
  style.log_axis(axes)
  tuned = f"{len(batch_size)} tuned batch sizes, {len(grid_rate)} (batch size, rate) pairs tried"
  style.describe(axes, caption=tuned, x_label=BATCH_SIZE, y_label="learning rate (peak of the schedule)")
  style.add_legend(figure)
  return figure


def _draw_grid(figure: Figure, axes: Axes, batch_size: np.ndarray, rate: np.ndarray, score: np.ndarray) -> None:
  """Draw every tried rate, coloured by its steps to target over the fewest at that batch size; crosses never arrived."""
  reached = np.isfinite(score)
  if reached.any():
    fewest = {size: np.min(score[reached & (batch_size == size)]) for size in np.unique(batch_size[reached])}
    excess = np.array([value / fewest[size] for size, value in zip(batch_size[reached], score[reached], strict=True)])
    points = axes.scatter(
      batch_size[reached], rate[reached], c=np.minimum(excess, 4.0), s=26, cmap="cividis", vmin=1, vmax=4, zorder=2
    )
    bar = figure.colorbar(points, ax=axes, ticks=[1, 2, 3, 4], pad=0.02, aspect=30)
    bar.ax.set_yticklabels(["1", "2", "3", "≥ 4"], fontsize=9)
    bar.outline.set_visible(False)
    bar.set_label("steps to target / fewest at this B", fontsize=9, color=style.INK)
  if not reached.all():
    axes.plot(
      batch_size[~reached],
      rate[~reached],
      "x",
      color=style.MUTED,
      alpha=0.6,
      markersize=4,
      label="a seed diverged or never arrived",
    )


FIGURES: dict[str, Callable[[Finding], Figure]] = {
  "variance_inverse_b": draw_variance_inverse_b,
  "direction_stable": draw_direction_stable,
  "oscillation": draw_oscillation,
  "more_steps": draw_more_steps,
  "generalizes": draw_generalizes,
  "flat_minima": draw_flat_minima,
  "throughput": draw_throughput,
  "linear_scaling": draw_linear_scaling,
}


def save_figure(figure: Figure, folder: str | Path, name: str) -> tuple[Path, Path]:
  """Write `folder/name.png` and `folder/name.pdf`, each whole or not at all.

  Holds: equal figures give equal bytes; the files carry no date, and the layout is settled once and then kept.

  Returns: the two paths.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  figure.draw_without_rendering()
  figure.set_layout_engine("none")
  paths = folder / f"{name}.png", folder / f"{name}.pdf"
  no_date = ({"Software": None}, {"CreationDate": None, "Creator": None, "Producer": None})
  for path, metadata in zip(paths, no_date, strict=True):
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
    write_atomically(path, buffer.getvalue())
  return paths
