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
START_SECONDS, TIMING_SECONDS, MEASURING_SECONDS = 7.0, 3.0, 0.2
"""Compiling a batch size; timing one; measuring one finished trial."""
EXPECTED_WIDENINGS = 1
NOISE_CHECKPOINTS, NOISE_GRADIENTS = 12, 30
"""Checkpoints of all seeds, and what one costs in gradients of the training set: most of it for minibatches of large batch sizes."""
NOISE, TIMING = "gradient noise", "timing"


class Progress:
  """Counts work part by part (batch sizes, noise, timing); a part's forecast gives way to what it really held."""

  def __init__(self, workload: Workload, plan: Plan) -> None:
    self._num_params, self._num_validation = num_params(workload), len(workload.validation)
    self._parts = {f"batch size {size}": self._forecast(workload, plan, size) for size in plan.batch_sizes}
    noise_flops = NOISE_CHECKPOINTS * NOISE_GRADIENTS * 6 * self._num_params * len(workload.train)
    self._parts |= {
      NOISE: START_SECONDS + noise_flops / FLOPS_PER_SECOND,
      TIMING: TIMING_SECONDS * len(plan.batch_sizes),
    }
    self._part, self._known, self._started = "", 0.0, True
    self._announced: set[Trial] = set()
    on_screen = sys.stderr.isatty()
    self._bar = tqdm(
      total=sum(self._parts.values()),
      smoothing=0.05,
      mininterval=0.5 if on_screen else 10.0,
      bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} gone, about {remaining} left",
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._bar.close()

  def _forecast(self, workload: Workload, plan: Plan, batch_size: int) -> float:
    trials = (plan.num_rates + EXPECTED_WIDENINGS) * plan.tuning_seeds + plan.final_seeds
    seconds = START_SECONDS
    for budget in ("epochs", "steps"):
      config = make_config(plan, workload.name, budget, batch_size=batch_size, train_size=len(workload.train))
      seconds += trials * self._trial_seconds(config) + plan.final_seeds * MEASURING_SECONDS
    return seconds

  def _trial_seconds(self, config: TrialConfig) -> float:
    flops = 6 * self._num_params * config.batch_size
    evaluation = 2 * self._num_params * self._num_validation / config.eval_every
    return config.num_steps * (STEP_SECONDS + (flops + evaluation) / FLOPS_PER_SECOND)

  def begin(self, part: str) -> None:
    """Closes the part before at what it held, and begins another."""
    if self._part:
      self._parts[self._part] = self._known
      self._bar.n = sum(list(self._parts.values())[: list(self._parts).index(part)])
    self._part, self._known = part, 0.0 if part == TIMING else START_SECONDS
    self._started = part == TIMING
    self._refresh()
    self._bar.set_description_str(part)

  def expect(self, config: TrialConfig, trials: Sequence[Trial]) -> None:
    """Announces trials about to be trained or skipped; a trial counts once."""
    new = set(trials) - self._announced
    self._announced |= new
    self._known += len(new) * self._trial_seconds(config)
    self._refresh()

  def _refresh(self) -> None:
    self._parts[self._part] = max(self._parts[self._part], self._known)
    self._bar.total = max(sum(self._parts.values()), self._bar.n)

  def advance(self, config: TrialConfig, steps: int) -> None:
    """Counts trial-steps that were settled, and with the first of a part its start."""
    if not self._started:
      self._started = True
      self._count(START_SECONDS)
    self._count(self._trial_seconds(config) * steps / config.num_steps)

  def timed(self) -> None:
    """Counts one timed batch size."""
    self._known += TIMING_SECONDS
    self._count(TIMING_SECONDS)

  def _count(self, seconds: float) -> None:
    self._bar.update(min(seconds, self._bar.total - self._bar.n))
