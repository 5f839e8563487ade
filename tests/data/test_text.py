"""Texts: which tokens lie in which block, and the subwords of LM1B."""

import dataclasses
import hashlib
import sys

import numpy as np
import pytest

from bsjax.data import DATASETS, DataError, bpe, load_source
from bsjax.data.arrays import write_arrays
from bsjax.data.source import Spec
from tests.data.raw_files import SENTENCES, SHAKESPEARE, small_table, write_raw_files


@pytest.fixture
def shakespeare(tmp_path, monkeypatch):
  write_raw_files("tiny_shakespeare", tmp_path / "raw")
  small_table(monkeypatch, "tiny_shakespeare", tmp_path / "raw")
  return lambda split, length: load_source(
    "tiny_shakespeare", split, data_dir=tmp_path, manual_dir=tmp_path / "raw", length=length
  )


@pytest.mark.parametrize("length", [1, 7, 50])
def test_every_token_but_the_first_is_predicted_once(shakespeare, length):
  bounds = DATASETS["tiny_shakespeare"].splits
  for split in ("train", "validation", "test"):
    blocks = shakespeare(split, length).arrays["tokens"]
    text = SHAKESPEARE.encode()[bounds[split].start : bounds[split].stop]
    num_blocks = (len(text) - 1) // length
    assert (blocks.shape, blocks.dtype) == ((num_blocks, length + 1), np.uint8)
    assert blocks[:, 1:].tobytes() == text[1 : 1 + num_blocks * length]  # what is predicted
    assert blocks[:, :-1].tobytes() == text[: num_blocks * length]  # from what
    assert len(text) - 1 - num_blocks * length < length  # what is dropped


def test_a_text_too_short_for_one_block_is_an_empty_split(shakespeare):
  size = DATASETS["tiny_shakespeare"].splits["test"]
  longest = size.stop - size.start - 1
  assert len(shakespeare("test", longest)) == 1
  with pytest.raises(DataError, match=f"split 'test' of tiny_shakespeare holds no example of length {longest + 1}"):
    shakespeare("test", longest + 1)


def test_domains_are_cut_between_two_plays(tmp_path, monkeypatch):
  """On numbers in place of the text: the two domains together are all of it, in its order."""
  for name in ("tiny_shakespeare_tragedies", "tiny_shakespeare_comedies"):
    numbers = {"tokens": Spec((), np.dtype(np.int32))}
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], example=numbers))
  parts = {"train": 1_003_854, "validation": 55_770, "test": 55_770}
  start = 0
  for part, size in parts.items():
    path = tmp_path / "arrays" / "tiny_shakespeare" / f"{part}.npz"
    write_arrays(path, {"tokens": np.arange(start, start + size, dtype=np.int32)})
    start += size
  pieces = [
    load_source(f"tiny_shakespeare_{domain}", split, data_dir=tmp_path, length=1).arrays["tokens"]
    for domain in ("tragedies", "comedies")
    for split in ("train", "validation", "test")
  ]
  ends = [(piece[0, 0], piece[-1, 1]) for piece in pieces]
  assert [first for first, _ in ends] == [0] + [last + 1 for _, last in ends[:-1]]
  assert ends[-1][1] == 1_115_394 - 1
  assert ends[3][0] == 710_427


# LM1B.


@pytest.fixture
def lm1b(tmp_path, monkeypatch):
  pytest.importorskip("sentencepiece", reason="the optional sentencepiece is not installed")
  write_raw_files("lm1b", tmp_path / "raw")
  small_table(monkeypatch, "lm1b", tmp_path / "raw", num_labels=300)
  return lambda split, length=4: load_source(
    "lm1b", split, data_dir=tmp_path, manual_dir=tmp_path / "raw", length=length
  )


def decoded(source, folder):
  """The sentences of a source of length 1, by SentencePiece itself."""
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "arrays" / "lm1b" / "bpe.model"))
  tokens = [int(source.arrays["tokens"][0, 0]), *source.arrays["tokens"][:, 1].tolist()]
  sentences, sentence = [], []
  for token in tokens:
    if token == 0:
      sentences.append(processor.decode(sentence))
      sentence = []
    else:
      sentence.append(token)
  assert not sentence  # the last one is ended, too
  return sentences


def test_subwords_hold_all_sentences_each_with_its_end(lm1b, tmp_path):
  lines = {part: [] for part in ("training", "heldout")}
  for file, sentences in SENTENCES.items():
    lines[file.split("-")[0]] += [sentence.strip() for sentence in sentences]
  train, validation, test = (lm1b(split, length=1) for split in ("train", "validation", "test"))
  assert sorted(decoded(train, tmp_path)) == sorted(lines["training"])  # the one with a letter outside ASCII, too
  assert sorted(decoded(validation, tmp_path) + decoded(test, tmp_path)) == sorted(lines["heldout"])
  assert (len(decoded(validation, tmp_path)), len(decoded(test, tmp_path))) == (4, 5)
  tokens = train.arrays["tokens"]
  assert tokens.dtype == np.uint16
  assert tokens.max() < 300


def test_the_name_in_records_tells_the_vocabulary(lm1b, tmp_path):
  first = lm1b("validation")
  vocabulary = tmp_path / "arrays" / "lm1b" / "bpe.model"
  digest = hashlib.sha256(vocabulary.read_bytes()).hexdigest()[:8]
  assert first.name == f"lm1b_bpe300_{digest}"
  # Learned again it is the same, and so is the name; what another vocabulary encoded is not taken for its own.
  vocabulary.unlink()
  assert lm1b("train").name == first.name
  vocabulary.write_bytes(bpe.train_bpe([[b"another text"] * 9], 270))
  again = lm1b("validation")
  assert again.name != first.name
  assert sorted(path.name for path in vocabulary.parent.glob("test[[]:4*.npz")) == sorted(
    f"test[:4]_{source.name[-8:]}.npz" for source in (first, again)
  )


def test_what_was_encoded_is_read_without_the_optional_package(lm1b, monkeypatch):
  first = lm1b("validation")
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  again = lm1b("validation")
  assert again.name == first.name
  np.testing.assert_array_equal(again.arrays["tokens"], first.arrays["tokens"])


@pytest.mark.parametrize("damage", [lambda model: b"", lambda model: model[:-100], lambda model: b"no model"])
def test_a_damaged_vocabulary_is_one_line(lm1b, tmp_path, damage):
  lm1b("validation")
  vocabulary = tmp_path / "arrays" / "lm1b" / "bpe.model"
  vocabulary.write_bytes(damage(vocabulary.read_bytes()))
  with pytest.raises(DataError, match=rf"^{vocabulary} is damaged; delete it, and it is learned again\.$"):
    lm1b("validation")


def test_too_few_sentences_for_the_vocabulary_is_one_line(lm1b, monkeypatch):
  monkeypatch.setitem(DATASETS, "lm1b", dataclasses.replace(DATASETS["lm1b"], num_labels=32_000))
  with pytest.raises(DataError, match=r"^no vocabulary of 32,000 subwords: [^\n]*$"):
    lm1b("train")
