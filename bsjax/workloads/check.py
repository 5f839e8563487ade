"""Checks of what a user's function returned: from shapes alone, each failure one line that says what came and what was wanted."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, get_args

import jax
import jax.numpy as jnp

from bsjax.data import RecordSource, Source
from bsjax.types import Variables
from bsjax.workloads.own_code import call_own
from bsjax.workloads.workload import BatchNorm, Preset, Target, Workload

_PREFIX = "validation_"


def check_workload(workload: Any, origin: str) -> Workload:
  """Checks what a user's function returned, from shapes alone.

  Raises:
    ValueError: not a `Workload`; a split that is empty, no `Source` or of arrays of different lengths; a target, a preset or a stated
      batch norm that is none; functions that fail; `init` without `Variables` of floating-point arrays; losses that are no float32
      scalars; metrics that are no scalars by name, or lack that of the target; half of the two parts of the loss.
  """
  if not isinstance(workload, Workload):
    raise ValueError(f"{origin} returned {type(workload).__name__}, wanted a bsjax.workloads.Workload")
  try:
    for split in (workload.train, workload.validation, workload.test):
      _check_split(split)
    _check_plain_values(workload)
    _check_functions(workload)
  except ValueError as error:
    raise ValueError(f"{origin}: {error}") from error
  return workload


def _check_split(split: Any) -> None:
  if not isinstance(split, Source | RecordSource):
    raise ValueError(f"a split is of type {type(split).__name__}, wanted a bsjax.data.Source")
  if isinstance(split, Source):
    lengths = {name: len(array) for name, array in split.arrays.items()}
    if len(set(lengths.values())) != 1:
      raise ValueError(
        f"split {split.split!r} of {split.name!r} has arrays of lengths {lengths}, wanted at least one array, all of one length"
      )
  if len(split) == 0:
    raise ValueError(f"split {split.split!r} of {split.name!r} is empty, wanted at least one example")


def _check_plain_values(workload: Workload) -> None:
  target, preset = workload.target, workload.preset
  for name, value, kind in (("target", target, Target), ("preset", preset, Preset)):
    if not isinstance(value, kind):
      raise ValueError(f"{name} is of type {type(value).__name__}, wanted a bsjax.workloads.{kind.__name__}")
  if target.direction not in ("max", "min"):
    raise ValueError(f"target.direction={target.direction!r}, wanted 'max' or 'min'")
  if not math.isfinite(target.goal):
    raise ValueError(f"target.goal={target.goal}, wanted a finite number")
  sizes = preset.batch_sizes
  if not sizes or any(not isinstance(size, Integral) or size < 1 for size in (*sizes, preset.reference_batch_size)):
    raise ValueError(
      f"preset has batch_sizes={sizes} and reference_batch_size={preset.reference_batch_size}, wanted whole numbers from 1, at least one"
    )
  if workload.batch_norm not in get_args(BatchNorm):
    raise ValueError(f"batch_norm={workload.batch_norm!r}, wanted one of {', '.join(get_args(BatchNorm))}")
  if (workload.example_outputs is None) != (workload.output_loss is None):
    raise ValueError("example_outputs and output_loss belong together: give both, or neither")


def _check_functions(workload: Workload) -> None:
  def shapes_of(name: str, *arguments: Any) -> Any:
    return call_own(name, jax.eval_shape, getattr(workload, name), *arguments)

  for name in ("init", "example_loss", "train_loss", "example_metrics"):
    if not callable(getattr(workload, name)):
      raise ValueError(f"{name} is {getattr(workload, name)!r}, wanted a function")
  params, model_state = _initial_shapes(workload)
  example = {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in workload.train.spec.items()}
  _check_loss("example_loss", shapes_of("example_loss", params, model_state, example))
  size = min(workload.preset.batch_sizes)
  batch = {name: jax.ShapeDtypeStruct((size, *one.shape), one.dtype) for name, one in example.items()}
  trained = shapes_of("train_loss", params, model_state, batch, jax.random.key(0))
  if not isinstance(trained, tuple) or len(trained) != 2:
    raise ValueError(f"train_loss returned {_described(trained)}, wanted (mean loss of the batch, new model_state)")
  _check_loss("train_loss", trained[0])
  metrics = shapes_of("example_metrics", params, model_state, example)
  if not isinstance(metrics, Mapping):
    raise ValueError(f"example_metrics returned {_described(metrics)}, wanted scalars by name, such as a 'loss'")
  metric = workload.target.metric
  if not metric.startswith(_PREFIX) or metric.removeprefix(_PREFIX) not in metrics:
    raise ValueError(
      f"target metric {metric!r} is not {_PREFIX} + one of {sorted(metrics)}, which example_metrics returns"
    )


def _initial_shapes(workload: Workload) -> Variables:
  returned = []

  def init(key: Any) -> Any:
    returned.append(workload.init(key))  # as it is: `eval_shape` makes an array of a Python number
    return returned[0]

  shapes = call_own("init", jax.eval_shape, init, jax.random.key(0))
  if not isinstance(shapes, Variables):
    raise ValueError(f"init returned {_described(shapes)}, wanted bsjax.types.Variables(params, model_state)")
  for path, leaf in jax.tree.leaves_with_path(returned[0].params):
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
      came = leaf.dtype if hasattr(leaf, "dtype") else f"the Python number {leaf!r}"
      raise ValueError(
        f"params{jax.tree_util.keystr(path)} is {came}, wanted a floating-point array: jnp.zeros(3), say"
      )
  return shapes


def _check_loss(name: str, loss: Any) -> None:
  if getattr(loss, "shape", None) != ():
    of_what = "one example" if name == "example_loss" else "a batch"
    raise ValueError(f"{name} returned {_described(loss)}, wanted a scalar () for {of_what}")
  if not jnp.issubdtype(loss.dtype, jnp.floating):
    raise ValueError(f"{name} is {loss.dtype}, wanted float32, which has a gradient")
  if jnp.finfo(loss.dtype).bits < 32:
    raise ValueError(f"{name} is {loss.dtype}, wanted float32: end with loss.astype(jnp.float32)")


def _described(value: Any) -> str:
  if isinstance(value, tuple) and not hasattr(value, "_fields"):
    return f"{len(value)} values"
  return f"shape {value.shape}" if hasattr(value, "shape") else type(value).__name__
