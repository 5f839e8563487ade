"""The order of examples, against a stream built in NumPy from `epoch_permutation` alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.data import order

KEY = jax.random.key(3)
# Compiled once per size, as in training; running their parts one by one takes four times as long.
epoch_permutation = jax.jit(order.epoch_permutation, static_argnums=2)
segment_indices = jax.jit(order.segment_indices, static_argnames=("num_steps", "batch_size", "num_examples"))


def stream(key, num_examples, length):
  """The endless stream of epochs, cut after `length` positions."""
  num_epochs = -(-length // num_examples)
  return np.concatenate([np.asarray(epoch_permutation(key, epoch, num_examples)) for epoch in range(num_epochs)])[
    :length
  ]


# Even division, B = 1, batches that span epochs, B = N, B and N with a common factor, and steps longer than an epoch.
SIZES = [(12, 4), (7, 1), (10, 7), (9, 9), (12, 9), (5, 4)]


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_equals_the_stream_cut_into_batches(num_examples, batch_size):
  num_steps, first_step = 11, 8
  expected = stream(KEY, num_examples, (first_step + num_steps) * batch_size).reshape(-1, batch_size)[first_step:]
  found = segment_indices(KEY, first_step, num_steps=num_steps, batch_size=batch_size, num_examples=num_examples)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 7), (9, 9)])
def test_does_not_depend_on_how_steps_are_cut(num_examples, batch_size):
  segment = functools.partial(segment_indices, KEY, batch_size=batch_size, num_examples=num_examples)
  whole = segment(0, num_steps=24)
  for size in (1, 8):
    pieces = [segment(start, num_steps=size) for start in range(0, 24, size)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_draws_no_epoch_that_is_not_read():
  """Of 12 examples in batches of 8 from step 1 on: five steps are read, positions 8 to 47, which end with the fourth epoch."""
  draw = functools.partial(segment_indices, KEY, 1, num_steps=11, batch_size=8, num_examples=12)
  whole, part = np.asarray(draw()).reshape(-1), np.asarray(draw(num_read=5)).reshape(-1)
  np.testing.assert_array_equal(part[:40], whole[:40])
  assert not part[40:].any()
  assert whole[40:].any()


def test_reads_each_example_once_per_epoch_and_reshuffles():
  num_examples, batch_size = 10, 4  # 15 steps are 6 epochs, and batches span them
  indices = segment_indices(KEY, 0, num_steps=15, batch_size=batch_size, num_examples=num_examples)
  epochs = np.asarray(indices).reshape(6, num_examples)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_examples), (6, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 6  # two alike: chance 15 / 10!, and the key is fixed


def test_independent_batches():
  draw = functools.partial(order.independent_indices, KEY, batch_size=50, num_examples=10)
  whole = np.asarray(draw(0, num_steps=40))
  assert whole.shape == (40, 50)
  np.testing.assert_array_equal(draw(7, num_steps=3), whole[7:10])  # a step depends on its number alone
  # 2,000 draws from 10 examples: each count is binomial with deviation 13.4; 5 of them.
  counts = np.bincount(whole.ravel(), minlength=10)
  assert len(counts) == 10
  assert abs(counts - 200).max() < 67
  # Pairs of successive steps agree at a place in 1 of 10 cases: 1,950 pairs, deviation 13.2.
  assert abs((whole[1:] == whole[:-1]).sum() - 195) < 67


def test_epoch_permutation_is_uniform():
  # Over M epochs, where example i lands is uniform on N places: each of the N^2 counts is binomial(M, 1/N). Bound: 5 standard
  # deviations, two-sided chance 6e-7 for each of 36 counts.
  num_examples, num_epochs = 6, 3000
  orders = jax.vmap(lambda epoch: epoch_permutation(KEY, epoch, num_examples))(jnp.arange(num_epochs))
  counts = np.stack([np.bincount(place, minlength=num_examples) for place in np.asarray(orders).T])
  std = np.sqrt(num_epochs / num_examples * (1 - 1 / num_examples))
  assert np.abs(counts - num_epochs / num_examples).max() < 5 * std


def test_vmap_over_keys_and_steps_equals_a_loop():
  keys, first_steps = jax.random.split(KEY, 3), jnp.array([0, 5, 2])
  segment = functools.partial(segment_indices, num_steps=4, batch_size=3, num_examples=7)
  found = jax.jit(jax.vmap(segment))(keys, first_steps)
  np.testing.assert_array_equal(
    found, np.stack([segment(key, step) for key, step in zip(keys, first_steps, strict=True)])
  )


@pytest.mark.parametrize(
  ("first_step", "batch_size", "num_examples"),
  [(2**31 - 10, 4096, 55_000), (1_000_003, 54_999, 55_000), (2**31 - 10, 65_537, 65_537), (123_456_789, 999, 1_000)],
)
def test_steps_times_batch_size_beyond_32_bits(first_step, batch_size, num_examples):
  position = first_step * batch_size  # a Python integer: no limit
  assert position > 2**31
  epoch, offset = divmod(position, num_examples)
  epochs = [np.asarray(epoch_permutation(KEY, epoch + i, num_examples)) for i in range(4)]
  expected = np.concatenate(epochs)[offset : offset + 2 * batch_size].reshape(2, batch_size)
  found = segment_indices(KEY, first_step, num_steps=2, batch_size=batch_size, num_examples=num_examples)
  np.testing.assert_array_equal(found, expected)


def test_is_the_same_under_x64():
  segment = functools.partial(segment_indices, KEY, num_steps=5, batch_size=3, num_examples=7)
  expected = segment(4)
  with jax.enable_x64(True):
    found = segment(4)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"batch_size": 11}, "batch_size=11 is larger than the data set of 10"),
    ({"batch_size": 0}, "at least 1"),
    ({"num_steps": 0}, "at least 1"),
    ({"num_examples": 2**30}, "num_examples=1073741824 is more"),
    ({"num_steps": 2**28, "batch_size": 10}, "cut the segment"),
  ],
)
def test_refuses_sizes_that_cannot_be_read(sizes, message):
  with pytest.raises(ValueError, match=message):
    segment_indices(KEY, 0, **{"num_steps": 2, "batch_size": 2, "num_examples": 10} | sizes)


@pytest.mark.parametrize(("first_step", "epochs"), [(0, 2), (1, 3), (2, 2), (3, 3), (10**9, 2)])
def test_only_epochs_that_are_read_are_drawn(first_step, epochs, monkeypatch):
  """Four steps of 4 of 8 examples are two epochs, or parts of three."""
  drawn = []
  permutation = order.epoch_permutation

  def counted(key, epoch, num_examples):
    jax.debug.callback(lambda epoch: drawn.append(int(epoch)), epoch)
    return permutation(key, epoch, num_examples)

  monkeypatch.setattr(order, "epoch_permutation", counted)
  order.segment_indices(jax.random.key(0), first_step, num_steps=4, batch_size=4, num_examples=8).block_until_ready()
  jax.effects_barrier()
  assert sorted(drawn) == [first_step // 2 + i for i in range(epochs)]
