"""The study of sharp minima from a plan to a report: solutions, escapes, the edge of stability, landscapes; judge, write."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from bsjax.analysis import (
  judge_edge_of_stability,
  judge_flat_generalizes,
  judge_flat_measures,
  judge_noise_escapes,
  judge_sharper_line,
  measurements_table,
  split_phases,
)
from bsjax.analysis.selection import probe_rows
from bsjax.records import Record, read_record, read_records, write_json
from bsjax.report import sharp_page, write_experiment
from bsjax.study.flatness import ERROR_KINDS
from bsjax.study.measure_curvature import EdgeMeasurements, SharpMeasurements
from bsjax.study.plan import workload_facts
from bsjax.study.sharp_landscapes import draw_landscapes, read_landscapes
from bsjax.study.sharp_plan import (
  SharpPlan,
  edge_batch_sizes,
  edge_config,
  edge_rates,
  edge_seeds,
  edge_workload,
  escape_config,
  extreme_part,
  extremes,
  rule_rate,
  solution_config,
)
from bsjax.study.sharp_progress import SharpProgress
from bsjax.train import TrialConfig, make_trial, run_trials
from bsjax.types import Hparams
from bsjax.workloads import Workload


class SharpStudy(NamedTuple):
  """What every part of the study needs."""

  workload: Workload
  plan: SharpPlan
  folder: Path
  mesh: Mesh
  provenance: dict[str, Any]
  progress: SharpProgress

  def run(
    self,
    workload: Workload,
    config: TrialConfig,
    rate: float,
    seeds: Sequence[int],
    probe: Any,
    *,
    keep_final: bool = False,
    **provenance: Any,
  ) -> list[Record]:
    """Trains what is missing of the seeds and returns the records of all of them."""
    trials = [make_trial(config, Hparams(rate, momentum=self.plan.momentum), seed) for seed in seeds]
    run_trials(
      workload,
      trials,
      self.folder,
      mesh=self.mesh,
      probe=probe,
      provenance=provenance | self.provenance,
      on_progress=functools.partial(self.progress.advance, workload, config),
      keep_final=keep_final,
    )
    return [read_record(self.folder / trial.id) for trial in trials]


def run_sharp_study(workload: Workload, plan: SharpPlan, out: Path, *, mesh: Mesh, environment: dict[str, Any]) -> Path:
  """Runs the study into `out` and returns the path of the report.

  Args:
    out: a folder claimed by `open_folder`; trials go to `out/sharp_minima/`, results beside it.
    mesh: axes "trial" and "data".
    environment: versions, device, code revision and command line; shown in the report and kept in every `trial.json`.

  Holds: whatever is complete on disk is not computed again.
  """
  folder = out / "sharp_minima"
  folder.mkdir(exist_ok=True)
  with SharpProgress(workload, plan) as progress:
    study = SharpStudy(workload, plan, folder, mesh, environment, progress)
    measurements = SharpMeasurements(workload, plan, folder, mesh)
    minimisers = _train_solutions(study, measurements)
    _follow_escapes(study, measurements, minimisers)
    _approach_the_edge(study)
    progress.begin("landscapes")
    draw_landscapes(workload, plan, folder, minimisers, mesh=mesh, on_progress=progress.landscape)
  return report_sharp_study(_describe(study), folder, out, environment=environment)


def _train_solutions(study: SharpStudy, measurements: SharpMeasurements) -> dict[str, list[Record]]:
  """Trains every batch size, rate and seed; returns the solutions of the smallest and the largest batch size, whose ends are kept."""
  workload, plan = study.workload, study.plan
  named = {size: name for name, size in extremes(plan).items()}
  minimisers = {}
  for batch_size in plan.batch_sizes:
    study.progress.begin(f"batch size {batch_size}")
    config = solution_config(plan, workload, batch_size)
    for part in plan.rate_parts:
      keep = batch_size in named and part == extreme_part(plan)
      records = study.run(
        workload,
        config,
        part * rule_rate(workload, batch_size),
        range(plan.seeds),
        measurements,
        keep_final=keep,
        kind="solution",
        rate_part=part,
      )
      if keep:
        minimisers[named[batch_size]] = records
  return minimisers


def _follow_escapes(study: SharpStudy, measurements: SharpMeasurements, minimisers: dict[str, list[Record]]) -> None:
  """Continues from each end of training with either batch size, at its own rate: a change of noise, and its control."""
  study.progress.begin("escapes")
  sizes = extremes(study.plan)
  for before, records in minimisers.items():
    for after, batch_size in sizes.items():
      config = escape_config(study.plan, study.workload, batch_size)
      rate = extreme_part(study.plan) * rule_rate(study.workload, batch_size)
      for parent in records:
        if parent.status["state"] != "complete":
          study.progress.advance(study.workload, config, config.num_steps)
          continue
        study.run(
          study.workload,
          dataclasses.replace(config, parent=parent.id),
          rate,
          [parent.trial["seed"]],
          measurements,
          kind="escape",
          branch=f"{before}_{after}",
          phase="during",
        )


def _approach_the_edge(study: SharpStudy) -> None:
  """Trains by plain gradient descent, full batch and smaller ones, and follows the curvature along the way."""
  workload = edge_workload(study.plan, study.workload)
  probe = EdgeMeasurements(workload, study.mesh)
  for batch_size in edge_batch_sizes(study.plan):
    study.progress.begin(f"edge of stability, batch size {batch_size}")
    config = edge_config(study.plan, workload, batch_size)
    for rate in edge_rates(study.plan, study.workload):
      study.run(workload, config, rate, edge_seeds(study.plan), probe, kind="edge")


def report_sharp_study(description: dict[str, Any], folder: Path, out: Path, *, environment: dict[str, Any]) -> Path:
  """Judges the records below `folder` and writes study.json, claims.json, results.csv, figures and report.html."""
  records = read_records(folder)
  states = [record.status["state"] for record in records]
  measured = {row["measure"] for record in records for row in probe_rows(record, "measure")}
  description = description | {
    "counts": {state: states.count(state) for state in ("complete", "diverged")},
    "measures": [name for name in ERROR_KINDS if name in measured],
  }
  write_json(out / "study.json", description)
  phases = split_phases(records)
  landscapes = read_landscapes(folder)
  findings = [
    judge_flat_measures(description, phases),
    judge_flat_generalizes(description, phases),
    judge_sharper_line(description, landscapes),
    judge_noise_escapes(description, phases),
    judge_edge_of_stability(description, phases),
  ]
  return write_experiment(
    out,
    sharp_page(description, records, findings),
    findings=findings,
    environment=environment,
    rows=measurements_table(records),
  )


def _describe(study: SharpStudy) -> dict[str, Any]:
  """Builds `study.json`: what the records mean, for an analysis that sees nothing else."""
  workload, plan = study.workload, study.plan
  sizes, part = extremes(plan), extreme_part(plan)
  return {
    **workload_facts(workload),
    "batch_sizes": list(plan.batch_sizes),
    "rate_parts": list(plan.rate_parts),
    "learning_rates": {
      str(size): [part * rule_rate(workload, size) for part in plan.rate_parts] for size in plan.batch_sizes
    },
    "num_epochs": plan.num_epochs,
    "train_loss_level": plan.train_loss,
    "seeds": list(range(plan.seeds)),
    "optimizer": plan.optimizer,
    "momentum": plan.momentum,
    "num_examples": plan.num_examples,
    "statistics": "none" if workload.batch_norm == "none" else plan.statistics,
    "escape": sizes | {f"{name}_rate": part * rule_rate(workload, size) for name, size in sizes.items()},
    "edge": {
      "batch_sizes": list(edge_batch_sizes(plan)),
      "learning_rates": list(edge_rates(plan, workload)),
      "train_size": plan.num_examples,
      "seeds": list(edge_seeds(plan)),
    },
  }
