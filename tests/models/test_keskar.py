"""Keskar's networks: the layers of the released code, its parameter counts, and its batch norm."""

import jax.nn
import pytest
from by_hand import assert_is, convolved, layers_of, mapped, normalised, num_parameters, pooled

from bsjax.models import deep, f1, f2, shallow


@pytest.mark.parametrize(
  ("model", "parameters"),
  [
    (f1((28, 28, 1), 10), 1_462_794),
    (f2((360,), 1973), 2_780_085),
    (shallow((32, 32, 3), 10), 1_757_834),
    (shallow((32, 32, 3), 100), 1_757_834 + 90 * (192 + 1)),
    (deep((32, 32, 3), 10), 14_991_946),
    (deep((32, 32, 3), 100), 14_991_946 + 90 * (512 + 1)),
  ],
)
def test_parameter_counts(model, parameters):
  assert num_parameters(model) == parameters


def test_the_layers_are_those_of_the_released_code():
  assert layers_of(f2((360,), 1973), (360,)) == ["f512", "n"] * 7 + ["f1973"]
  expected = "c64/5/1@32 n  c64/5/1@16 n  f384 n d0.5  f192 n d0.5  f10"
  assert layers_of(shallow((32, 32, 3), 10), (32, 32, 3)) == expected.split()
  expected = """
    c64/3/1@32 n d0.3 c64/3/1@32 n
    c128/3/1@16 n d0.4 c128/3/1@16 n
    c256/3/1@8 n d0.4 c256/3/1@8 n d0.4 c256/3/1@8 n
    c512/3/1@4 n d0.4 c512/3/1@4 n d0.4 c512/3/1@4 n
    c512/3/1@2 n d0.4 c512/3/1@2 n d0.4 c512/3/1@2 n
    d0.5 f512 n d0.5 f10
  """
  assert layers_of(deep((32, 32, 3), 10), (32, 32, 3)) == expected.split()


def test_shallow_is_norm_relu_and_overlapping_pools_with_the_moments_of_the_batch():
  """In inference, by default: Keras' mode 2."""

  def by_hand(p, state, x):
    for layer in range(2):
      x = pooled(jax.nn.relu(normalised(convolved(x, p[f"Conv_{layer}"]), p[f"BatchNorm_{layer}"])), 3, 2, "SAME")
    for layer in range(2):
      x = jax.nn.relu(normalised(mapped(x, p[f"Dense_{layer}"]), p[f"BatchNorm_{layer + 2}"]))
    return mapped(x, p["Dense_2"])

  assert_is(shallow((7, 8, 3), 4, channels=3, widths=(6, 5)), by_hand, (5, 7, 8, 3))


def test_deep_is_norm_and_relu_and_a_pool_per_block():
  def by_hand(p, state, x):
    number = 0
    for convolutions in (2, 2, 3, 3, 3):
      for _ in range(convolutions):
        norm, statistics = p[f"BatchNorm_{number}"], state[f"BatchNorm_{number}"]
        x = jax.nn.relu(normalised(convolved(x, p[f"Conv_{number}"]), norm, statistics))
        number += 1
      x = pooled(x, padding="SAME")
    x = jax.nn.relu(normalised(mapped(x, p["Dense_0"]), p["BatchNorm_13"], state["BatchNorm_13"]))
    return mapped(x, p["Dense_1"])

  assert_is(deep((9, 8, 2), 3, channels=1, batch_norm="running"), by_hand, (3, 9, 8, 2))
