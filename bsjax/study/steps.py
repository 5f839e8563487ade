"""The study of steps to result: a sweep per optimizer, how good every batch size can get, judge, write."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from bsjax.analysis import (
  SweepRecords,
  judge_lr_sensitivity,
  judge_momentum_extends_scaling,
  judge_same_best_error,
  judge_three_regimes,
)
from bsjax.analysis.quality import QUALITY, QUALITY_FINAL, best_quality
from bsjax.analysis.steps_to_result import sweep_records
from bsjax.analysis.sweep_table import sweep_table
from bsjax.records import read_records, write_json
from bsjax.report import steps_page, write_experiment
from bsjax.study.measure import metrics_of
from bsjax.study.plan import workload_facts
from bsjax.study.space import draw_points
from bsjax.study.sweep import SPACE_SEED, Sweep, run_sweep
from bsjax.study.sweep_plan import (
  FIRST_FINAL_SEED,
  SweepPlan,
  make_sweep_plan,
  pilot_every,
  space_of,
  sweep_config,
  sweep_hparams,
)
from bsjax.study.sweep_progress import SweepProgress
from bsjax.study.timing import record_timing
from bsjax.train import Plan as LanePlan
from bsjax.train import make_trial
from bsjax.types import Hparams
from bsjax.workloads import Workload

QUALITY_TRIALS = 8
TESTS = 32
"""How often a trial that judges quality is tested along its budget, at equal distances."""


class StepsPlan(NamedTuple):
  """One sweep for each optimizer, and how many of its points are trained on to see how good a batch size can get."""

  sweeps: Mapping[str, SweepPlan]
  quality_trials: int


def make_steps_plan(
  workload: Workload,
  *,
  optimizers: Sequence[str] = ("sgd", "momentum"),
  quality_trials: int | None = None,
  **overrides: Any,
) -> StepsPlan:
  """Plans one sweep for each optimizer, all alike but for where the search of rates begins.

  Raises:
    ValueError: no optimizer, one that comes twice, a number of trials out of range, or what `make_sweep_plan` refuses.
  """
  if not optimizers or len({*optimizers}) < len(optimizers):
    raise ValueError(f"--optimizers={','.join(optimizers)}, wanted at least one, each once")
  quality_trials = QUALITY_TRIALS if quality_trials is None else quality_trials
  if quality_trials < 0:
    raise ValueError(f"--quality_trials={quality_trials}, wanted 0 or more")
  return StepsPlan(
    {name: make_sweep_plan(workload, optimizer=name, **overrides) for name in optimizers}, quality_trials
  )


def with_validation(workload: Workload, count: int | None) -> Workload:
  """Keeps the first `count` validation examples (None: all), where looking for the target costs more than the training between two looks.

  Raises:
    ValueError: a count out of range.
  """
  if count is None:
    return workload
  whole = workload.validation
  if not 1 <= count <= len(whole):
    raise ValueError(f"--validation_examples={count}, wanted 1 to {len(whole)}, the size of the validation set")
  return dataclasses.replace(workload, validation=whole.first(count))


def run_steps_study(
  workload: Workload,
  plan: StepsPlan,
  out: Path,
  *,
  mesh: Mesh,
  environment: dict[str, Any],
  lane_plan: LanePlan | None = None,
) -> Path:
  """Runs the study into `out` and returns the path of the report.

  Args:
    out: a folder claimed by `open_folder`; trials go to `out/steps_to_result/<optimizer>/`, results beside it.
    mesh: axes "trial" and "data".
    environment: versions, device, code revision and command line; shown in the report and kept in every `trial.json`.
    lane_plan: how many trials run side by side and in turn; None: the fastest.

  Holds: whatever is complete on disk is not computed again.
  """
  folder = out / "steps_to_result"
  plans = plan.sweeps
  first = next(iter(plans.values()))
  full_trials = plan.quality_trials + first.final_seeds if plan.quality_trials else 0
  described = {}
  with SweepProgress(workload, first, sweeps=tuple(plans), full_trials=full_trials) as progress:
    for optimizer, sweep_plan in plans.items():
      sweep = Sweep(workload, sweep_plan, folder / optimizer, mesh, environment, progress, optimizer, lane_plan)
      sweep.folder.mkdir(parents=True, exist_ok=True)
      description = run_sweep(sweep)
      if plan.quality_trials:
        _measure_quality(sweep, description, plan.quality_trials)
      _time_steps(sweep)
      described[optimizer] = description | {"quality_trials": plan.quality_trials}
  description = workload_facts(workload) | {"target": workload.target._asdict(), "optimizers": described}
  return report_steps_study(description, folder, out, environment=environment)


def _time_steps(sweep: Sweep) -> None:
  """Measures what a step of every batch size takes on this machine, one trial by itself: steps to result become seconds to result."""
  plan = dataclasses.replace(sweep.plan, warmup="none", warmup_fraction=0.0)
  for batch_size in plan.batch_sizes:
    config = sweep_config(plan, sweep.workload, batch_size=batch_size, num_steps=1, every=1)
    (point,) = draw_points(space_of(plan, batch_size), 1, seed=SPACE_SEED)
    hparams = sweep_hparams(plan, point, 1, batch_size=batch_size)
    record_timing(sweep.workload, make_trial(config, hparams, 0), sweep.folder, sweep.provenance)


def _measure_quality(sweep: Sweep, description: dict[str, Any], num_trials: int) -> None:
  """Trains some points of every batch size for the whole budget, then the one that got best at fresh seeds.

  The points are those that reached the target, from the fastest to the slowest at equal distances: what is best after the whole budget
  need not have been the fastest. A batch size where none did is left out.
  """
  test = metrics_of("test", sweep.workload, {"test": sweep.workload.test})
  for batch_size in sweep.plan.batch_sizes:
    sweep.progress.begin(batch_size, sweep.name)
    budget = sweep.budget(batch_size)
    every = pilot_every(budget)
    config = dataclasses.replace(sweep.config(batch_size, budget, every), stop_at_target=False)
    points, seeds = _spread(sweep, description, batch_size, num_trials)
    if not points:
      continue
    records = sweep.run(config, points, seeds, QUALITY)
    best = best_quality(description, records)
    if best is not None:
      final = range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + sweep.plan.final_seeds)
      looks = config.num_steps // every
      config = dataclasses.replace(
        config,
        probes=("test",),
        probe_steps=tuple(sorted({every * -(-looks * part // TESTS) for part in range(1, TESTS + 1)})),
      )
      sweep.run(config, [points[best]] * len(final), final, QUALITY_FINAL, probe=lambda trial, state: [test(state)])


def _spread(
  sweep: Sweep, description: dict[str, Any], batch_size: int, count: int
) -> tuple[list[dict[str, float]], list[int]]:
  """Picks points that reached the target, and their seeds, ranked by their steps."""
  records = sweep_records(description, read_records(sweep.folder), batch_size)
  ranked = sorted(
    ((steps, record.trial["seed"], record) for record in records if (steps := sweep.steps(record)) is not None),
    key=lambda entry: entry[:2],
  )
  chosen = {round(index * (len(ranked) - 1) / max(count - 1, 1)) for index in range(count)} if ranked else set()
  names = description["sweep"][str(batch_size)]["space"]
  records = [ranked[index][2] for index in sorted(chosen)]
  defaults = Hparams(0.0)._asdict()
  points = [{name: r.trial["hparams"].get(name, defaults[name]) for name in names} for r in records]
  return points, [r.trial["seed"] for r in records]


def report_steps_study(description: dict[str, Any], folder: Path, out: Path, *, environment: dict[str, Any]) -> Path:
  """Judges the records below `folder` and writes study.json, claims.json, results.csv, figures and report.html."""
  write_json(out / "study.json", description)
  sweeps = {
    optimizer: SweepRecords(study, read_records(folder / optimizer))
    for optimizer, study in description["optimizers"].items()
  }
  findings = [
    judge_three_regimes(sweeps),
    judge_momentum_extends_scaling(sweeps),
    judge_lr_sensitivity(sweeps),
    judge_same_best_error(sweeps),
  ]
  return write_experiment(
    out, steps_page(description, sweeps, findings), findings=findings, environment=environment, rows=sweep_table(sweeps)
  )
