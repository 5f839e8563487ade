"""The streamed path against the resident one: the same bits; and what a kill, a divergence or a corrupt record does to it."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import classifier
from test_segment import hparams_of, run_segment

from bsjax.data import DataError, RecordSource, Source, segment_indices
from bsjax.records import read_record
from bsjax.train import (
  ORDER_STREAM,
  Plan,
  TrainState,
  Trial,
  TrialConfig,
  choose_data_path,
  chunked,
  evaluate,
  evaluate_source,
  examples_that_fit,
  init_state,
  make_mesh,
  make_trial,
  run_trials,
  stream,
  streamed_segment,
)
from bsjax.train import path as path_module
from bsjax.train import streamed as stream_module
from bsjax.types import Hparams
from bsjax.workloads import Workload

ROOT = Path(__file__).parents[2]
NOISE = {"microbatch_size": 2, "noise_route": "microbatch", "noise_every": 2}
CONFIG = TrialConfig("mlp", 4, 12, 3, optimizer="momentum")


class Records:
  """A source's examples as records; those in `bad` cannot be read."""

  def __init__(self, source: Source) -> None:
    self.arrays, self.bad, self.most = source.arrays, set(), 0

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values())))

  def __getitems__(self, indices: Any) -> list[dict[str, np.ndarray]]:
    self.most = max(self.most, len(indices))
    if self.bad & set(indices):
      raise OSError("wrong checksum")
    return [{name: array[index] for name, array in self.arrays.items()} for index in indices]


def as_records(source: Source) -> RecordSource:
  return RecordSource(source.name, source.split, Records(source), lambda record: record, source.spec)


def on_disk(kind: str) -> Workload:
  workload = classifier(kind)
  parts = {split: as_records(getattr(workload, split)) for split in ("train", "validation", "test")}
  return dataclasses.replace(workload, **parts)


def bits(tree: Any) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def run_streamed(
  workload: Workload, config: TrialConfig, rate: float, seed: int, calls: tuple[int, ...]
) -> tuple[TrainState, list[Any]]:
  """Some calls of the streamed segment, of so many rows each."""
  one = jax.tree.map(
    lambda leaf: leaf[None],
    (init_state(workload, config.optimizer, hparams_of(rate), jnp.uint32(seed)), hparams_of(rate)),
  )
  segment, (state, hparams), rows = streamed_segment(workload, config, make_mesh(data=1)), one, []
  for count in calls:
    state, told = segment(state, hparams, jnp.uint32([seed]), np.array([count]), workload.train, workload.validation)
    rows.append(told)
  return state, rows


@pytest.mark.parametrize(
  ("kind", "batch_size", "options"),
  [
    ("mlp", 16, {}),  # 37 examples: a batch may span two epochs
    ("mlp", 4, {"with_replacement": True}),
    ("mlp", 4, NOISE),
    ("mlp_bn", 5, {"optimizer": "adamw"}),
    ("cnn", 4, {}),
  ],
)
def test_both_paths_give_the_same_bits(
  kind: str, batch_size: int, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
  """States and rows, whether the examples lie in memory or on disk, with rows cut into blocks and calls."""
  monkeypatch.setattr(stream_module, "BLOCK_STEPS", 2)
  workload, config = classifier(kind), TrialConfig(kind, batch_size, 12, 3, **options)
  state, rows = run_segment(workload, config, [0.05], num_rows=4, seeds=[1])
  rows = jax.tree.map(lambda values: values[:, :4], rows)
  for source, calls in ((workload, (4,)), (on_disk(kind), (1, 3))):
    found, told = run_streamed(source, config, 0.05, 1, calls)
    assert bits(found) == bits(state)
    assert bits(jax.tree.map(lambda *values: np.concatenate(values, axis=1), *told)) == bits(rows)


def test_blocks_are_as_equal_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
  """As many steps as the bytes allow, at least one, at most `BLOCK_STEPS`."""
  mesh, source = make_mesh(data=1), classifier("mlp").train
  batch_bytes = 4 * (36 * 4 + 4)
  for room, every, expected in ((3, 12, 3), (3, 4, 2), (5, 12, 4), (0.5, 12, 1), (1e9, 12, 12), (1e9, 100, 25)):
    monkeypatch.setattr(
      stream_module, "device_memory", lambda device, room=room: room * batch_bytes / stream_module.BLOCK_SHARE
    )
    config = dataclasses.replace(CONFIG, num_steps=every, eval_every=every)
    assert stream_module.block_steps(source, config, mesh) == expected, (room, every)
  monkeypatch.setattr(stream_module, "device_memory", lambda device: 3 * batch_bytes / stream_module.BLOCK_SHARE)
  two = SimpleNamespace(shape={"trial": 1, "data": 2}, local_devices=[None, None])
  assert stream_module.block_steps(source, dataclasses.replace(CONFIG, eval_every=12), two) == 6  # half a batch on each


def test_two_blocks_are_on_the_device_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
  """When one is put there, at most one other is alive, and the steps before that one are done."""
  monkeypatch.setattr(stream_module, "BLOCK_STEPS", 2)
  events: list[Any] = []
  put, wait = jax.make_array_from_process_local_data, jax.block_until_ready

  def counted_put(sharding: Any, array: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    if shape == (2, 4, 6, 6, 1):
      events.append(sum(other.shape == shape for other in jax.live_arrays()))
    return put(sharding, array, shape)

  def counted_wait(tree: Any) -> Any:
    events.append("wait")
    return wait(tree)

  monkeypatch.setattr(jax, "make_array_from_process_local_data", counted_put)
  monkeypatch.setattr(jax, "block_until_ready", counted_wait)
  run_streamed(on_disk("mlp"), dataclasses.replace(CONFIG, eval_every=12), 0.05, 1, (1,))
  assert events[:12] == [0, "wait", *[1, "wait"] * 5]


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_evaluation_of_a_source_is_that_of_its_arrays(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
  """Bitwise, whatever the chunks; and the source is not asked for more than a chunk."""
  monkeypatch.setattr(sys.modules["bsjax.train.evaluate"], "EVAL_CHUNK", chunk_size)
  workload = on_disk("mlp")
  state = init_state(workload, "sgd", hparams_of(0.1), jnp.uint32(0))
  expected = jax.jit(evaluate, static_argnums=0)(
    workload.example_metrics, state.params, {}, chunked(classifier("mlp").validation.arrays, chunk_size)
  )
  found = evaluate_source(workload.example_metrics, state.params, {}, workload.validation)
  assert found.keys() == expected.keys()
  assert bits(found) == bits(expected)
  assert workload.validation.records.most == min(chunk_size, 11)  # type: ignore[union-attr]


def test_the_path_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
  workload, mesh = on_disk("mlp"), make_mesh(data=1)
  size = (37 + 11) * (36 * 4 + 4)
  assert workload.train.nbytes + workload.validation.nbytes == size
  for memory, expected in ((4 * size, "resident"), (4 * size - 1, "streamed")):
    monkeypatch.setattr(path_module, "device_memory", lambda device, memory=memory: memory)
    assert choose_data_path(workload, mesh) == expected
  for memory, count in ((0, 1), (4 * 148 * 5, 5), (10**9, 37)):
    monkeypatch.setattr(path_module, "device_memory", lambda device, memory=memory: memory)
    assert examples_that_fit(workload.train) == count


def test_memory_of_a_device() -> None:
  class Device:
    platform = "cpu"

    def __init__(self, stats: dict | None) -> None:
      self.memory_stats = lambda: stats

  assert path_module.device_memory(Device({"bytes_limit": 123})) == 123
  pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  assert path_module.device_memory(Device(None)) == pages // jax.local_device_count()


# Pools of trials.


def trials_of(config: TrialConfig, *, rates: tuple[float, ...] = (0.1, 0.3), seeds: range = range(2)) -> list[Trial]:
  return [make_trial(config, Hparams(rate), seed) for rate in rates for seed in seeds]


def run(folder: Path, trials: list[Trial], workload: Workload | None = None, **options: Any) -> None:
  run_trials(workload or on_disk("mlp"), trials, folder, mesh=make_mesh(data=1), **{"data_path": "streamed", **options})


def rows_of(folder: Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.jsonl"))}


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
  """The rows of the same trials on the resident path, one at a time."""
  folder = tmp_path_factory.mktemp("resident")
  run(folder, trials_of(CONFIG), classifier("mlp"), data_path="resident", plan=Plan())
  assert {read_record(folder / trial.id).trial["data_path"] for trial in trials_of(CONFIG)} == {"resident"}
  return rows_of(folder)


def test_trials_in_turn_leave_the_records_of_the_resident_path(tmp_path: Path, resident: dict[str, bytes]) -> None:
  trials, steps = trials_of(CONFIG), []
  run(tmp_path, trials, on_progress=steps.append)
  assert rows_of(tmp_path) == resident
  assert sum(steps) == 4 * 12
  for trial in trials:
    record = read_record(tmp_path / trial.id)
    assert record.status["state"] == "complete"
    assert record.trial["data_path"] == "streamed"
    assert record.trial["plan"] == {"side_by_side": 1, "in_turn": 1, "devices": 1}


class _Stop(Exception):
  pass


def interrupted(folder: Path, after: int, **options: Any) -> None:
  """Runs until `after` trial-steps were reported, with a checkpoint after each row, and breaks off."""
  left = after

  def count(steps: int) -> None:
    nonlocal left
    left -= steps
    if left <= 0:
      raise _Stop

  with pytest.raises(_Stop):
    run(folder, trials_of(CONFIG), on_progress=count, checkpoint_seconds=0.0, **options)


@pytest.mark.parametrize("after", [1, 20])
def test_resume_gives_the_same_bits(tmp_path: Path, after: int, resident: dict[str, bytes]) -> None:
  interrupted(tmp_path, after)
  assert rows_of(tmp_path) != resident
  run(tmp_path, trials_of(CONFIG))
  assert rows_of(tmp_path) == resident
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("first", ["streamed", "resident"])
def test_trials_may_go_on_on_the_other_path(tmp_path: Path, first: str, resident: dict[str, bytes]) -> None:
  second = {"streamed": "resident", "resident": "streamed"}[first]
  interrupted(tmp_path, 16, data_path=first, plan=Plan())
  run(tmp_path, trials_of(CONFIG), data_path=second)
  assert rows_of(tmp_path) == resident


def test_another_plan_is_refused(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match=r"data_path='streamed' trains one trial at a time, plan=\(8, 1\) more"):
    run(tmp_path, trials_of(CONFIG), plan=Plan(8, 1))


def test_diverged_trial_stops_at_its_row(tmp_path: Path) -> None:
  wild, calm = make_trial(CONFIG, Hparams(1e30), 0), make_trial(CONFIG, Hparams(0.1), 0)
  workload = on_disk("mlp")
  run(tmp_path / "streamed", [wild, calm], workload)
  run(tmp_path / "resident", [wild, calm], classifier("mlp"), data_path="resident", plan=Plan())
  assert rows_of(tmp_path / "streamed") == rows_of(tmp_path / "resident")
  for trial, state in ((wild, "diverged"), (calm, "complete")):
    streamed, other = (read_record(tmp_path / path / trial.id).status for path in ("streamed", "resident"))
    assert streamed["state"] == other["state"] == state
    assert streamed["first_nonfinite_step"] == other["first_nonfinite_step"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_corrupt_record_keeps_the_rows_before_it(tmp_path: Path, split: str, resident: dict[str, bytes]) -> None:
  """One line with split and example; once the file is mended, a rerun gives the records of a run without the fault."""
  workload, trial = on_disk("mlp"), make_trial(CONFIG, Hparams(0.1), 0)
  order = segment_indices(stream(jnp.uint32(0), ORDER_STREAM), 0, num_steps=9, batch_size=4, num_examples=37)
  bad = {"train": int(order[7, 1]), "validation": 10}[split]  # first read in step 8, or at the end of the first row
  getattr(workload, split).records.bad.add(bad)
  message = rf"example {bad} of split '{split}' of made_up cannot be read: OSError: wrong checksum"
  with pytest.raises(DataError, match=message) as raised:
    run(tmp_path, [trial], workload)
  assert "\n" not in str(raised.value)
  kept = read_record(tmp_path / trial.id)
  assert kept.status["state"] == "running"
  assert [row["step"] for row in kept.metrics] == {"train": [3, 6], "validation": []}[split]
  run(tmp_path, [trial])
  assert rows_of(tmp_path) == {name: rows for name, rows in resident.items() if name.startswith(trial.id)}


ON_EIGHT_DEVICES = """
import json, sys
sys.path.insert(0, "tests/train")
import jax, jax.numpy as jnp, numpy as np
from problems import classifier
from test_segment import hparams_of
from test_streamed import bits, on_disk
from bsjax.train import TrialConfig, build_segment, chunked, device_arrays, init_state, make_mesh, streamed_segment
out = {}
for name, kind, shape, options in (
  ("spread", "mlp_bn", (1, 8), {}),
  ("on two", "mlp_bn", (1, 2), {}),
  ("microbatches", "mlp", (1, 2), {"microbatch_size": 4, "noise_route": "microbatch", "noise_every": 2}),
  ("devices", "mlp", (1, 2), {"microbatch_size": 8, "noise_route": "device", "noise_every": 2}),
  ("not spread", "mlp", (1, 2), {"batch_size": 13}),
):
  config = TrialConfig(kind, **{"batch_size": 16, "num_steps": 12, "eval_every": 3} | options)
  mesh, workload = make_mesh(trial=shape[0], data=shape[1]), classifier(kind)
  seeds, hparams = jnp.zeros(1, jnp.uint32), jax.tree.map(lambda leaf: leaf[None], hparams_of(0.05))
  start = lambda: jax.tree.map(lambda leaf: leaf[None], init_state(workload, "sgd", hparams_of(0.05), jnp.uint32(0)))
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays, devices=mesh.shape["data"])
  inputs = start(), hparams, seeds, jnp.int32(4), *data
  state, rows = jax.block_until_ready(build_segment(workload, config, 1, mesh)(*inputs))
  rows = jax.tree.map(lambda values: values[:, :4], rows)
  source = on_disk(kind)
  found, told = streamed_segment(source, config, mesh)(start(), hparams, seeds, np.array([4]), source.train, source.validation)
  jax.block_until_ready(found)
  out[name] = {"same": bits((found, told)) == bits((state, rows)), "losses": told.train_loss.tolist(), "theirs": rows.train_loss.tolist()}
  out[name]["held_out"] = told.validation["loss"].tolist()
try:
  streamed_segment(classifier("mlp"), config, make_mesh(trial=2, data=4))
except ValueError as error:
  out["refused"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_eight_devices() -> dict:
  """Forced host devices, in a process of its own; NPROC as in conftest.py, or two cores would dead-lock."""
  environment = os.environ | {
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
    "NPROC": "16",
  }
  command = ["timeout", "-s", "KILL", "240", sys.executable, "-c", ON_EIGHT_DEVICES]
  done = subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["spread", "on two", "microbatches", "devices", "not spread"])
def test_both_paths_agree_on_several_devices(on_eight_devices: dict, case: str) -> None:
  assert on_eight_devices[case]["same"], on_eight_devices[case]


def test_devices_for_trials_are_refused(on_eight_devices: dict) -> None:
  assert "the mesh spreads trials over 2 devices: give them to the batch" in on_eight_devices["refused"]


IN_TWO_PROCESSES = """
import json, sys
sys.path.insert(0, "tests/train")
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp, numpy as np
from test_segment import hparams_of
from test_streamed import on_disk
from bsjax.train import TrialConfig, choose_data_path, init_state, make_mesh, streamed_segment
source, config, mesh = on_disk("mlp_bn"), TrialConfig("mlp_bn", 16, 12, 3), make_mesh(data=2)
start = init_state(source, "sgd", hparams_of(0.05), jnp.uint32(0)), hparams_of(0.05)
state, hparams = jax.tree.map(lambda leaf: np.asarray(leaf)[None], start)
segment = streamed_segment(source, config, mesh)
_, rows = segment(state, hparams, np.zeros(1, np.uint32), np.array([4]), source.train, source.validation)
told = {"losses": np.asarray(rows.train_loss).tolist(), "held_out": np.asarray(rows.validation["loss"]).tolist()}
told |= {"read": source.train.records.most, "evaluated": source.validation.records.most}
print(json.dumps(told | {"path": choose_data_path(source, mesh)}))
"""


def test_two_processes_read_half_of_each_batch_and_of_what_is_evaluated(on_eight_devices: dict) -> None:
  """Real ones, of one device each, against one process with both: the same bits."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {"NPROC": "16", "PYTHONPATH": str(ROOT)}
  command = ["timeout", "-s", "KILL", "240", sys.executable, "-c", IN_TWO_PROCESSES, address]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  running = [subprocess.Popen([*command, str(number)], cwd=ROOT, env=environment, **pipes) for number in range(2)]
  for process in running:
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    alike = {name: on_eight_devices["on two"][name] for name in ("losses", "held_out")}
    # 11 examples of the validation split in one chunk, padded to 12
    assert json.loads(out.splitlines()[-1]) == alike | {"read": 8, "evaluated": 6, "path": "resident"}
