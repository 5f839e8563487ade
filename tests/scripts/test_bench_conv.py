"""The convolution bench runs and prints what its docstring says."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_line_per_case_and_opponent():
  done = subprocess.run(
    [sys.executable, "-m", "scripts.bench_conv", "--only=conv_b8,few_8_8,small_4_k5", "--repeats=2"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(text) for text in done.stdout.splitlines()]
  found = [(line["case"], line["versus"]) for line in lines]
  assert found == [
    ("conv_b8", "lax_in_scan"),
    ("conv_b8", "at_once"),
    ("few_8_8", "each_column"),
    ("small_4_k5", "lax_in_scan"),
  ]
  for line in lines:
    assert (line["bench"], line["n"]) == ("conv", 2)
    assert 0 < line["low"] <= line["ratio"] <= line["high"]
