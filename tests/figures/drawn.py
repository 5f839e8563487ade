"""What a reader sees of a drawn figure, for the tests of all figures: its texts, its lines, and that nothing covers anything."""

import itertools
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bsjax.analysis import Finding


def texts_of(figure: Figure) -> str:
  """Return all words of a figure."""
  return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def line_of(axes: Axes, label: str) -> Line2D:
  """Return the one line of `axes` that has this label."""
  (found,) = [line for line in axes.lines if str(line.get_label()) == label]
  return found


def assert_draws_cleanly(draw: Callable[[Finding], Figure], finding: Finding) -> None:
  """Draw; check the layout, and that neither the settings nor the figures of pyplot change."""
  settings = dict(matplotlib.rcParams)
  figure = draw(finding)
  assert pyplot.get_fignums() == []
  assert dict(matplotlib.rcParams) == settings
  assert_nothing_is_covered_or_cut(figure)


def assert_nothing_is_covered_or_cut(figure: Figure) -> None:
  """Check that the legend lies beside all panels, no panel's texts lie in another, and everything within the page."""
  figure.draw_without_rendering()
  (legend,) = figure.legends
  frame = legend.get_window_extent()
  outer = [axes.get_tightbbox() for axes in figure.axes]
  inner = [axes.get_window_extent() for axes in figure.axes]
  assert not any(frame.overlaps(box) for box in outer), "the legend covers a panel"
  for one, other in itertools.permutations(range(len(outer)), 2):
    twins = np.array_equal(inner[one].extents, inner[other].extents)  # one panel with two scales
    assert twins or not outer[one].overlaps(inner[other]), f"panel {one} covers panel {other}"
  inside, pixel = figure.get_tightbbox(), 1 / figure.dpi
  width, height = figure.get_size_inches()
  # One pixel at 160 dpi: text is placed to whole pixels.
  assert inside.x0 >= -pixel
  assert inside.y0 >= -pixel
  assert inside.x1 <= width + pixel
  assert inside.y1 <= height + pixel
