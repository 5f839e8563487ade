"""The rules that carry a rate from one batch size to another."""

import doctest

import pytest

from bsjax.optim import SCALING_RULES, scale_learning_rate, scaling

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


def test_docstring_examples():
  failed, tried = doctest.testmod(scaling)
  assert tried > 0
  assert failed == 0
