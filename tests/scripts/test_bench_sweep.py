"""The benchmark of sweeps runs, its two sides train alike, and its lines hold what a reader of them needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.bench_sweep"]


def run(*flags: str) -> subprocess.CompletedProcess:
  # In a process of its own: the benchmark pins its process to one core.
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run([*COMMAND, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_tiny_sweep_against_the_loop() -> None:
  done = run("--only=tiny", "--versus=jax_loop", "--repeats=1")
  assert done.returncode == 0, done.stderr
  (line,) = [json.loads(line) for line in done.stdout.splitlines()]
  assert (line["bench"], line["case"], line["versus"], line["trials"], line["n"]) == (
    "sweep",
    "tiny",
    "jax_loop",
    64,
    1,
  )
  # One repetition: the ratio is that of the two times.
  assert line["ratio"] == pytest.approx(line["seconds"] / line["their_seconds"], abs=1e-4)
  assert min(line["bare_seconds"], line["first_run_seconds"]) > 0


def test_cases_of_the_other_benchmark_are_refused() -> None:
  other = run("--only=tiny_b8")
  assert other.returncode != 0
  assert "wanted some of tiny, tiny_seeds, small, mlp512_b8, cnn_b8" in other.stderr
