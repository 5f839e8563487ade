"""The judge of the line finds the factor that was put in, its interval, and nothing where there is nothing."""

import math

import numpy as np
import pytest

from bsjax.analysis.claims_landscape import judge_sharper_line, rise_around
from tests.analysis.checks import check
from tests.analysis.simulate_landscape import ALPHAS, SEEDS, STUDY, factors, paths, surroundings

CLAIM = "sharper_line"

T_FOUR = 2.7764451
"""The quantile of Student's t at 97.5 % with four degrees of freedom, from a table."""


def test_the_factor_and_its_interval_are_those_put_in():
  """Parabolas: the rise is steepness x mean of d^2, so the ratio is that of the steepnesses, seed by seed."""
  finding = judge_sharper_line(STUDY, paths(factors(3.0)) | surroundings())
  check(finding, CLAIM, "holds")
  half = T_FOUR * 0.1 / math.sqrt(5)
  claim = finding.claim
  assert [claim.measured, claim.ci_low, claim.ci_high] == pytest.approx(
    [3, 3 * math.exp(-half), 3 * math.exp(half)], rel=1e-6
  )
  assert claim.n == 5
  assert "3.00 [2.65, 3.40] times as much around large-batch (B = 1,024) solutions as around small-batch (B = 32)" in (
    finding.reading
  )
  assert "on the curve 6.00 [6.00, 6.00]" in finding.reading
  # mean logarithm of three directions, 1.5^(-1, 0, 1): standard error of the difference sqrt(2 log(1.5)^2 / 3), t(4)
  low, high = (2 * math.exp(sign * T_FOUR * math.sqrt(2 * math.log(1.5) ** 2 / 3)) for sign in (-1, 1))
  assert f"around one solution of each 2.00 [{low:.2f}, {high:.2f}]" in finding.reading
  assert "5 seeds at mean training losses 0.04 and 0.01" in finding.reading
  assert finding.reading.endswith("sharper on this line; no batch norm.")


def test_the_series_hold_every_point():
  rows = paths(factors(3.0)) | surroundings()
  series = judge_sharper_line(STUDY, rows).series
  assert len(series["path"]) == 2 * len(SEEDS) * len(ALPHAS)
  at = (series["path"] == "curve") & (series["seed"] == 3)
  for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
    np.testing.assert_array_equal(series[name][at], [row[name] for row in rows["curve_3"]])
  np.testing.assert_array_equal(series["alpha"][at], ALPHAS)
  for prefix, name, keys in (
    ("plane", "random", ("x", "y", "train_loss", "test_accuracy")),
    ("random", "random_line", ("direction", "x", "train_loss", "test_accuracy")),
    ("trajectory", "trajectory", ("x", "y", "train_loss", "test_accuracy")),
    ("checkpoint", "path", ("x", "y", "step", "explained_x", "explained_y")),
  ):
    at = series[f"{prefix}_solution"] == "large"
    for key in keys:
      np.testing.assert_array_equal(series[f"{prefix}_{key}"][at], [row[key] for row in rows[f"{name}_large"]])
    assert at.sum() * 2 == len(at)
  np.testing.assert_allclose(series["rise_small"][series["rise_path"] == "line"], 0.2 * (0.125**2 + 0.25**2) / 2)
  assert (series["small_batch_size"], series["large_batch_size"]) == (32, 1024)
  assert series["factor_path"].tolist() == ["line", "curve"]
  np.testing.assert_allclose(series["factor"], [3, 6])


@pytest.mark.parametrize(
  ("factor", "spread", "verdict"),
  [(1 / 3, 0.1, "fails"), (1.0, 0.02, "fails"), (1.0, 0.5, "inconclusive"), (1.05, 0.02, "holds")],
)
def test_verdicts(factor, spread, verdict):
  """Reversed, none at all and known to be none, not known, and small but certain."""
  finding = judge_sharper_line(STUDY, paths(factors(factor, spread=spread)))
  check(finding, CLAIM, verdict)
  assert finding.claim.measured == pytest.approx(factor)
  assert ("not sharper" in finding.reading, "left open" in finding.reading) == (
    verdict == "fails",
    verdict == "inconclusive",
  )


def test_the_curve_does_not_decide():
  finding = judge_sharper_line(STUDY, paths(factors(3.0), curve=0.1))
  check(finding, CLAIM, "holds")
  assert "on the curve 0.10" in finding.reading


def test_one_seed_is_refused():
  finding = judge_sharper_line(STUDY, paths([3.0]))
  check(finding, CLAIM, "inconclusive")
  assert (finding.claim.measured, finding.claim.ci_low, finding.claim.n) == (pytest.approx(3), None, 1)
  assert "one seed gives no interval, two would" in finding.reading
  check(judge_sharper_line(STUDY, paths([3.0, 3.1])), CLAIM, "holds")


@pytest.mark.parametrize("rows", [{}, surroundings(), {"line_0": []}])
def test_nothing_is_said_so(rows):
  finding = judge_sharper_line({}, rows)
  check(finding, CLAIM, "inconclusive")
  assert finding.claim.measured is None
  assert finding.reading.startswith("The loss on the line between a small-batch and a large-batch solution was not")
  assert len(finding.series["path"]) == 0
  assert len(finding.series["plane_x"]) == (162 if "random_small" in rows else 0)


def spoil(rows, name, change):
  """Changes the training loss near the large-batch solution of one line."""
  return rows | {name: [row | {"train_loss": change(row)} for row in rows[name]]}


def test_a_seed_without_a_ratio_is_not_left_out():
  """The others agree on 3, and would hold; a seed whose loss falls on both sides of a solution contradicts, and has no logarithm."""
  rows = paths(factors(3.0))
  falling = [
    spoil(rows, "line_2", lambda row, p=place: row["train_loss"] + 50 * max(0, 0.1 - (row["x"] - p) ** 2))
    for place in (0, 1)
  ]
  lost = spoil(rows, "line_2", lambda row: None if row["x"] == 1.125 else row["train_loss"])
  far = spoil(rows, "line_2", lambda row: None if row["x"] < -0.3 else row["train_loss"])
  for changed in (*falling, lost):
    finding = judge_sharper_line(STUDY, changed)
    check(finding, CLAIM, "inconclusive")
    assert finding.claim.measured is None
    assert "the loss does not rise, or is not known, around a solution of seed 2;" in finding.reading
  check(judge_sharper_line(STUDY, far), CLAIM, "holds")


def test_the_rise_is_the_mean_on_both_sides():
  """A slope through the solution cancels: x + x^2 rises by the mean of x^2 over -1/4, -1/8, 1/8, 1/4."""
  x = np.linspace(-1, 1, 17)
  assert rise_around(x, 7 + x + x**2, 0.0) == pytest.approx((2 / 64 + 2 / 16) / 4)
  assert rise_around(x + 1, 7 + 5 * x + x**2, 1.0) == pytest.approx((2 / 64 + 2 / 16) / 4)
  assert math.isnan(rise_around(x[x >= 0], x[x >= 0] ** 2, 0.0))  # one side only
  assert math.isnan(rise_around(x[x != 0], x[x != 0] ** 2, 0.0))  # the solution itself is missing


def test_the_statistics_are_named():
  finding = judge_sharper_line({}, paths(factors(3.0), batch_norm="reestimated"))
  check(finding, CLAIM, "holds")
  assert finding.series["batch_norm"] == "batch norm: statistics re-estimated at every point"
  assert finding.reading.endswith("; batch norm: statistics re-estimated at every point.")
  assert "around large-batch solutions as around small-batch ones" in finding.reading
