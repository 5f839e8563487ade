"""Measurements on the quadratic, where each has a closed form."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.data import RecordSource, Source
from bsjax.study import measure, timing
from bsjax.study.measure import Measurements
from bsjax.study.timing import TIMED_REPEATS, time_steps
from bsjax.train import TrainState, TrialConfig, init_state, make_trial
from bsjax.types import Hparams
from bsjax.workloads import Workload, load_workload
from bsjax.workloads.quadratic import SPECTRUM

CONFIG = TrialConfig("quadratic", 8, 100, 1, probes=("test", "sharpness", "noise"), probe_steps=(100,))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
  workload = load_workload("quadratic")
  trial = make_trial(CONFIG, Hparams(0.1), 0)
  state = init_state(workload, "sgd", Hparams(*map(jnp.float32, trial.hparams)), jnp.uint32(0))
  state = dataclasses.replace(state, step=jnp.int32(100))
  found = Measurements(workload, (1, 4, 64, 512))(trial, state)
  return {name: [row for row in found if row["probe"] == name] for name in ("test", "sharpness", "noise", "minibatch")}


def moments() -> tuple[np.ndarray, float]:
  """G and tr(Sigma) at w = (1, ..., 1), in float64."""
  centers = load_workload("quadratic").train.arrays["center"].astype(np.float64)
  return SPECTRUM * (1 - centers.mean(axis=0)), float((SPECTRUM**2 * centers.var(axis=0, ddof=1)).sum())


def test_every_row_has_its_step(rows: dict) -> None:
  assert {row["step"] for found in rows.values() for row in found} == {100}


def test_sharpness_is_the_largest_eigenvalue(rows: dict) -> None:
  (row,) = rows["sharpness"]
  np.testing.assert_allclose(row["sharpness"], SPECTRUM[0], rtol=1e-5)  # its error is the residual's square
  assert row["residual"] <= 1e-3 * row["sharpness"]
  assert row["num_examples"] == 512


def test_test_metrics(rows: dict) -> None:
  (row,) = rows["test"]
  np.testing.assert_allclose([row["test_loss"], row["train_loss"]], 0.5 * SPECTRUM.sum(), rtol=1e-6)


def test_noise_is_exact(rows: dict) -> None:
  (row,) = rows["noise"]
  gradient, trace = moments()
  np.testing.assert_allclose(row["grad_cov_trace"], trace, rtol=1e-4)
  np.testing.assert_allclose(row["grad_sq_norm"], gradient @ gradient - trace / 512, rtol=1e-4)
  assert row["noise_scale_ci_low"] < trace / (gradient @ gradient) < row["noise_scale_ci_high"]
  assert row["verdict"] == "identified"


def test_minibatches_scatter_as_predicted(rows: dict) -> None:
  gradient, trace = moments()
  assert [row["batch_size"] for row in rows["minibatch"]] == [1, 4, 64]  # the 512 are all examples, without noise
  for row in rows["minibatch"]:
    predicted = trace * (1 / row["batch_size"] - 1 / 512)
    # 64 draws; 4 standard errors, a false alarm in 1 of 16,000
    assert abs(row["variance"] - predicted) < 4 * row["variance_sem"]
    assert row["cosine"] < 1


def test_time_is_measured() -> None:
  workload = load_workload("quadratic")
  config = TrialConfig("quadratic", 8, 1, 1)
  found = time_steps(workload, config, Hparams(0.1))
  assert [row["repeat"] for row in found] == list(range(TIMED_REPEATS))
  for row in found:
    assert 1e-8 < row["seconds_per_step"] < 1
    np.testing.assert_allclose(row["examples_per_second"], 8 / row["seconds_per_step"])


def test_batch_norm_in_training_mode_is_refused() -> None:
  workload = dataclasses.replace(load_workload("quadratic"), batch_norm="batch")
  with pytest.raises(ValueError, match=r"batch_norm='batch'.*use batch_norm='running'"):
    Measurements(workload, (1,))


def test_unused_state_fields_do_not_matter() -> None:
  """A probe reads parameters and model state only."""
  workload = load_workload("quadratic")
  trial = make_trial(dataclasses.replace(CONFIG, probes=("test",)), Hparams(0.1), 0)
  state = init_state(workload, "momentum", Hparams(*map(jnp.float32, trial.hparams)), jnp.uint32(0))
  bare = TrainState(state.step, state.params, state.model_state, ())
  measurements = Measurements(workload, (1,))
  assert measurements(trial, state) == measurements(trial, bare)


class Records:
  """A source's examples as records, which counts how many were read."""

  def __init__(self, source: Source) -> None:
    self.arrays, self.read = source.arrays, 0

  def __len__(self) -> int:
    return len(self.arrays["center"])

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
    self.read += len(indices)
    return [{"center": self.arrays["center"][index]} for index in indices]


def on_disk() -> Workload:
  workload = load_workload("quadratic")
  parts = {
    split: RecordSource("quadratic", split, Records(source), lambda record: record, source.spec)
    for split, source in (("train", workload.train), ("test", workload.test))
    if isinstance(source, Source)
  }
  return dataclasses.replace(workload, **parts)


def test_noise_is_that_of_the_first_examples_where_not_all_fit(rows: dict, monkeypatch: pytest.MonkeyPatch) -> None:
  """And the rows say of how many; the metrics, which are streamed, are still those of all."""
  monkeypatch.setattr(measure, "examples_that_fit", lambda source: min(len(source), 100))
  workload = on_disk()
  few = dataclasses.replace(workload, train=workload.train.first(100))
  trial = make_trial(dataclasses.replace(CONFIG, probes=("test", "noise")), Hparams(0.1), 0)
  state = init_state(workload, "sgd", Hparams(*map(jnp.float32, trial.hparams)), jnp.uint32(0))
  state = dataclasses.replace(state, step=jnp.int32(100))
  test, *noise = Measurements(workload, (4, 100, 200))(trial, state)
  _, *expected = Measurements(few, (4, 100, 200))(trial, state)
  assert noise == expected
  assert [row["num_examples"] for row in noise] == [100, 100]  # and no minibatches of 100 or 200
  assert test == rows["test"][0]


@pytest.mark.parametrize(("batch_size", "count"), [(8, 16), (32, 32)])
def test_only_the_first_examples_are_read_to_be_timed(
  batch_size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(timing, "TIMED_BYTES", 16 * 64)  # 16 examples of 16 numbers
  monkeypatch.setattr(timing, "TIMED_SECONDS", 1e-6)
  workload = on_disk()
  time_steps(workload, TrialConfig("quadratic", batch_size, 1, 1), Hparams(0.1))
  assert workload.train.records.read == count  # type: ignore[union-attr]
