"""The noise benchmark runs, its sides agree, and it refuses to time sides that do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.bench_noise"]


def run(*flags):
  # In a process of its own: the benchmark pins its process to one core. Compiled as for users, as it computes more than it compiles.
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  return subprocess.run([*COMMAND, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_perceptron_against_one_example_at_a_time():
  done = run("--only=mlp512", "--versus=vmap_one", "--repeats=2")
  assert done.returncode == 0, done.stderr
  (line,) = [json.loads(text) for text in done.stdout.splitlines()]
  assert (line["bench"], line["case"], line["versus"], line["n"]) == ("noise", "mlp512", "vmap_one", 2)
  assert 0 < line["low"] <= line["ratio"] <= line["high"]
  # Norms by another formula: float32 rounding shows, a few 1e-7, and nothing larger.
  assert 0 < line["difference"] < 1e-5
  # Forward and backward of 784-512-512-10 on 1024 examples, less the gradient of the images.
  flops = 1024 * 2 * (3 * (784 * 512 + 512 * 512 + 512 * 10) - 784 * 512)
  assert abs(line["gflops"] * line["seconds"] * 1e9 / flops - 1) < 1.1e-3  # each of the two has four digits


def test_an_unknown_case_is_refused_with_the_known_ones():
  done = run("--only=mlp513")
  assert done.returncode != 0
  assert "mlp512_interval" in done.stderr
  assert done.stdout == ""
