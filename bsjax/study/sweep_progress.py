"""The progress bar of a sweep: trials settled, weighted by what their steps cost."""

import sys

from tqdm import tqdm

from bsjax.study.progress import FLOPS_PER_SECOND, STEP_SECONDS
from bsjax.study.sweep_plan import PILOT_TRIALS, SweepPlan, most_steps
from bsjax.train import TrialConfig
from bsjax.workloads import Workload, num_params

BATCH_SIZE_SECONDS = 10.0
"""Two compilations, of the pilot's program and of the sweep's."""


class SweepProgress:
  """Counts trials batch size by batch size; one that ends early counts as a whole trial."""

  def __init__(self, workload: Workload, plan: SweepPlan) -> None:
    self._plan, self._num_params, self._train_size = plan, num_params(workload), len(workload.train)
    self._trials = dict.fromkeys(plan.batch_sizes, PILOT_TRIALS + plan.num_trials + plan.final_seeds)
    self._bar = tqdm(
      total=sum(self._seconds(size) for size in plan.batch_sizes),
      smoothing=0.05,
      mininterval=0.5 if sys.stderr.isatty() else 10.0,
      bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} gone, about {remaining} left",
    )
    self._batch_size = plan.batch_sizes[0]

  def __enter__(self) -> "SweepProgress":
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.close()

  def _trial_seconds(self, batch_size: int) -> float:
    step = STEP_SECONDS + 6 * self._num_params * batch_size / FLOPS_PER_SECOND
    return step * most_steps(self._plan, batch_size=batch_size, train_size=self._train_size) / 4

  def _seconds(self, batch_size: int) -> float:
    return BATCH_SIZE_SECONDS + self._trials[batch_size] * self._trial_seconds(batch_size)

  def begin(self, batch_size: int) -> None:
    """Closes the batch size before, and begins another."""
    self._batch_size = batch_size
    sizes = self._plan.batch_sizes
    self._bar.n = sum(self._seconds(size) for size in sizes[: sizes.index(batch_size)])
    self._bar.set_description_str(f"batch size {batch_size}")

  def expect_more(self, trials: int) -> None:
    """Announces the trials of a wider space."""
    self._trials[self._batch_size] += trials
    self._bar.total = sum(self._seconds(size) for size in self._plan.batch_sizes)

  def advance(self, config: TrialConfig, steps: int) -> None:
    """Counts trial-steps that were settled."""
    seconds = self._trial_seconds(config.batch_size) * steps / config.num_steps
    self._bar.update(min(seconds, self._bar.total - self._bar.n))
