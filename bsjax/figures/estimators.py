"""The figures of the estimators of gradient noise: do they agree, and do their intervals cover?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bsjax.analysis import Finding
from bsjax.analysis.claims_coverage import GIVEN_REGIMES, JUDGED, LEAST_COVERAGE, MOST_COVERAGE
from bsjax.analysis.claims_estimators import QUANTITIES, ROUNDING, SAMPLED_ROUTES
from bsjax.figures import style
from bsjax.figures.series import column, columns, no_data

QUANTITY_WORDS = {"grad_cov_trace": "tr Σ", "grad_sq_norm": "|G|²"}


def draw_estimators_agree(finding: Finding) -> Figure:
  """Draw how many standard errors each sampled estimate is off the exact one; beside it the rounding of the ghost route."""
  question = "Do the cheap estimators agree with the exact one?"
  route, quantity = column(finding, "route", str), column(finding, "quantity", str)
  z, error, step = columns(finding, "z relative_error step")
  if not np.isfinite(z).any() and not np.any(route == "ghost"):
    return no_data(question, finding)
  figure, (left, right) = style.new_figure(question, num_panels=2)
  pairs = [(r, q) for r in SAMPLED_ROUTES for q in QUANTITIES if np.isfinite(z[(route == r) & (quantity == q)]).any()]
  for place, (pair, color) in enumerate(
    zip(pairs, (style.BLUE, style.GREEN, style.VERMILION, style.ORANGE), strict=False)
  ):
    values = z[(route == pair[0]) & (quantity == pair[1]) & np.isfinite(z)]
    # Spread sideways in the order of the values, so that equal ones do not hide each other.
    left.plot(place + np.linspace(-0.3, 0.3, len(values)), np.sort(values), "o", color=color, markersize=4)
  left.axhspan(-1.96, 1.96, color=style.RULE, alpha=0.6, linewidth=0, label="where 95 of 100 should lie")
  left.axhline(0, color=style.INK, linewidth=1)
  left.set_xticks(range(len(pairs)), [f"{r}\n{QUANTITY_WORDS[q]}" for r, q in pairs])
  reach = max(3.5, 1.1 * np.max(np.abs(z[np.isfinite(z)]), initial=0))
  left.set_xlim(-0.6, len(pairs) - 0.4)
  left.set_ylim(-reach, reach)
  count = int(np.isfinite(z).sum())
  style.describe(
    left,
    caption=f"{count} estimates, each column sorted",
    x_label="route and quantity",
    y_label="(estimate − exact) / standard error",
  )
  ghost = route == "ghost"
  for name, color, marker in (("grad_cov_trace", style.BLUE, "o"), ("grad_sq_norm", style.VERMILION, "s")):
    at = ghost & (quantity == name)
    # Equal to the last bit has no place on a logarithmic axis: drawn at the spacing of float64.
    right.plot(
      step[at],
      np.maximum(error[at], 1e-16),
      marker,
      color=color,
      markersize=4.5,
      label=f"ghost, {QUANTITY_WORDS[name]}",
    )
  right.axhline(
    ROUNDING, color=style.INK, linestyle="--", linewidth=1.4, label=f"tolerance: {ROUNDING:g} (float32 sums)"
  )
  if np.any(step > 0):
    style.symlog_axis(right, step)
  right.set_yscale("log")
  right.yaxis.set_minor_formatter(NullFormatter())
  style.describe(
    right, caption="one mark per checkpoint", x_label="step", y_label="|ghost − exact| / exact (log scale)"
  )
  style.add_legend(figure, num_columns=4)
  return figure


def draw_coverage(finding: Finding) -> Figure:
  """Draw how often the given intervals hold the truth against the true noise scale; beside it how often an interval is given at all.

  Left: one mark per problem, noise scale and data set size at which an interval was given, with its binomial interval. Right: the share
  of draws with an interval, by regime (how far |G|^2 lies above its sampling error); 0 is always refused.
  """
  question = "Do the intervals hold the truth as often as they say?"
  problem, regime = column(finding, "problem", str), column(finding, "regime", str)
  noise_scale, share, coverage, low, high = columns(
    finding, "noise_scale share_given coverage coverage_low coverage_high"
  )
  if not np.isfinite(share).any():
    return no_data(question, finding)
  figure, (left, right) = style.new_figure(question, num_panels=2)
  left.axhspan(LEAST_COVERAGE, MOST_COVERAGE, color=style.RULE, alpha=0.7, linewidth=0, label="93 to 97 %")
  left.axhline(0.95, color=style.INK, linewidth=1, linestyle="--")
  problems = list(dict.fromkeys(problem))
  palette = (style.BLUE, style.VERMILION, style.GREEN, style.ORANGE, style.PURPLE, style.MUTED, style.INK)
  kinds = list(dict.fromkeys(regime))
  shapes = dict(zip(kinds, "osv^D" * len(kinds), strict=False))
  slots = [(name, kind) for name in problems for kind in kinds if np.isfinite(coverage[regime == kind]).any()]
  colors = dict(zip(problems, palette * len(problems), strict=False))
  for slot, (name, kind) in enumerate(slots):
    at = (problem == name) & (regime == kind) & np.isfinite(coverage) & np.isfinite(noise_scale)
    if not at.any():
      continue
    # Spread sideways over half a decade, so that no mark hides another.
    x = noise_scale[at] * 10 ** (0.5 * (slot - (len(slots) - 1) / 2) / len(slots))
    left.errorbar(
      x,
      coverage[at],
      yerr=np.array([coverage[at] - low[at], high[at] - coverage[at]]),
      fmt=shapes[kind],
      color=colors[name],
      mfc=colors[name] if name in JUDGED and kind in GIVEN_REGIMES else "white",
      markersize=4,
      linewidth=1,
    )
  for name in problems:
    left.plot([], [], "o", color=colors[name], label=name.replace("_", " "))
  left.set_xscale("log")
  left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.format_tick(value)))
  left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
  style.describe(
    left,
    caption=f"{int(np.isfinite(coverage).sum())} cells with their binomial 95 % intervals; open: not judged",
    x_label="true noise scale (examples, log scale)",
    y_label="intervals that hold the truth",
  )
  for place, kind in enumerate(kinds):
    for index, name in enumerate(problems):
      values = np.sort(share[(regime == kind) & (problem == name)])
      x = place + 0.7 * ((index + 0.5) / len(problems) - 0.5) + np.linspace(-0.04, 0.04, len(values))
      right.plot(x, values, shapes[kind], color=colors[name], markersize=4)
  right.set_xticks(range(len(kinds)), kinds)
  right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
  right.set_ylim(-0.04, 1.04)
  style.describe(
    right,
    caption="every cell; the rest are refused as unidentifiable",
    x_label="how far |G|² lies above its sampling error (marks: as on the left)",
    y_label="draws that are given an interval",
  )
  style.add_legend(figure, num_columns=4)
  return figure


FIGURES: dict[str, Callable[[Finding], Figure]] = {
  "estimators_agree": draw_estimators_agree,
  "coverage": draw_coverage,
}
