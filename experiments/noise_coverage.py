"""Do the intervals of the gradient noise scale hold the truth as often as they say, and are they refused where they must be?

  python -m experiments.noise_coverage --out=runs/noise_coverage

Draws data sets from problems whose noise scale is known exactly (linear-Gaussian, logistic, heavy-tailed; true noise
scales from 10 to 1,000,000; from hopelessly few examples to ample ones, and without any gradient) and counts. Judges one
claim: OUT/report.html, OUT/claims.json, OUT/results.csv, OUT/coverage.md. Run it again to continue after a kill. Takes about 5 minutes
on one CPU core. Expected: 93 to 97 % where intervals are given, and no number where nothing can be said.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from bsjax.study import describe_environment, run_command
from bsjax.study.command import claim_folder
from bsjax.study.coverage import NOISE_SCALES, PROBLEMS, make_cells, run_coverage

SMOKE_DRAWS, SMOKE_NOISE_SCALES = 20, (1e1, 1e3)

_FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string(
  "out", "runs/noise_coverage", "folder for the results; new, empty, or to be continued", flag_values=_FLAGS
)
_NUM_DRAWS = flags.DEFINE_integer("num_draws", None, "data sets of each line of the table; 2000", flag_values=_FLAGS)
_SMOKE = flags.DEFINE_bool(
  "smoke", False, f"two noise scales and {SMOKE_DRAWS} draws, to see that it works", flag_values=_FLAGS
)


def prepare(out: str | Path, *, num_draws: int | None = None, smoke: bool = False) -> Callable[[], Path]:
  """Checks everything that can be wrong before a draw is made, claims `out`, and returns the run."""
  if num_draws is None:
    num_draws = SMOKE_DRAWS if smoke else 2000
  if num_draws < 1:
    raise ValueError(f"--num_draws={num_draws}, wanted at least 1; 1000 and more to judge the claim")
  noise_scales = SMOKE_NOISE_SCALES if smoke else NOISE_SCALES
  cells = make_cells(tuple(PROBLEMS), noise_scales, num_draws)
  return claim_folder(
    out,
    {"experiment": "noise_coverage", "num_draws": num_draws, "noise_scales": list(noise_scales)},
    lambda folder: run_coverage(cells, folder, environment=describe_environment()),
  )


def run(out: str | Path = "runs/noise_coverage", *, num_draws: int | None = None, smoke: bool = False) -> Path:
  """Runs the draws from Python and returns the path of the report; options are named like the flags."""
  return prepare(out, num_draws=num_draws, smoke=smoke)()


def _prepare_from_flags() -> Callable[[], Path]:
  return prepare(_OUT.value, num_draws=_NUM_DRAWS.value, smoke=_SMOKE.value)


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
