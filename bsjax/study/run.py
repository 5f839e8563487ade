"""The batch-size study from a plan to a report: tune, train, measure, time, judge, write."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from bsjax.analysis import advise, judge_all, results_table
from bsjax.records import Record, read_record, read_records, write_json
from bsjax.report import write_report
from bsjax.study.measure import Measurements
from bsjax.study.plan import Plan, budget_steps, first_rates, make_config, make_hparams, workload_facts
from bsjax.study.progress import NOISE, TIMING, Progress
from bsjax.study.timing import record_timing
from bsjax.study.tune import tune_rate
from bsjax.train import DataPath, TrialConfig, make_trial, run_trials
from bsjax.workloads import Workload

BUDGETS = ("epochs", "steps")
FINAL_PROBES = ("test", "sharpness")
NOISE_FRACTIONS = (0.0, 1 / 16, 1 / 4, 1.0)
"""Where along the reference run the gradient noise is measured."""
NOISE_RUNS = 3


class _Study(NamedTuple):
  workload: Workload
  plan: Plan
  folder: Path
  mesh: Mesh
  measurements: Measurements
  provenance: dict[str, Any]
  progress: Progress
  data_path: DataPath | None

  @property
  def train_size(self) -> int:
    return len(self.workload.train)

  def config(self, budget: str, batch_size: int, probes: tuple[str, ...] = ()) -> TrialConfig:
    return make_config(
      self.plan, self.workload.name, budget, batch_size=batch_size, train_size=self.train_size, probes=probes
    )

  def longer_budget(self, batch_size: int) -> str:
    """The budget with more steps at this batch size (the first of equals): where steps to target are read."""
    return max(BUDGETS, key=lambda name: self.config(name, batch_size).num_steps)

  def run(
    self, config: TrialConfig, seeds: Sequence[int], rates: Sequence[float], *, kind: str = "train"
  ) -> list[Record]:
    """Trains what is missing of rates x seeds and returns the records of all of them."""
    trials = [make_trial(config, make_hparams(self.plan, config, rate), seed) for rate in rates for seed in seeds]
    self.progress.expect(config, trials)
    run_trials(
      self.workload,
      trials,
      self.folder,
      mesh=self.mesh,
      probe=self.measurements,
      provenance={"kind": kind} | self.provenance,
      on_progress=lambda steps: self.progress.advance(config, steps),
      data_path=self.data_path,
    )
    return [read_record(self.folder / trial.id) for trial in trials]


def run_study(
  workload: Workload,
  plan: Plan,
  out: Path,
  *,
  mesh: Mesh,
  environment: dict[str, Any],
  data_path: DataPath | None = None,
) -> Path:
  """Runs the study into `out` and returns the path of the report.

  Args:
    out: a folder claimed by `open_folder`; trials go to `out/batch_size_study/`, results beside it.
    mesh: axes "trial" and "data".
    environment: versions, device, code revision and command line; shown in the report and kept in every `trial.json`.
    data_path: "resident", "streamed", or by size; see `run_trials`.

  Holds: whatever is complete on disk is not computed again; the order of work depends on the plan and the records
  only. Timings are measured once, after all training, when this process does nothing else.
  """
  folder = out / "batch_size_study"
  folder.mkdir(exist_ok=True)
  with Progress(workload, plan) as progress:
    study = _Study(
      workload, plan, folder, mesh, Measurements(workload, plan.batch_sizes), environment, progress, data_path
    )
    tuned: dict[str, dict[str, Any]] = {choice: {} for choice in (*BUDGETS, "target")}
    for batch_size in plan.batch_sizes:
      progress.begin(f"batch size {batch_size}")
      for choice, entry in _tune_and_train(study, batch_size).items():
        tuned[choice][str(batch_size)] = entry
    progress.begin(NOISE)
    _measure_noise(study, tuned["epochs"])
    progress.begin(TIMING)
    _time_steps(study, tuned["epochs"])
  return report_study(_describe(study, tuned), folder, out, environment=environment)


def report_study(description: dict[str, Any], folder: Path, out: Path, *, environment: dict[str, Any]) -> Path:
  """Judges the records below `folder` and writes study.json, claims.json, results.csv, figures and report.html."""
  records = read_records(folder)
  states = [record.status["state"] for record in records if record.trial["kind"] != "timing"]
  description = description | {"counts": {state: states.count(state) for state in ("complete", "diverged")}}
  write_json(out / "study.json", description)
  findings = judge_all(description, records)
  return write_report(
    out,
    study=description,
    findings=findings,
    advice=advise(description, records, findings),
    environment=environment,
    rows=results_table(description, records),
  )


def _tune_and_train(study: _Study, batch_size: int) -> dict[str, Any]:
  """Tunes the rate of one batch size for both budgets and for the target, and trains the final seeds at each choice."""
  plan, entries = study.plan, {}
  first = first_rates(plan, batch_size=batch_size)
  grids: dict[str, list[float]] = {}
  for choice in (*BUDGETS, "target"):
    budget = study.longer_budget(batch_size) if choice == "target" else choice
    config = study.config(budget, batch_size)
    best, grids[budget] = tune_rate(
      functools.partial(study.run, config, plan.tuning_seed_values),
      grids.get(budget, first),
      objective="steps_to_target" if choice == "target" else "validation_loss",
      target=study.workload.target._asdict(),
      seeds=plan.tuning_seed_values,
    )
    entries[choice] = {"learning_rate": best.learning_rate, "edge": best.edge, "grid": grids[budget]}
    if best.learning_rate is not None:
      study.run(study.config(budget, batch_size, FINAL_PROBES), plan.final_seed_values, [best.learning_rate])
  return entries


def _measure_noise(study: _Study, tuned: dict[str, Any]) -> None:
  """Trains the reference batch size again and measures the gradient noise along the way."""
  plan = study.plan
  batch_size = min(plan.batch_sizes, key=lambda size: abs(size - plan.reference_batch_size))
  rate = tuned[str(batch_size)]["learning_rate"]
  if rate is None:
    return
  config = study.config("epochs", batch_size)
  every = config.eval_every
  steps = sorted({round(fraction * config.num_steps / every) * every for fraction in NOISE_FRACTIONS})
  config = dataclasses.replace(config, probes=("noise",), probe_steps=tuple(steps))
  study.run(config, plan.final_seed_values[:NOISE_RUNS], [rate], kind="noise")


def _time_steps(study: _Study, tuned: dict[str, Any]) -> None:
  """Measures the step time of every batch size, once: a finished timing is kept on a rerun."""
  for batch_size in study.plan.batch_sizes:
    rate = tuned[str(batch_size)]["learning_rate"] or study.plan.base_learning_rate
    config = dataclasses.replace(study.config("steps", batch_size), num_steps=1, eval_every=1, warmup="none")
    trial = make_trial(config, make_hparams(dataclasses.replace(study.plan, warmup_fraction=0.0), config, rate), 0)
    record_timing(study.workload, trial, study.folder, study.provenance)
    study.progress.timed()


def _describe(study: _Study, tuned: dict[str, Any]) -> dict[str, Any]:
  """Builds `study.json`: what the records mean, for an analysis that sees nothing else."""
  workload, plan = study.workload, study.plan
  steps = {
    budget: {
      str(size): budget_steps(plan, budget, batch_size=size, train_size=study.train_size) for size in plan.batch_sizes
    }
    for budget in BUDGETS
  }
  return {
    **workload_facts(workload),
    "target": workload.target._asdict(),
    "batch_sizes": list(plan.batch_sizes),
    "optimizer": plan.optimizer,
    "momentum": plan.momentum,
    "weight_decay": plan.weight_decay,
    "schedule": plan.schedule,
    "warmup_fraction": plan.warmup_fraction,
    "scaling_rule": plan.scaling_rule,
    "reference_batch_size": plan.reference_batch_size,
    "budgets": {
      "epochs": {"num_epochs": plan.num_epochs, "num_steps": steps["epochs"]},
      "steps": {"num_steps": steps["steps"]},
    },
    "tuning_seeds": plan.tuning_seed_values,
    "final_seeds": plan.final_seed_values,
    "tuned": tuned,
  }
