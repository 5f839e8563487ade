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
from bsjax.study.command import claim_folder, use_compilation_cache
from bsjax.study.measure_noise import check_example_loss
from bsjax.train import make_mesh
from bsjax.workloads import WORKLOADS, load_workload, workload_settings

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")
SMOKE = {"num_epochs": 1, "num_steps": 64, "num_rates": 3, "tuning_seeds": 1, "final_seeds": 3}

_WORKLOAD = flags.DEFINE_string("workload", "digits_mlp", f"{', '.join(WORKLOADS)}, or your_file.py:function")
_OUT = flags.DEFINE_string("out", "runs/batch_size_study", "folder for the results; new, empty, or to be continued")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where data sets are prepared, or where raw files lie")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "where raw files lie already, for machines without a network")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", None, "comma-separated; default: the workload's")
_NUM_EPOCHS = flags.DEFINE_float("num_epochs", None, "the equal-epochs budget")
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "the equal-steps budget")
_OPTIMIZER = flags.DEFINE_enum("optimizer", "sgd", OPTIMIZERS, "")
_MOMENTUM = flags.DEFINE_float("momentum", 0.9, "for optimizers that have it; also beta1")
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.0, "not applied to biases and norms")
_SCHEDULE = flags.DEFINE_enum("schedule", "constant", SCHEDULES, "")
_WARMUP = flags.DEFINE_float("warmup_fraction", 0.0, "of the steps of each budget")
_BASE_RATE = flags.DEFINE_float("base_learning_rate", None, "middle of the grid at the reference batch size")
_RULE = flags.DEFINE_enum("scaling_rule", "sqrt", SCALING_RULES, "where the grids of other batch sizes begin")
_NUM_RATES = flags.DEFINE_integer("num_rates", None, "rates of the first grid, factor 2 apart; it widens by itself")
_TUNING_SEEDS = flags.DEFINE_integer("tuning_seeds", None, "seeds per rate")
_FINAL_SEEDS = flags.DEFINE_integer("final_seeds", None, "other seeds at the tuned rate, at least 3")
_TRIAL_DEVICES = flags.DEFINE_integer(
  "trial_devices", 1, "devices across which trials are spread; the rest share batches"
)
_SMOKE = flags.DEFINE_bool("smoke", False, "three batch sizes and a minute budget, to see that it works")


def prepare(
  workload: str,
  out: str | Path,
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  smoke: bool = False,
  trial_devices: int = 1,
  **overrides: Any,
) -> Callable[[], Path]:
  """Checks everything that can be wrong before a step is made, claims `out`, and returns the run."""
  loaded = load_workload(workload, data_dir=data_dir, manual_dir=manual_dir)
  if smoke:
    sizes = loaded.preset.batch_sizes
    overrides = {"batch_sizes": (sizes[0], sizes[len(sizes) // 2], sizes[-1])} | SMOKE | _given(overrides)
  check_example_loss(loaded)
  plan = make_plan(loaded, **overrides)
  mesh = make_mesh(trial=trial_devices)
  return claim_folder(
    out,
    {"experiment": "batch_size_study"} | workload_settings(workload) | plan.__dict__,
    lambda folder: run_study(loaded, plan, folder, mesh=mesh, environment=describe_environment()),
  )


def run(workload: str = "digits_mlp", out: str | Path = "runs/batch_size_study", **options: Any) -> Path:
  """Runs the study from Python and returns the path of the report; options are named like the flags."""
  return prepare(workload, out, **options)()


def _given(options: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in options.items() if value is not None}


def _batch_sizes(texts: list[str] | None) -> tuple[int, ...] | None:
  if texts is None:
    return None
  if not all(text.strip().isdigit() for text in texts):
    raise ValueError(f"--batch_sizes={','.join(texts)}, wanted whole numbers separated by commas, such as 1,8,64")
  return tuple(sorted({int(text) for text in texts}))


def _prepare_from_flags() -> Callable[[], Path]:
  use_compilation_cache()
  return prepare(
    _WORKLOAD.value,
    _OUT.value,
    data_dir=_DATA_DIR.value,
    manual_dir=_MANUAL_DIR.value,
    smoke=_SMOKE.value,
    trial_devices=_TRIAL_DEVICES.value,
    batch_sizes=_batch_sizes(_BATCH_SIZES.value),
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
  )


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__"))
