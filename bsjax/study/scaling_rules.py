"""The study of scaling rules from a plan to a report: lattices of rates, noise scales, Adam's own rule; judge, write."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from bsjax.analysis import judge_no_rule_fits_all, results_table
from bsjax.analysis.regret import ADAM
from bsjax.optim import OPTIMIZERS
from bsjax.records import read_records, write_json
from bsjax.report import scaling_page, write_experiment
from bsjax.study.lattice import carry_adam, lay_lattices
from bsjax.study.measure_noise import NoiseMeasurements
from bsjax.study.plan import workload_facts
from bsjax.study.sweep import Sweep
from bsjax.study.sweep_plan import FIRST_FINAL_SEED, GIVE_UP_FACTOR, QUANTISATION, SweepPlan, make_sweep_plan
from bsjax.study.sweep_progress import SweepProgress
from bsjax.train import Plan as LanePlan
from bsjax.workloads import Workload

DEFAULT_OPTIMIZERS = ("sgd", "momentum", "adam")
RATES_EXPECTED = 10
"""Rates of a typical lattice, for the progress bar."""
LEAST_SEEDS, MOST_SEEDS = 4, FIRST_FINAL_SEED // 2 // RATES_EXPECTED
"""Seeds of a rate: enough to resample, and no more than a sweep may have trials."""
HEAVY_BALL = ("momentum", "momentum_absorbed", "nesterov", "nesterov_absorbed", "sam")
"""Optimizers whose steps add up to 1 / (1 - momentum) times the rate: their lattice begins that much lower."""


@dataclass(frozen=True)
class ScalingPlan:
  """A study of scaling rules, as plain numbers and names; two with equal plans give equal records.

  Batch sizes ascend. Where nothing is known yet, the target is looked for in at most `num_epochs` epochs or `num_steps` steps, whichever
  is more; trials at other rates than the best end at `GIVE_UP_FACTOR` times its steps, be it beyond.
  """

  batch_sizes: tuple[int, ...]
  optimizers: tuple[str, ...]
  seeds: int
  reference_batch_size: int
  momentum: float
  num_epochs: float
  num_steps: int


def make_scaling_plan(workload: Workload, **overrides: object) -> ScalingPlan:
  """Takes the workload's preset and replaces what `overrides` gives (None keeps the default).

  Raises:
    ValueError: a number out of range or an unknown name; the message names it.
  """
  given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
  sweep = make_sweep_plan(workload)
  sizes = tuple(sorted(given.pop("batch_sizes", sweep.batch_sizes)))
  plan = ScalingPlan(
    batch_sizes=sizes,
    optimizers=DEFAULT_OPTIMIZERS,
    seeds=6,
    reference_batch_size=min(
      sizes, key=lambda size: abs(math.log(max(size, 1) / sweep.reference_batch_size)), default=0
    ),
    momentum=sweep.momentum,
    num_epochs=sweep.num_epochs,
    num_steps=sweep.num_steps,
  )
  plan = dataclasses.replace(plan, **given)
  _check(plan)
  for optimizer in plan.optimizers:
    sweep_plan_of(plan, workload, optimizer)
  return plan


def _check(plan: ScalingPlan) -> None:
  if len(plan.batch_sizes) < 2:
    raise ValueError(f"--batch_sizes has {len(plan.batch_sizes)}, wanted at least 2: rates are carried between them")
  if len(set(plan.batch_sizes)) < len(plan.batch_sizes):
    raise ValueError(f"--batch_sizes={','.join(map(str, plan.batch_sizes))}, wanted each once")
  if not plan.optimizers:
    raise ValueError(f"--optimizers is empty, wanted some of {', '.join(OPTIMIZERS)}")
  for name in plan.optimizers:
    if name not in OPTIMIZERS or plan.optimizers.count(name) > 1:
      raise ValueError(f"--optimizers has {name!r}, wanted each once of {', '.join(OPTIMIZERS)}")
  if not LEAST_SEEDS <= plan.seeds <= MOST_SEEDS:
    raise ValueError(
      f"--seeds={plan.seeds}, wanted {LEAST_SEEDS} to {MOST_SEEDS}: rates are chosen on all but one and judged on it"
    )
  if not 0 <= plan.momentum < 1:
    raise ValueError(f"--momentum={plan.momentum:g}, wanted 0 <= momentum < 1")
  if plan.reference_batch_size not in plan.batch_sizes:
    raise ValueError(
      f"--reference_batch_size={plan.reference_batch_size}, wanted one of the batch sizes {', '.join(map(str, plan.batch_sizes))}"
    )


def sweep_plan_of(plan: ScalingPlan, workload: Workload, optimizer: str) -> SweepPlan:
  """Builds the plan that all trials of one optimizer share: constant schedule, rates around the square-root rule's guess."""
  rate = workload.preset.base_learning_rate * (1 - plan.momentum) if optimizer in HEAVY_BALL else None
  return make_sweep_plan(
    workload,
    batch_sizes=plan.batch_sizes,
    num_epochs=plan.num_epochs,
    num_steps=plan.num_steps,
    num_trials=RATES_EXPECTED * plan.seeds,
    final_seeds=0,
    optimizer=optimizer,
    base_learning_rate=rate,
    reference_batch_size=plan.reference_batch_size,
    momentum=plan.momentum,
  )


def run_scaling_study(
  workload: Workload,
  plan: ScalingPlan,
  out: Path,
  *,
  mesh: Mesh,
  environment: dict[str, Any],
  lane_plan: LanePlan | None = None,
) -> Path:
  """Runs the study into `out` and returns the path of the report.

  Args:
    out: a folder claimed by `open_folder`; trials go to `out/scaling_rules/`, results beside it.
    mesh: axes "trial" and "data".
    environment: versions, device, code revision and command line; shown in the report and kept in every `trial.json`.
    lane_plan: how many trials run side by side and in turn; None: the fastest.

  Holds: whatever is complete on disk is not computed again.
  """
  folder = out / "scaling_rules"
  folder.mkdir(exist_ok=True)
  plans = {optimizer: sweep_plan_of(plan, workload, optimizer) for optimizer in plan.optimizers}
  measurements = NoiseMeasurements(workload, mesh)
  lattices, skipped = {}, {}
  downwards = dataclasses.replace(plans[plan.optimizers[0]], batch_sizes=plan.batch_sizes[::-1])
  with SweepProgress(workload, downwards, sweeps=plan.optimizers, full_trials=1) as progress:
    for optimizer, sweep_plan in plans.items():
      sweep = Sweep(workload, sweep_plan, folder, mesh, environment, progress, optimizer, lane_plan)
      lattices[optimizer] = lay_lattices(sweep, seeds=plan.seeds, measurements=measurements)
      if optimizer == ADAM:
        skipped = carry_adam(sweep, lattices[optimizer], seeds=plan.seeds)
  description = {
    **workload_facts(workload),
    "target": workload.target._asdict(),
    "batch_sizes": list(plan.batch_sizes),
    "optimizers": list(plan.optimizers),
    "seeds": list(range(plan.seeds)),
    "reference_batch_size": plan.reference_batch_size,
    "momentum": plan.momentum,
    "num_epochs": plan.num_epochs,
    "num_steps": plan.num_steps,
    "base_rates": {optimizer: plans[optimizer].base_learning_rate for optimizer in plan.optimizers},
    "quantisation": QUANTISATION,
    "give_up_factor": GIVE_UP_FACTOR,
    "lattices": lattices,
    "adam_sqrt_skipped": skipped,
  }
  return report_scaling_study(description, folder, out, environment=environment)


def report_scaling_study(description: dict[str, Any], folder: Path, out: Path, *, environment: dict[str, Any]) -> Path:
  """Judges the records below `folder` and writes study.json, claims.json, results.csv, figures and report.html."""
  records = read_records(folder)
  states = [record.status["state"] for record in records]
  description = description | {"counts": {state: states.count(state) for state in ("complete", "diverged")}}
  write_json(out / "study.json", description)
  findings = [judge_no_rule_fits_all(description, records)]
  return write_experiment(
    out,
    scaling_page(description, findings),
    findings=findings,
    environment=environment,
    rows=results_table(description, records),
  )
