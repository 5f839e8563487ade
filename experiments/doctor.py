"""Does this workload keep to what the laboratory relies on, and if not, what is to be fixed?

  python -m experiments.doctor --workload=my_file.py:make_workload

Makes 15 checks of the loss, the data, the metrics, the probes and the compiled program, and prints a line for each: "ok", "fix" (with what
to do) or "note". Trains nothing. The exit code is 0 if nothing is to be fixed, 1 if something is, 2 if the workload cannot be loaded.
docs/your_model.md explains every line. A small model takes 10 to 30 seconds on a CPU core, most of it compiling; --smoke --fake_data tells
whether a large one runs.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from bsjax.records import open_folder, write_json
from bsjax.study import describe_environment, run_command
from bsjax.study.command import use_compilation_cache
from bsjax.study.diagnosis import Diagnosis
from bsjax.study.doctor import as_json, examine, examine_aloud, needs_fixing
from bsjax.workloads import WORKLOADS, load_workload, workload_settings

_FLAGS = flags.FlagValues()
_WORKLOAD = flags.DEFINE_string(
  "workload",
  "digits_mlp",
  f"{', '.join(WORKLOADS)}; or your_file.py:function, package.module:function",
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string("out", None, "folder for doctor.json; without it nothing is written", flag_values=_FLAGS)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "where data sets are prepared, or where raw files lie", flag_values=_FLAGS
)
_MANUAL_DIR = flags.DEFINE_string(
  "manual_dir", None, "where raw files lie already, for machines without a network", flag_values=_FLAGS
)
_FAKE_DATA = flags.DEFINE_bool(
  "fake_data", False, "random data of the right shapes, to try a workload without its files", flag_values=_FLAGS
)
_SMOKE = flags.DEFINE_bool(
  "smoke", False, "3 checks only: an evaluation, a probe of a few examples, training steps", flag_values=_FLAGS
)


def prepare(
  workload: str,
  *,
  out: str | Path | None = None,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  fake_data: bool = False,
  smoke: bool = False,
  aloud: bool = False,
) -> Callable[[], list[Diagnosis]]:
  """Loads the workload, claims `out`, and returns the examination; `aloud` prints each line as it is found."""
  loaded = load_workload(workload, data_dir=data_dir, manual_dir=manual_dir, fake_data=fake_data)
  if out is not None:
    open_folder(Path(out), {"experiment": "doctor"})

  def examination() -> list[Diagnosis]:
    diagnoses = examine_aloud(loaded, smoke=smoke) if aloud else list(examine(loaded, smoke=smoke))
    if out is not None:
      content = workload_settings(workload, fake_data=fake_data) | {
        "diagnoses": as_json(diagnoses),
        "environment": describe_environment(),
      }
      write_json(Path(out) / "doctor.json", content)
    return diagnoses

  return examination


def run(workload: str = "digits_mlp", **options: Any) -> list[Diagnosis]:
  """Examines a workload from Python; options are named like the flags, and nothing is printed."""
  return prepare(workload, **options)()


def _prepare_from_flags() -> Callable[[], int]:
  use_compilation_cache()
  examination = prepare(
    _WORKLOAD.value,
    out=_OUT.value,
    data_dir=_DATA_DIR.value,
    manual_dir=_MANUAL_DIR.value,
    fake_data=_FAKE_DATA.value,
    smoke=_SMOKE.value,
    aloud=True,
  )
  return lambda: int(needs_fixing(examination()))


if __name__ == "__main__":
  sys.exit(run_command(_prepare_from_flags, documentation=__doc__ or "", module="__main__", flag_values=_FLAGS))
