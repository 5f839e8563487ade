"""What does batch size do to this training, and which one should I use?

  python -m experiments.batch_size_study --workload=digits_mlp --out=runs/demo

Trains at every batch size with the rate tuned for each, at equal epochs and at equal steps; judges eight claims and
recommends a batch size: OUT/report.html, OUT/claims.json, OUT/results.csv. Run it again to continue after a kill.
digits_mlp takes about 2 minutes on two CPU cores. Expected there: noise falls as 1/B and small batches need more
updates; whether they generalise better and end in flatter minima is what the report measures.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from bsjax.optim import OPTIMIZERS, SCALING_RULES
from bsjax.study import describe_environment, make_plan, run_command, run_study
from bsjax.study.command import (
  claim_folder,
  define_data_path_flag,
  define_study_flags,
  forced_data_path,
  numbers_flag,
  study_options,
  use_compilation_cache,
)
from bsjax.study.measure_noise import check_example_loss
from bsjax.train import make_mesh
from bsjax.workloads import load_workload, workload_settings

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")
SMOKE = {"num_epochs": 1, "num_steps": 32, "num_rates": 3, "tuning_seeds": 1, "final_seeds": 3}

_FLAGS = define_study_flags("runs/batch_size_study", smoke="three batch sizes and a minute budget")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", None, "comma-separated; default: the workload's", flag_values=_FLAGS)
_NUM_EPOCHS = flags.DEFINE_float("num_epochs", None, "the equal-epochs budget", flag_values=_FLAGS)
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "the equal-steps budget", flag_values=_FLAGS)
_OPTIMIZER = flags.DEFINE_enum("optimizer", "sgd", OPTIMIZERS, "", flag_values=_FLAGS)
_MOMENTUM = flags.DEFINE_float("momentum", 0.9, "for optimizers that have it; also beta1", flag_values=_FLAGS)
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.0, "not applied to biases and norms", flag_values=_FLAGS)
_SCHEDULE = flags.DEFINE_enum("schedule", "constant", SCHEDULES, "", flag_values=_FLAGS)
_WARMUP = flags.DEFINE_float("warmup_fraction", 0.0, "of the steps of each budget", flag_values=_FLAGS)
_BASE_RATE = flags.DEFINE_float(
  "base_learning_rate", None, "middle of the grid at the reference batch size", flag_values=_FLAGS
)
_RULE = flags.DEFINE_enum(
  "scaling_rule", "sqrt", SCALING_RULES, "where the grids of other batch sizes begin", flag_values=_FLAGS
)
_NUM_RATES = flags.DEFINE_integer(
  "num_rates", None, "rates of the first grid, factor 2 apart; it widens by itself", flag_values=_FLAGS
)
_TUNING_SEEDS = flags.DEFINE_integer("tuning_seeds", None, "seeds per rate", flag_values=_FLAGS)
_FINAL_SEEDS = flags.DEFINE_integer(
  "final_seeds", None, "other seeds at the tuned rate, at least 3", flag_values=_FLAGS
)
_DATA_PATH = define_data_path_flag(_FLAGS)


def prepare(
  workload: str,
  out: str | Path,
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  fake_data: bool = False,
  smoke: bool = False,
  trial_devices: int = 1,
  data_path: str = "auto",
  **overrides: Any,
) -> Callable[[], Path]:
  """Checks everything that can be wrong before a step is made, claims `out`, and returns the run."""
  loaded = load_workload(workload, data_dir=data_dir, manual_dir=manual_dir, fake_data=fake_data)
  if smoke:
    sizes = loaded.preset.batch_sizes
    overrides = {"batch_sizes": (sizes[0], sizes[len(sizes) // 2], sizes[-1])} | SMOKE | _given(overrides)
  check_example_loss(loaded)
  plan = make_plan(loaded, **overrides)
  mesh, path = make_mesh(trial=trial_devices), forced_data_path(data_path)
  return claim_folder(
    out,
    {"experiment": "batch_size_study"} | workload_settings(workload, fake_data=fake_data) | plan.__dict__,
    lambda folder: run_study(loaded, plan, folder, mesh=mesh, environment=describe_environment(), data_path=path),
  )


def run(workload: str = "digits_mlp", out: str | Path = "runs/batch_size_study", **options: Any) -> Path:
  """Runs the study from Python and returns the path of the report; options are named like the flags."""
  return prepare(workload, out, **options)()


def _given(options: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in options.items() if value is not None}


def _prepare_from_flags() -> Callable[[], Path]:
  use_compilation_cache()
  return prepare(
    **study_options(_FLAGS),
    batch_sizes=numbers_flag("batch_sizes", _BATCH_SIZES.value, int, "whole numbers, such as 1,8,64,"),
    num_epochs=_NUM_EPOCHS.value,
    num_steps=_NUM_STEPS.value,
    optimizer=_OPTIMIZER.value,
    momentum=_MOMENTUM.value,
    weight_decay=_WEIGHT_DECAY.value,
    schedule=_SCHEDULE.value,
    warmup_fraction=_WARMUP.value,
    base_learning_rate=_BASE_RATE.value,
    scaling_rule=_RULE.value,
    num_rates=_NUM_RATES.value,
    tuning_seeds=_TUNING_SEEDS.value,
    final_seeds=_FINAL_SEEDS.value,
    data_path=_DATA_PATH.value,
  )


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
