"""A forced plan reaches every pool of a sweep; a stage runs alone."""

import json
from pathlib import Path

from bsjax.records import read_records
from bsjax.study.stages import Stage, listed, run_stages
from bsjax.study.sweep import Sweep, run_sweep
from bsjax.study.sweep_plan import make_sweep_plan
from bsjax.study.sweep_progress import SweepProgress
from bsjax.train import PLANS, Plan, make_mesh
from bsjax.types import Hparams
from bsjax.workloads import load_workload


def sweep_under(folder: Path, lane_plan: Plan) -> None:
  """A small sweep of the quadratic at one batch size."""
  workload = load_workload("quadratic")
  plan = make_sweep_plan(workload, batch_sizes=(32,), num_trials=4, final_seeds=1, num_epochs=1, num_steps=128)
  with SweepProgress(workload, plan) as progress:
    run_sweep(Sweep(workload, plan, folder, make_mesh(data=1), {}, progress, lane_plan=lane_plan))


def test_a_sweep_under_a_forced_plan(tmp_path: Path) -> None:
  sweep_under(tmp_path, PLANS["map"])
  records = read_records(tmp_path)
  assert {record.trial["kind"] for record in records} == {"pilot", "sweep", "final"}
  assert all(record.trial["plan"] == {"side_by_side": 1, "in_turn": 8, "devices": 1} for record in records)
  assert {entry["basis"] for entry in json.loads((tmp_path / "plans.json").read_text()).values()} == {"forced"}


def test_a_stage_runs_alone(tmp_path: Path) -> None:
  stages = [Stage(8, 1.0, 0.25), Stage(16, 1.0, 0.25)]
  records = run_stages(
    load_workload("quadratic"), listed(stages), Hparams(0.05), 0, tmp_path, mesh=make_mesh(data=1), rows_per_stage=4
  )
  assert [record.trial["plan"] for record in records] == [{"side_by_side": 1, "in_turn": 1, "devices": 1}] * 2
