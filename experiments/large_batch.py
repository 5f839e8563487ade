"""At the largest batches, what helps: warm-up, a cosine, LARS, LAMB, AdamW, each tuned equally?

  python -m experiments.large_batch --workload=digits_mlp --out=runs/large_batch

Every batch size sees the same number of epochs. Each way to train (an arm) is tuned at each large batch size with the
same number of quasi-random trials over its rate and the length of its warm-up, and judged at fresh seeds by its test
error, beside a tuned small-batch baseline and the linear rule as it stands. Judges three claims: OUT/report.html,
OUT/claims.json, OUT/results.csv. Run it again to continue after a kill. digits_mlp takes about 3 minutes on two CPU
cores. Expected there: once rates are tuned no remedy helps, and batch size 1,024 ends with twice the error of 32.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from bsjax.study import describe_environment, make_large_batch_plan, run_command, run_large_batch_study
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
from bsjax.study.large_batch_plan import ARMS
from bsjax.train import make_mesh
from bsjax.workloads import load_workload, workload_settings

SMOKE = {"num_trials": 4, "final_seeds": 2}
SMOKE_STEPS = 8

_FLAGS = define_study_flags("runs/large_batch", smoke="one batch size, few and short trials")
_BATCH_SIZES = flags.DEFINE_list(
  "batch_sizes",
  None,
  "large ones, comma-separated; default: the three largest of the workload's, at least 4 times apart",
  flag_values=_FLAGS,
)
_REFERENCE_BATCH_SIZE = flags.DEFINE_integer(
  "reference_batch_size", None, "the small batch size of the baseline; default: the workload's", flag_values=_FLAGS
)
_ARMS = flags.DEFINE_list("arms", None, f"some of {', '.join(ARMS)}; default: all", flag_values=_FLAGS)
_NUM_EPOCHS = flags.DEFINE_float(
  "num_epochs", None, "what every batch size may see; default: the workload's", flag_values=_FLAGS
)
_NUM_TRIALS = flags.DEFINE_integer(
  "num_trials", None, "of each arm's search at each batch size; default: 32", flag_values=_FLAGS
)
_FINAL_SEEDS = flags.DEFINE_integer(
  "final_seeds", None, "fresh seeds that judge a tuned arm; default: 16", flag_values=_FLAGS
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
  if smoke:
    largest = loaded.preset.batch_sizes[-1]
    given = {name: value for name, value in overrides.items() if value is not None}
    short = {"batch_sizes": (largest,), "num_epochs": SMOKE_STEPS * largest / len(loaded.train)}
    overrides = short | SMOKE | given
  arms_plan = make_large_batch_plan(loaded, **overrides)
  lanes = lane_plan(plan)
  mesh = make_mesh(trial=trial_devices)
  check_spread((arms_plan.reference_batch_size, *arms_plan.batch_sizes), mesh)
  return claim_folder(
    out,
    {"experiment": "large_batch"} | workload_settings(workload, fake_data=fake_data) | arms_plan.__dict__,
    lambda folder: run_large_batch_study(
      loaded, arms_plan, folder, mesh=mesh, environment=describe_environment(), lane_plan=lanes
    ),
  )


def run(workload: str = "digits_mlp", out: str | Path = "runs/large_batch", **options: Any) -> Path:
  """Runs the study from Python and returns the path of the report; options are named like the flags."""
  return prepare(workload, out, **options)()


def _prepare_from_flags() -> Callable[[], Path]:
  use_compilation_cache()
  return prepare(
    **study_options(_FLAGS),
    batch_sizes=numbers_flag("batch_sizes", _BATCH_SIZES.value, int, "whole numbers, such as 256,1024,"),
    reference_batch_size=_REFERENCE_BATCH_SIZE.value,
    arms=None if _ARMS.value is None else tuple(_ARMS.value),
    num_epochs=_NUM_EPOCHS.value,
    num_trials=_NUM_TRIALS.value,
    final_seeds=_FINAL_SEEDS.value,
    plan=_PLAN.value,
  )


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
