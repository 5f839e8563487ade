"""Tuning: the best rate of a batch size, on a grid that is widened until the best is not on its edge."""

from collections.abc import Callable, Sequence
from typing import Any

from bsjax.analysis import BestRate, best_rate
from bsjax.records import Record

MOST_WIDENINGS = 6
"""A grid is widened by one rate at a time at most this often; a best rate that is still on the edge is marked."""

RunRates = Callable[[Sequence[float]], list[Record]]
"""Trains the tuning seeds at the given rates (skipping what is done) and returns all records of this batch size and budget."""


def tune_rate(
  run_rates: RunRates, rates: Sequence[float], *, objective: Any, target: dict[str, Any], seeds: Sequence[int]
) -> tuple[BestRate, list[float]]:
  """Finds the rate with the best mean score over `seeds`, widening the grid by factors of 2 while the best is on its edge.

  A grid all of whose trials failed is widened downwards (they diverged) as often.

  Returns: the choice, whose `edge` is not None where the grid could not be widened enough, and the final grid.
  Holds: what is trained depends on the records only, so a rerun retraces it without training anything twice.
  """
  grid = sorted(rates)
  for widening in range(MOST_WIDENINGS + 1):
    best = best_rate(run_rates(grid), objective=objective, target=target, seeds=seeds)
    if best.learning_rate is not None and best.edge is None:
      break
    if widening < MOST_WIDENINGS:
      grid = [*grid, grid[-1] * 2] if best.edge == "high" else [grid[0] / 2, *grid]
  return best, grid
