"""Search spaces as data: what a hyperparameter may be, quasi-random points and grids of it, and what lies on an edge."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import qmc

from bsjax.types import Hparams

SCALES = ("linear", "log", "reverse_log", "integer", "discrete")
EDGE_MARGIN = 0.1
"""A best point in this outer part of a dimension, on its own scale, sits on the edge."""
WIDENED_BY = 0.5
"""How much of its width a dimension gains on an edge."""


@dataclass(frozen=True)
class Dimension:
  """What one hyperparameter may be.

  "linear", "log" and "reverse_log" are uniform between `low` and `high` in v, log v and log(1 - v) (for momentum near 1); "integer" takes
  whole numbers from `low` to `high`, both included, equally often; "discrete" takes one of `values`.

  Raises:
    ValueError: bounds that are reversed or that the scale cannot take; the message names the hyperparameter.
  """

  name: str
  scale: str
  low: float = 0.0
  high: float = 0.0
  values: tuple[float, ...] = ()

  def __post_init__(self) -> None:
    where = f"{self.name}:{self.scale}:{self.low:g}:{self.high:g}"
    if self.name not in Hparams._fields:
      raise ValueError(f"unknown hyperparameter {self.name!r}: use one of {', '.join(Hparams._fields)}")
    if self.scale not in SCALES:
      raise ValueError(f"{self.name} has scale {self.scale!r}: use one of {', '.join(SCALES)}")
    if self.scale == "discrete":
      if not self.values or not all(map(math.isfinite, self.values)):
        raise ValueError(f"{self.name}:discrete has values {list(self.values)}: wanted at least one finite number")
      return
    ordered = self.low < self.high or (self.scale == "integer" and self.low == self.high)
    if not (math.isfinite(self.low) and math.isfinite(self.high) and ordered):
      raise ValueError(f"{where}: wanted two finite bounds, the lower one first")
    if self.scale == "log" and self.low <= 0:
      raise ValueError(f"{where}: a log scale cannot reach 0, raise the lower bound above it")
    if self.scale == "reverse_log" and self.high >= 1:
      raise ValueError(f"{where}: a reverse log scale cannot reach 1, lower the upper bound below it")
    if self.scale == "integer" and not (float(self.low).is_integer() and float(self.high).is_integer()):
      raise ValueError(f"{where}: an integer scale needs whole bounds")

  def value(self, unit: float) -> float:
    """Maps a number from [0, 1) to a value: uniform on the scale."""
    if self.scale == "discrete":
      return self.values[int(unit * len(self.values))]
    if self.scale == "integer":
      return self.low + math.floor(unit * (self.high - self.low + 1))
    if self.scale == "reverse_log":
      return 1 - (1 - self.low) * ((1 - self.high) / (1 - self.low)) ** unit
    if self.scale == "log":
      return self.low * (self.high / self.low) ** unit
    return self.low + unit * (self.high - self.low)

  def unit(self, value: float) -> float:
    """Maps a value back to its place in [0, 1]; the middle of its cell for whole and discrete numbers."""
    if self.scale == "discrete":
      return (self.values.index(value) + 0.5) / len(self.values)
    if self.scale == "integer":
      return (value - self.low + 0.5) / (self.high - self.low + 1)
    if self.scale == "reverse_log":
      return math.log((1 - value) / (1 - self.low)) / math.log((1 - self.high) / (1 - self.low))
    if self.scale == "log":
      return math.log(value / self.low) / math.log(self.high / self.low)
    return (value - self.low) / (self.high - self.low)


Space = tuple[Dimension, ...]
"""One dimension for each hyperparameter that is searched over; the others are fixed elsewhere."""


def parse_space(text: str) -> Space:
  """Reads `name:scale:low:high` and `name:discrete:v1:v2:...`, separated by commas.

  Raises:
    ValueError: what cannot be read, or a hyperparameter that comes twice.

  >>> [dimension.scale for dimension in parse_space("learning_rate:log:1e-3:1,momentum:discrete:0:0.9")]
  ['log', 'discrete']
  """
  space = tuple(_parse_dimension(part) for part in text.split(",") if part.strip())
  names = [dimension.name for dimension in space]
  if not names or len({*names}) < len(names):
    raise ValueError(f"search space {text!r}: wanted each hyperparameter once, such as learning_rate:log:1e-3:1")
  return space


def _parse_dimension(text: str) -> Dimension:
  name, scale, *rest = [*(part.strip() for part in text.split(":")), "", ""][: max(2, text.count(":") + 1)]
  try:
    numbers = tuple(float(number) for number in rest)
  except ValueError as error:
    raise ValueError(f"search space {text!r}: wanted numbers after {name}:{scale}") from error
  if scale == "discrete":
    return Dimension(name, scale, values=numbers)
  if len(numbers) != 2:
    raise ValueError(f"search space {text!r}: wanted {name}:{scale or 'SCALE'}:LOW:HIGH")
  return Dimension(name, scale, *numbers)


def centred(name: str, centre: float, factor: float) -> Dimension:
  """Returns a log scale from `centre / factor` to `centre * factor`."""
  return Dimension(name, "log", centre / factor, centre * factor)


def draw_points(space: Space, count: int, *, seed: int, first: int = 0) -> list[dict[str, float]]:
  """Draws points number `first` to `first + count - 1` of a scrambled Halton sequence.

  Point k depends on the space, the seed and k alone: the first 20 of 200 are the 20.

  Source: Halton (1960), scrambled by permuting digits (Owen 2017, "A randomized Halton algorithm in R"), in SciPy. Shallue et al.
  (2019) drew their trials quasi-randomly, citing Bousquet et al. (2017).
  """
  if count < 1:
    raise ValueError(f"{count} trials were asked for, wanted at least 1")
  sampler = qmc.Halton(len(space), scramble=True, rng=np.random.default_rng(seed))
  if first:
    sampler.fast_forward(first)
  return [
    {dimension.name: dimension.value(float(unit)) for dimension, unit in zip(space, row, strict=True)}
    for row in sampler.random(count)
  ]


def grid_points(space: Space, points_per_dimension: int) -> list[dict[str, float]]:
  """Lays out the grid of all combinations: ends included, equally spaced on each scale; every value of a discrete one."""
  if points_per_dimension < 2:
    raise ValueError(f"{points_per_dimension} points per dimension were asked for, wanted at least 2: the ends")
  axes = [_grid(dimension, points_per_dimension) for dimension in space]
  names = [dimension.name for dimension in space]
  return [dict(zip(names, row, strict=True)) for row in itertools.product(*axes)]


def _grid(dimension: Dimension, count: int) -> list[float]:
  if dimension.scale == "discrete":
    return list(dimension.values)
  if dimension.scale == "integer":
    return sorted({float(round(value)) for value in np.linspace(dimension.low, dimension.high, count)})
  return [*(dimension.value(index / (count - 1)) for index in range(count - 1)), dimension.high]


def edges_of(space: Space, point: Mapping[str, Any]) -> dict[str, str]:
  """Names the dimensions on whose "low" or "high" edge a point sits; where nothing lies beyond, as below 0, there is no edge."""
  found = {}
  for dimension in space:
    if dimension.scale != "discrete":
      value = point[dimension.name]
      unit = dimension.unit(value)
      side = "low" if unit < 0.5 else "high"
      near = min(unit, 1 - unit) < EDGE_MARGIN or value in (dimension.low, dimension.high)
      if near and _beyond(dimension, side) is not None:
        found[dimension.name] = side
  return found


def widen(space: Space, edges: Mapping[str, str]) -> tuple[Space, Space]:
  """Widens a space beyond the first of the edges its best point sits on; the others' turn comes with the next best point.

  Returns:
    The wider space, and the part of it that is new: where to draw more points. Equal to `space` twice if there is no edge.
  """
  for index, dimension in enumerate(space):
    beyond = _beyond(dimension, edges[dimension.name]) if dimension.name in edges else None
    if beyond is not None:
      wider = dataclasses.replace(dimension, low=min(dimension.low, beyond.low), high=max(dimension.high, beyond.high))
      return (*space[:index], wider, *space[index + 1 :]), (*space[:index], beyond, *space[index + 1 :])
  return space, space


def _beyond(dimension: Dimension, side: str) -> Dimension | None:
  """Returns the stretch beyond an edge, half as wide as the dimension on its scale; None below 0, where no hyperparameter is."""
  if dimension.scale == "integer":
    width = max(1, round(WIDENED_BY * (dimension.high - dimension.low)))
    low, high = (
      (dimension.high + 1, dimension.high + width) if side == "high" else (dimension.low - width, dimension.low - 1)
    )
  elif side == "high":
    low, high = dimension.high, dimension.value(1 + WIDENED_BY)
  else:
    low, high = dimension.value(-WIDENED_BY), dimension.low
  low = max(low, 0.0)
  if high < low or (low == high and dimension.scale != "integer"):
    return None
  return dataclasses.replace(dimension, low=low, high=high)


def describe_space(space: Sequence[Dimension]) -> dict[str, dict[str, Any]]:
  """Describes a space as JSON."""
  return {
    dimension.name: {"scale": dimension.scale}
    | (
      {"values": list(dimension.values)}
      if dimension.scale == "discrete"
      else {"low": dimension.low, "high": dimension.high}
    )
    for dimension in space
  }
