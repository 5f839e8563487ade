"""A small workload that the doctor finds nothing wrong with, and how to break it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.data import Source
from bsjax.study.diagnosis import Diagnosis, make_case
from bsjax.study.doctor import CHECKS
from bsjax.types import Variables
from bsjax.workloads import Preset, Target, Workload, workload_from_logits

FEATURES, CLASSES, HIDDEN = 6, 3, 5


def source(split: str, seed: int, count: int) -> Source:
  draw = np.random.default_rng(seed)
  label = np.arange(count, dtype=np.int32) % CLASSES
  x = draw.normal(size=(count, FEATURES)) + label[:, None]
  return Source("made_up", split, {"x": x.astype(np.float32), "label": label})


def init(key):
  first, last = jax.random.split(key)
  return Variables(
    {"w": jax.random.normal(first, (FEATURES, HIDDEN)), "v": jax.random.normal(last, (HIDDEN, CLASSES))}, {}
  )


def logits(params, model_state, example):
  return jnp.tanh(example["x"] @ params["w"]) @ params["v"]


@functools.cache
def good() -> Workload:
  return workload_from_logits(
    "good",
    init,
    logits,
    train=source("train", 0, 64),
    validation=source("validation", 1, 16),
    test=source("test", 2, 16),
    target=Target("validation_accuracy", 0.99, "max"),
    preset=Preset(batch_sizes=(8, 16, 32), base_learning_rate=0.1),
  )


def broken(**changes: Any) -> Workload:
  """Replaces fields of the good one."""
  return dataclasses.replace(good(), **changes)


def diagnose(check: str, workload: Workload) -> Diagnosis:
  """Makes one check."""
  return CHECKS[check](make_case(workload))
