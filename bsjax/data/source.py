"""One split of a data set: all of it in memory, or read record by record."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


class DataError(ValueError):
  """Says in one line why a data set could not be loaded or read, and what to do."""


class Spec(NamedTuple):
  """Shape and dtype of one example's array, without the axis of examples."""

  shape: tuple[int, ...]
  dtype: np.dtype[Any]

  @property
  def nbytes(self) -> int:
    """Bytes of one example."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Examples(Protocol):
  """A sequence of records that fetches several at once, as `tfds.data_source` does."""

  def __len__(self) -> int: ...

  def __getitems__(self, indices: Sequence[int], /) -> Sequence[Any]: ...


@dataclass(frozen=True, eq=False)
class Source:
  """One split of a data set in host memory: `arrays = {"image": u8[N, H, W, C], "label": i32[N]}`, in a fixed order."""

  name: str
  split: str
  arrays: Mapping[str, np.ndarray]

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values())))

  @property
  def spec(self) -> dict[str, Spec]:
    """What one example holds."""
    return {name: Spec(array.shape[1:], array.dtype) for name, array in self.arrays.items()}

  @property
  def nbytes(self) -> int:
    """Bytes of the whole split."""
    return len(self) * sum(spec.nbytes for spec in self.spec.values())

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples at `indices`, i[n], stacked: `{name: [n, ...]}`."""
    return {name: array[indices] for name, array in self.arrays.items()}

  def first(self, count: int) -> "Source":
    """Returns the split of the first `count` examples, or of all where there are fewer, in memory."""
    return Source(self.name, self.split, {name: array[:count] for name, array in self.arrays.items()})


@dataclass(frozen=True, eq=False)
class RecordSource:
  """One split of a data set too large for memory: examples are read, and decoded, when they are asked for.

  Attributes:
    records: the records on disk, in a fixed order.
    decode: a record -> `{name: array}` of one example, of the shapes and dtypes of `spec`.
  """

  name: str
  split: str
  records: Examples
  decode: Callable[[Any], Mapping[str, np.ndarray]]
  spec: Mapping[str, Spec]

  def __len__(self) -> int:
    return len(self.records)

  @property
  def nbytes(self) -> int:
    """Bytes of the whole split, decoded."""
    return len(self) * sum(spec.nbytes for spec in self.spec.values())

  def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples at `indices`, i[n], stacked: `{name: [n, ...]}`.

    Raises:
      DataError: a record that cannot be read or decoded, by name, split and number.
    """
    if not len(indices):  # `np.stack` wants at least one
      return {name: np.empty((0, *spec.shape), spec.dtype) for name, spec in self.spec.items()}
    try:
      rows = [self.decode(record) for record in self.records.__getitems__([int(index) for index in indices])]
      return {name: np.stack([row[name] for row in rows]) for name in self.spec}
    except Exception as error:  # whoever reads and decodes promises no type
      if len(indices) > 1:
        for index in indices:  # which of them is it?
          self.fetch(np.array([index]))
      which = f"example{'s' * (len(indices) > 1)} {', '.join(str(index) for index in indices)}"
      what = f"{type(error).__name__}: {error}".splitlines()[0].strip()
      reason = error if isinstance(error, DataError) else f"{what}; prepare the data set anew"
      raise DataError(f"{which} of split {self.split!r} of {self.name} cannot be read: {reason}") from error

  def first(self, count: int) -> Source:
    """Returns the split of the first `count` examples, or of all where there are fewer, in memory."""
    return Source(self.name, self.split, self.fetch(np.arange(min(count, len(self)))))

  @functools.cached_property
  def arrays(self) -> dict[str, np.ndarray]:
    """The whole split in memory, decoded once: `nbytes` of it."""
    return dict(self.first(len(self)).arrays)
