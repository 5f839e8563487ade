"""The progress bar of a study of large batches, in estimated seconds."""

import sys
from collections.abc import Sequence

from tqdm import tqdm

from bsjax.study.large_batch_plan import RECIPES, REPEATED_POINTS, REPEATS, LargeBatchPlan, budget_of
from bsjax.study.progress import FLOPS_PER_SECOND, START_SECONDS, STEP_SECONDS
from bsjax.train import TrialConfig
from bsjax.workloads import Workload, num_params


class LargeBatchProgress:
  """Counts trials search by search; a search is one arm at one batch size, with its repeats and final seeds.

  Args:
    searches: batch size and arm of each.
    followed: batch sizes at which the linear rule is followed, too.
  """

  def __init__(
    self,
    workload: Workload,
    plan: LargeBatchPlan,
    searches: Sequence[tuple[int, str]],
    followed: Sequence[int] = (),
  ) -> None:
    self._num_params, self._num_validation = num_params(workload), len(workload.validation)
    trials = plan.num_trials + REPEATED_POINTS * REPEATS + plan.final_seeds
    self._trial_seconds = {size: self._estimate(plan, size, len(workload.train)) for size, _ in searches}
    recipes = len(RECIPES) * plan.final_seeds * sum(self._trial_seconds[size] for size in followed)
    self._bar = tqdm(
      total=recipes + sum(START_SECONDS + trials * self._trial_seconds[size] for size, _ in searches),
      smoothing=0.05,
      mininterval=0.5 if sys.stderr.isatty() else 10.0,
      bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} gone, about {remaining} left",
    )
    self._started = True

  def __enter__(self) -> "LargeBatchProgress":
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.close()

  def _estimate(self, plan: LargeBatchPlan, batch_size: int, train_size: int) -> float:
    budget = budget_of(plan, batch_size=batch_size, train_size=train_size)
    rows = budget.num_steps / budget.every
    flops = 2 * self._num_params * (3 * batch_size * budget.num_steps + self._num_validation * rows)
    return budget.num_steps * STEP_SECONDS + flops / FLOPS_PER_SECOND

  def begin(self, batch_size: int, arm: str) -> None:
    """Names the search that comes next."""
    self._started = arm in RECIPES  # their programs are those of arms
    self._bar.set_description_str(f"batch size {batch_size}, {arm}")

  def expect_more(self, batch_size: int, trials: int) -> None:
    """Announces the trials of a wider space."""
    self._bar.total += trials * self._trial_seconds[batch_size]

  def advance(self, config: TrialConfig, steps: int) -> None:
    """Counts trial-steps that were settled, and with the first of a search its start."""
    seconds = self._trial_seconds[config.batch_size] * steps / config.num_steps
    if not self._started:
      self._started = True
      seconds += START_SECONDS
    self._bar.update(min(seconds, self._bar.total - self._bar.n))
