"""A user's own code: how it is found, and how what goes wrong in it becomes one clear line."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bsjax.data import DataError

OWN_WORKLOAD = "path/to/file.py:function, or package.module:function"


def source_path(source: str) -> Path:
  """Returns the Python file that `source`, a path that ends with ".py" or the name of a module, stands for."""
  if source.endswith(".py"):
    return Path(source)
  spec = importlib.util.find_spec(source)
  return Path((spec.origin if spec else None) or source)


def load_function(source: str, name: str) -> Callable[..., Any]:
  """Runs the file, or imports the module, and returns the function called `name` in it.

  Args:
    source: a path that ends with ".py", or the name of a module, which is looked for in the current folder first.

  Raises:
    ValueError: there is no such file, module or function, or the code fails.
  """
  module = _run_file(Path(source)) if source.endswith(".py") else _import_module(source)
  function = getattr(module, name, None)
  if not callable(function):
    own = [
      key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    raise ValueError(f"no function {name!r} in {source}; it has {', '.join(own) or 'none'}")
  return function


def _run_file(path: Path) -> ModuleType:
  """Runs a file as a module of its own, registered so that dataclasses and pickle find it; it may import its neighbours.

  Their folder is looked in last, so that no name of theirs hides another module.
  """
  if not path.is_file():
    raise ValueError(f"{str(path)!r} is not a Python file: give {OWN_WORKLOAD}")
  spec = importlib.util.spec_from_file_location(f"bsjax_user_{path.stem}", path)
  assert spec is not None  # .py files always have a loader
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  folder = str(path.resolve().parent)
  if folder not in sys.path:
    sys.path.append(folder)
  try:
    call_own("the file", spec.loader.exec_module, module)
  except ValueError:
    del sys.modules[spec.name]
    raise
  return module


def _import_module(name: str) -> ModuleType:
  """Imports a module by name; the current folder comes first, as under `python -m`."""
  if not all(part.isidentifier() for part in name.split(".")):
    raise ValueError(f"{name!r} is not a Python file, nor the name of a module: give {OWN_WORKLOAD}")
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    return call_own("the module", importlib.import_module, name)
  except ValueError as error:
    cause = error.__cause__
    if isinstance(cause, ModuleNotFoundError) and f"{name}.".startswith(f"{cause.name}."):
      raise ValueError(f"no module {cause.name!r} in {os.getcwd()}, or installed: give {OWN_WORKLOAD}") from cause
    raise


def check_signature(function: Callable[..., Any], *, passed: set[str]) -> set[str]:
  """Returns which of the parameters called `passed` a function takes.

  Raises:
    ValueError: it needs others.
  """
  parameters = inspect.signature(function).parameters
  variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  needed = [
    name
    for name, parameter in parameters.items()
    if parameter.default is parameter.empty and parameter.kind not in variadic and name not in passed
  ]
  if needed:
    raise ValueError(
      f"the function needs {', '.join(needed)}, and gets only {', '.join(sorted(passed))}: give defaults"
    )
  return passed & parameters.keys()


def call_own(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
  """Calls a user's code, described as `what`, for example "init".

  Raises:
    DataError: a data set could not be loaded, which says all by itself.
    ValueError: anything else went wrong: what, in one line, and in which line of the user's code.
  """
  try:
    return function(*arguments, **options)
  except DataError:
    raise
  except SyntaxError as error:
    raise ValueError(f"syntax error in line {error.lineno} of {error.filename}: {error.msg}") from error
  except (Exception, SystemExit) as error:
    raise ValueError(f"{_explained(what, error)}{_where(error)}") from error


def _explained(what: str, error: BaseException) -> str:
  if isinstance(error, ModuleNotFoundError) and error.name:
    package = error.name.split(".")[0]
    if importlib.util.find_spec(package) is None:
      return (
        f"needs the package {package}, which is not installed: pip install {package} (or the distribution that holds it), "
        "or start in the folder that holds it"
      )
  message = next(iter(str(error).splitlines()), "")
  if "relative import" in message:
    return f"{what} has a relative import, which needs a package: give package.module:function, from the folder that holds the package"
  return f"{what} failed with {type(error).__name__}: {message}"


def _where(error: BaseException) -> str:
  """Names the innermost line that is neither of this package nor of an installed one."""
  library = (Path(__file__).parents[1], Path(os.__file__).parent)
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if not frame.filename.startswith("<")
    and "site-packages" not in Path(frame.filename).parts
    and not any(folder in Path(frame.filename).parents for folder in library)
  ]
  return f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""
