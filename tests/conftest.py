"""What every test runs under: the CPU, enough threads for fake devices, and a folder for the prepared digits."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # before jax: fake devices of a child process dead-lock on two cores without it

import pytest


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
  """Points the default data folder at one that the whole session shares and nobody's home directory holds."""
  folder = tmp_path_factory.getbasetemp().parent / "bsjax-data"
  os.environ["BSJAX_DATA_DIR"] = str(folder)
  return str(folder)
