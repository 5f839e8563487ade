"""What does the loop-safe convolution save inside a scan, what its sum over blocks of examples, and what its other forms?

  python -m scripts.bench_conv                                     all cases, conv32_b128 for minutes
  python -m scripts.bench_conv --only=conv_b8 --versus=lax_in_scan    one case against one

Prints one JSON object per case and opponent. conv_*: a scan of gradient steps on two 3x3 convolutions from 16 to 16
channels. few_*: a scan of single convolutions of 64 images with few channels; few_3_16 is from 3 to 16 channels, _k5 and _k7
say another kernel than 3x3, _s2 a stride of 2. small_*: the same of 32 images smaller than the kernel; small_2_k3 is 2x2 under 3x3.
Opponents:
  lax_in_scan    of conv_* and small_*: the same with lax.conv_general_dilated
  at_once        of conv_*: ours, with the filter gradient of the whole batch as one block
  each_column    of few_*: ours, with each column of the output by itself and no fourth channel beside three
`ratio` is our CPU time over theirs, below 1 is faster: the median of alternating repetitions, `low` and `high` the smallest
and the largest. Compilation is not timed. The weights that both sides arrive at are compared before.
"""
# ruff: noqa: E402  (the process is pinned before JAX is imported)

import os

if hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

import bsjax.conv
from bsjax.models import conv
from bsjax.types import Array


class Single(NamedTuple):
  """A convolution by itself."""

  size: int
  channels: tuple[int, int]
  kernel: int = 3
  stride: int = 1
  examples: int = 64


STEPS_OF = {"conv_b8": (8, 16), "conv_b128": (128, 16), "conv32_b128": (128, 32)}
"""Examples, and rows and columns of an image."""
SINGLE = {
  "few_3_16": Single(32, (3, 16)),
  "few_3_32": Single(32, (3, 32)),
  "few_8_8": Single(32, (8, 8)),
  "few_16_16": Single(32, (16, 16)),
  "few_1_6_k5": Single(28, (1, 6), kernel=5),
  "few_6_16_k5": Single(28, (6, 16), kernel=5),
  "few_3_16_k7_s2": Single(64, (3, 16), kernel=7, stride=2),
  "small_2_k3": Single(2, (512, 512), examples=32),
  "small_4_k5": Single(4, (128, 128), kernel=5, examples=32),
}
CASES = (*STEPS_OF, *SINGLE)
STEPS, CHANNELS = 4, 16
OPPONENTS = ("lax_in_scan", "at_once", "each_column")

_ONLY = flags.DEFINE_list("only", list(CASES), "Cases to run.")
_VERSUS = flags.DEFINE_list("versus", list(OPPONENTS), "Opponents to run against.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Alternating repetitions.", lower_bound=1)
flags.register_validator("only", lambda names: set(names) <= set(CASES), f"wanted some of {', '.join(CASES)}")
flags.register_validator("versus", lambda names: set(names) <= set(OPPONENTS), f"wanted some of {', '.join(OPPONENTS)}")


def plain(x: Array, w: Array) -> Array:
  return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


Convolve = Callable[[Array, Array], Array]
Steps = Callable[[Array, Array], Array]


def scanned_steps(convolve: Convolve) -> Steps:
  """Builds `STEPS` gradient steps on two layers in one scan, as training makes them."""

  def loss(weights: Array, x: Array) -> Array:
    return jnp.mean(convolve(jax.nn.relu(convolve(x, weights[0])), weights[1]) ** 2)

  def step(weights: Array, x: Array) -> tuple[Array, None]:
    return weights - 0.01 * jax.grad(loss)(weights, x), None

  return jax.jit(lambda weights, batches: lax.scan(step, weights, batches)[0])


def at_once(weights: Array, batches: Array) -> Steps:
  """Compiles our steps with blocks as large as the batch."""
  with mock.patch.object(bsjax.conv, "FILTER_GRADIENT_COLUMNS", batches.shape[1] * batches.shape[2]):
    return scanned_steps(conv).lower(weights, batches).compile()


def scanned_convolution(convolve: Convolve) -> Steps:
  """Builds a scan that convolves batch after batch and keeps the last."""

  def all_batches(w: Array, batches: Array) -> Array:
    def step(last: Array, x: Array) -> tuple[Array, None]:
      return convolve(x, w), None

    start = jax.eval_shape(convolve, batches[0], w)
    return lax.scan(step, jnp.zeros(start.shape), batches)[0]

  return jax.jit(all_batches)


def pairs(case: str, draw: np.random.Generator) -> Iterator[tuple[str, Steps, Steps, Array, Array]]:
  """Yields each opponent of a case, our side, theirs, and the operands of both."""
  if case in SINGLE:
    size, channels, kernel, stride, examples = SINGLE[case]
    batches = draw.normal(size=(STEPS, examples, size, size, channels[0])).astype(np.float32)
    weights = draw.normal(size=(kernel, kernel, *channels)).astype(np.float32) / math.sqrt(kernel**2 * channels[0])
    convolve = partial(conv, stride=stride)
    ours = scanned_convolution(convolve).lower(weights, batches).compile()
    if size < kernel:
      yield "lax_in_scan", ours, scanned_convolution(plain), weights, batches
    else:
      with mock.patch.multiple(bsjax.conv, SLOW_CHANNELS=0, SLOW_INPUTS=0):
        theirs = scanned_convolution(convolve).lower(weights, batches).compile()
      yield "each_column", ours, theirs, weights, batches
  else:
    batch_size, size = STEPS_OF[case]
    batches = draw.normal(size=(STEPS, batch_size, size, size, CHANNELS)).astype(np.float32)
    weights = (0.1 * draw.normal(size=(2, 3, 3, CHANNELS, CHANNELS))).astype(np.float32)
    ours = scanned_steps(conv).lower(weights, batches).compile()
    yield "lax_in_scan", ours, scanned_steps(plain), weights, batches
    yield "at_once", ours, at_once(weights, batches), weights, batches


def main(arguments: list[str]) -> None:
  del arguments
  draw = np.random.default_rng(0)
  for case in _ONLY.value:
    for versus, ours, theirs, weights, batches in pairs(case, draw):
      if versus in _VERSUS.value:
        np.testing.assert_allclose(ours(weights, batches), theirs(weights, batches), atol=1e-5)
        print(json.dumps({"bench": "conv", "case": case, "versus": versus, **compare(ours, theirs, weights, batches)}))
        sys.stdout.flush()


def compare(ours: Steps, theirs: Steps, weights: Array, batches: Array) -> dict[str, float | int | str]:
  """Times both sides in turn; seconds are of one step."""
  seconds: dict[Steps, list[float]] = {ours: [], theirs: []}
  for _ in range(_REPEATS.value):
    for side, times in seconds.items():
      began = time.process_time()
      jax.block_until_ready(side(weights, batches))
      times.append((time.process_time() - began) / STEPS)
  ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
  numbers = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
  numbers |= {"seconds_per_step": statistics.median(seconds[ours]), "their_seconds": statistics.median(seconds[theirs])}
  rounded = {name: float(f"{value:.4g}") for name, value in numbers.items()}
  return rounded | {"n": len(ratios), "device": jax.devices()[0].platform}


if __name__ == "__main__":
  app.run(main)
