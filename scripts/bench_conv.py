"""What does the loop-safe convolution save: gradients of a convolution inside a scan, ours against lax.conv_general_dilated.

  python -m scripts.bench_conv                    both batch sizes, about two minutes on one core
  python -m scripts.bench_conv --only=conv_b8     one case

Prints one JSON object per case: a scan of gradient steps on a 3x3 convolution from 16 to 16 channels over 16x16 images.
`ratio` is our CPU time over theirs, below 1 is faster: the median of alternating repetitions, `low` and `high` the smallest
and the largest. Compilation is not timed. Values and gradients of both sides are compared before.
"""
# ruff: noqa: E402  (the process is pinned before JAX is imported)

import os

if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from bsjax.models import conv
from bsjax.types import Array

CASES = {"conv_b8": 8, "conv_b128": 128}
STEPS, SIZE, CHANNELS = 4, 16, 16

_ONLY = flags.DEFINE_list("only", list(CASES), "Cases to run.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Alternating repetitions.", lower_bound=1)
flags.register_validator("only", lambda names: set(names) <= set(CASES), f"wanted some of {', '.join(CASES)}")


def plain(x: Array, w: Array) -> Array:
  return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def scanned_steps(convolve: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
  """Builds `STEPS` gradient steps on two layers in one scan, as training makes them."""

  def loss(weights: Array, x: Array) -> Array:
    return jnp.mean(convolve(jax.nn.relu(convolve(x, weights[0])), weights[1]) ** 2)

  def step(weights: Array, x: Array) -> tuple[Array, None]:
    return weights - 0.01 * jax.grad(loss)(weights, x), None

  return jax.jit(lambda weights, batches: lax.scan(step, weights, batches)[0])


def main(arguments: list[str]) -> None:
  del arguments
  ours, theirs = scanned_steps(conv), scanned_steps(plain)
  draw = np.random.default_rng(0)
  for case in _ONLY.value:
    batches = draw.normal(size=(STEPS, CASES[case], SIZE, SIZE, CHANNELS)).astype(np.float32)
    weights = (0.1 * draw.normal(size=(2, 3, 3, CHANNELS, CHANNELS))).astype(np.float32)
    np.testing.assert_allclose(ours(weights, batches), theirs(weights, batches), atol=1e-5)
    seconds: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(_REPEATS.value):
      for side, times in seconds.items():
        began = time.process_time()
        jax.block_until_ready(side(weights, batches))
        times.append((time.process_time() - began) / STEPS)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    row = {"bench": "conv", "case": case, "versus": "lax_in_scan", "ratio": statistics.median(ratios)}
    row |= {"low": min(ratios), "high": max(ratios), "n": len(ratios), "device": jax.devices()[0].platform}
    row |= {"seconds_per_step": statistics.median(seconds[ours]), "their_seconds": statistics.median(seconds[theirs])}
    print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}))
    sys.stdout.flush()


if __name__ == "__main__":
  app.run(main)
