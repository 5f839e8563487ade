"""From a name, or a function of a user's own, to a `Workload`."""

import functools
import hashlib
from collections.abc import Callable

from bsjax.data import DataError
from bsjax.workloads.own_code import OWN_WORKLOAD, call_own, check_signature, load_function, source_path
from bsjax.workloads.quadratic import quadratic
from bsjax.workloads.vision import RECIPES, vision_workload
from bsjax.workloads.workload import Workload, check_workload

WORKLOADS: dict[str, Callable[..., Workload]] = {
  **{name: functools.partial(vision_workload, name) for name in RECIPES},
  "quadratic": quadratic,
}


def workload_settings(name: str) -> dict[str, str]:
  """Describes a workload for the settings of an output folder: its name, and for a user's own the SHA-256 of its source file."""
  if ":" not in name:
    return {"workload": name}
  content = source_path(name.rsplit(":", 1)[0]).read_bytes()
  return {"workload": name, "workload_sha256": hashlib.sha256(content).hexdigest()}


def load_workload(name: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """Builds the workload called `name`.

  Args:
    name: one of `WORKLOADS`, or a function of your own: `path/to/file.py:function`, or `package.module:function`, imported as Python does,
      from the current folder first. It is called with those of `data_dir` and `manual_dir` that it takes. The code is run: give only
      what you trust.
    data_dir, manual_dir: where data sets are prepared, and where raw files lie already.

  Raises:
    ValueError: unknown name, missing file, module or function, code that fails, or a function that returns something else; for a user's
      code with the line where it failed.
  """
  options = {"data_dir": data_dir, "manual_dir": manual_dir}
  if ":" not in name:
    if name not in WORKLOADS:
      raise ValueError(f"--workload={name!r} is unknown: use one of {', '.join(WORKLOADS)}; or {OWN_WORKLOAD}")
    return check_workload(WORKLOADS[name](**options), name)
  source, function_name = name.rsplit(":", 1)
  try:
    function = load_function(source, function_name)
    taken = check_signature(function, passed=set(options))
    workload = call_own(function_name, function, **{option: options[option] for option in taken})
  except DataError:
    raise
  except ValueError as error:
    raise ValueError(f"--workload={name!r}: {error}") from error
  return check_workload(workload, name)
