"""Reading a finding's series, and what is drawn where there are none."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from bsjax.analysis import Finding
from bsjax.figures import style


def column(finding: Finding, name: str, dtype: type = float) -> np.ndarray:
  """Return a series as a flat array; a series that is absent is an empty one."""
  return np.atleast_1d(np.asarray(finding.series.get(name, []), dtype=dtype)).ravel()


def columns(finding: Finding, names: str, *, prefix: str = "") -> list[np.ndarray]:
  """Return several series, their names separated by spaces and all with `prefix` before them, as flat float arrays."""
  return [column(finding, prefix + name) for name in names.split()]


def scalar(finding: Finding, name: str) -> float:
  """Return a 0-d series, NaN where it is absent."""
  return float(np.asarray(finding.series.get(name, np.nan), dtype=float))


def no_data(question: str, finding: Finding) -> Figure:
  """Draw the figure of a finding without data: its reading says why."""
  return style.no_data_figure(question, finding.reading or "no complete trial measured this")
