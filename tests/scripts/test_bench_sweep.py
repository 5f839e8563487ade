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
  done = run("--cases=tiny", "--opponents=jax_loop", "--repeats=1")
  assert done.returncode == 0, done.stderr
  (line,) = [json.loads(line) for line in done.stdout.splitlines()]
  assert (line["bench"], line["case"], line["versus"], line["trials"], line["n"]) == (
    "sweep",
    "tiny",
    "jax_loop",
    64,
    1,
  )
  # One repetition: the ratio is that of the two times, and records cost something.
  assert line["ratio"] == pytest.approx(line["seconds"] / line["their_seconds"], abs=1e-4)
  assert line["seconds"] > line["bare_seconds"] > 0
  # A first call compiles; the 64 trials of 2048 steps themselves are not counted in the time of the others.
  assert line["first_run_seconds"] > line["seconds"] * 64 * 2048
  # 20 is the aim of a quiet machine; half of it tells a sweep from trials one after another, which is about 6.
  assert line["ratio"] < 0.1


def test_flags_of_the_other_benchmark_are_refused() -> None:
  done = run("--only=tiny_b8")
  assert done.returncode != 0
  assert "--cases, --opponents, --trial_devices and --repeats" in done.stdout + done.stderr
  unknown = run("--cases=mlp513_b8")
  assert unknown.returncode != 0
  assert "mlp512_b8" in unknown.stderr
