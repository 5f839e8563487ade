"""From a name, or a file and function of a user's own, to a `Workload`."""

import functools
import hashlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from bsjax.workloads.quadratic import quadratic
from bsjax.workloads.vision import RECIPES, vision_workload
from bsjax.workloads.workload import Workload, check_workload

WORKLOADS: dict[str, Callable[..., Workload]] = {
  **{name: functools.partial(vision_workload, name) for name in RECIPES},
  "quadratic": quadratic,
}


def workload_settings(name: str) -> dict[str, str]:
  """Describes a workload for the settings of an output folder: its name, and for a user's file the SHA-256 of its content."""
  path = Path(name.rsplit(":", 1)[0])
  return {"workload": name} | (
    {"workload_sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if ":" in name else {}
  )


def load_workload(name: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """Builds the workload called `name`.

  Args:
    name: one of `WORKLOADS`, or `path/to/file.py:function` of your own; the function is called with those of
      `data_dir` and `manual_dir` that it takes. The file is Python and is run: give only files you trust.
    data_dir, manual_dir: where data sets are prepared, and where raw files lie already.

  Raises:
    ValueError: unknown name, missing file or function, or a function that fails or returns something else.
  """
  if ":" not in name:
    if name not in WORKLOADS:
      raise ValueError(f"--workload={name!r} is unknown: use one of {', '.join(WORKLOADS)}, or your_file.py:function")
    return check_workload(WORKLOADS[name](data_dir=data_dir, manual_dir=manual_dir), name)
  file_name, function_name = name.rsplit(":", 1)
  path = Path(file_name)
  if not path.is_file() or path.suffix != ".py":
    raise ValueError(f"--workload={name!r}: {file_name!r} is not a Python file: give path/to/file.py:function")
  spec = importlib.util.spec_from_file_location(f"bsjax_user_{path.stem}", path)
  assert spec is not None  # .py files always have a loader
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ValueError(f"--workload={name!r}: the file failed with {type(error).__name__}: {error}") from error
  function = getattr(module, function_name, None)
  if not callable(function):
    names = [
      key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    raise ValueError(
      f"--workload={name!r}: no function {function_name!r} in the file; it has {', '.join(names) or 'none'}"
    )
  accepted = inspect.signature(function).parameters
  options = {"data_dir": data_dir, "manual_dir": manual_dir}
  try:
    workload = function(**{key: value for key, value in options.items() if key in accepted})
    return check_workload(workload, name)
  except ValueError:
    raise
  except Exception as error:
    raise ValueError(f"--workload={name!r}: {function_name} failed with {type(error).__name__}: {error}") from error
