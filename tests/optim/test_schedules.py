"""The shape of each schedule: unit peak, even ramp, decay to what was asked; one program for all numbers; what is refused."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.optim import SCHEDULES, complete_schedule, make_schedule, schedules
from bsjax.types import Hparams

ROUNDING = 2e-7
"""Two or three float32 roundings of numbers up to 1."""
MILESTONES = (5, 8)


def factors(name, num_steps=12, warmup="none", milestones=None, **numbers):
  milestones = (MILESTONES if name == "step" else ()) if milestones is None else milestones
  numbers = ({"decay_factor": 0.5} if name == "step" else {}) | numbers
  options = {"warmup": warmup, "milestones": milestones}
  hparams = complete_schedule(name, Hparams(0.1, **numbers), num_steps=num_steps, **options)
  return np.array(jax.vmap(make_schedule(name, hparams, **options))(jnp.arange(num_steps)))


@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ramp_and_peak(name, warmup_steps):
  found = factors(name, warmup="gradual", warmup_steps=warmup_steps)
  assert np.argmax(found) == warmup_steps
  assert found[warmup_steps] == 1.0
  # From nothing before the first step to the peak, in equal parts.
  ramp = np.diff(found[: warmup_steps + 1], prepend=0.0)
  np.testing.assert_allclose(ramp, 1 / (warmup_steps + 1), rtol=0, atol=ROUNDING)
  assert np.all(found > 0)


def test_warmups_from_the_rate_of_the_reference_batch():
  """Goyal et al. (2017), section 2.2, for 32 times the reference batch: eta + (32 eta - eta) i / 5, and eta alone."""
  gradual = factors("constant", warmup="gradual", warmup_steps=5, warmup_factor=1 / 32)
  eta = 0.1
  expected = (eta + (32 * eta - eta) * np.arange(5) / 5) / (32 * eta)
  np.testing.assert_allclose(gradual, [*expected, *np.ones(7)], rtol=0, atol=ROUNDING)
  constant = factors("constant", warmup="constant", warmup_steps=5, warmup_factor=1 / 32)
  np.testing.assert_array_equal(constant, [1 / 32] * 5 + [1.0] * 7)


def test_after_the_peak():
  after = lambda name, **numbers: factors(name, warmup="gradual", warmup_steps=3, **numbers)[3:]  # noqa: E731
  x = np.arange(9) / 9
  expected = {
    "constant": (np.ones(9), {}),
    "linear": (1 - 0.8 * x, {"decay_factor": 0.2}),
    "cosine": (0.2 + 0.8 * (1 + np.cos(np.pi * x)) / 2, {"decay_factor": 0.2}),
    "step": (np.array([1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]), {"decay_factor": 0.5}),
    "inverse_sqrt": (
      np.sqrt(3 / np.arange(3, 12)),
      {},
    ),  # of Vaswani et al.: 1 / sqrt(t), with the peak at the warm-up's end
  }
  assert set(expected) == set(SCHEDULES)
  for name, (want, numbers) in expected.items():
    np.testing.assert_allclose(after(name, **numbers), want, rtol=0, atol=ROUNDING, err_msg=name)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_that_ends_before_the_run_stays_where_it_is(name):
  found = factors(name, decay_steps=4, decay_factor=0.25)
  np.testing.assert_allclose(found[4:], 0.25, rtol=0, atol=ROUNDING)
  assert np.all(np.diff(found[:5]) < 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_program_serves_all_numbers(name):
  milestones = MILESTONES if name == "step" else ()
  traces = []

  @jax.jit
  def factor(hparams, step):
    traces.append(name)
    return make_schedule(name, hparams, warmup="gradual", milestones=milestones)(step)

  for numbers in (
    Hparams(0.1, warmup_steps=2.0, decay_steps=9.0, decay_factor=0.5),
    Hparams(0.3, 0.5, decay_steps=3.0),
  ):
    for step in range(12):
      lone = make_schedule(name, numbers, warmup="gradual", milestones=milestones)(step)
      np.testing.assert_allclose(factor(jax.tree.map(jnp.float32, numbers), step), lone, rtol=0, atol=ROUNDING)
  assert len(traces) == 1


@pytest.mark.parametrize(
  ("name", "numbers", "options", "message"),
  [
    ("constant", {"warmup_steps": 12}, {"warmup": "gradual"}, r"warmup_steps=12 is not in \[0, num_steps=12\)"),
    ("constant", {"warmup_steps": -1}, {"warmup": "gradual"}, r"warmup_steps=-1 is not in \[0, num_steps=12\)"),
    ("constant", {"warmup_steps": 2}, {}, "warmup_steps=2, warmup_factor=0 without a warm-up"),
    ("constant", {"warmup_steps": 2}, {"warmup": "constant"}, "warmup_factor=0, wanted 0 < warmup_factor <= 1"),
    ("constant", {"warmup_factor": 2, "warmup_steps": 2}, {"warmup": "gradual"}, "warmup_factor=2, wanted"),
    ("cosine", {"decay_factor": 1.5}, {}, "decay_factor=1.5, wanted a fraction"),
    ("step", {"decay_factor": 0.0}, {"milestones": (3,)}, "decay_factor=0, wanted a fraction"),
    ("step", {"decay_factor": 0.1}, {}, r"milestones=\[\] with schedule 'step'"),
    ("step", {"decay_factor": 0.1}, {"milestones": (4, 4)}, r"milestones=\[4, 4\] with schedule 'step'"),
    ("linear", {}, {"milestones": (4,)}, r"milestones=\[4\] with schedule 'linear'"),
    ("linear", {"decay_steps": -3}, {}, "decay_steps=-3, wanted a number above 0"),
    ("linear", {"decay_steps": np.nan}, {}, "decay_steps=nan, wanted a number above 0"),
  ],
)
def test_numbers_out_of_range_are_named(name, numbers, options, message):
  with pytest.raises(ValueError, match=message):
    complete_schedule(name, Hparams(0.1, **numbers), num_steps=12, **options)


@pytest.mark.parametrize(
  ("name", "warmup", "unknown"), [("triangle", "none", "schedule 'triangle'"), ("cosine", "slow", "warm-up 'slow'")]
)
def test_unknown_names_list_the_known(name, warmup, unknown):
  with pytest.raises(ValueError, match=f"{unknown}; use one of"):
    make_schedule(name, Hparams(0.1), warmup=warmup)


def test_docstring_examples():
  failed, tried = doctest.testmod(schedules)
  assert tried > 0
  assert failed == 0
