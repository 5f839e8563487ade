"""How large is the gradient noise of this training, and does it behave as theory says?

  python -m experiments.noise_scale --workload=digits_mlp --out=runs/noise_scale

Trains at several batch sizes and rates and measures along the way the noise scale (in total and for each layer), its
Hessian and Adam forms, and how four estimators agree; then changes the temperature, rate / batch size, in the middle
of training and back. Judges four claims: OUT/report.html, OUT/claims.json, OUT/results.csv. Run it again to continue
after a kill. digits_mlp takes about 2 minutes on two CPU cores. Expected there: the noise scale grows 3 to 13 times.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from bsjax.optim import OPTIMIZERS
from bsjax.study import describe_environment, make_noise_plan, run_command, run_noise_study
from bsjax.study.command import claim_folder, define_study_flags, numbers_flag, study_options, use_compilation_cache
from bsjax.study.measure_noise import check_example_loss
from bsjax.train import make_mesh
from bsjax.workloads import load_workload, workload_settings

SMOKE = {"num_epochs": 1, "seeds": 2}

_FLAGS = define_study_flags("runs/noise_scale", smoke="one batch size and a minute budget")
_BATCH_SIZES = flags.DEFINE_list(
  "batch_sizes", None, "comma-separated; default: three of the workload's", flag_values=_FLAGS
)
_LEARNING_RATES = flags.DEFINE_list(
  "learning_rates",
  None,
  "comma-separated, at every batch size; default: a rule's rate and its quarter",
  flag_values=_FLAGS,
)
_NUM_EPOCHS = flags.DEFINE_float(
  "num_epochs", None, "of each run, and of each of three stretches of the temperature test", flag_values=_FLAGS
)
_SEEDS = flags.DEFINE_integer("seeds", None, "of every run, at least 2", flag_values=_FLAGS)
_OPTIMIZER = flags.DEFINE_enum("optimizer", "sgd", OPTIMIZERS, "sgd has no momentum", flag_values=_FLAGS)
_MOMENTUM = flags.DEFINE_float("momentum", 0.9, "for optimizers that have it; also beta1", flag_values=_FLAGS)


def prepare(
  workload: str,
  out: str | Path,
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  fake_data: bool = False,
  smoke: bool = False,
  trial_devices: int = 1,
  **overrides: Any,
) -> Callable[[], Path]:
  """Checks everything that can be wrong before a step is made, claims `out`, and returns the run."""
  loaded = load_workload(workload, data_dir=data_dir, manual_dir=manual_dir, fake_data=fake_data)
  check_example_loss(loaded)
  if smoke:
    sizes = loaded.preset.batch_sizes
    given = {name: value for name, value in overrides.items() if value is not None}
    overrides = {"batch_sizes": (sizes[len(sizes) // 2],)} | SMOKE | given
  plan = make_noise_plan(loaded, **overrides)
  mesh = make_mesh(trial=trial_devices)
  return claim_folder(
    out,
    {"experiment": "noise_scale"} | workload_settings(workload, fake_data=fake_data) | plan.__dict__,
    lambda folder: run_noise_study(loaded, plan, folder, mesh=mesh, environment=describe_environment()),
  )


def run(workload: str = "digits_mlp", out: str | Path = "runs/noise_scale", **options: Any) -> Path:
  """Runs the study from Python and returns the path of the report; options are named like the flags."""
  return prepare(workload, out, **options)()


def _prepare_from_flags() -> Callable[[], Path]:
  use_compilation_cache()
  return prepare(
    **study_options(_FLAGS),
    batch_sizes=numbers_flag("batch_sizes", _BATCH_SIZES.value, int, "whole numbers, such as 8,64,"),
    learning_rates=numbers_flag("learning_rates", _LEARNING_RATES.value, float, "numbers, such as 0.05,0.2,"),
    num_epochs=_NUM_EPOCHS.value,
    seeds=_SEEDS.value,
    optimizer=_OPTIMIZER.value,
    momentum=_MOMENTUM.value,
  )


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
