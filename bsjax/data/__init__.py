"""Data sets by name, and the order in which their examples are read."""

from bsjax.data.load import DataError, load_source
from bsjax.data.order import epoch_permutation, independent_indices, segment_indices
from bsjax.data.source import RecordSource, Source, Spec

__all__ = [
  "DataError",
  "RecordSource",
  "Source",
  "Spec",
  "epoch_permutation",
  "independent_indices",
  "load_source",
  "segment_indices",
]
