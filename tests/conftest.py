"""What every test runs under: the CPU, programs compiled in a hurry, enough threads for fake devices, a folder for the prepared digits.

Compiling takes most of the suite's time, so LLVM is told to optimise little and in one piece, and XLA to emit loops the old way: the same
operations in less than half of the time. `XLA_FLAGS= bash scripts/test.sh` tests the programs that users run.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
  "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("NPROC", "16")  # before jax: fake devices of a child process dead-lock on two cores without it

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def same_path() -> Iterator[None]:
  """Forgets the folders that a test imported from: a workload's file puts its own on the path of its process."""
  before = list(sys.path)
  yield
  sys.path[:] = before


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
  """Points the default data folder at one that the whole session shares and nobody's home directory holds."""
  folder = tmp_path_factory.getbasetemp().parent / "bsjax-data"
  os.environ["BSJAX_DATA_DIR"] = str(folder)
  return str(folder)
