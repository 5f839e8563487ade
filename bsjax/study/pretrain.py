"""The study of pre-training and fine-tuning from a plan to a report: pre-train at every batch size, fine-tune what came out, judge,
write."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bsjax.analysis import judge_finetune_small, judge_pretrain_large, pretrain_table
from bsjax.analysis.claims_pretrain import FINETUNE, PRETRAIN
from bsjax.analysis.large_batch import better_arm
from bsjax.records import read_record, read_records, write_json
from bsjax.report import pretrain_page, write_experiment
from bsjax.study.large_batch import LargeBatchStudy, tune_and_train
from bsjax.study.large_batch_plan import (
  ARMS,
  MOMENTUM,
  REPEATED_POINTS,
  REPEATS,
  Budget,
  LargeBatchPlan,
  arm_config,
)
from bsjax.study.large_batch_progress import LargeBatchProgress
from bsjax.study.measure import Measurements
from bsjax.study.plan import workload_facts
from bsjax.study.pretrain_plan import MOST_STARTS, NOISE_AT, PretrainPlan
from bsjax.study.sweep_plan import FIRST_FINAL_SEED
from bsjax.train import Plan as LanePlan
from bsjax.train import TrainState, Trial, init_state, restore_final
from bsjax.types import Hparams, Variables
from bsjax.workloads import Workload
from bsjax.workloads.transfer import Transfer, start_from


def run_pretrain_study(
  transfer: Transfer,
  plan: PretrainPlan,
  out: Path,
  *,
  mesh: Mesh,
  environment: dict[str, Any],
  lane_plan: LanePlan | None = None,
) -> Path:
  """Runs the study into `out` and returns the path of the report.

  Every arm is tuned at every batch size of both parts, as in the study of large batches. Pre-trained networks of the better arm at the
  smallest and at the largest batch size, of the first `MOST_STARTS` final seeds, are what fine-tuning starts from.

  Args:
    out: a folder claimed by `open_folder`; trials go to `out/pretrain_finetune/PART/`, results beside it.

  Holds: whatever is complete on disk is not computed again; what is trained depends on the plan and on earlier records only.
  """
  folder = out / "pretrain_finetune"
  make_study = functools.partial(_make_study, mesh=mesh, environment=environment, lane_plan=lane_plan)
  pretraining = make_study(transfer.pretrain, plan.pretrain, folder / PRETRAIN, pretrains=True)
  entries = _train_all(pretraining)
  parts = {PRETRAIN: _describe(transfer.pretrain, plan.pretrain, entries)}
  sizes = plan.pretrain.reference_batch_size, max(plan.pretrain.batch_sizes)
  for part, size in zip(FINETUNE, sizes, strict=True):
    pretrained = _starts(pretraining, entries, size)
    if pretrained is not None:
      workload = _finetuned(transfer, pretrained, size)
      tuned = _train_all(make_study(workload, plan.finetune, folder / part))
      parts[part] = _describe(workload, plan.finetune, tuned) | {"pretrain_batch_size": size}
  description = {
    "parts": parts,
    "noise_at": NOISE_AT,
    "head": list(transfer.head),
    "starts": min(MOST_STARTS, plan.pretrain.final_seeds),
    "momentum": MOMENTUM,
    "repeats": [REPEATED_POINTS, REPEATS],
  }
  return report_pretrain_study(description, folder, out, environment=environment)


def report_pretrain_study(description: dict[str, Any], folder: Path, out: Path, *, environment: dict[str, Any]) -> Path:
  """Judges the records below `folder` and writes study.json, claims.json, results.csv, figures and report.html."""
  records = {part: read_records(folder / part) for part in description["parts"]}
  states = [record.status["state"] for of_part in records.values() for record in of_part]
  description = description | {"counts": {state: states.count(state) for state in ("complete", "diverged")}}
  write_json(out / "study.json", description)
  findings = [judge(description, records) for judge in (judge_pretrain_large, judge_finetune_small)]
  return write_experiment(
    out,
    pretrain_page(description, records, findings),
    findings=findings,
    environment=environment,
    rows=pretrain_table(description, records),
  )


def _make_study(
  workload: Workload,
  plan: LargeBatchPlan,
  folder: Path,
  *,
  mesh: Mesh,
  environment: dict[str, Any],
  lane_plan: LanePlan | None,
  pretrains: bool = False,
) -> LargeBatchStudy:
  folder.mkdir(parents=True, exist_ok=True)
  searches = [(size, arm) for size in (plan.reference_batch_size, *plan.batch_sizes) for arm in plan.arms]
  measurements = Measurements(workload, ())

  def looks(budget: Budget) -> tuple[int, ...]:
    middle = round(NOISE_AT * budget.num_steps / budget.every) * budget.every
    return (middle, budget.num_steps) if pretrains and 0 < middle < budget.num_steps else (budget.num_steps,)

  def probe(trial: Trial, state: TrainState) -> list[dict[str, Any]]:
    if int(state.step) == trial.config.num_steps:
      return [*measurements.test(trial, state)]
    return [*measurements.noise(trial, state)] if trial.config.batch_size == plan.reference_batch_size else []

  progress = LargeBatchProgress(workload, plan, searches)
  return LargeBatchStudy(
    workload, plan, folder, mesh, environment, progress, probe, lane_plan, keep_final=pretrains, look_steps=looks
  )


def _train_all(study: LargeBatchStudy) -> dict[str, dict[str, Any]]:
  """Tunes and trains every arm at every batch size of a part; returns the entries of `study.json`, by batch size and arm."""
  plan = study.plan
  with study.progress:
    return {
      str(size): {arm: tune_and_train(study, arm, size) for arm in plan.arms}
      for size in (plan.reference_batch_size, *plan.batch_sizes)
    }


def _starts(study: LargeBatchStudy, entries: dict[str, Any], size: int) -> Variables | None:
  """Returns what the better arm at a batch size pre-trained, stacked: the ends of its first final trials that completed, at most
  `MOST_STARTS`; None if there is none."""
  arm = better_arm(entries[str(size)])
  records = [read_record(study.folder / name) for name in entries[str(size)][arm]["final"]]
  complete = [record.id for record in records if record.status["state"] == "complete"][:MOST_STARTS]
  config = arm_config(arm, study.workload, batch_size=size, budget=study.budget(size))
  start = functools.partial(init_state, study.workload, config.optimizer)
  shapes = jax.eval_shape(start, Hparams(*[jnp.float32(0) for _ in Hparams._fields]), jnp.uint32(0))
  states = [restore_final(study.folder, dataclasses.replace(config, parent=name), like=shapes) for name in complete]
  if not states:
    return None
  variables = [Variables(state.params, state.model_state) for state in states]
  return jax.tree.map(lambda *arrays: np.stack(arrays), *variables)


def _finetuned(transfer: Transfer, pretrained: Variables, size: int) -> Workload:
  """Builds the workload that fine-tunes pre-trained variables; its name has their digest, since ids of trials depend on them."""
  digest = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(pretrained))).hexdigest()
  return start_from(pretrained, transfer.finetune, transfer.head, f"{transfer.finetune.name}_from_b{size}_{digest[:8]}")


def _describe(workload: Workload, plan: LargeBatchPlan, entries: dict[str, Any]) -> dict[str, Any]:
  """Builds a part of `study.json`: what its records mean, for an analysis that sees nothing else."""
  return {
    **workload_facts(workload),
    "target": workload.target._asdict(),
    "batch_sizes": [plan.reference_batch_size, *plan.batch_sizes],
    "arms": {name: {"optimizer": ARMS[name].optimizer, "weight_decay": ARMS[name].weight_decay} for name in plan.arms},
    "num_epochs": plan.num_epochs,
    "num_trials": plan.num_trials,
    "final_seeds": [*range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + plan.final_seeds)],
    "tuned": entries,
  }
