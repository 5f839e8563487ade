"""Search spaces: scales against their definitions, points that do not depend on how many are asked for, edges and what lies beyond."""

import doctest
import math

import numpy as np
import pytest

from bsjax.study import space as module
from bsjax.study.space import Dimension, centred, describe_space, draw_points, edges_of, grid_points, parse_space, widen

SPACE = parse_space(
  "learning_rate:log:1e-3:10, momentum:reverse_log:0.9:0.9999, decay_steps:integer:3:6, weight_decay:linear:0:2,"
  "decay_factor:discrete:0:0.01:0.1"
)


def test_scales_are_uniform_in_what_they_say():
  """Moments of a uniform distribution, of 2,048 transformed values: random ones are off by 0.006, quasi-random ones by far less."""
  points = draw_points(SPACE, 2048, seed=0)
  values = {name: np.array([point[name] for point in points]) for name in points[0]}
  units = {
    "learning_rate": np.log(values["learning_rate"] / 1e-3) / np.log(1e4),
    "momentum": np.log10((1 - values["momentum"]) / 0.1) / -3,
    "weight_decay": values["weight_decay"] / 2,
  }
  for name, unit in units.items():
    assert 0 <= unit.min() < 0.01, name
    assert 0.99 < unit.max() <= 1, name
    assert unit.mean() == pytest.approx(0.5, abs=0.005), name
    assert unit.var() == pytest.approx(1 / 12, abs=0.005), name
  for name, choices in (("decay_steps", (3, 4, 5, 6)), ("decay_factor", (0, 0.01, 0.1))):
    found, counts = np.unique(values[name], return_counts=True)
    assert tuple(found) == choices
    np.testing.assert_allclose(counts / 2048, 1 / len(choices), atol=0.01)


def test_points_do_not_depend_on_how_many_are_asked_for():
  many = draw_points(SPACE, 200, seed=3)
  assert draw_points(SPACE, 20, seed=3) == many[:20]
  assert draw_points(SPACE, 50, seed=3, first=30) == many[30:80]
  assert draw_points(SPACE, 20, seed=4) != many[:20]
  assert len({point["learning_rate"] for point in many}) == 200


def test_places_are_found_back():
  for dimension in SPACE:
    for unit in (0.05, 0.3, 0.77):
      place = dimension.unit(dimension.value(unit))
      cell = {"integer": 4, "discrete": 3}.get(dimension.scale)
      assert place == pytest.approx((math.floor(unit * cell) + 0.5) / cell if cell else unit, rel=1e-9), dimension


def test_grid():
  points = grid_points(parse_space("learning_rate:log:0.01:1,decay_steps:integer:1:4,momentum:discrete:0:0.9"), 3)
  assert len(points) == 3 * 3 * 2
  np.testing.assert_allclose(sorted({point["learning_rate"] for point in points}), [0.01, 0.1, 1])
  assert {point["decay_steps"] for point in points} == {1, 2, 4}
  assert points[0] == {"learning_rate": 0.01, "decay_steps": 1, "momentum": 0}


def test_edges_and_widening():
  rate = centred("learning_rate", 0.1, 10)
  assert (rate.low, rate.high) == (pytest.approx(0.01), pytest.approx(1))
  space = (rate, Dimension("momentum", "discrete", values=(0.0, 0.9)))
  point = lambda value: {"learning_rate": value, "momentum": 0.9}  # noqa: E731
  assert edges_of(space, point(0.1)) == {}
  assert edges_of(space, point(0.0155)) == {"learning_rate": "low"}  # 0.095 of the width
  assert edges_of(space, point(0.0162)) == {}
  assert edges_of(space, point(0.9)) == {"learning_rate": "high"}
  wider, beyond = widen(space, {"learning_rate": "high"})
  assert (wider[0].low, wider[0].high) == (rate.low, pytest.approx(10))
  assert (beyond[0].low, beyond[0].high) == (rate.high, pytest.approx(10))
  assert wider[1] == beyond[1] == space[1]
  wider, beyond = widen(space, {"learning_rate": "low"})
  assert (wider[0].low, beyond[0].high) == (pytest.approx(0.001), rate.low)


@pytest.mark.parametrize(
  ("text", "edge", "beyond"),
  [
    ("momentum:reverse_log:0.9:0.99", "high", (0.99, 1 - 0.01 / 10**0.5)),
    ("momentum:reverse_log:0:0.9", "low", None),  # a momentum below 0
    ("weight_decay:linear:0:1", "low", None),
    ("weight_decay:linear:0.2:1", "low", (0.0, 0.2)),
    ("decay_steps:integer:4:8", "high", (9, 10)),
    ("decay_steps:integer:1:8", "low", (0, 0)),
    ("decay_steps:integer:0:8", "low", None),
  ],
)
def test_widening_goes_as_far_as_the_scale_does(text, edge, beyond):
  (dimension,) = space = parse_space(text)
  place = {dimension.name: dimension.low if edge == "low" else dimension.high}
  assert edges_of(space, place) == ({} if beyond is None else {dimension.name: edge})
  wider, new = widen(space, {dimension.name: edge})
  if beyond is None:
    assert wider == new == space
  else:
    assert (new[0].low, new[0].high) == pytest.approx(beyond)
    assert (wider[0].low, wider[0].high) == pytest.approx(
      (min(dimension.low, beyond[0]), max(dimension.high, beyond[1]))
    )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("learning_rate:log:1:0.1", "learning_rate:log:1:0.1: wanted two finite bounds, the lower one first"),
    ("learning_rate:log:0:1", "a log scale cannot reach 0"),
    ("momentum:reverse_log:0.5:1", "a reverse log scale cannot reach 1"),
    ("decay_steps:integer:1.5:3", "an integer scale needs whole bounds"),
    ("learning_rate:log:nan:1", "wanted two finite bounds"),
    ("lr:log:0.1:1", "unknown hyperparameter 'lr': use one of learning_rate, momentum"),
    ("learning_rate:cubic:0.1:1", "learning_rate has scale 'cubic': use one of linear, log"),
    ("learning_rate:log:0.1", "wanted learning_rate:log:LOW:HIGH"),
    ("learning_rate:log:a:1", "wanted numbers after learning_rate:log"),
    ("learning_rate", "wanted learning_rate:SCALE:LOW:HIGH"),
    ("momentum:discrete", "momentum:discrete has values \\[\\]"),
    ("momentum:discrete:0,momentum:discrete:1", "wanted each hyperparameter once"),
    ("", "wanted each hyperparameter once"),
  ],
)
def test_bad_spaces_are_named(text, message):
  with pytest.raises(ValueError, match=message):
    parse_space(text)


def test_no_trials_left():
  with pytest.raises(ValueError, match="0 trials were asked for"):
    draw_points(SPACE, 0, seed=0)
  with pytest.raises(ValueError, match="1 points per dimension"):
    grid_points(SPACE, 1)


def test_description_is_json_of_every_dimension():
  told = describe_space(SPACE)
  assert list(told) == [dimension.name for dimension in SPACE]
  assert told["learning_rate"] == {"scale": "log", "low": 1e-3, "high": 10}
  assert told["decay_factor"] == {"scale": "discrete", "values": [0, 0.01, 0.1]}


def test_docstring_examples():
  failed, tried = doctest.testmod(module)
  assert tried > 0
  assert failed == 0
