"""The convolution bench runs and prints what its docstring says."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_line_per_case_and_opponent():
  done = subprocess.run(
    [sys.executable, "-m", "scripts.bench_conv", "--only=conv_b8", "--repeats=2"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(text) for text in done.stdout.splitlines()]
  assert [line["versus"] for line in lines] == ["lax_in_scan", "at_once"]
  for line in lines:
    assert (line["bench"], line["case"], line["n"]) == ("conv", "conv_b8", 2)
    assert 0 < line["low"] <= line["ratio"] <= line["high"]
