"""Data sets by name, and the order in which their examples are read."""

from bsjax.data.augment import (
  Augment,
  augment_batch,
  center_crop,
  chain,
  flip,
  rotated_shift,
  scaled_crop,
  shifted_crop,
)
from bsjax.data.datasets import DATASETS, Dataset, Split, split_size
from bsjax.data.load import describe_data, is_prepared, load_source, prepare_data
from bsjax.data.order import epoch_permutation, independent_indices, segment_indices
from bsjax.data.prepare import describe_needs
from bsjax.data.source import DataError, RecordSource, Source, Spec
from bsjax.data.stream import read_ahead, stream_batches

__all__ = [
  "DATASETS",
  "Augment",
  "DataError",
  "Dataset",
  "RecordSource",
  "Source",
  "Spec",
  "Split",
  "augment_batch",
  "center_crop",
  "chain",
  "describe_data",
  "describe_needs",
  "epoch_permutation",
  "flip",
  "independent_indices",
  "is_prepared",
  "load_source",
  "prepare_data",
  "read_ahead",
  "rotated_shift",
  "scaled_crop",
  "segment_indices",
  "shifted_crop",
  "split_size",
  "stream_batches",
]
