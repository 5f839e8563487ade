"""The progress bar of one or several sweeps: trials settled, weighted by what their steps cost."""

import sys
from collections.abc import Sequence

from tqdm import tqdm

from bsjax.study.progress import FLOPS_PER_SECOND, STEP_SECONDS
from bsjax.study.sweep_plan import PILOT_TRIALS, SweepPlan, most_steps
from bsjax.train import TrialConfig
from bsjax.workloads import Workload, num_params

BATCH_SIZE_SECONDS = 10.0
"""Two compilations, of the pilot's program and of the sweep's."""
USED_SHARE = 1 / 4
"""A trial of a sweep ends at its target: of its budget it takes about this part."""


class SweepProgress:
  """Counts trials part by part, a part being one batch size of one sweep; a trial that ends early counts as a whole one."""

  def __init__(
    self, workload: Workload, plan: SweepPlan, *, sweeps: Sequence[str] = ("",), full_trials: int = 0
  ) -> None:
    """Forecasts the cost of equal sweeps.

    Args:
      sweeps: their names, in the order in which they run.
      full_trials: at each batch size, trials beside the sweep that take their whole budget.
    """
    self._plan, self._num_params, self._train_size = plan, num_params(workload), len(workload.train)
    trials = PILOT_TRIALS + plan.num_trials + plan.final_seeds + full_trials / USED_SHARE
    self._trials = {(name, size): trials for name in sweeps for size in plan.batch_sizes}
    self._part = next(iter(self._trials))
    self._bar = tqdm(
      total=self._seconds_before(None),
      smoothing=0.05,
      mininterval=0.5 if sys.stderr.isatty() else 10.0,
      bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} gone, about {remaining} left",
    )

  def __enter__(self) -> "SweepProgress":
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.close()

  def _trial_seconds(self, batch_size: int) -> float:
    step = STEP_SECONDS + 6 * self._num_params * batch_size / FLOPS_PER_SECOND
    return step * most_steps(self._plan, batch_size=batch_size, train_size=self._train_size) * USED_SHARE

  def _seconds_before(self, part: tuple[str, int] | None) -> float:
    """Adds up the cost of all parts before one, or of all."""
    parts = list(self._trials)
    counted = parts if part is None else parts[: parts.index(part)]
    return sum(BATCH_SIZE_SECONDS + self._trials[each] * self._trial_seconds(each[1]) for each in counted)

  def begin(self, batch_size: int, sweep: str = "") -> None:
    """Closes the part before, and begins another."""
    self._part = sweep, batch_size
    self._bar.n = self._seconds_before(self._part)
    self._bar.set_description_str(f"{sweep}{', ' if sweep else ''}batch size {batch_size}")

  def expect_more(self, trials: int) -> None:
    """Announces the trials of a wider space."""
    self._trials[self._part] += trials
    self._bar.total = self._seconds_before(None)

  def advance(self, config: TrialConfig, steps: int) -> None:
    """Counts trial-steps that were settled."""
    seconds = self._trial_seconds(config.batch_size) * steps / config.num_steps
    if not config.stop_at_target:
      seconds /= USED_SHARE
    self._bar.update(min(seconds, self._bar.total - self._bar.n))
