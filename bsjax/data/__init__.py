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
from bsjax.data.load import DataError, load_source
from bsjax.data.order import epoch_permutation, independent_indices, segment_indices
from bsjax.data.source import RecordSource, Source, Spec

__all__ = [
  "Augment",
  "DataError",
  "RecordSource",
  "Source",
  "Spec",
  "augment_batch",
  "center_crop",
  "chain",
  "epoch_permutation",
  "flip",
  "independent_indices",
  "load_source",
  "rotated_shift",
  "scaled_crop",
  "segment_indices",
  "shifted_crop",
]
