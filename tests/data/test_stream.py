"""What is read ahead: the order of the compiled path, the same global batches for any number of processes, and what a bad record does."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from bsjax.data import (
  DataError,
  RecordSource,
  Source,
  Spec,
  independent_indices,
  order,
  read_ahead,
  stream,
  stream_batches,
)

KEY = jax.random.key(3)
segment_indices = jax.jit(order.segment_indices, static_argnames=("num_steps", "batch_size", "num_examples"))
SPEC = {"x": Spec((2,), np.dtype(np.float32)), "label": Spec((), np.dtype(np.int32))}


class Records:
  """Example i is the number i, and says how many were asked for at once; those in `bad` cannot be read."""

  def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
    self.count, self.bad, self.asked = count, bad, []

  def __len__(self) -> int:
    return self.count

  def __getitems__(self, indices: Sequence[int]) -> list[int]:
    self.asked.append(len(indices))
    for index in indices:
      if index in self.bad:
        raise OSError(f"crc of record {index} is wrong\nand more that nobody reads")
    return list(indices)


def decode(record: int) -> dict[str, Any]:
  return {"x": np.array([record, -record], np.float32), "label": np.int32(record)}


def numbers(count: int, bad: tuple[int, ...] = ()) -> RecordSource:
  return RecordSource("numbers", "train", Records(count, bad), decode, SPEC)


def labels(source: Source | RecordSource, first_step: int = 0, **options: Any) -> np.ndarray:
  return np.stack([batch["label"] for batch in stream_batches(source, KEY, first_step, **options)])


# Even division, batches that span epochs, B = 1 and B = N.
@pytest.mark.parametrize(("num_examples", "batch_size"), [(12, 4), (10, 7), (7, 1), (9, 9)])
def test_batches_are_those_of_the_compiled_order(num_examples, batch_size):
  sizes = {"num_steps": 11, "batch_size": batch_size}
  expected = segment_indices(KEY, 8, **sizes, num_examples=num_examples)
  for source in (numbers(num_examples), numbers(num_examples).first(num_examples)):
    np.testing.assert_array_equal(labels(source, 8, **sizes), expected)


def test_batches_with_replacement_are_those_of_the_compiled_order():
  sizes = {"num_steps": 5, "batch_size": 6}
  found = labels(numbers(10), 3, **sizes, with_replacement=True)
  np.testing.assert_array_equal(found, independent_indices(KEY, 3, **sizes, num_examples=10))


def test_steps_beyond_32_bit_positions():
  sizes = {"num_steps": 2, "batch_size": 999}
  expected = segment_indices(KEY, 123_456_789, **sizes, num_examples=1000)
  np.testing.assert_array_equal(labels(numbers(1000), 123_456_789, **sizes), expected)


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(process_count):
  sizes = {"num_steps": 7, "batch_size": 8}
  shares = [
    labels(numbers(10), **sizes, process_index=index, process_count=process_count) for index in range(process_count)
  ]
  assert {share.shape for share in shares} == {(7, 8 // process_count)}
  np.testing.assert_array_equal(np.concatenate(shares, axis=1), labels(numbers(10), **sizes))


def test_what_cannot_be_read_is_refused_before_anything_is():
  with pytest.raises(ValueError, match="batch_size=6 cannot be shared by 4 processes: use a multiple of 4"):
    stream_batches(numbers(10), KEY, 0, num_steps=1, batch_size=6, process_count=4)
  with pytest.raises(ValueError, match="batch_size=11 is larger than the data set of 10"):
    stream_batches(numbers(10), KEY, 0, num_steps=1, batch_size=11)


def test_a_source_is_asked_for_pieces_and_not_far_ahead(monkeypatch):
  """Batches of 8 examples of 12 bytes in pieces of at most 3 examples; never more than `PIECES_AHEAD` of them beyond what was taken."""
  monkeypatch.setattr(stream, "READ_BYTES", 36)
  monkeypatch.setattr(stream, "PIECES_AHEAD", 4)
  monkeypatch.setattr(stream, "READ_THREADS", 2)
  source = numbers(50)
  records = source.records
  assert isinstance(records, Records)
  sizes = {"num_steps": 30, "batch_size": 8}
  expected = segment_indices(KEY, 0, **sizes, num_examples=50)
  for step, batch in enumerate(stream_batches(source, KEY, 0, **sizes), start=1):
    np.testing.assert_array_equal(batch["x"], np.stack([expected[step - 1], -expected[step - 1]], axis=1))
    time.sleep(0.001)  # so that threads would run further if they could
    assert len(records.asked) <= 3 * step + 4
  assert max(records.asked) == 3
  assert sum(records.asked) == 30 * 8


def test_examples_larger_than_a_piece_are_read_one_by_one(monkeypatch):
  monkeypatch.setattr(stream, "READ_BYTES", 5)
  source = numbers(6)
  (batch,) = read_ahead(source, lambda _: np.array([4, 0, 5]), count=1, size=3)
  assert batch["label"].tolist() == [4, 0, 5]
  assert source.records.asked == [1, 1, 1]


def test_a_bad_record_is_named_when_its_turn_comes():
  """The batches before it are whole, though the threads met it long before they were taken."""
  expected = np.asarray(segment_indices(KEY, 0, num_steps=5, batch_size=2, num_examples=10))
  bad = int(expected[3, 1])
  batches = stream_batches(numbers(10, bad=(bad,)), KEY, 0, num_steps=5, batch_size=2)
  assert [next(batches)["label"].tolist() for _ in range(3)] == expected[:3].tolist()
  with pytest.raises(
    DataError, match=rf"example {bad} of split 'train' of numbers cannot be read: OSError: crc"
  ) as raised:
    next(batches)
  assert "\n" not in str(raised.value)


def test_no_examples_have_the_shapes_of_examples():
  fetched = numbers(10).fetch(np.array([], np.int64))
  some = numbers(10).fetch(np.array([3, 4]))
  assert {name: (array.shape, array.dtype) for name, array in fetched.items()} == {
    name: ((0, *array.shape[1:]), array.dtype) for name, array in some.items()
  }


def test_a_record_that_does_not_decode_is_named():
  def broken(record: int) -> dict[str, Any]:
    return {"x": np.zeros(2 + (record == 7), np.float32), "label": np.int32(record)}

  source = RecordSource("numbers", "test", Records(10), broken, SPEC)
  with pytest.raises(DataError, match="examples 5, 7 of split 'test' of numbers cannot be read: ValueError"):
    source.fetch(np.array([5, 7]))  # each stacks by itself
  source = RecordSource("numbers", "test", Records(10), lambda record: {}, SPEC)
  with pytest.raises(DataError, match="example 5 of split 'test' of numbers cannot be read: KeyError"):
    source.fetch(np.array([5, 7]))


def test_threads_end_with_the_stream():
  """Whether it is read to its end, closed, or ends in an error."""

  def reading() -> int:
    return sum(thread.name.startswith("grain-prefetch") for thread in threading.enumerate())

  for ways in ("read", "closed", "raised"):
    bad = tuple(range(10)) if ways == "raised" else ()
    batches = stream_batches(numbers(10, bad), KEY, 0, num_steps=50, batch_size=2)
    if ways == "raised":
      with pytest.raises(DataError):
        next(batches)
    else:
      next(batches)
      assert reading() > 0
      list(batches) if ways == "read" else batches.close()  # type: ignore[attr-defined]
    until = time.monotonic() + 20
    while reading() and time.monotonic() < until:
      time.sleep(0.01)
    assert reading() == 0, ways
