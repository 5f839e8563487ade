"""Data sets by name, and the order in which their examples are read."""

from bsjax.data.order import epoch_permutation, independent_indices, segment_indices
from bsjax.data.source import DataError, Source, load_source

__all__ = ["DataError", "Source", "epoch_permutation", "independent_indices", "load_source", "segment_indices"]
