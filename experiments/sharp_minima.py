"""Do small batches end in flatter minima, by any measure, and does flatness tell which solution generalises?

  python -m experiments.sharp_minima --workload=digits_mlp --out=runs/sharp_minima

Trains at several batch sizes and rates; measures every flatness measure of the literature where each solution first
reaches the same training loss, and at equal epochs; draws the loss landscape between and around a small-batch and a
large-batch solution; continues both with the other's batch size; follows the largest Hessian eigenvalue of full-batch
and smaller-batch descent towards 2 / learning rate. Judges five claims: OUT/report.html, OUT/claims.json,
OUT/results.csv. Run it again to continue after a kill. digits_mlp takes about 5 minutes on two CPU cores. Expected
there: small batches end flatter at equal epochs, and by no measure at equal training loss.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from bsjax.optim import OPTIMIZERS
from bsjax.study import describe_environment, make_sharp_plan, run_command, run_sharp_study
from bsjax.study.command import claim_folder, define_study_flags, numbers_flag, study_options, use_compilation_cache
from bsjax.study.measure_noise import check_example_loss
from bsjax.study.sharp_plan import STATISTICS
from bsjax.train import make_mesh
from bsjax.workloads import load_workload, workload_settings

SMOKE = {"num_epochs": 2, "num_steps": 32, "seeds": 2, "train_loss": 1.5}

_FLAGS = define_study_flags("runs/sharp_minima", smoke="two batch sizes and a minute budget")
_BATCH_SIZES = flags.DEFINE_list(
  "batch_sizes", None, "comma-separated; default: up to five of the workload's", flag_values=_FLAGS
)
_RATE_PARTS = flags.DEFINE_list(
  "rate_parts",
  None,
  "rates, as parts of the square-root rule's for sgd; adamw: about 0.005; default: 0.25,1",
  flag_values=_FLAGS,
)
_NUM_EPOCHS = flags.DEFINE_float(
  "num_epochs", None, "where equal epochs are compared; default: 4 times the workload's", flag_values=_FLAGS
)
_NUM_STEPS = flags.DEFINE_integer(
  "num_steps", None, "steps that even the largest batches may make; also those of the edge", flag_values=_FLAGS
)
_TRAIN_LOSS = flags.DEFINE_float(
  "train_loss", None, "the training loss at which solutions are compared", flag_values=_FLAGS
)
_SEEDS = flags.DEFINE_integer("seeds", None, "of every solution, at least 2", flag_values=_FLAGS)
_OPTIMIZER = flags.DEFINE_enum("optimizer", "sgd", OPTIMIZERS, "sgd has no momentum", flag_values=_FLAGS)
_MOMENTUM = flags.DEFINE_float("momentum", 0.9, "for optimizers that have it; also beta1", flag_values=_FLAGS)
_NUM_EXAMPLES = flags.DEFINE_integer(
  "num_examples", None, "training examples on which curvature is measured; default: at most 10,000", flag_values=_FLAGS
)
_STATISTICS = flags.DEFINE_enum(
  "statistics", "running", STATISTICS, "which batch-norm statistics the measures use", flag_values=_FLAGS
)


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
    overrides = {"batch_sizes": (sizes[len(sizes) // 2], sizes[-1])} | SMOKE | given
  plan = make_sharp_plan(loaded, **overrides)
  mesh = make_mesh(trial=trial_devices)
  return claim_folder(
    out,
    {"experiment": "sharp_minima"} | workload_settings(workload, fake_data=fake_data) | plan.__dict__,
    lambda folder: run_sharp_study(loaded, plan, folder, mesh=mesh, environment=describe_environment()),
  )


def run(workload: str = "digits_mlp", out: str | Path = "runs/sharp_minima", **options: Any) -> Path:
  """Runs the study from Python and returns the path of the report; options are named like the flags."""
  return prepare(workload, out, **options)()


def _prepare_from_flags() -> Callable[[], Path]:
  use_compilation_cache()
  return prepare(
    **study_options(_FLAGS),
    batch_sizes=numbers_flag("batch_sizes", _BATCH_SIZES.value, int, "whole numbers, such as 8,64,"),
    rate_parts=numbers_flag("rate_parts", _RATE_PARTS.value, float, "numbers, such as 0.25,1,"),
    num_epochs=_NUM_EPOCHS.value,
    num_steps=_NUM_STEPS.value,
    train_loss=_TRAIN_LOSS.value,
    seeds=_SEEDS.value,
    optimizer=_OPTIMIZER.value,
    momentum=_MOMENTUM.value,
    num_examples=_NUM_EXAMPLES.value,
    statistics=_STATISTICS.value,
  )


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
