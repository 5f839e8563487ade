"""The progress bar of a study, in estimated seconds, so that its remaining time is honest from the first minute."""

import sys
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from bsjax.study.plan import Plan, make_config
from bsjax.train import Trial, TrialConfig
from bsjax.workloads import Workload, num_params

STEP_SECONDS, FLOPS_PER_SECOND = 6e-6, 2e10
"""Rough cost of a step on two CPU cores. Only ratios matter: the bar's rate is measured as it goes."""
GROUP_SECONDS, TIMING_SECONDS, PROBE_SECONDS = 4.0, 2.5, 0.3
"""Compiling and starting a batch size; timing one; measuring one finished trial."""
EXPECTED_WIDENINGS = 1


class Progress:
  """Counts work against a forecast that grows when a grid is widened."""

  def __init__(self, workload: Workload, plan: Plan) -> None:
    self._workload, self._num_params = workload, num_params(workload)
    self._begun: set[int] = set()
    self._expected: set[Trial] = set()
    forecast, size = 0.0, len(workload.train)
    for batch_size in plan.batch_sizes:
      trials = (plan.num_rates + EXPECTED_WIDENINGS) * plan.tuning_seeds + plan.final_seeds
      for budget in ("epochs", "steps"):
        config = make_config(plan, workload.name, budget, batch_size=batch_size, train_size=size)
        forecast += trials * config.num_steps * self._step_seconds(config) + plan.final_seeds * PROBE_SECONDS
      forecast += GROUP_SECONDS + TIMING_SECONDS
    self._known = 0.0
    self._bar = tqdm(
      total=forecast,
      smoothing=0.05,
      file=sys.stderr,
      disable=None if sys.stderr.isatty() else False,
      mininterval=0.5 if sys.stderr.isatty() else 10.0,
      bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed} gone, about {remaining} left",
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if kind is None:
      self._bar.update(max(0.0, self._bar.total - self._bar.n))
    self._bar.close()

  def _step_seconds(self, config: TrialConfig) -> float:
    flops = 6 * self._num_params * config.batch_size
    evaluation = 2 * self._num_params * len(self._workload.validation) / config.eval_every
    return STEP_SECONDS + (flops + evaluation) / FLOPS_PER_SECOND

  def _add(self, seconds: float) -> None:
    self._known += seconds
    self._bar.total = max(self._bar.total, self._known)

  def expect(self, config: TrialConfig, trials: Sequence[Trial]) -> None:
    """Announces trials about to run (or to be skipped); those announced before count once."""
    new = set(trials) - self._expected
    self._expected |= new
    self._add(len(new) * config.num_steps * self._step_seconds(config))
    self._bar.set_description_str(f"batch size {config.batch_size}")
    if config.batch_size not in self._begun:
      self._begun.add(config.batch_size)
      self._add(GROUP_SECONDS)
      self._bar.update(GROUP_SECONDS)

  def advance(self, config: TrialConfig, steps: int) -> None:
    """Counts trial-steps that were settled."""
    self._bar.update(min(steps * self._step_seconds(config), max(0.0, self._bar.total - self._bar.n)))

  def timed(self) -> None:
    """Counts one timed batch size."""
    self._bar.set_description_str("timing steps")
    self._add(TIMING_SECONDS)
    self._bar.update(min(TIMING_SECONDS, max(0.0, self._bar.total - self._bar.n)))
