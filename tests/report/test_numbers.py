"""Numbers as people read them."""

import doctest
import math

import numpy as np
import pytest

from bsjax.report import numbers
from bsjax.report.numbers import format_interval, format_number, format_ratio

PLAIN = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")


def _read_back(text):
  """Turn what the report writes into a float again."""
  return float(text.translate(PLAIN).replace(",", "").replace(" × 10", "e"))


def test_documented_examples():
  failed, tried = doctest.testmod(numbers)
  assert tried >= 3
  assert failed == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_every_number_is_written_to_three_significant_digits(sign):
  for value in sign * 10.0 ** np.random.default_rng(0).uniform(-30, 30, size=2000):
    text = format_number(value)
    # Half a unit in the third digit is at most 0.5 % of the number, and much less would mean more digits than promised.
    assert _read_back(text) == pytest.approx(float(value), rel=0.005)
    digits = text.split(" × ")[0].replace(",", "").replace(".", "").replace("−", "").strip("0")
    assert len(digits) <= 3
    assert "-" not in text


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.9996, "1.00"),
    (999.6, "1,000"),
    (0, "0"),
    (0.0, "0"),
    (60_000, "60,000"),
    (np.int64(1437), "1,437"),
    (np.float32(0.25), "0.250"),
    (9.999e6, "1 × 10⁷"),
    (math.inf, "∞"),
    (-math.inf, "−∞"),
    (None, "not identified"),
    (math.nan, "not identified"),
    (np.float64("nan"), "not identified"),
    ("above 0", "above 0"),
  ],
)
def test_edges(value, text):
  assert format_number(value) == text


@pytest.mark.parametrize(
  ("low", "high", "text"),
  [
    (-1.02, -0.98, "[−1.02, −0.980]"),
    (39, math.inf, "[39, ∞)"),
    (None, 5.0, "(−∞, 5.00]"),
    (-math.inf, None, "(−∞, ∞)"),
    (None, None, ""),
    (math.nan, math.nan, ""),
  ],
)
def test_intervals(low, high, text):
  assert format_interval(low, high) == text


@pytest.mark.parametrize(
  ("value", "smallest", "text"),
  [(8, 8, "1.0×"), (30, 8, "3.8×"), (12_570, 8, "1,571×"), (math.nan, 8, ""), (8, None, ""), (8, 0, "")],
)
def test_ratios(value, smallest, text):
  assert format_ratio(value, smallest) == text
