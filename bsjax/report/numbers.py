"""How the report writes numbers for people: three significant digits, intervals in brackets, words for what is missing."""

from __future__ import annotations

import math
from typing import Any

NOT_IDENTIFIED = "not identified"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def is_missing(value: Any) -> bool:
  """Say whether a value is None or NaN: both mean that nothing was measured."""
  return value is None or (isinstance(value, (int, float)) and math.isnan(value))


def format_number(value: Any, *, missing: str = NOT_IDENTIFIED) -> str:
  """Write a number with three significant digits; whole numbers keep all of theirs, text stays as it is.

  Holds: every finite float is within 0.5 % of what is written; negative numbers carry a true minus sign.

  >>> [format_number(value) for value in (1437, 0.012345, 12345.6, -0.99649, 3.2e-7, None)]
  ['1,437', '0.0123', '12,300', '−0.996', '3.2 × 10⁻⁷', 'not identified']
  """
  value = value.item() if hasattr(value, "item") else value
  if isinstance(value, str):
    return value
  if is_missing(value):
    return missing
  if math.isinf(value):
    return "∞" if value > 0 else "−∞"
  if isinstance(value, int):
    return f"{value:,}".replace("-", "−")
  rounded = float(f"{value:.3g}")
  if rounded == 0:
    return "0"
  exponent = math.floor(math.log10(abs(rounded)))
  if -4 <= exponent < 7:
    text = f"{rounded:,.{max(2 - exponent, 0)}f}"
  else:
    mantissa = f"{rounded / 10.0**exponent:.3g}"
    text = f"{mantissa} × 10{str(exponent).translate(_SUPERSCRIPTS)}"
  return text.replace("-", "−")


def format_interval(low: Any, high: Any) -> str:
  """Write `[low, high]`; an open end is written as infinite, and nothing at all where both ends are missing.

  >>> format_interval(0.98, 1.0204), format_interval(12.0, None), format_interval(None, float("nan"))
  ('[0.980, 1.02]', '[12.0, ∞)', '')
  """
  if is_missing(low) and is_missing(high):
    return ""
  left = "(−∞" if is_missing(low) or math.isinf(low) else f"[{format_number(low)}"
  right = "∞)" if is_missing(high) or math.isinf(high) else f"{format_number(high)}]"
  return f"{left}, {right}"


def format_ratio(value: Any, smallest: Any) -> str:
  """Write how many times the smallest a cost is: `1.0×` is the cheapest, and nothing where either is missing.

  >>> format_ratio(300, 200), format_ratio(None, 200)
  ('1.5×', '')
  """
  if is_missing(value) or is_missing(smallest) or not smallest:
    return ""
  ratio = value / smallest
  return f"{ratio:.1f}×" if ratio < 99.5 else f"{ratio:,.0f}×"
