"""How many steps does each batch size need, when each is tuned by itself?

  python -m experiments.steps_to_result --workload=digits_mlp --out=runs/steps_to_result

Searches hyperparameters at every batch size by quasi-random trials, for each optimizer, until the target is reached; fits
the critical batch size and the three regimes with intervals; compares momentum with none, how wide good learning rates
are, and how good every batch size can get. Judges four claims: OUT/report.html, OUT/claims.json, OUT/results.csv. Run it
again to continue after a kill; `python -m scripts.status OUT` tells how far it is. digits_mlp takes about 6 minutes on one
CPU core. Expected there: a critical batch size of 26, and of 62 with momentum.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from bsjax.optim import SCHEDULES, WARMUPS
from bsjax.study import describe_environment, run_command
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
from bsjax.study.steps import make_steps_plan, run_steps_study, with_validation
from bsjax.study.sweep_plan import SPACE_RULES
from bsjax.train import make_mesh
from bsjax.workloads import load_workload, workload_settings

SMOKE = {"num_trials": 8, "final_seeds": 2, "num_epochs": 4.0, "num_steps": 64, "quality_trials": 2}

_FLAGS = define_study_flags("runs/steps_to_result", smoke="three batch sizes and eight trials")
_OPTIMIZERS = flags.DEFINE_list(
  "optimizers", ["sgd", "momentum"], "comma-separated, each swept by itself; sgd has no momentum", flag_values=_FLAGS
)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", None, "comma-separated; default: the workload's", flag_values=_FLAGS)
_NUM_TRIALS = flags.DEFINE_integer("num_trials", None, "of every batch size; default: 64", flag_values=_FLAGS)
_NUM_EPOCHS = flags.DEFINE_float(
  "num_epochs", None, "most epochs of a trial; default: twice the workload's", flag_values=_FLAGS
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "steps that even the largest batches may make", flag_values=_FLAGS)
_FINAL_SEEDS = flags.DEFINE_integer("final_seeds", None, "fresh seeds of the best trial", flag_values=_FLAGS)
_QUALITY_TRIALS = flags.DEFINE_integer(
  "quality_trials", None, "trained for the whole budget at every batch size; default: 8, 0 for none", flag_values=_FLAGS
)
_VALIDATION_EXAMPLES = flags.DEFINE_integer(
  "validation_examples", None, "on the first so many of the validation set the target is looked for", flag_values=_FLAGS
)
_SPACE = flags.DEFINE_string(
  "space",
  None,
  "what is searched: NAME:SCALE:LOW:HIGH, comma-separated, SCALE log, linear, reverse_log or integer, or NAME:discrete:V1:V2...; default: "
  "the learning rate, over a factor 256 around --scaling_rule",
  flag_values=_FLAGS,
)
_SCALING_RULE = flags.DEFINE_enum(
  "scaling_rule", None, SPACE_RULES, "centre of the rates at each batch size; default: sqrt", flag_values=_FLAGS
)
_NOISE_SCALE = flags.DEFINE_float("noise_scale", None, "in examples, for --scaling_rule=noise", flag_values=_FLAGS)
_MOMENTUM = flags.DEFINE_float(
  "momentum", None, "where it is not searched; also beta1; default: 0.9", flag_values=_FLAGS
)
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", None, "where it is not searched; default: 0", flag_values=_FLAGS)
_SCHEDULE = flags.DEFINE_enum(
  "schedule", None, [name for name in SCHEDULES if name != "step"], "default: constant", flag_values=_FLAGS
)
_WARMUP = flags.DEFINE_enum("warmup", None, WARMUPS, "default: none", flag_values=_FLAGS)
_WARMUP_FRACTION = flags.DEFINE_float("warmup_fraction", None, "of the most steps", flag_values=_FLAGS)
_HALF_LIFE = flags.DEFINE_float(
  "half_life", None, "examples after which Adam's second moment forgets half, at any batch size", flag_values=_FLAGS
)
_MICROBATCH_SIZE = flags.DEFINE_integer(
  "microbatch_size", None, "larger batches accumulate gradients of so many examples", flag_values=_FLAGS
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
  validation_examples: int | None = None,
  **overrides: Any,
) -> Callable[[], Path]:
  """Checks everything that can be wrong before a step is made, claims `out`, and returns the run."""
  loaded = with_validation(
    load_workload(workload, data_dir=data_dir, manual_dir=manual_dir, fake_data=fake_data), validation_examples
  )
  if smoke:
    sizes = loaded.preset.batch_sizes
    given = {name: value for name, value in overrides.items() if value is not None}
    overrides = {"batch_sizes": (sizes[len(sizes) // 2], sizes[-2], sizes[-1])} | SMOKE | given
  steps_plan = make_steps_plan(loaded, **overrides)
  lanes = lane_plan(plan)
  mesh = make_mesh(trial=trial_devices)
  check_spread(next(iter(steps_plan.sweeps.values())).batch_sizes, mesh)
  return claim_folder(
    out,
    {"experiment": "steps_to_result"}
    | workload_settings(workload, fake_data=fake_data)
    | {
      "quality_trials": steps_plan.quality_trials,
      "validation_examples": len(loaded.validation),
      "sweeps": {name: dict(sweep.__dict__) for name, sweep in steps_plan.sweeps.items()},
    },
    lambda folder: run_steps_study(
      loaded, steps_plan, folder, mesh=mesh, environment=describe_environment(), lane_plan=lanes
    ),
  )


def run(workload: str = "digits_mlp", out: str | Path = "runs/steps_to_result", **options: Any) -> Path:
  """Runs the study from Python and returns the path of the report; options are named like the flags."""
  return prepare(workload, out, **options)()


def _prepare_from_flags() -> Callable[[], Path]:
  use_compilation_cache()
  return prepare(
    **study_options(_FLAGS),
    optimizers=tuple(_OPTIMIZERS.value),
    batch_sizes=numbers_flag("batch_sizes", _BATCH_SIZES.value, int, "whole numbers, such as 8,64,"),
    num_trials=_NUM_TRIALS.value,
    num_epochs=_NUM_EPOCHS.value,
    num_steps=_NUM_STEPS.value,
    final_seeds=_FINAL_SEEDS.value,
    quality_trials=_QUALITY_TRIALS.value,
    validation_examples=_VALIDATION_EXAMPLES.value,
    space=_SPACE.value,
    scaling_rule=_SCALING_RULE.value,
    noise_scale=_NOISE_SCALE.value,
    momentum=_MOMENTUM.value,
    weight_decay=_WEIGHT_DECAY.value,
    schedule=_SCHEDULE.value,
    warmup=_WARMUP.value,
    warmup_fraction=_WARMUP_FRACTION.value,
    half_life=_HALF_LIFE.value,
    microbatch_size=_MICROBATCH_SIZE.value,
    plan=_PLAN.value,
  )


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
