"""The shape of each schedule: unit peak, even ramp, cosine to the end."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.optim import SCHEDULES, make_schedule, schedules


@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ramp_and_peak(name, warmup_steps):
  factors = np.array(jax.vmap(make_schedule(name, num_steps=12, warmup_steps=warmup_steps))(jnp.arange(12)))
  assert np.argmax(factors) == warmup_steps
  assert factors[warmup_steps] == 1.0
  # From nothing before the first step to the peak, in equal parts; one or two float32 roundings below 1.
  ramp = np.diff(factors[: warmup_steps + 1], prepend=0.0)
  np.testing.assert_allclose(ramp, 1 / (warmup_steps + 1), rtol=0, atol=2e-7)
  assert np.all(factors > 0)


def test_after_the_peak():
  steps = jnp.arange(3, 10)
  constant = jax.vmap(make_schedule("constant", num_steps=10, warmup_steps=3))(steps)
  np.testing.assert_array_equal(constant, 1.0)
  cosine = jax.vmap(make_schedule("warmup_cosine", num_steps=10, warmup_steps=3))(steps)
  expected = [(1 + np.cos(np.pi * k / 7)) / 2 for k in range(7)]
  np.testing.assert_allclose(cosine, expected, rtol=0, atol=2e-7)  # a float32 cosine, off by one or two roundings


@pytest.mark.parametrize("warmup_steps", [-1, 10])
def test_rejects_a_warmup_that_leaves_no_step(warmup_steps):
  with pytest.raises(ValueError, match=rf"warmup_steps={warmup_steps} is not in \[0, num_steps=10\)"):
    make_schedule("constant", num_steps=10, warmup_steps=warmup_steps)


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match="'cosine'; use one of constant, warmup_cosine"):
    make_schedule("cosine", num_steps=10)


def test_docstring_examples():
  failed, tried = doctest.testmod(schedules)
  assert tried > 0
  assert failed == 0
