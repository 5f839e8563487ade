"""Which rule for the learning rate loses least when the batch size changes: none, sqrt, linear, or the noise scale's?

  python -m experiments.scaling_rules --workload=digits_mlp --out=runs/scaling_rules

At every batch size and for every optimizer, measures the steps to the target on a lattice of rates, from the best rate
down to rates that fail on either side. Then carries the best rate of every batch size to every other by every rule, and
compares the steps with those at the best rate there: the regret, with its interval, chosen on some seeds and judged on
others. Judges the claim that no rule fits all: OUT/report.html, OUT/claims.json, OUT/results.csv. Run it again to
continue after a kill. digits_mlp takes about 5 minutes on one CPU core. Expected there: the noise scale's rule loses
least on average, and no rule fits everywhere.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from bsjax.study import describe_environment, make_scaling_plan, run_command, run_scaling_study
from bsjax.study.command import (
  check_spread,
  claim_folder,
  define_plan_flag,
  define_study_flags,
  lane_plan,
  numbers_flag,
  study_options,
  use_compilation_cache,
)
from bsjax.study.measure_noise import check_example_loss
from bsjax.train import make_mesh
from bsjax.workloads import load_workload, workload_settings

SMOKE = {"optimizers": ("sgd", "adam"), "seeds": 4}

_FLAGS = define_study_flags("runs/scaling_rules", smoke="up to three batch sizes, sgd and adam, four seeds")
_BATCH_SIZES = flags.DEFINE_list(
  "batch_sizes",
  None,
  "comma-separated; default: the workload's; rules fit the lattice exactly between powers of two",
  flag_values=_FLAGS,
)
_OPTIMIZERS = flags.DEFINE_list(
  "optimizers", None, "comma-separated; default: sgd,momentum,adam; sgd has no momentum", flag_values=_FLAGS
)
_SEEDS = flags.DEFINE_integer("seeds", None, "of every rate, at least 4; default: 6", flag_values=_FLAGS)
_REFERENCE = flags.DEFINE_integer(
  "reference_batch_size",
  None,
  "one of the batch sizes: where the figure's lines and Adam's own rule begin; default: the workload's",
  flag_values=_FLAGS,
)
_MOMENTUM = flags.DEFINE_float("momentum", None, "for optimizers that have it; also beta1; 0.9", flag_values=_FLAGS)
_NUM_EPOCHS = flags.DEFINE_float(
  "num_epochs", None, "where the search for the target ends; default: twice the workload's", flag_values=_FLAGS
)
_NUM_STEPS = flags.DEFINE_integer(
  "num_steps", None, "steps that even the largest batches may make in that search", flag_values=_FLAGS
)
_PLAN = define_plan_flag(_FLAGS)


def prepare(
  workload: str,
  out: str | Path,
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  fake_data: bool = False,
  smoke: bool = False,
  trial_devices: int = 1,
  plan: str = "auto",
  **overrides: Any,
) -> Callable[[], Path]:
  """Checks everything that can be wrong before a step is made, claims `out`, and returns the run."""
  loaded = load_workload(workload, data_dir=data_dir, manual_dir=manual_dir, fake_data=fake_data)
  check_example_loss(loaded)
  if smoke:
    sizes = loaded.preset.batch_sizes
    given = {name: value for name, value in overrides.items() if value is not None}
    few = sizes[len(sizes) // 3 :: 2][:3] if len(sizes) > 3 else sizes
    overrides = {"batch_sizes": few} | SMOKE | given
  scaling_plan = make_scaling_plan(loaded, **overrides)
  lanes = lane_plan(plan)
  mesh = make_mesh(trial=trial_devices)
  check_spread(scaling_plan.batch_sizes, mesh)
  return claim_folder(
    out,
    {"experiment": "scaling_rules"} | workload_settings(workload, fake_data=fake_data) | scaling_plan.__dict__,
    lambda folder: run_scaling_study(
      loaded, scaling_plan, folder, mesh=mesh, environment=describe_environment(), lane_plan=lanes
    ),
  )


def run(workload: str = "digits_mlp", out: str | Path = "runs/scaling_rules", **options: Any) -> Path:
  """Runs the study from Python and returns the path of the report; options are named like the flags."""
  return prepare(workload, out, **options)()


def _prepare_from_flags() -> Callable[[], Path]:
  use_compilation_cache()
  names = _OPTIMIZERS.value
  return prepare(
    **study_options(_FLAGS),
    batch_sizes=numbers_flag("batch_sizes", _BATCH_SIZES.value, int, "whole numbers, such as 8,64,"),
    optimizers=None if names is None else tuple(name.strip() for name in names),
    seeds=_SEEDS.value,
    reference_batch_size=_REFERENCE.value,
    momentum=_MOMENTUM.value,
    num_epochs=_NUM_EPOCHS.value,
    num_steps=_NUM_STEPS.value,
    plan=_PLAN.value,
  )


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
