"""The progress bar of the study of sharp minima, in estimated seconds."""

import sys

from tqdm import tqdm

from bsjax.study.flatness import program_names
from bsjax.study.progress import FLOPS_PER_SECOND, START_SECONDS, STEP_SECONDS
from bsjax.study.sharp_landscapes import num_points
from bsjax.study.sharp_plan import (
  SharpPlan,
  edge_batch_sizes,
  edge_config,
  edge_rates,
  edge_seeds,
  edge_workload,
  escape_config,
  extremes,
  solution_config,
)
from bsjax.train import TrialConfig
from bsjax.workloads import Workload, num_params

CHECKPOINT_SECONDS, MEASURE_SECONDS, POINT_SECONDS = 0.002, 0.02, 0.002
"""Rough cost of a checkpoint, of a measure and of a point of a landscape on the digits, beside what its arithmetic takes."""
MEASURE_GRADIENTS, EDGE_GRADIENTS = 40, 20
"""Rough cost of a measure in gradients of the data set: Lanczos stops early at the largest eigenvalue."""


class SharpProgress:
  """A bar in estimated seconds, so that the time left is honest although trials differ in length by far."""

  def __init__(self, workload: Workload, plan: SharpPlan) -> None:
    self._num_params = num_params(workload)
    self._num_measures, self._num_examples = len(program_names(workload, plan)), plan.num_examples
    self._started: set[str] = set()
    solutions = [solution_config(plan, workload, size) for size in plan.batch_sizes]
    escapes = [escape_config(plan, workload, size) for size in extremes(plan).values()]
    edge = [edge_config(plan, edge_workload(plan, workload), size) for size in edge_batch_sizes(plan)]
    counts = [
      *((workload, config, len(plan.rate_parts) * plan.seeds) for config in solutions),
      *((workload, config, 2 * plan.seeds) for config in escapes),
      *(
        (edge_workload(plan, workload), config, len(edge_rates(plan, workload)) * len(edge_seeds(plan)))
        for config in edge
      ),
    ]
    total = sum(count * self._seconds(at, config) for at, config, count in counts)
    self._point_seconds = POINT_SECONDS + 2 * self._forward_seconds(plan.num_examples)
    self._bar = tqdm(
      total=total + len(counts) * START_SECONDS + num_points(plan) * self._point_seconds,
      smoothing=0.05,
      mininterval=0.5 if sys.stderr.isatty() else 10.0,
      bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} gone, about {remaining} left",
    )

  def __enter__(self) -> "SharpProgress":
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.close()

  def _forward_seconds(self, num_examples: int) -> float:
    return 2 * self._num_params * num_examples / FLOPS_PER_SECOND

  def _seconds(self, workload: Workload, config: TrialConfig) -> float:
    step = STEP_SECONDS + 3 * self._forward_seconds(config.batch_size)
    (kind,) = config.probes
    looked_at = self._num_examples if kind == "solution" else len(workload.train) + len(workload.test)
    checkpoint = CHECKPOINT_SECONDS + self._forward_seconds(looked_at)
    gradient = 3 * self._forward_seconds(self._num_examples)
    measured = {
      "solution": 2 * self._num_measures * (MEASURE_SECONDS + MEASURE_GRADIENTS * gradient),
      "escape": len(config.probe_steps) * 3 * (MEASURE_SECONDS + MEASURE_GRADIENTS * gradient),
      "edge": len(config.probe_steps) * 3 * (MEASURE_SECONDS + EDGE_GRADIENTS * gradient),
    }[kind]
    return config.num_steps * step + len(config.probe_steps) * checkpoint + measured

  def begin(self, part: str) -> None:
    """Names what comes next."""
    self._bar.set_description_str(part)

  def advance(self, workload: Workload, config: TrialConfig, steps: int) -> None:
    """Counts trial-steps that were settled, and with the first of a batch size its start."""
    seconds = self._seconds(workload, config) * steps / config.num_steps
    name = f"{config.probes}{config.batch_size}"
    if name not in self._started:
      self._started.add(name)
      seconds += START_SECONDS
    self.count(seconds)

  def landscape(self, points: int) -> None:
    """Counts points of landscapes."""
    self.count(points * self._point_seconds)

  def count(self, seconds: float) -> None:
    """Counts estimated seconds."""
    self._bar.update(min(seconds, self._bar.total - self._bar.n))
