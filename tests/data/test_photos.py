"""ImageNet: photographs read record by record, on a copy of twelve that is prepared here, in the stock format, without TensorFlow."""

import dataclasses
import importlib.util
import io
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bsjax.data import DATASETS, DataError, RecordSource, Split, load_source, prepare, prepare_data
from bsjax.data.read import decode_photo

SIZES = [(300, 400), (400, 300), (256, 256), (100, 150)]  # height, width
PARTS = {"train": 12, "validation": 4}


def photo(number):
  """Smooth, so that JPEG changes little: a ramp from left to right and one from top to bottom."""
  height, width = SIZES[number % len(SIZES)]
  down, right = np.mgrid[:height, :width]
  colours = [255 * right / width, 255 * down / height, np.full((height, width), 20 * number)]
  return np.stack(colours, -1).astype(np.uint8)


def jpeg(pixels, mode="RGB"):
  content = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(content, "jpeg", quality=95)
  return content.getvalue()


def label(number):
  return (499, 500, 0, 999)[number % 4]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  """A prepared copy."""
  stock = tfds.builder_cls("imagenet2012")
  root = tmp_path_factory.mktemp("photos")

  class Twelve(stock, skip_registration=True):
    name = "imagenet2012"
    pkg_dir_path = stock._get_pkg_dir_path()
    url_infos = stock.url_infos
    MANUAL_DOWNLOAD_INSTRUCTIONS = None

    def _split_generators(self, dl_manager):
      return {part: self._generate_examples(count) for part, count in PARTS.items()}

    def _generate_examples(self, count):
      for number in range(count):
        image = io.BytesIO(jpeg(photo(number)))
        yield f"n{number}.JPEG", {"image": image, "label": label(number), "file_name": f"n{number}.JPEG"}

  with prepare.quiet(DATASETS["imagenet2012"]):
    Twelve(data_dir=root, file_format="array_record").download_and_prepare()
  return root


@pytest.fixture
def table(monkeypatch):
  """The rows of the table, made as small as the copy."""
  test = Split(("validation",), 0, 4)
  splits = {"train": Split(("train",), 0, 9), "validation": Split(("train",), 9, 12), "test": test}
  for name in ("imagenet2012", "imagenet2012_half_classes"):
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], parts=PARTS, splits=splits))


def records(copy, part):
  return list(tfds.data_source("imagenet2012", split=part, data_dir=copy, download=False))


def test_examples_are_those_of_the_copy_in_its_order(copy, table):
  train, validation, test = (load_source("imagenet2012", split, data_dir=copy) for split in DATASETS["mnist"].splits)
  stored = records(copy, "train")
  assert [len(train), len(validation), len(test)] == [9, 3, 4]
  assert isinstance(train, RecordSource)
  assert train.nbytes == 9 * (256 * 256 * 3 + 4)
  fetched = [*train.fetch(np.arange(9))["label"], *validation.fetch(np.arange(3))["label"]]
  assert fetched == [record["label"] for record in stored]
  assert test.fetch(np.array([3, 0]))["label"].tolist() == [records(copy, "validation")[n]["label"] for n in (3, 0)]
  for name, spec in train.spec.items():
    array = train.fetch(np.array([2, 5]))[name]
    assert (array.shape, array.dtype) == ((2, *spec.shape), spec.dtype)


@pytest.mark.parametrize("number", range(4))
def test_the_middle_of_the_photograph_is_kept_in_proportion(copy, number):
  """The ramps tell where a pixel came from: at the centre both are a half, and across 256 pixels they rise by 256 / their length."""
  height, width = SIZES[number]
  scale = 256 / min(height, width)
  content = {"image": jpeg(photo(number)), "label": 1, "file_name": b"n.JPEG"}
  image = decode_photo(content, DATASETS["imagenet2012"], copy)["image"].astype(float)
  position = (np.arange(256) + 0.5 - 128) / 256
  expected_right = 255 * (0.5 + position * 256 / (width * scale))
  expected_down = 255 * (0.5 + position * 256 / (height * scale))
  # JPEG at quality 95 and rounding move a smooth pixel by 3 of 255 at most (colour is stored at half resolution).
  inner = slice(4, -4)
  np.testing.assert_allclose(image[128, inner, 0], expected_right[inner], atol=4)
  np.testing.assert_allclose(image[inner, 128, 1], expected_down[inner], atol=4)


def test_grey_photographs_become_colour(copy):
  content = {"image": jpeg(photo(0), "L"), "label": 1, "file_name": b"n.JPEG"}
  image = decode_photo(content, DATASETS["imagenet2012"], copy)["image"]
  assert image.shape == (256, 256, 3)
  assert (image[..., 0] == image[..., 2]).all()


def test_half_of_the_classes_are_those_below_500(copy, table):
  for split, rows in (("train", slice(0, 9)), ("validation", slice(9, 12))):
    stored = [record["label"] for record in records(copy, "train")[rows]]
    source = load_source("imagenet2012_half_classes", split, data_dir=copy)
    assert source.fetch(np.arange(len(source)))["label"].tolist() == [number for number in stored if number < 500]
    assert 0 < len(source) < len(stored)


def test_a_split_without_examples_is_refused(copy, table, monkeypatch):
  nowhere = dataclasses.replace(DATASETS["imagenet2012_half_classes"], labels=range(1, 499))
  monkeypatch.setitem(DATASETS, "imagenet2012_half_classes", nowhere)
  with pytest.raises(DataError, match=r"split 'test' of imagenet2012_half_classes holds no example\."):
    load_source("imagenet2012_half_classes", "test", data_dir=copy)


def test_preparing_counts_labels_for_the_half_of_classes_only(copy, table, tmp_path):
  root = shutil.copytree(copy / "imagenet2012", tmp_path / "imagenet2012").parent
  prepare_data("imagenet2012", data_dir=root)
  assert not (root / "arrays").exists()
  prepare_data("imagenet2012_half_classes", data_dir=root)
  with np.load(root / "arrays" / "imagenet2012" / "train.npz") as kept:
    assert kept.files == ["label"]
    assert kept["label"].tolist() == [record["label"] for record in records(copy, "train")]


# Damage.


def flip_a_byte(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 1
  path.write_bytes(content)


def test_flipped_bytes_of_a_record_are_an_error_when_it_is_fetched(copy, table, tmp_path):
  root = shutil.copytree(copy, tmp_path / "copy")
  shard = root / "imagenet2012" / "5.1.0" / "imagenet2012-train.array_record-00000-of-00001"
  source = load_source("imagenet2012", "train", data_dir=root)
  for position in (70, 5_000, 20_000):
    whole = shard.read_bytes()
    flip_a_byte(shard, position)
    with pytest.raises(DataError, match=r"imagenet2012/5\.1\.0 cannot be read: .*[Cc]orrupted.*; delete it") as error:
      load_source("imagenet2012", "train", data_dir=root).fetch(np.arange(9))
    assert "\n" not in str(error.value)
    shard.write_bytes(whole)
  assert source.fetch(np.arange(9))["image"].shape == (9, 256, 256, 3)


def _cut_short(folder):
  shard = folder / "imagenet2012-train.array_record-00000-of-00001"
  shard.write_bytes(shard.read_bytes()[:-1000])


def _exchange_files(folder):
  """The training file holds as many records as that of validation."""
  shutil.copy(*(folder / f"imagenet2012-{part}.array_record-00000-of-00001" for part in ("validation", "train")))


@pytest.mark.parametrize(
  ("damage", "what"),
  [
    (lambda folder: (folder / "imagenet2012-train.array_record-00000-of-00001").unlink(), "No such file"),
    (_cut_short, "train.array_record"),
    (_exchange_files, "train.array_record-00000-of-00001 holds 4 records of 12"),
    (lambda folder: (folder / "dataset_info.json").unlink(), ""),
    (lambda folder: (folder / "dataset_info.json").write_text(""), "ParseError"),
    (lambda folder: shutil.rmtree(folder) or folder.mkdir(), ""),
  ],
)
def test_a_copy_of_only_some_files_is_not_taken_for_whole(copy, table, tmp_path, damage, what):
  root = shutil.copytree(copy, tmp_path / "copy")
  damage(root / "imagenet2012" / "5.1.0")
  for call in (
    lambda: prepare_data("imagenet2012", data_dir=root),
    lambda: load_source("imagenet2012", "train", data_dir=root),
  ):
    with pytest.raises(
      DataError, match=f"/copy/imagenet2012.* read: .*{what}.*; delete it, or pass another --data_dir"
    ) as error:
      call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image": b"no photograph"}, r"n\.JPEG cannot be decoded: UnidentifiedImageError: .*; delete it"),
    ({"image": jpeg(photo(0))[:4000]}, r"n\.JPEG cannot be decoded: OSError: .*truncated.*; delete it"),
    ({"label": 1000}, r"n\.JPEG has label 1000, wanted 0\.\.999"),
    ({"label": -1}, r"n\.JPEG has label -1, wanted 0\.\.999"),  # the official test part
  ],
)
def test_bad_photographs_are_named(copy, change, message):
  content = {"image": jpeg(photo(0)), "label": 1, "file_name": b"n.JPEG"} | change
  with pytest.raises(DataError, match=message):
    decode_photo(content, DATASETS["imagenet2012"], copy)


# Preparing.


def without_tensorflow(monkeypatch, found):
  monkeypatch.setattr(importlib.util, "find_spec", lambda module: object() if found else None)


def test_preparing_says_how_to_install_tensorflow(tmp_path, monkeypatch):
  without_tensorflow(monkeypatch, found=False)
  with pytest.raises(
    DataError,
    match=r"imagenet2012 needs tensorflow to be prepared, .*: pip install tensorflow-cpu==.* \(the extra bsjax\[tf\]\)",
  ):
    load_source("imagenet2012_half_images", "train", data_dir=tmp_path)


def test_files_that_ask_to_register_are_never_downloaded(tmp_path, monkeypatch):
  without_tensorflow(monkeypatch, found=True)
  monkeypatch.setattr(prepare, "_answers", lambda url: True)
  with pytest.raises(DataError, match=r"needs ILSVRC2012_img_train\.tar.*www\.image-net\.org, which asks to register"):
    load_source("imagenet2012", "train", data_dir=tmp_path)
  (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"x")
  with pytest.raises(DataError, match=r"img_val\.tar of imagenet2012: expected 6,744,924,160 bytes .*, found 1 bytes"):
    load_source("imagenet2012", "train", data_dir=tmp_path)
