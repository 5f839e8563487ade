"""A landscape that was interrupted anywhere ends with the bytes of one that was not; batch norm has statistics at every point."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.data import Source
from bsjax.models import mlp
from bsjax.probes.landscape import TrajectoryPlane, landscape, line_coefficients, stack_corners
from bsjax.records import RecordError
from bsjax.study import landscape as study_landscape
from bsjax.study.landscape import (
  LINE_POINTS,
  PIECE,
  compute_landscape,
  grid_around,
  grid_points,
  landscape_statistics,
  line_points,
  lines_points,
  path_rows,
  reestimated_state,
  split_metrics_fn,
)
from bsjax.train import evaluate
from bsjax.types import Variables
from bsjax.workloads.classification import classification
from bsjax.workloads.workload import Preset, Target

CALLS = []
CORNERS = {"w": np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)}
POINTS = line_points(LINE_POINTS[:13])
COEFFICIENTS = np.asarray(line_coefficients(LINE_POINTS[:13]))


def metrics_fn(params, scale):
  """Counts its tracings: the compiled program is shared."""
  CALLS.append(1)
  return {"train_loss": scale * jnp.sum(jnp.sin(9 * params["w"])), "test_loss": jnp.log(params["w"][0])}


def compute(path, *, points=POINTS, coefficients=COEFFICIENTS, name="line_0", **options):
  return compute_landscape(
    path, name, points, coefficients, CORNERS, metrics_fn, data=(jnp.float32(2),), batch_norm="none", **options
  )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A file of an uninterrupted run."""
  path = tmp_path_factory.mktemp("whole") / "landscapes" / "line_0.jsonl"
  return path, compute(path)


def test_rows_hold_the_point_and_its_metrics(whole):
  path, rows = whole
  assert [json.loads(line) for line in path.read_text().splitlines()] == rows
  assert len(rows) == 13
  assert 13 % PIECE  # the last piece is padded, and the padding is not written
  exact = (1 - LINE_POINTS[:13, None]) * CORNERS["w"][0].astype(float) + LINE_POINTS[:13, None] * CORNERS["w"][1]
  for row, x, w in zip(rows, LINE_POINTS, exact, strict=False):
    assert list(row) == ["landscape", "x", "y", "test_loss", "train_loss", "batch_norm"]
    assert (row["landscape"], row["x"], row["y"], row["batch_norm"]) == ("line_0", x, 0.0, "none")
    # 9 w of size 30 is rounded by 30 * 2^-24 = 2e-6, 50 sines add up, times 2: at most 2e-4
    assert row["train_loss"] == pytest.approx(2 * np.sum(np.sin(9 * w)), abs=2e-4)
    assert (row["test_loss"] is None) == (w[0] < 0)
  assert any(row["test_loss"] is None for row in rows)
  assert not all(row["test_loss"] is None for row in rows)


def test_cut_anywhere_and_resumed_has_the_bytes_of_the_uninterrupted_run(whole, tmp_path):
  """Cut between rows and inside of one, in whole pieces and beside them; resumed pieces begin at other points."""
  content = whole[0].read_bytes()
  ends = [0, *(at + 1 for at, byte in enumerate(content) if byte == ord("\n"))]
  for number, cut in enumerate([0, ends[1] - 1, ends[1], ends[4] + 17, ends[5], ends[12] + 3, ends[13] - 1, ends[13]]):
    path = tmp_path / f"{number}.jsonl"
    path.write_bytes(content[:cut])
    counted = []
    assert compute(path, on_progress=counted.append) == whole[1]
    assert path.read_bytes() == content
    assert counted[0] == sum(end <= cut for end in ends) - 1  # what was whole on disk is not computed again
    assert sum(counted) == 13


def test_a_kill_between_pieces_loses_nothing_written(whole, tmp_path):
  def kill(count):
    if len(seen) == 2:
      raise KeyboardInterrupt
    seen.append(count)

  seen = []
  path = tmp_path / "line_0.jsonl"
  with pytest.raises(KeyboardInterrupt):
    compute(path, on_progress=kill)
  assert len(path.read_text().splitlines()) == 2 * PIECE
  compute(path)
  assert path.read_bytes() == whole[0].read_bytes()


def test_complete_landscapes_run_nothing_and_others_share_the_program(whole, monkeypatch, tmp_path):
  compute(tmp_path / "again.jsonl", points=POINTS[:2], coefficients=COEFFICIENTS[:2])
  assert len(CALLS) == 1
  monkeypatch.setattr(study_landscape, "_landscape", None)
  assert compute(whole[0]) == whole[1]


def test_other_points_and_damage_are_refused(whole, tmp_path):
  content = whole[0].read_text()
  path = tmp_path / "line_0.jsonl"
  for options in (
    {"points": line_points(LINE_POINTS[1:14])},
    {"name": "line_1"},
    {"points": POINTS[:5], "coefficients": COEFFICIENTS[:5]},
  ):
    path.write_text(content)
    with pytest.raises(RecordError, match="line_0.jsonl holds other points.*delete it"):
      compute(path, **options)
    assert path.read_text() == content
  path.write_text(content.replace("landscape", 'land"scape', 1))
  with pytest.raises(RecordError, match="damaged in line 1: delete it"):
    compute(path)
  with pytest.raises(ValueError, match="13 points and 5 coefficients"):
    compute(path, coefficients=COEFFICIENTS[:5])


def test_points():
  assert line_points(np.array([0.0, 0.125])) == [{"x": 0.0, "y": 0.0}, {"x": 0.125, "y": 0.0}]
  assert [(p["direction"], p["x"]) for p in lines_points(np.array([0, 1]), 2)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  assert [(p["x"], p["y"]) for p in grid_points(np.array([1, 2]), np.array([3, 4]))] == [(1, 3), (2, 3), (1, 4), (2, 4)]
  x, y = grid_around(np.array([[4.0, 0.4], [0.0, 0.0]]))
  assert len(x) == len(y) == 25
  np.testing.assert_allclose(x[[0, -1]], [-1, 5])  # a quarter of 4 on either side
  np.testing.assert_allclose(
    y[[0, -1]], [-1.3, 1.7]
  )  # a strip of half of 4 about 0.2, and a quarter of 2 on either side
  plane = TrajectoryPlane(None, np.array([[3.0, 1.0], [0.0, 0.0]], np.float32), np.array([0.75, 0.25]))
  assert path_rows("path_small", plane, [0, 8]) == [
    {"landscape": "path_small", "x": 3.0, "y": 1.0, "step": 0, "explained_x": 0.75, "explained_y": 0.25},
    {"landscape": "path_small", "x": 0.0, "y": 0.0, "step": 8, "explained_x": 0.75, "explained_y": 0.25},
  ]


@pytest.fixture(scope="module")
def networks():
  """Two states of a small network with batch norm on 100 digits, whose statistics are far from those of the data."""
  model = mlp((8, 8, 1), (5, 4), 10, batch_norm="running")
  target, preset = Target("validation_loss", 1.0, "min"), Preset((2,), 0.1)
  whole = classification("net", "digits", model, pixel_max=16.0, target=target, preset=preset, batch_norm="running")
  first = {
    split: Source("digits", split, {name: array[:100] for name, array in getattr(whole, split).arrays.items()})
    for split in ("train", "test")
  }
  workload = dataclasses.replace(whole, **first)
  states = []
  for seed, spread in enumerate((1.0, 9.0)):
    params, state = workload.init(jax.random.key(seed))
    states.append(Variables(params, jax.tree.map(lambda leaf, spread=spread: spread * leaf + 0.1, state)))
  return workload, states


def test_statistics_are_those_of_the_point_wherever_it_is(networks):
  """The defining identity: with one batch of all examples, inference has the loss of training mode, whatever the corners' statistics.

  Float32: the step's weight 0.1 is the difference of numbers of size 1, so statistics have a relative error of some 1e-6.
  """
  workload, (small, large) = networks
  metrics_fn, data = split_metrics_fn(workload)
  coefficients = line_coefficients([-1, 0, 0.5, 2])
  found = jax.jit(landscape, static_argnums=0)(metrics_fn, stack_corners(small, large), coefficients, *data)
  lost = Variables(small.params, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), small.model_state))

  @jax.jit
  def train_loss(weights):
    params = jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, small.params, large.params)
    return workload.train_loss(params, lost.model_state, dict(workload.train.arrays), jax.random.key(0))[0]

  np.testing.assert_allclose(found["train_loss"], [train_loss(weights) for weights in coefficients], rtol=1e-4)
  assert all(np.isfinite(values).all() for values in found.values())
  assert set(found) == {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}
  assert np.ptp(found["train_loss"]) > 0.01
  assert landscape_statistics(workload) == "reestimated"


def test_statistics_are_means_over_batches(networks, monkeypatch):
  """Of the first layer, in numpy: two batches of 40 examples; the last 20 do not fill a batch."""
  workload, (variables, _) = networks
  monkeypatch.setattr(study_landscape, "STATISTICS_BATCH", 40)
  _, (_, batches) = split_metrics_fn(workload)
  assert batches["image"].shape[:2] == (2, 40)
  kernel, bias = (np.asarray(variables.params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
  images = workload.train.arrays["image"].reshape(100, -1) / 16.0
  layers = [images[start : start + 40] @ kernel + bias for start in (0, 40)]
  state = reestimated_state(workload, *variables, batches)["BatchNorm_0"]
  np.testing.assert_allclose(state["mean"], np.mean([layer.mean(axis=0) for layer in layers], axis=0), atol=1e-5)
  np.testing.assert_allclose(state["var"], np.mean([layer.var(axis=0) for layer in layers], axis=0), rtol=1e-4)


def test_state_that_training_does_not_average_stays(networks):
  workload, (variables, _) = networks
  frozen = dataclasses.replace(workload, train_loss=lambda params, state, batch, key: (0.0, state))
  _, (_, batches) = split_metrics_fn(workload)
  got = reestimated_state(frozen, *variables, batches)
  jax.tree.map(np.testing.assert_array_equal, got, variables.model_state)


def test_without_batch_norm_nothing_is_estimated(networks):
  workload = dataclasses.replace(networks[0], train_loss=None, batch_norm="none")
  assert reestimated_state(workload, {}, {}, {}) == {}
  assert landscape_statistics(workload) == "none"


def test_where_the_loss_is_not_known_the_accuracy_is_not_either(networks):
  """The largest of ten NaN is the first, and a tenth of the digits are zeros: an accuracy of 0.1 would be reported."""
  workload, (variables, _) = networks
  lost = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), variables.params)
  metrics_fn, data = split_metrics_fn(workload, num_examples=30)
  found = jax.jit(metrics_fn)(Variables(lost, variables.model_state), *data)
  assert all(np.isnan(value) for value in found.values())


def test_num_examples_cuts_both_sets(networks):
  _, (splits, batches) = split_metrics_fn(networks[0], num_examples=30)
  assert splits["train"].weight.sum() == 30
  assert splits["test"].weight.sum() == 30
  assert batches["label"].shape == (1, 30)


def test_chunks_hold_what_an_evaluation_may(networks, monkeypatch):
  """An example's largest array is its image as float32, 4 x 8 x 8 bytes: room for 40 cuts 100 examples into three chunks."""
  monkeypatch.setattr(sys.modules[evaluate.__module__], "EVAL_BYTES", 40 * 4 * 8 * 8)
  _, (splits, _) = split_metrics_fn(networks[0])
  assert splits["train"].weight.shape == splits["test"].weight.shape == (3, 34)
