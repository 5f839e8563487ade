"""The best value of the metric that a budget of steps or of examples buys at each batch size."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from bsjax.analysis.selection import is_number
from bsjax.analysis.steps_to_result import sweep_records, trial_state
from bsjax.records import Record

Unit = Literal["steps", "epochs"]
ROUNDING = 1e-9
"""A budget of E epochs holds the step E N / B itself, though the product may come out a rounding below it."""


class BudgetCurves(NamedTuple):
  """One curve over the batch sizes for each budget.

  `best` f64[K, n] is the best value of the metric within the budget, NaN where nothing was measured within it. `reached` bool[K, n]
  marks values that passed the goal: trials stop there, so such a value says "at least as good as this".
  """

  unit: Unit
  budgets: np.ndarray
  batch_sizes: np.ndarray
  best: np.ndarray
  reached: np.ndarray


def budget_curves(study: dict, records: Sequence[Record], budgets: Sequence[float], *, unit: Unit) -> BudgetCurves:
  """Finds the best value of the metric over all trials and rows with step <= S, or with B step <= E.

  A trial that was cut counts where it went on to the end of the budget, since within the budget it is whole; infeasible trials never
  count. The value is a maximum over trials as they were drawn and carries no interval: `tuning_bias` tells what more of them would give.

  Args:
    budgets: S in steps, or E in epochs (of `study["train_size"]` examples).

  Source: Shallue et al. (2019), Fig. 11 and the authors' `apply_step_budget` and `apply_example_budget`, over complete trials there.
  """
  sizes = sorted(int(size) for size in study["sweep"])
  metric, sign = study["target"]["metric"], 1 if study["target"]["direction"] == "max" else -1
  best = np.full((len(budgets), len(sizes)), np.nan)
  for column, size in enumerate(sizes):
    limits = np.asarray(budgets, float) * (1 if unit == "steps" else study["train_size"] / size)
    for record in sweep_records(study, records, size):
      state = trial_state(study, record)
      rows = [(row["step"], sign * row[metric]) for row in record.metrics if is_number(row.get(metric))]
      if state == "infeasible" or not rows:
        continue
      steps, values = np.array(rows, float).T
      seen = np.searchsorted(steps, limits * (1 + ROUNDING), side="right")  # rows within each budget
      whole = (seen > 0) & ((state == "complete") | (limits <= steps[-1]))
      running = np.maximum.accumulate(values)
      best[whole, column] = np.fmax(best[whole, column], running[seen[whole] - 1])
  return BudgetCurves(
    unit, np.asarray(budgets, float), np.array(sizes), sign * best, best >= sign * study["target"]["goal"]
  )
