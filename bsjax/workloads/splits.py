"""The three splits of a named workload's data, and where they come from."""

from typing import TypedDict

from bsjax.data import RecordSource, Source, load_source

Splits = tuple[Source | RecordSource, Source | RecordSource, Source | RecordSource]
"""The train, validation and test splits."""


class DataOptions(TypedDict, total=False):
  """Where the data of a named workload come from: its own keyword arguments, all optional."""

  data_dir: str | None
  """Where prepared data sets lie, or go."""
  manual_dir: str | None
  """Where raw files lie already."""
  fake_data: bool
  """Random data of the right shapes instead, without any file."""


def load_splits(
  dataset: str,
  *,
  length: int | None = None,
  data_dir: str | None = None,
  manual_dir: str | None = None,
  fake_data: bool = False,
) -> Splits:
  """Loads the three splits of a data set; of a text, with examples that predict `length` tokens."""
  train, validation, test = (
    load_source(dataset, split, data_dir=data_dir, manual_dir=manual_dir, fake=fake_data, length=length)
    for split in ("train", "validation", "test")
  )
  return train, validation, test
