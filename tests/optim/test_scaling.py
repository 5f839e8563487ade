"""The rules that carry a rate from one batch size to another."""

import doctest

import pytest

from bsjax.optim import SCALING_RULES, half_life_beta2, noise_limited_rate, scale_adam, scale_learning_rate, scaling
from bsjax.types import Hparams

EXPECTED = {"none": 0.2, "linear": 0.2 * 9, "sqrt": 0.2 * 3}


@pytest.mark.parametrize("rule", SCALING_RULES)
def test_nine_times_the_batch(rule):
  up = scale_learning_rate(rule, 0.2, batch_size=288, reference_batch_size=32)
  assert up == pytest.approx(EXPECTED[rule], rel=1e-15)
  assert scale_learning_rate(rule, up, batch_size=32, reference_batch_size=288) == pytest.approx(0.2, rel=1e-15)


def test_rejects_what_it_does_not_know():
  with pytest.raises(ValueError, match="'cubic'; use one of none, linear, sqrt"):
    scale_learning_rate("cubic", 0.1, batch_size=2, reference_batch_size=1)
  with pytest.raises(ValueError, match="batch_size=0 and reference_batch_size=1 must both be positive"):
    scale_learning_rate("none", 0.1, batch_size=0, reference_batch_size=1)


def test_noise_limited_rate_is_linear_below_the_noise_scale_and_constant_above():
  rate = lambda size, noise=1e4: noise_limited_rate(0.1, noise, batch_size=size, reference_batch_size=10)  # noqa: E731
  assert rate(10) == pytest.approx(0.1, rel=1e-15)
  assert rate(20) / rate(10) == pytest.approx(2, rel=2e-3)
  assert rate(10**9) == pytest.approx(0.1 * 1001, rel=1e-4)  # rate_max = rate (1 + noise_scale / B)
  assert rate(10**9) / rate(10**4) == pytest.approx(2, rel=1e-4)  # half of it at B = noise_scale
  assert rate(64, 0.0) == 0.1
  with pytest.raises(ValueError, match="noise_scale=-1 must be a finite number"):
    rate(10, -1)


def test_adam_keeps_its_memory_in_examples():
  base = Hparams(0.01, 0.9, 0.99, 0.1, 1e-6)
  up = scale_adam(base, batch_size=512, reference_batch_size=64)
  assert up[:3] == (pytest.approx(0.01 * 8**0.5), pytest.approx(0.2), pytest.approx(0.92))
  assert (up.weight_decay, up.epsilon) == (0.1, pytest.approx(1e-6 / 8**0.5))
  back = scale_adam(up, batch_size=64, reference_batch_size=512)
  assert back == pytest.approx(base)
  with pytest.raises(ValueError, match="beta1=0, beta2=0.9: from 64 the rule holds up to 639"):
    scale_adam(base, batch_size=640, reference_batch_size=64)
  scale_adam(base, batch_size=639, reference_batch_size=64)


def test_half_life_halves():
  beta2 = half_life_beta2(1000.0, batch_size=50)
  assert beta2 ** (1000 / 50) == pytest.approx(0.5, rel=1e-14)
  with pytest.raises(ValueError, match="half_life=0"):
    half_life_beta2(0, batch_size=50)


def test_docstring_examples():
  failed, tried = doctest.testmod(scaling)
  assert tried > 0
  assert failed == 0
