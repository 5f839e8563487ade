"""Pre-train with large batches and fine-tune with small ones: is the advice right?

  python -m experiments.pretrain_finetune --task=digits --out=runs/pretrain_finetune

Pre-trains on one task at several batch sizes with warm-up, cosine and AdamW or LAMB, each tuned at each batch size; then
fine-tunes what the smallest and what the largest batch size learned on another task, at 4 to 1,024 examples, as far as
the training set reaches, tuned as well. Every batch size of a part sees the same number of epochs. Judges two claims:
OUT/report.html, OUT/claims.json, OUT/results.csv. Run it again to continue after a kill.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from bsjax.study import describe_environment, make_pretrain_plan, run_command, run_pretrain_study
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
from bsjax.study.measure_noise import check_example_loss
from bsjax.study.pretrain_plan import FINETUNE_BATCH_SIZES, PRETRAIN_ARMS
from bsjax.train import make_mesh
from bsjax.workloads.transfer import TRANSFERS

SMOKE = {"num_trials": 4, "final_seeds": 2, "num_epochs": 4, "finetune_epochs": 1}

_FLAGS = define_study_flags("runs/pretrain_finetune", smoke="two batch sizes of each part, few and short trials")
delattr(_FLAGS, "workload")
_TASK = flags.DEFINE_enum("task", "digits", list(TRANSFERS), "the two tasks", flag_values=_FLAGS)
_BATCH_SIZES = flags.DEFINE_list(
  "batch_sizes",
  None,
  "of pre-training, comma-separated; the smallest is what others are held against",
  flag_values=_FLAGS,
)
_FINETUNE_BATCH_SIZES = flags.DEFINE_list(
  "finetune_batch_sizes",
  None,
  f"default: those of {','.join(map(str, FINETUNE_BATCH_SIZES))} that the training set reaches",
  flag_values=_FLAGS,
)
_ARMS = flags.DEFINE_list(
  "arms", None, f"of pre-training, some of {', '.join(ARMS)}; default: {','.join(PRETRAIN_ARMS)}", flag_values=_FLAGS
)
_NUM_EPOCHS = flags.DEFINE_float("num_epochs", None, "of pre-training; default: the task's", flag_values=_FLAGS)
_FINETUNE_EPOCHS = flags.DEFINE_float(
  "finetune_epochs", None, "of fine-tuning; default: the task's", flag_values=_FLAGS
)
_NUM_TRIALS = flags.DEFINE_integer("num_trials", None, "of each search; default: 16", flag_values=_FLAGS)
_FINAL_SEEDS = flags.DEFINE_integer(
  "final_seeds", None, "fresh seeds that judge a tuned arm; default: 8", flag_values=_FLAGS
)
_PLAN = define_plan_flag(_FLAGS)


def prepare(
  task: str,
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
  if task not in TRANSFERS:
    raise ValueError(f"--task={task!r} is unknown: use one of {', '.join(TRANSFERS)}")
  transfer = TRANSFERS[task](data_dir=data_dir, manual_dir=manual_dir, fake_data=fake_data)
  check_example_loss(transfer.pretrain)
  if smoke:
    sizes = transfer.pretrain.preset.batch_sizes
    given = {name: value for name, value in overrides.items() if value is not None}
    overrides = {"batch_sizes": (sizes[0], sizes[-1]), "finetune_batch_sizes": (16, 64)} | SMOKE | given
  arms_plan = make_pretrain_plan(transfer, **overrides)
  lanes = lane_plan(plan)
  mesh = make_mesh(trial=trial_devices)
  for part in (arms_plan.pretrain, arms_plan.finetune):
    check_spread((part.reference_batch_size, *part.batch_sizes), mesh)
  return claim_folder(
    out,
    {"experiment": "pretrain_finetune", "task": task} | ({"fake_data": True} if fake_data else {}) | arms_plan.settings,
    lambda folder: run_pretrain_study(
      transfer, arms_plan, folder, mesh=mesh, environment=describe_environment(), lane_plan=lanes
    ),
  )


def run(task: str = "digits", out: str | Path = "runs/pretrain_finetune", **options: Any) -> Path:
  """Runs the study from Python and returns the path of the report; options are named like the flags."""
  return prepare(task, out, **options)()


def _prepare_from_flags() -> Callable[[], Path]:
  use_compilation_cache()
  whole = "whole numbers, such as 16,64,"
  return prepare(
    _TASK.value,
    **study_options(_FLAGS),
    batch_sizes=numbers_flag("batch_sizes", _BATCH_SIZES.value, int, whole),
    finetune_batch_sizes=numbers_flag("finetune_batch_sizes", _FINETUNE_BATCH_SIZES.value, int, whole),
    arms=None if _ARMS.value is None else tuple(_ARMS.value),
    num_epochs=_NUM_EPOCHS.value,
    finetune_epochs=_FINETUNE_EPOCHS.value,
    num_trials=_NUM_TRIALS.value,
    final_seeds=_FINAL_SEEDS.value,
    plan=_PLAN.value,
  )


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
