"""Subwords of LM1B: a vocabulary that is learned once from the data, and kept beside them.

Byte-pair encoding by SentencePiece, because it is one package without dependencies and needs no download. Text is not
normalised, and a character outside the vocabulary becomes its bytes, so that nothing is lost. The papers' vocabularies were not
found, so losses per token cannot be compared with theirs; the digest of ours is part of the data set's name in records.
"""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bsjax.data.source import DataError

_NUM_SENTENCES = 1_000_000  # to learn from; more would change rare words only
_EOS_ID, _UNKNOWN_ID, _NONE = 0, 1, -1


def train_bpe(texts: Iterable[list[bytes]], vocabulary_size: int) -> bytes:
  """Learns a vocabulary from the first million sentences and returns SentencePiece's model file: token 0 ends a sentence.

  Raises:
    DataError: the sentences are too few for a vocabulary of this size.
  """
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=itertools.islice((text.decode() for chunk in texts for text in chunk), _NUM_SENTENCES),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocabulary_size,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      eos_id=_EOS_ID,
      unk_id=_UNKNOWN_ID,
      bos_id=_NONE,
      pad_id=_NONE,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise DataError(f"no vocabulary of {vocabulary_size:,} subwords: {' '.join(str(error).split())}") from error
  return model.getvalue()


def encode_sentences(model: Path, texts: Iterable[list[bytes]]) -> Iterator[np.ndarray]:
  """Yields the tokens of each chunk of sentences, u16[T]: one sentence after the other, each with its end.

  Raises:
    DataError: `model` is not a model file.
  """
  import sentencepiece

  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    processor.encode("")  # an empty file fails here only
  except RuntimeError as error:
    raise DataError(f"{model} is damaged; delete it, and it is learned again.") from error
  for chunk in texts:
    sentences = processor.encode([text.decode() for text in chunk], add_eos=True)
    yield np.concatenate([np.asarray(sentence, np.uint16) for sentence in sentences])


def digest(path: Path) -> str:
  """Returns the first eight digits of the SHA-256 of a vocabulary: enough to tell two apart."""
  return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
