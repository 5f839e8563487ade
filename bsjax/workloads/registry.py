"""From a name, or a function of a user's own, to a `Workload`."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from bsjax.data import DataError
from bsjax.workloads.check import check_workload
from bsjax.workloads.further import f2_substitute, svhn_autoencoder
from bsjax.workloads.own_code import OWN_WORKLOAD, call_own, check_signature, load_function, source_path
from bsjax.workloads.quadratic import quadratic
from bsjax.workloads.text import TEXTS, text_workload
from bsjax.workloads.vision import RECIPES, vision_workload
from bsjax.workloads.workload import Workload

WORKLOADS: dict[str, Callable[..., Workload]] = {
  **{name: functools.partial(vision_workload, name) for name in RECIPES},
  **{name: functools.partial(text_workload, name) for name in TEXTS},
  **{function.__name__: function for function in (f2_substitute, svhn_autoencoder, quadratic)},
}


def workload_settings(name: str, *, fake_data: bool = False) -> dict[str, Any]:
  """Describes a workload for the settings of an output folder: its name, for a user's own the SHA-256 of its source file, fake data."""
  settings: dict[str, Any] = {"workload": name} | ({"fake_data": True} if fake_data else {})
  if ":" not in name:
    return settings
  content = source_path(name.rsplit(":", 1)[0]).read_bytes()
  return settings | {"workload_sha256": hashlib.sha256(content).hexdigest()}


def load_workload(
  name: str, *, data_dir: str | None = None, manual_dir: str | None = None, fake_data: bool = False
) -> Workload:
  """Builds the workload called `name`.

  Args:
    name: one of `WORKLOADS`, or a function of your own: `path/to/file.py:function`, or `package.module:function`, imported as Python does,
      from the current folder first. It is called with those of `data_dir`, `manual_dir` and `fake_data` that it takes. The code is run:
      give only what you trust.
    data_dir, manual_dir: where data sets are prepared, and where raw files lie already.
    fake_data: random data of the right shapes instead, without any file; the workload's name then begins with "fake_". What is made here
      (`f2_substitute`, `quadratic`) needs none and stays as it is.

  Raises:
    ValueError: fake data of a function of yours that takes no `fake_data`; unknown name, missing file, module or function, code that
      fails, or a function that returns something else; for a user's code with the line where it failed.
  """
  options: dict[str, Any] = {"data_dir": data_dir, "manual_dir": manual_dir, "fake_data": fake_data}
  if ":" not in name:
    if name not in WORKLOADS:
      raise ValueError(f"--workload={name!r} is unknown: use one of {', '.join(WORKLOADS)}; or {OWN_WORKLOAD}")
    return check_workload(WORKLOADS[name](**options), name)
  source, function_name = name.rsplit(":", 1)
  try:
    function = load_function(source, function_name)
    taken = check_signature(function, passed=set(options))
    if fake_data and "fake_data" not in taken:
      raise ValueError(f"the function {function_name} takes no fake_data: leave --fake_data out, or add the parameter")
    workload = call_own(function_name, function, **{option: options[option] for option in taken})
  except DataError:
    raise
  except ValueError as error:
    raise ValueError(f"--workload={name!r}: {error}") from error
  return check_workload(workload, name)
