"""The study of gradient noise from a plan to a report: train, measure along the way, change the temperature, judge, write."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from tqdm import tqdm

from bsjax.analysis import (
  judge_estimators_agree,
  judge_layernorm_predicts_total,
  judge_noise_grows,
  judge_temperature,
  measurements_table,
)
from bsjax.records import Record, read_record, read_records, write_json
from bsjax.report import noise_page, write_experiment
from bsjax.study.measure_noise import NoiseMeasurements
from bsjax.study.noise_plan import (
  Branch,
  NoisePlan,
  along_config,
  rates_of,
  route_steps,
  stretch_config,
  temperature_branches,
)
from bsjax.study.plan import workload_facts
from bsjax.study.progress import FLOPS_PER_SECOND, START_SECONDS, STEP_SECONDS
from bsjax.train import TrainState, Trial, TrialConfig, make_trial, run_trials
from bsjax.types import Hparams
from bsjax.workloads import Workload, num_params

JUDGES = (judge_noise_grows, judge_temperature, judge_estimators_agree, judge_layernorm_predicts_total)
CHECKPOINT_SECONDS = {"noise": 0.03, "hessian_noise": 0.05, "adam_noise": 0.02, "routes": 0.1}
"""Rough cost of a measurement on the digits, for the forecast."""
PARENT_SECONDS = 0.3
"""Rough cost of keeping a last state and starting from it."""


class _Study(NamedTuple):
  workload: Workload
  plan: NoisePlan
  folder: Path
  mesh: Mesh
  measurements: NoiseMeasurements
  provenance: dict[str, Any]
  progress: "_Progress"

  def probe(self, trial: Trial, state: TrainState) -> list[dict[str, Any]]:
    """Measures what the trial's config names; what takes longest at some of its checkpoints only.

    These are the four routes, and the Hessian form where it has to be randomised, which is then measured on one seed of each setting.
    Random draws follow from the trial's id: settings that share a seed would draw the same batches, and their errors be one.
    """
    names = set(trial.config.probes)
    if int(state.step) not in route_steps(trial.config):
      names -= {"routes"} if self.measurements.exact_hessian else {"routes", "hessian_noise"}
    if trial.seed and not self.measurements.exact_hessian:
      names -= {"hessian_noise"}
    config = dataclasses.replace(trial.config, probes=tuple(name for name in trial.config.probes if name in names))
    return self.measurements(Trial(config, trial.hparams, int(trial.id, 16) % 2**31), state)

  def run(
    self, config: TrialConfig, rate: float, seeds: Sequence[int], *, keep_final: bool = False, **provenance: Any
  ) -> list[Record]:
    """Trains what is missing of the seeds and returns the records of all of them."""
    hparams = Hparams(rate, momentum=self.plan.momentum)
    trials = [make_trial(config, hparams, seed) for seed in seeds]
    run_trials(
      self.workload,
      trials,
      self.folder,
      mesh=self.mesh,
      probe=self.probe,
      provenance=provenance | self.provenance,
      on_progress=lambda steps: self.progress.advance(config, steps),
      keep_final=keep_final,
    )
    return [read_record(self.folder / trial.id) for trial in trials]


class _Progress:
  """A bar in estimated seconds, so that the time left is honest although trials differ in length by far."""

  def __init__(self, workload: Workload, plan: NoisePlan) -> None:
    self._flops_per_example = 6 * num_params(workload)
    self._started: set[int] = set()
    along = [(along_config(plan, workload, size), len(rates_of(plan, workload, size))) for size in plan.batch_sizes]
    total = sum(plan.seeds * count * self._seconds(config) for config, count in along)
    branches = temperature_branches(plan, workload)
    if branches:
      sizes = [branches[0].batch_size] * (1 + len(branches)) + [branch.batch_size for branch in branches]
      total += sum(plan.seeds * self._seconds(stretch_config(plan, workload, branches, size)) for size in sizes)
    total += START_SECONDS * len({*plan.batch_sizes, *(branch.batch_size for branch in branches)})
    self._bar = tqdm(
      total=total,
      smoothing=0.05,
      mininterval=0.5 if sys.stderr.isatty() else 10.0,
      bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} gone, about {remaining} left",
    )

  def __enter__(self) -> "_Progress":
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.close()

  def _seconds(self, config: TrialConfig) -> float:
    step = STEP_SECONDS + self._flops_per_example * config.batch_size / FLOPS_PER_SECOND
    measuring = len(config.probe_steps) * sum(CHECKPOINT_SECONDS[name] for name in config.probes)
    return config.num_steps * step + measuring + (PARENT_SECONDS if "noise" in config.probes[-1:] else 0.0)

  def begin(self, part: str) -> None:
    """Names what comes next."""
    self._bar.set_description_str(part)

  def advance(self, config: TrialConfig, steps: int) -> None:
    """Counts trial-steps that were settled, and with the first of a batch size its start."""
    seconds = self._seconds(config) * steps / config.num_steps
    if config.batch_size not in self._started:
      self._started.add(config.batch_size)
      seconds += START_SECONDS
    self._bar.update(min(seconds, self._bar.total - self._bar.n))

  def skip(self, config: TrialConfig) -> None:
    """Counts a trial that cannot be made, because the one before it diverged."""
    self.advance(config, config.num_steps)


def run_noise_study(workload: Workload, plan: NoisePlan, out: Path, *, mesh: Mesh, environment: dict[str, Any]) -> Path:
  """Runs the study into `out` and returns the path of the report.

  Args:
    out: a folder claimed by `open_folder`; trials go to `out/noise_scale/`, results beside it.
    mesh: axes "trial" and "data".
    environment: versions, device, code revision and command line; shown in the report and kept in every `trial.json`.

  Holds: whatever is complete on disk is not computed again.
  """
  folder = out / "noise_scale"
  folder.mkdir(exist_ok=True)
  with _Progress(workload, plan) as progress:
    study = _Study(workload, plan, folder, mesh, NoiseMeasurements(workload, mesh), environment, progress)
    for batch_size in plan.batch_sizes:
      progress.begin(f"batch size {batch_size}")
      config = along_config(plan, workload, batch_size)
      for rate in rates_of(plan, workload, batch_size):
        study.run(config, rate, range(plan.seeds), kind="along")
    progress.begin("temperature")
    _change_temperature(study)
  return report_noise_study(_describe(study), folder, out, environment=environment)


def _change_temperature(study: _Study) -> None:
  """Trains to the middle, changes rate and batch size for a stretch in every branch, and changes them back for another.

  Each stretch starts from the parameters and the optimizer state at which the one before ended, seed by seed. A seed that diverged
  ends there.
  """
  branches = temperature_branches(study.plan, study.workload)
  if not branches:
    return
  unchanged = branches[0]
  base = _stretch(study, branches, unchanged)
  examples = base.num_steps * base.batch_size
  for before in study.run(
    base,
    unchanged.learning_rate,
    range(study.plan.seeds),
    keep_final=True,
    **_place(unchanged.name, "before", 0),
  ):
    for branch in branches:
      during = _follow(study, _stretch(study, branches, branch), branch, before, "during", examples)
      _follow(study, base, Branch(branch.name, *unchanged[1:]), during, "after", 2 * examples)


def _stretch(study: _Study, branches: tuple[Branch, ...], branch: Branch) -> TrialConfig:
  return stretch_config(study.plan, study.workload, branches, branch.batch_size)


def _follow(
  study: _Study, config: TrialConfig, branch: Branch, parent: Record | None, phase: str, examples_before: int
) -> Record | None:
  """Trains one stretch from the end of another; nothing from one that diverged."""
  if parent is None or parent.status["state"] != "complete":
    study.progress.skip(config)
    return None
  config = dataclasses.replace(config, parent=parent.id)
  place = _place(branch.name, phase, examples_before)
  (record,) = study.run(config, branch.learning_rate, [parent.trial["seed"]], keep_final=phase == "during", **place)
  return record


def _place(branch: str, phase: str, examples_before: int) -> dict[str, Any]:
  return {"kind": "temperature", "branch": branch, "phase": phase, "examples_before": examples_before}


def report_noise_study(description: dict[str, Any], folder: Path, out: Path, *, environment: dict[str, Any]) -> Path:
  """Judges the records below `folder` and writes study.json, claims.json, results.csv, figures and report.html."""
  records = read_records(folder)
  states = [record.status["state"] for record in records]
  description = description | {"counts": {state: states.count(state) for state in ("complete", "diverged")}}
  write_json(out / "study.json", description)
  findings = [judge(description, records) for judge in JUDGES]
  return write_experiment(
    out,
    noise_page(description, findings),
    findings=findings,
    environment=environment,
    rows=measurements_table(records),
  )


def _describe(study: _Study) -> dict[str, Any]:
  """Builds `study.json`: what the records mean, for an analysis that sees nothing else."""
  workload, plan = study.workload, study.plan
  branches = temperature_branches(plan, workload)
  return {
    **workload_facts(workload),
    "batch_sizes": list(plan.batch_sizes),
    "learning_rates": {str(size): list(rates_of(plan, workload, size)) for size in plan.batch_sizes},
    "num_epochs": plan.num_epochs,
    "optimizer": plan.optimizer,
    "momentum": plan.momentum,
    "seeds": list(range(plan.seeds)),
    "branches": [branch._asdict() for branch in branches],
  }
