"""The doctor as a whole, what its checks start from, and the bytes of a step."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import bsjax.study.diagnosis
import bsjax.study.doctor
import bsjax.study.doctor_data
import bsjax.study.doctor_program
from bsjax.data import RecordSource, Source
from bsjax.study.diagnosis import Diagnosis, compare, make_case
from bsjax.study.doctor import CHECKS, as_json, examine, needs_fixing
from bsjax.study.doctor_program import device_bytes, largest_batch, readable, step_bytes
from bsjax.types import Variables
from tests.study.examined import CLASSES, FEATURES, HIDDEN, broken, diagnose, good, logits


def test_a_good_workload_needs_no_fixing() -> None:
  begun: list[str] = []
  found = list(examine(good(), on_check=begun.append))
  assert [diagnosis.check for diagnosis in found] == list(CHECKS)
  assert begun == ["train_loss", *CHECKS]
  assert {diagnosis.check: diagnosis.message for diagnosis in found if diagnosis.status != "ok"} == {}
  assert not needs_fixing(found)
  assert found[0].numbers == {"num_params": FEATURES * HIDDEN + HIDDEN * CLASSES, "num_arrays": 2}


def test_a_smoke_run_evaluates_probes_and_trains() -> None:
  found = list(examine(good(), smoke=True))
  assert [(diagnosis.check, diagnosis.status) for diagnosis in found] == [
    ("metrics", "ok"),
    ("ghost norms", "ok"),
    ("compilations", "ok"),
  ]


@pytest.mark.parametrize(
  ("share", "expected"), [(1 / 64, 32), (1 / 32, 32), (1 / 31, 16), (1 / 8, 8), (1 / 7, 4), (1 / 3, 2), (2, 2)]
)
def test_batches_of_costly_losses_are_smaller(share: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
  """`share` of the operations that a batch may take are one example's: 2 F H + 2 H C for two products, and what tanh and softmax take."""
  flops = bsjax.study.diagnosis._loss_flops(good())
  assert 2 * (FEATURES * HIDDEN + HIDDEN * CLASSES) <= flops < 3 * (FEATURES * HIDDEN + HIDDEN * CLASSES)
  monkeypatch.setattr(bsjax.study.diagnosis, "BATCH_FLOPS", flops / share)
  assert {len(array) for array in make_case(good()).batch.values()} == {expected}


@pytest.mark.parametrize(("share", "expected"), [(1 / 100, 16), (1 / 10, 10), (1, 2)])
def test_costly_losses_are_evaluated_on_fewer_examples(
  share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Of 16; `share` as above, of the operations that an evaluation may take."""
  case = make_case(good())
  monkeypatch.setattr(bsjax.study.doctor_data, "EVALUATED_FLOPS", case.loss_flops / share)
  assert f" on {expected} examples" in CHECKS["metrics"](case).message


def test_one_failing_check_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
  def fails(params, model_state, example):
    raise KeyError("no such array")

  few = {name: CHECKS[name] for name in ("mean", "metrics", "labels")}
  monkeypatch.setattr(bsjax.study.doctor, "CHECKS", few)
  found = list(examine(broken(example_metrics=fails)))
  assert [(diagnosis.check, diagnosis.status) for diagnosis in found] == [
    ("mean", "ok"),
    ("metrics", "fix"),
    ("labels", "ok"),
  ]
  assert "cannot be checked: it failed with KeyError: 'no such array' (line" in found[1].message
  assert needs_fixing(found)


def test_without_a_training_loss_that_is_all_there_is_to_say() -> None:
  (found,) = examine(broken(train_loss=lambda params, model_state, batch: None))
  assert (found.check, found.status) == ("train_loss", "fix")
  assert "cannot be computed: train_loss failed with TypeError" in found.message


def test_numbers_are_strict_json() -> None:
  diagnosis = Diagnosis("mean", "fix", "words", {"loss": float("nan"), "size": 2.0, "top": float("inf")})
  assert as_json([diagnosis]) == [
    {"check": "mean", "status": "fix", "message": "words", "numbers": {"loss": None, "size": 2.0, "top": None}}
  ]


class Records:
  """A split on disk: fetches several records at once, and remembers how many it was asked for."""

  def __init__(self, source: Source) -> None:
    self.source, self.asked = source, 0

  def __len__(self) -> int:
    return len(self.source)

  def __getitems__(self, indices):
    self.asked += len(indices)
    return [self.source.fetch(index) for index in indices]


def test_of_splits_on_disk_the_first_examples_are_looked_at_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(bsjax.study.doctor_data, "MOST_RECORDS", 10)
  few = {name: CHECKS[name] for name in ("data", "duplicates", "labels", "classes")}
  monkeypatch.setattr(bsjax.study.doctor, "CHECKS", few)
  records = {split: Records(getattr(good(), split)) for split in ("train", "validation", "test")}
  sources = {split: RecordSource("made_up", split, r, dict, r.source.spec) for split, r in records.items()}
  for diagnosis in examine(broken(**sources)):
    assert diagnosis.status == "ok"
    assert diagnosis.message.endswith("(looked at: the first 10 of each split)")
  assert {split: r.asked for split, r in records.items()} == {"train": 2 * 32 + 10, "validation": 10, "test": 10}


def test_the_docs_explain_every_line() -> None:
  page = (Path(__file__).parents[2] / "docs" / "your_model.md").read_text()
  rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
  assert rows[-len(CHECKS) - 1 :] == ["train_loss", *CHECKS]


# --- the case ---


def test_the_two_batches_share_no_example() -> None:
  case = make_case(good())
  rows = [{row.tobytes() for row in np.asarray(batch["x"])} for batch in (case.batch, case.other)]
  assert [len(each) for each in rows] == [32, 32]
  assert not rows[0] & rows[1]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 1), (3, 1), (4, 2), (63, 16)])
def test_a_small_training_set_gives_small_batches(count: int, size: int) -> None:
  case = make_case(broken(train=good().train.first(count)))
  assert {len(array) for batch in (case.batch, case.other) for array in batch.values()} == {size}


def test_half_precision_is_allowed_its_rounding() -> None:
  def half(params, model_state, batch, key):
    short = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    return jnp.mean(logits(short, {}, {"x": batch["x"].astype(jnp.bfloat16)})).astype(jnp.float32), model_state

  assert (make_case(good()).rounding, make_case(broken(train_loss=half)).rounding) == (1e-5, 2e-2)


def test_samples_are_compared_by_their_standard_errors() -> None:
  draw = np.random.default_rng(0)
  one, same, other = (draw.normal(mean, 0.1, 400) for mean in (1.0, 1.0, 1.05))
  # Standard error of a difference of means: 0.1 sqrt(2 / 400) = 0.007; five of them are 0.035.
  assert compare(one, same, 1e-5).agrees
  assert not compare(one, other, 1e-5).agrees
  assert compare(one, other, 1e-5).allowed == pytest.approx(0.035 / 1.05, rel=0.1)
  assert not compare([1.0], [float("nan")], 1e-5).agrees
  assert compare([0.0], [0.0], 1e-5).agrees


# --- memory ---


def test_too_large_a_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(bsjax.study.doctor_program, "device_bytes", lambda: 5000)
  found = diagnose("memory", good())
  assert found.status == "fix"
  assert "the device has 5 KB: too much at 32; leave it out of preset.batch_sizes" in found.message
  assert found.numbers["bytes_at_32"] + found.numbers["data_bytes"] > 5000


@pytest.mark.parametrize(
  ("sizes", "compiled"),
  [((8,), (8, 16, 32)), ((32, 8), (8, 32, 64)), ((8, 8), (8, 16, 32)), ((8, 16, 32, 64), (8, 32, 64))],
)
def test_a_preset_of_few_batch_sizes_is_filled_up_to_three(sizes, compiled, monkeypatch: pytest.MonkeyPatch) -> None:
  """100 bytes an example beside 1,000 of parameters: a device of 10,000 bytes beside the data holds 90 examples."""
  workload = broken(preset=good().preset._replace(batch_sizes=sizes))
  data = workload.train.nbytes + workload.validation.nbytes
  monkeypatch.setattr(bsjax.study.doctor_program, "step_bytes", lambda workload, size: 1000 + 100 * size)
  monkeypatch.setattr(bsjax.study.doctor_program, "device_bytes", lambda: 10_000 + data)
  found = diagnose("memory", workload)
  assert found.status == "ok"
  assert found.numbers.keys() >= {f"bytes_at_{size}" for size in compiled}
  assert sum(name.startswith("bytes_at") for name in found.numbers) == 3
  assert (found.numbers["largest_batch_low"], found.numbers["largest_batch_high"]) == (90, 90)


def test_only_a_batch_size_of_the_preset_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
  """1,800 bytes at 8, 2,600 at 16, 4,200 at 32: with a preset of 8 alone, a device that holds 2,000 is large enough."""
  data = good().train.nbytes + good().validation.nbytes
  monkeypatch.setattr(bsjax.study.doctor_program, "step_bytes", lambda workload, size: 1000 + 100 * size)
  monkeypatch.setattr(bsjax.study.doctor_program, "device_bytes", lambda: 2000 + data)
  one, all_three = (broken(preset=good().preset._replace(batch_sizes=sizes)) for sizes in ((8,), (8, 16, 32)))
  found = diagnose("memory", one)
  assert (found.status, found.numbers["largest_batch_low"], found.numbers["largest_batch_high"]) == ("ok", 10, 10)
  assert "too much at 32; leave it out" in diagnose("memory", all_three).message
  monkeypatch.setattr(bsjax.study.doctor_program, "device_bytes", lambda: 1700 + data)
  assert "too much at 8; leave it out of preset.batch_sizes" in diagnose("memory", one).message


def test_an_unknown_device_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(bsjax.study.doctor_program, "device_bytes", lambda: None)
  assert diagnose("memory", good()).status == "note"


def test_bytes_of_a_step_are_those_of_state_gradient_and_batch() -> None:
  """Parameters and momentum, which the new ones replace in place; what lies between is at most a gradient and a half."""
  width = 4000
  size = 4 * width * (FEATURES + CLASSES)
  wide = broken(init=lambda key: Variables({"w": jnp.ones((FEATURES, width)), "v": jnp.ones((width, CLASSES))}, {}))
  one = step_bytes(wide, 1)
  assert one is not None
  assert 2 * size <= one < 3.5 * size
  small, large = step_bytes(good(), 8), step_bytes(good(), 64)
  assert small is not None
  assert large is not None
  assert large - small >= (64 - 8) * 4 * (FEATURES + 1)


def test_this_machine_tells_its_memory() -> None:
  assert 2**28 < (device_bytes() or 0) < 2**44


@pytest.mark.parametrize(
  ("known", "limit", "interval"),
  [
    ([(1, 110), (11, 210), (21, 310)], 1310, (121, 121)),  # 10 bytes an example: 1000 more bytes hold 100 more
    ([(1, 110), (11, 210), (21, 330)], 1530, (121, 141)),  # 10 and 12 bytes
    ([(1, 110), (11, 210), (21, 420)], 9999, None),  # 10 and 21 bytes: not linear
    ([(1, 110), (11, 110), (21, 310)], 9999, None),
    (
      [(1, 110), (11, 210), (21, 330)],
      270,
      (16, 17),
    ),  # between the last two: from the second, 60 more bytes of 12 or 10
    ([(1, 110), (11, 210), (21, 410)], 390, (20, 21)),  # no more than the size that is known not to fit
    ([(1, 110), (11, 210), (21, 310)], 100, None),
    ([(1, 110), (21, 310)], 9999, None),  # two points are on a line, whatever the truth
  ],
)
def test_the_largest_batch_is_an_interval_or_a_refusal(known, limit: int, interval) -> None:
  assert largest_batch(known, limit) == (None if interval is None else pytest.approx(interval))


def test_bytes_are_readable() -> None:
  assert [readable(count) for count in (7, 999, 1000, 123_456, 25.3e9, 5e15)] == [
    "7 B", "999 B", "1 KB", "123 KB", "25.3 GB", "5e+03 TB",
  ]  # fmt: skip
