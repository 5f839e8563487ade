"""What the compiled training step costs before it runs: compilations and bytes."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.data import Source
from bsjax.probes.leaves import leaf_names
from bsjax.study.diagnosis import Case, Diagnosis, listed
from bsjax.train import TrainState, TrialConfig, build_segment, chunked, device_arrays, init_state, make_mesh, make_step
from bsjax.train.evaluate import spread_chunks
from bsjax.train.segment import lane_sharding
from bsjax.types import Hparams
from bsjax.workloads import Workload

OPTIMIZER = "momentum"
LINEAR_FACTOR = 2
"""Bytes count as linear in the batch size where they grow per example by factors no further apart between the three sizes."""
UNITS = ("B", "KB", "MB", "GB", "TB")


def check_compilations(case: Case) -> Diagnosis:
  """Calls the compiled training segment three times, at other rates and seeds, each from where the one before ended."""
  size = len(next(iter(case.batch.values())))
  config, mesh = TrialConfig(case.workload.name, size, 1, 1, optimizer=OPTIMIZER), make_mesh(data=1)
  segment: Any = build_segment(case.workload, config, 1, mesh)
  train, validation = jax.device_get((case.batch, case.other))
  data = device_arrays(train, mesh), jax.device_put(chunked(validation), spread_chunks(mesh))
  start = init_state(case.workload, OPTIMIZER, Hparams(0.1), jnp.uint32(0))
  states = jax.device_put(jax.tree.map(lambda leaf: leaf[None], start), lane_sharding(mesh))
  for call in range(3):
    hparams = jax.tree.map(lambda value, call=call: np.full(1, value / (1 + call), np.float32), Hparams(0.01))
    states, _ = segment(states, hparams, np.array([call], np.uint32), jnp.int32(1), *data)
  count = segment._cache_size()
  if count == 1:
    return Diagnosis("compilations", "ok", "1 for three calls of the training segment", {"compilations": 1.0})
  shapes = jax.eval_shape(case.workload.init, case.key)
  weak = [leaf for leaf, array in zip(leaf_names(shapes), jax.tree.leaves(shapes), strict=True) if array.weak_type]
  why = (
    f"{listed(weak)} come from Python numbers without a dtype: "
    if weak
    else "init and train_loss differ in what they return: "
  )
  message = (
    f"{count} for three calls of the training segment: {why}give every array a dtype, as in jnp.zeros(3, jnp.float32)"
  )
  return Diagnosis("compilations", "fix", message, {"compilations": float(count)})


def check_memory(case: Case) -> Diagnosis:
  """Reads the bytes of one training step off the program compiled for three batch sizes; none is run.

  They are the smallest, middle and largest of the preset, of fewer than three filled up by doubling the largest. Only one of the preset
  can be too large.
  """
  workload = case.workload
  preset = sorted(set(workload.preset.batch_sizes))
  sizes = sorted({preset[0], preset[len(preset) // 2], preset[-1]})
  while len(sizes) < 3:
    sizes.append(2 * sizes[-1])
  needed = [step_bytes(workload, size) for size in sizes]
  known = [(size, count) for size, count in zip(sizes, needed, strict=True) if count is not None]
  if not known:
    return Diagnosis("memory", "note", f"this backend ({jax.default_backend()}) does not tell the bytes of a program")
  data = sum(split.nbytes for split in (workload.train, workload.validation) if isinstance(split, Source))
  limit = device_bytes()
  numbers = {f"bytes_at_{size}": float(count) for size, count in known} | {"data_bytes": float(data)}
  steps = ", ".join(f"{readable(count)} at {size:,}" for size, count in known)
  told = f"a step ({OPTIMIZER}) takes {steps}, the data {readable(data)}"
  if limit is None:
    return Diagnosis("memory", "note", f"{told}; the memory of this device is not known", numbers)
  numbers["device_bytes"] = float(limit)
  told = f"{told}, the device has {readable(limit)}"
  largest, most = [pair for pair in known if pair[0] <= preset[-1]][-1]
  if most + data > limit:
    message = f"{told}: too much at {largest:,}; leave it out of preset.batch_sizes"
    return Diagnosis("memory", "fix", message, numbers)
  interval = largest_batch(known, limit - data)
  if interval is None:
    return Diagnosis("memory", "ok", f"{told}; it does not grow linearly, so no largest batch is named", numbers)
  numbers |= {"largest_batch_low": interval[0], "largest_batch_high": interval[1]}
  between = " and ".join(f"{float(f'{size:.3g}'):,.0f}" for size in interval)
  return Diagnosis("memory", "ok", f"{told}; the largest batch that fits is between {between}", numbers)


def step_bytes(workload: Workload, batch_size: int) -> int | None:
  """Compiles one training step and returns the bytes it holds at once: arguments, results and what lies between; None where not told."""

  def shapes() -> TrainState:
    return init_state(workload, OPTIMIZER, Hparams(0.1), jnp.uint32(0))

  batch = {
    name: jax.ShapeDtypeStruct((batch_size, *spec.shape), spec.dtype) for name, spec in workload.train.spec.items()
  }
  config = TrialConfig(workload.name, batch_size, 1, 1, optimizer=OPTIMIZER)
  step = jax.jit(make_step(workload, config), donate_argnums=0)
  hparams = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), Hparams(0.1))
  found = step.lower(jax.eval_shape(shapes), hparams, batch, jax.random.key(0)).compile().memory_analysis()
  if found is None:
    return None
  held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return int(held + found.temp_size_in_bytes)


def device_bytes() -> int | None:
  """Returns the memory of the first device; of a CPU that of the machine; None where it is not told."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return (device.memory_stats() or {}).get("bytes_limit")


def largest_batch(known: list[tuple[int, int]], limit: int) -> tuple[float, float] | None:
  """Extends bytes m(B) known at three batch sizes to the largest batch that fits in `limit`.

      B = B_i + (limit - m_i) / slope,        slope from (m_3 - m_2) / (B_3 - B_2) and (m_2 - m_1) / (B_2 - B_1)

  where B_i is the largest of the three that fits.

  Args:
    known: (batch size, bytes), ascending.

  Returns:
    The results of the larger and of the smaller slope, at most a size that does not fit; None, a refusal, with fewer than three sizes,
    where none fits, or where the slopes are not positive or more than `LINEAR_FACTOR` apart: then the bytes do not grow linearly between
    the known sizes, and nothing is known beyond them.
  """
  slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(known, known[1:], strict=False)]
  if len(slopes) < 2 or min(slopes) <= 0 or max(slopes) > LINEAR_FACTOR * min(slopes):
    return None
  fitting = [pair for pair in known if pair[1] <= limit]
  if not fitting:
    return None
  size, count = fitting[-1]
  too_large = min((size for size, count in known if count > limit), default=math.inf)
  return size + (limit - count) / max(slopes), min(too_large, size + (limit - count) / min(slopes))


def readable(count: float) -> str:
  """Writes a number of bytes with three digits: 12.3 MB (of 1,000 KB)."""
  power = min(len(UNITS) - 1, max(0, (len(str(int(count))) - 1) // 3))
  return f"{count / 1000**power:.3g} {UNITS[power]}"
