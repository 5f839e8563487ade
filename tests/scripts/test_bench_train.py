"""The benchmark runs, its two sides train alike, and its lines hold what a reader of them needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.bench_train"]
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def run(*flags):
  # In a process of its own: the benchmark pins its process to one core.
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run([*COMMAND, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_tiny_case_against_both_jax_opponents():
  done = run("--only=tiny_b8", "--versus=jax_loop,entry", "--repeats=2")
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert [(line["bench"], line["case"], line["versus"]) for line in lines] == [
    ("train", "tiny_b8", "jax_loop"),
    ("train", "tiny_b8", "entry"),
  ]
  for line in lines:
    assert line["n"] == 2
    assert 0 < line["low"] <= line["ratio"] <= line["high"]
    # Forward and backward of 16-32-2 on 8 examples, less the gradient of the images.
    assert line["flops_per_step"] == 2 * 8 * (3 * (16 * 32 + 32 * 2) - 16 * 32)
    assert line["gflops"] < line["gemm_gflops"]


def test_an_unknown_case_is_refused_with_the_known_ones():
  done = run("--only=mlp513_b8")
  assert done.returncode != 0
  assert "mlp512_b8" in done.stderr
  assert done.stdout == ""


def test_operations_of_a_residual_network():
  program = "from scripts.bench_train import CASES; print(CASES['resnet8_b8'].flops_per_step)"
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
  first = 32 * 32 * 9 * 3 * 16
  stages = [32 * 32 * 9 * 2 * 16 * 16, 16 * 16 * 9 * (16 + 32) * 32, 8 * 8 * 9 * (32 + 64) * 64]
  assert float(done.stdout) == 2 * 8 * (3 * (first + sum(stages) + 64 * 10) - first)


@pytest.mark.skipif(NUM_CORES < 2, reason="needs two cores")
def test_several_cores_are_compared_with_pytorch_only():
  done = run("--cores=2", "--only=tiny_b8", "--versus=jax_loop,entry")
  assert (done.returncode, done.stdout) == (0, "")
  assert run("--cores=0").returncode != 0
