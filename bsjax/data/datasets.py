"""The table of data sets: what each is made of, how it is split, and what one example holds.

A data set of this table is a *selection* from the official parts of a TFDS data set, so that subsets cost no preparation of
their own: `mnist_6875` reads the copy of `mnist`. Names say what differs from the plain name, and go into records as they are.

Rules: `train` and `validation` are cut from the official training part, in TFDS's order (a hash of the keys: as good as random, and the
same everywhere); `test` is the official test part. Data sets named `..._all` train on the whole official training part, as papers
without a validation set do, and both `validation` and `test` are the official test part: choose nothing by them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bsjax.data.source import DataError, Spec


class Split(NamedTuple):
  """Items `start .. stop - 1` (all, where `stop` is None) of official parts, one after the other: examples; in a text, tokens.

  `labelled` counts those whose label the data set keeps, if it keeps only some.
  """

  parts: tuple[str, ...]
  start: int = 0
  stop: int | None = None
  labelled: int | None = None


@dataclass(frozen=True)
class Dataset:
  """One row of the table.

  Attributes:
    tfds_name: what TFDS calls the data set that is prepared.
    builder: `module:Class` of the builder in `bsjax.data` that prepares it; empty for TFDS's own, which needs TensorFlow.
    parts: the official parts that are read (in TFDS's notation), with their numbers of records.
    example: what one example holds; in a text, what one token is.
    num_labels: the number of labels of the official parts, or of tokens in the vocabulary.
    splits: `train`, `validation` and `test`.
    labels: keeps the examples with these labels, renumbered from 0; None keeps all.
    pixel_max: the largest value of a pixel.
    by_record: read record by record (`RecordSource`), because the whole would not fit into memory.
    extra: the extra of the package (`bsjax[EXTRA]`) without which it cannot be prepared; empty for none.
  """

  tfds_name: str
  builder: str
  parts: Mapping[str, int]
  example: Mapping[str, Spec]
  num_labels: int
  splits: Mapping[str, Split]
  labels: range | None = None
  pixel_max: int = 255
  by_record: bool = False
  extra: str = ""

  @property
  def num_classes(self) -> int:
    """C: labels are 0..C-1, and so are tokens."""
    return self.num_labels if self.labels is None else len(self.labels)

  @property
  def is_text(self) -> bool:
    """Whether examples are blocks of tokens, whose length the reader chooses."""
    return "tokens" in self.example

  @property
  def has_subwords(self) -> bool:
    """Whether tokens are subwords of a vocabulary that is learned from the data; bytes otherwise."""
    return self.is_text and self.num_labels > 256


def find_dataset(name: str) -> Dataset:
  """Returns the row of this name.

  Raises:
    DataError: there is none.
  """
  if name not in DATASETS:
    raise DataError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}.")
  return DATASETS[name]


def split_size(dataset: Dataset, split: str) -> int | None:
  """Returns how many examples (in a text, tokens) a split has; None where only counting can tell."""
  _, start, stop, labelled = dataset.splits[split]
  if dataset.labels is not None:
    return labelled
  return None if stop is None else stop - start


def _images(height: int, width: int, channels: int) -> dict[str, Spec]:
  return {"image": Spec((height, width, channels), np.dtype(np.uint8)), "label": Spec((), np.dtype(np.int32))}


def _tokens(dtype: type) -> dict[str, Spec]:
  return {"tokens": Spec((), np.dtype(dtype))}


def _held_out(num_train: int, num_official: int, test: Split) -> dict[str, Split]:
  """Trains on the first examples of the official training part and validates on its last."""
  return {
    "train": Split(("train",), 0, num_train),
    "validation": Split(("train",), num_train, num_official),
    "test": test,
  }


def _all(num_official: int, test: Split) -> dict[str, Split]:
  return {"train": Split(("train",), 0, num_official), "validation": test, "test": test}


def _with_train(dataset: Dataset, train: Split) -> Dataset:
  return dataclasses.replace(dataset, splits={**dataset.splits, "train": train})


def _classes(dataset: Dataset, labels: range, labelled: dict[str, int | None]) -> Dataset:
  """Keeps the examples of some classes: `labelled` of them in each split."""
  splits = {split: rows._replace(labelled=labelled[split]) for split, rows in dataset.splits.items()}
  return dataclasses.replace(dataset, splits=splits, labels=labels)


def _text_90_5_5(start: int, stop: int) -> dict[str, Split]:
  """Cuts a stretch of a text as TFDS cuts tiny_shakespeare: nine tenths, then half of the rest, then the rest."""
  parts = ("train", "validation", "test")
  train_stop = start + int((stop - start) * 0.9)
  validation_stop = train_stop + int((stop - train_stop) * 0.5)
  return {
    "train": Split(parts, start, train_stop),
    "validation": Split(parts, train_stop, validation_stop),
    "test": Split(parts, validation_stop, stop),
  }


_DIGITS = Dataset(
  "digits",
  "digits:Digits",
  {"train": 1024, "validation": 386, "test": 387},
  _images(8, 8, 1),
  10,
  {
    "train": Split(("train",), 0, 1024),
    "validation": Split(("validation",), 0, 386),
    "test": Split(("test",), 0, 387),
  },
  pixel_max=16,
)

# 55,000 and 5,000: Shallue et al. (2019), whose full batch of MNIST and Fashion-MNIST is 55,000.
_MNIST_TEST = Split(("test",), 0, 10_000)
_MNIST = Dataset(
  "mnist",
  "mnist:Mnist",
  {"train": 60_000, "test": 10_000},
  _images(28, 28, 1),
  10,
  _held_out(55_000, 60_000, _MNIST_TEST),
)

# 45,000 and 5,000: our choice, a tenth held out. We have no source for the split of Shallue et al. (2019).
_CIFAR10 = Dataset(
  "cifar10",
  "cifar:Cifar10",
  {"train": 50_000, "test": 10_000},
  _images(32, 32, 3),
  10,
  _held_out(45_000, 50_000, Split(("test",), 0, 10_000)),
)
_CIFAR100 = dataclasses.replace(_CIFAR10, tfds_name="cifar100", builder="cifar:Cifar100", num_labels=100)

# The 5,000 for validation are our choice.
_SVHN = Dataset(
  "svhn_cropped",
  "svhn:SvhnCropped",
  {"train": 73_257, "test": 26_032, "extra": 531_131},
  _images(32, 32, 3),
  10,
  _held_out(68_257, 73_257, Split(("test",), 0, 26_032)),
)

# The 50,000 for validation are our choice; the labels of the official test part are not public, so its validation part is our test.
_IMAGENET_TEST = Split(("validation",), 0, 50_000)
_IMAGENET = Dataset(
  "imagenet2012",
  "",
  {"train": 1_281_167, "validation": 50_000},
  _images(256, 256, 3),
  1000,
  _held_out(1_231_167, 1_281_167, _IMAGENET_TEST),
  by_record=True,
  extra="tf",
)

_SHAKESPEARE_LENGTH = 1_115_394
_SECOND_DOMAIN = (
  710_427  # where The Winter's Tale begins; it, Measure for Measure, The Taming of the Shrew and The Tempest follow
)
_SHAKESPEARE = Dataset(
  "tiny_shakespeare",
  "text:TinyShakespeare",
  {"train": 1, "validation": 1, "test": 1},
  _tokens(np.uint8),
  256,
  _text_90_5_5(0, _SHAKESPEARE_LENGTH),
)

# The held-out part has no fixed validation set: its first half is ours.
_LM1B = Dataset(
  "lm1b",
  "text:Lm1b",
  {"train": 30_301_028, "test[:153344]": 153_344, "test[153344:]": 153_344},
  _tokens(np.uint16),
  32_000,
  {"train": Split(("train",)), "validation": Split(("test[:153344]",)), "test": Split(("test[153344:]",))},
  extra="lm1b",
)

DATASETS: dict[str, Dataset] = {
  "digits": _DIGITS,
  "mnist": _MNIST,
  # Keskar et al. (2017): all 60,000, so that their 10 % batch is 6,000.
  "mnist_all": dataclasses.replace(_MNIST, splits=_all(60_000, _MNIST_TEST)),
  # Shallue et al. (2019), section 4.5: an eighth, a quarter and a half of the 55,000.
  "mnist_6875": _with_train(_MNIST, Split(("train",), 0, 6_875)),
  "mnist_13750": _with_train(_MNIST, Split(("train",), 0, 13_750)),
  "mnist_27500": _with_train(_MNIST, Split(("train",), 0, 27_500)),
  # For fine-tuning: pre-train on one half of the classes, fine-tune on the other.
  "mnist_0to4": _classes(_MNIST, range(5), {"train": 28_051, "validation": 2_545, "test": 5_139}),
  "mnist_5to9": _classes(_MNIST, range(5, 10), {"train": 26_949, "validation": 2_455, "test": 4_861}),
  "fashion_mnist": dataclasses.replace(_MNIST, tfds_name="fashion_mnist", builder="mnist:FashionMnist"),
  "kmnist": dataclasses.replace(_MNIST, tfds_name="kmnist", builder="mnist:Kmnist"),
  "svhn": _SVHN,
  # McCandlish et al. (2018), appendix A.4: the extended set, easier examples in front.
  "svhn_extra": _with_train(_SVHN, Split(("extra", "train"), 0, 531_131 + 68_257)),
  "cifar10": _CIFAR10,
  # Keskar et al. (2017): all 50,000, so that their 10 % batch is 5,000.
  "cifar10_all": dataclasses.replace(_CIFAR10, splits=_all(50_000, _CIFAR10.splits["test"])),
  "cifar100": _CIFAR100,
  "cifar100_all": dataclasses.replace(_CIFAR100, splits=_all(50_000, _CIFAR100.splits["test"])),
  "imagenet2012": _IMAGENET,
  # Goyal et al. (2017): all 1,281,167 to train on, error on the official validation part.
  "imagenet2012_all": dataclasses.replace(_IMAGENET, splits=_all(1_281_167, _IMAGENET_TEST)),
  # Shallue et al. (2019), section 4.5. Which images and which classes they kept was not found: ours are the first.
  "imagenet2012_half_images": _with_train(_IMAGENET, Split(("train",), 0, 640_583)),
  "imagenet2012_half_classes": _classes(_IMAGENET, range(500), {"train": None, "validation": None, "test": 25_000}),
  "tiny_shakespeare": _SHAKESPEARE,
  # Two domains for fine-tuning, cut between two plays: tragedies and histories, then comedies and romances.
  "tiny_shakespeare_tragedies": dataclasses.replace(_SHAKESPEARE, splits=_text_90_5_5(0, _SECOND_DOMAIN)),
  "tiny_shakespeare_comedies": dataclasses.replace(
    _SHAKESPEARE, splits=_text_90_5_5(_SECOND_DOMAIN, _SHAKESPEARE_LENGTH)
  ),
  "lm1b": _LM1B,
}
