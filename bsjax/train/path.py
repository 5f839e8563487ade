"""Where a data set lies while a trial trains: all of it on the device, or read ahead of time from the host."""

import os
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh

from bsjax.data import RecordSource, Source
from bsjax.workloads import Workload

DataPath = Literal["resident", "streamed"]
DATA_PATHS: tuple[DataPath, ...] = get_args(DataPath)
RESIDENT_SHARE = 0.25
"""Of a device's memory, for data that stay there; the rest is for the model, its gradients, and on the CPU for the host's own copy."""


def device_memory(device: Any) -> int:
  """Finds the bytes of memory of one device; on a CPU its share of the machine's, free or not, so that a rerun finds the same."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return int(stats["bytes_limit"])
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices(backend=device.platform))


def choose_data_path(workload: Workload, mesh: Mesh) -> DataPath:
  """Chooses by size: "resident" if training and validation set take at most `RESIDENT_SHARE` of one device's memory, else "streamed".

  Records that fit are read into memory, once.
  """
  size = workload.train.nbytes + workload.validation.nbytes
  return "resident" if size <= RESIDENT_SHARE * device_memory(mesh.local_devices[0]) else "streamed"


def examples_that_fit(source: Source | RecordSource) -> int:
  """Counts the first examples of a split that measurements can hold on one device: all, or what `RESIDENT_SHARE` of its memory takes."""
  example = max(1, source.nbytes // len(source))
  return min(len(source), max(1, int(RESIDENT_SHARE * device_memory(jax.devices()[0])) // example))
