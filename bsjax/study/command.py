"""The command line around an experiment: flags, one-line errors, exit codes, the compilation cache, provenance."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from bsjax.data import DataError
from bsjax.records import RecordError, lock_folder, open_folder
from bsjax.train import DATA_PATHS, PLANS, DataPath, Plan
from bsjax.workloads import WORKLOADS

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
STUDY_FLAGS = ("workload", "out", "data_dir", "manual_dir", "fake_data", "trial_devices", "smoke")
HELP_WIDTH = 118
SHOWN_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy", "scipy")


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, in `~/.cache/bsjax/xla` unless JAX_COMPILATION_CACHE_DIR says otherwise."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/bsjax/xla").expanduser()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def describe_environment() -> dict[str, Any]:
  """Tells what the numbers were made with: versions, device, code revision and command line."""
  devices = jax.devices()
  return {
    "command_line": shlex.join(["python", "-m", _module_name(), *sys.argv[1:]]),
    "code_revision": code_revision(),
    "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
    "host_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "processor": _processor(),
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in SHOWN_PACKAGES},
  }


def _module_name() -> str:
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  return spec.name if spec else Path(sys.argv[0]).name


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor() or platform.machine()
  return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def code_revision() -> str:
  """Returns the git commit of this source tree, with "+changes" if it was edited since; "unknown" outside a checkout."""
  here = Path(__file__).parent
  try:
    commit = subprocess.run(
      ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
    status = subprocess.run(
      ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return commit + ("+changes" if status.stdout.strip() else "")


def claim_folder(out: str | Path, settings: dict[str, Any], run: Callable[[Path], Path]) -> Callable[[], Path]:
  """Claims `out` for an experiment with these settings, before a step is made, and returns the run, which holds the folder's lock.

  Raises:
    RecordError: the folder belongs to other settings, holds something else, or cannot be written.
  """
  folder = Path(out)
  open_folder(folder, settings)

  def locked() -> Path:
    with lock_folder(folder):
      return run(folder)

  return locked


def define_study_flags(out: str, *, smoke: str) -> flags.FlagValues:
  """Defines the flags that every study of a workload has, and returns them: flags of its own, so that experiments can import each other.

  Args:
    out: the default folder for results.
    smoke: what `--smoke` does.
  """
  study_flags = flags.FlagValues()
  flags.DEFINE_string(
    "workload",
    "digits_mlp",
    f"{', '.join(WORKLOADS)}; or your_file.py:function, package.module:function",
    flag_values=study_flags,
  )
  flags.DEFINE_string("out", out, "folder for the results; new, empty, or to be continued", flag_values=study_flags)
  flags.DEFINE_string("data_dir", None, "where data sets are prepared, or where raw files lie", flag_values=study_flags)
  flags.DEFINE_string(
    "manual_dir", None, "where raw files lie already, for machines without a network", flag_values=study_flags
  )
  flags.DEFINE_bool(
    "fake_data", False, "random data of the right shapes, to try a workload without its files", flag_values=study_flags
  )
  flags.DEFINE_integer(
    "trial_devices", 1, "devices across which trials are spread; the rest share batches", flag_values=study_flags
  )
  flags.DEFINE_bool("smoke", False, f"{smoke}, to see that it works", flag_values=study_flags)
  return study_flags


def study_options(study_flags: flags.FlagValues) -> dict[str, Any]:
  """Reads what `define_study_flags` defined, by name, after the flags were parsed."""
  return {name: study_flags[name].value for name in STUDY_FLAGS if name in study_flags}


def define_plan_flag(flag_values: flags.FlagValues) -> flags.FlagHolder[Any]:
  """Defines `--plan`, for experiments with many small trials; `lane_plan` reads its value."""
  return flags.DEFINE_enum(
    "plan", "auto", ("auto", *PLANS), "trials side by side and in turn; auto: the fastest here", flag_values=flag_values
  )


def define_data_path_flag(flag_values: flags.FlagValues) -> flags.FlagHolder[Any]:
  """Defines `--data_path`; `forced_data_path` reads its value."""
  return flags.DEFINE_enum(
    "data_path",
    "auto",
    ("auto", *DATA_PATHS),
    "data on the device, or read ahead; auto: by size",
    flag_values=flag_values,
  )


def forced_data_path(name: str) -> DataPath | None:
  """Returns the path of this name; None, to choose by size, for "auto".

  Raises:
    ValueError: an unknown name.
  """
  paths: dict[str, DataPath | None] = {"auto": None} | {path: path for path in DATA_PATHS}
  if name not in paths:
    raise ValueError(f"--data_path={name}, wanted one of {', '.join(paths)}")
  return paths[name]


def lane_plan(name: str) -> Plan | None:
  """Returns the plan of pools of this name; None, to choose the fastest, for "auto".

  Raises:
    ValueError: an unknown name.
  """
  if name not in ("auto", *PLANS):
    raise ValueError(f"--plan={name}, wanted one of auto, {', '.join(PLANS)}")
  return PLANS.get(name)


def check_spread(batch_sizes: Sequence[int], mesh: Mesh) -> None:
  """Refuses batch sizes that the devices of the mesh axis "data" cannot share equally.

  Raises:
    ValueError: one of them; the message names its neighbours that they can.
  """
  devices = mesh.shape["data"]
  for size in batch_sizes:
    if size % devices:
      below, above = size - size % devices, size - size % devices + devices
      neighbours = f"{below} or {above}" if below else f"{above}"
      raise ValueError(
        f"--batch_sizes has {size}, which {devices} devices cannot share equally: use {neighbours}, or give the devices to trials with "
        "--trial_devices"
      )


def numbers_flag(name: str, texts: list[str] | None, kind: type, wanted: str) -> tuple[Any, ...] | None:
  """Reads a comma-separated flag as numbers, each once, ascending; None where it was not given.

  Raises:
    ValueError: not numbers of this `kind`; the message says what was `wanted`.
  """
  if texts is None:
    return None
  try:
    return tuple(sorted({kind(text) for text in texts}))
  except ValueError as error:
    raise ValueError(f"--{name}={','.join(texts)}, wanted {wanted} separated by commas") from error


def _help(documentation: str, module: str, flag_values: flags.FlagValues) -> str:
  lines = [documentation.strip(), "", "flags:"]
  for flag in (*flag_values.get_key_flags_for_module(__name__), *flag_values.get_key_flags_for_module(module)):
    default = f" ({flag.default_as_str})" if flag.default is not None else ""
    words = f"--{flag.name}: {' '.join((flag.help or '').split()).replace('|', ' | ')}{default}"
    lines += textwrap.wrap(words, HELP_WIDTH, initial_indent="  ", subsequent_indent="    ")
  return "\n".join(lines)


def run_command(
  prepare: Callable[[], Callable[[], Path | int]],
  *,
  documentation: str,
  module: str,
  flag_values: flags.FlagValues,
) -> int:
  """Parses the flags, runs an experiment, and returns the exit code.

  Args:
    prepare: reads the flags and checks everything that can be wrong with them; returns the run itself, which
      returns the path of its report, to be printed, or an exit code.
    documentation: what `--help` shows above the flags.
    module: whose flags `--help` lists.
    flag_values: where they are defined; of its own, so that two experiments may be imported into one process.

  A `ValueError` of `prepare`, and a `RecordError` or `DataError` of either, is the user's to mend: one line on standard error and
  exit code 2. Anything else is ours and keeps its traceback.
  """
  if {"--help", "-h", "-help"} & set(sys.argv[1:]):
    print(_help(documentation, module, flag_values))
    return 0
  try:
    extra = flag_values(sys.argv)[1:]
    if extra:
      raise ValueError(f"unexpected argument {extra[0]!r}: flags are written --name=value; --help lists them")
    run = prepare()
  except (flags.Error, ValueError) as error:
    return _refuse(error)
  except KeyboardInterrupt:
    return _interrupted()
  try:
    result = run()
  except (RecordError, DataError) as error:
    return _refuse(error)
  except KeyboardInterrupt:
    return _interrupted()
  if isinstance(result, int):
    return result
  print(f"report: {result.absolute()}")
  return 0


def _interrupted() -> int:
  print("interrupted: what is done is kept, the same command continues from there", file=sys.stderr)
  return EXIT_INTERRUPTED


def _refuse(error: Exception) -> int:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  return EXIT_BAD_INPUT
