"""Sweeps on disk: skipped, resumed, diverged, probed; and the same bits whatever happened in between."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import classifier, quadratic

from bsjax.records import RecordError, read_record, read_records
from bsjax.train import (
  TrainState,
  Trial,
  TrialConfig,
  build_segment,
  init_state,
  make_mesh,
  make_trial,
  run_trials,
)
from bsjax.train.checkpoint import restore_checkpoint, save_checkpoint
from bsjax.train.plan import PLANS_FILE, Plan, num_lanes, remembered_plan
from bsjax.train.pool import _Pool
from bsjax.train.segment import lane_groups, program_config
from bsjax.types import Hparams

# Orbax leaves reads of a damaged checkpoint behind, which then find their event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[2]
CONFIG = TrialConfig("quadratic", 8, 600, 4)


def trials_of(config: TrialConfig, *, rates: tuple[float, ...] = (0.1, 0.3), seeds: range = range(4)) -> list[Trial]:
  return [make_trial(config, Hparams(rate), seed) for rate in rates for seed in seeds]


def norm_probe(trial: Trial, state: TrainState) -> list[dict]:
  return [{"probe": "norm", "step": int(state.step), "norm": float(jnp.sum(state.params["w"] ** 2))}]


def run(folder: Path, trials: list[Trial], **options: object) -> None:
  run_trials(quadratic(), trials, folder, mesh=make_mesh(data=1), **options)  # type: ignore[arg-type]


def read_plan(folder: Path, config: TrialConfig) -> Plan:
  plan = remembered_plan(folder, config, make_mesh(data=1))
  assert plan is not None
  return plan


def names(folder: Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
  """All that must not depend on interruptions: rows and what the trial is; wall seconds are left out."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.glob("*/*.json*"))
    if path.name not in ("status.json", PLANS_FILE) and path.parent.name != "checkpoints"
  }


def test_rows_and_statuses(tmp_path: Path) -> None:
  trials = trials_of(CONFIG)
  run(tmp_path, trials)
  assert names(tmp_path) == sorted([PLANS_FILE, *(trial.id for trial in trials)])
  for trial in trials:
    record = read_record(tmp_path / trial.id)
    assert record.status["state"] == "complete"
    assert [row["step"] for row in record.metrics] == list(range(4, 601, 4))
    assert all(row["examples_seen"] == 8 * row["step"] for row in record.metrics)
    assert record.trial["hparams"]["learning_rate"] == trial.hparams.learning_rate
    # the excess loss cannot exceed a start's and falls to the noise floor of its rate, about rate/2 tr(H Cov)/B
    assert record.metrics[0]["validation_loss"] > record.metrics[-1]["validation_loss"]


def test_complete_trials_are_skipped_and_new_ones_added(tmp_path: Path) -> None:
  run(tmp_path, trials_of(CONFIG, seeds=range(2)))
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
  steps: list[int] = []
  run(tmp_path, trials_of(CONFIG, seeds=range(4)), on_progress=steps.append)
  assert {path: path.stat().st_mtime_ns for path in before} == before
  assert len(read_records(tmp_path)) == 8
  assert sum(steps) == 8 * 600
  run(tmp_path / "at_once", trials_of(CONFIG, seeds=range(4)))
  assert contents(tmp_path) | contents(tmp_path / "at_once") == contents(tmp_path) | {}
  assert {k: v for k, v in contents(tmp_path).items() if "/" in k} == contents(tmp_path / "at_once")


def test_one_compilation_for_a_whole_pool(tmp_path: Path) -> None:
  """Refilled lanes, a second pool of the same config and one with probes: one entry in the compiler's cache."""
  config = dataclasses.replace(CONFIG, batch_size=7)  # of no other test
  run(tmp_path / "a", trials_of(config, seeds=range(6)))
  run(tmp_path / "b", trials_of(config, rates=(0.2,)), checkpoint_seconds=0.0)
  probed = dataclasses.replace(config, num_steps=300, probes=("norm",), probe_steps=(300,))
  run(tmp_path / "c", trials_of(probed), probe=norm_probe)
  plan = read_plan(tmp_path / "a", config)
  mesh = make_mesh(data=1)
  assert build_segment(quadratic(), config, num_lanes(plan, mesh), mesh, plan.in_turn)._cache_size() == 1


def test_trials_that_stop_at_their_target_are_the_beginnings_of_those_that_do_not(tmp_path: Path) -> None:
  """Row by row, up to the first that reaches it; trials that never do, and one that diverges, end as without."""
  whole = [*trials_of(CONFIG, rates=(0.1, 0.3, 1e-4), seeds=range(3)), make_trial(CONFIG, Hparams(200.0), 0)]
  config = dataclasses.replace(CONFIG, stop_at_target=True)
  stopping = [trial._replace(config=config) for trial in whole]
  steps: list[int] = []
  run(tmp_path, whole)
  run(tmp_path, stopping, on_progress=steps.append, checkpoint_seconds=0.0)
  assert sum(steps) == len(whole) * 600
  target, lengths = quadratic().target, []
  for trial, stopped in zip(whole, stopping, strict=True):
    full, cut = read_record(tmp_path / trial.id), read_record(tmp_path / stopped.id)
    reached = [target.is_reached(row[target.metric]) for row in full.metrics]
    length = reached.index(True) + 1 if any(reached) else len(reached)
    assert cut.metrics == full.metrics[:length]
    assert cut.status["state"] == full.status["state"]
    assert cut.trial["config"]["stop_at_target"] is True
    lengths.append(length)
  # The rates differ in when they arrive, 1e-4 does not arrive, 200 diverges.
  assert len({*lengths[:6]}) > 1
  assert max(lengths[:6]) < 150
  assert lengths[6:9] == [150] * 3
  assert lengths[9] < 10
  assert program_config(config) == program_config(CONFIG)
  with pytest.raises(ValueError, match="keep_final with stop_at_target"):
    run(tmp_path, stopping, keep_final=True)


def test_diverged_trial_stops_and_touches_nobody(tmp_path: Path) -> None:
  config = dataclasses.replace(CONFIG, num_steps=1200)
  wild = make_trial(config, Hparams(200.0), 0)
  calm = trials_of(config, rates=(0.1,), seeds=range(3))
  steps: list[int] = []
  run(tmp_path / "both", [calm[0], wild, *calm[1:]], on_progress=steps.append)
  run(tmp_path / "calm", calm)
  record = read_record(tmp_path / "both" / wild.id)
  assert record.status["state"] == "diverged"
  first = record.status["first_nonfinite_step"]
  assert 4 < first < 40
  assert [row["step"] for row in record.metrics] == list(range(4, first, 4))[: (first - 1) // 4]
  assert all(np.isfinite([row["train_loss"], row["validation_loss"]]).all() for row in record.metrics)
  both = contents(tmp_path / "both")
  assert {name: both[name] for name in contents(tmp_path / "calm")} == contents(tmp_path / "calm")
  assert sum(steps) == 4 * 1200
  run(tmp_path / "both", [wild])  # not tried again
  assert read_record(tmp_path / "both" / wild.id) == record


def test_the_step_of_divergence_is_exact(tmp_path: Path) -> None:
  """Evaluated every step, or once after 40: the loss of a minibatch overflows at most two steps after that of all examples."""
  first = {}
  for every in (1, 40):
    trial = make_trial(dataclasses.replace(CONFIG, num_steps=80, eval_every=every), Hparams(200.0), 0)
    run(tmp_path, [trial])
    first[every] = read_record(tmp_path / trial.id).status["first_nonfinite_step"]
  assert 0 <= first[40] - first[1] <= 2


def test_rows_of_a_group() -> None:
  """As many as any lane has left, but none beyond a step where the host must look: lanes out of step cost no call of their own."""
  seat = lambda step: SimpleNamespace(step=step)  # noqa: E731

  def rows(steps: list[int], keep_final: bool = False, **options: Any) -> int:
    pool = SimpleNamespace(config=dataclasses.replace(CONFIG, **options), keep_final=keep_final)
    return _Pool._group_rows(pool, [seat(step) if step >= 0 else None for step in steps])  # type: ignore[arg-type]

  assert rows([-1, -1]) == 0
  assert rows([0, 0]) == rows([-1, 0]) == rows([596, 0]) == 64  # a segment is 256 steps
  assert rows([596, 500]) == 25
  assert rows([596, 500], keep_final=True) == 1
  probed = {"probes": ("norm",), "probe_steps": (0, 300, 600)}
  assert rows([296, 0], **probed) == 1
  assert rows([300, 300], **probed) == 64
  assert rows([500, 300], **probed) == 25


def test_few_trials_share_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Three trials in two groups of four: the second group, which holds none, makes no rows, on one device and on two."""
  seen = count_segments(monkeypatch)
  run(tmp_path, trials_of(CONFIG, rates=(0.1,), seeds=range(3)), plan=Plan(4, 2))
  assert [rows.tolist() for rows in seen] == [[64, 0], [64, 0], [22, 0]]
  two = SimpleNamespace(shape={"trial": 2})
  assert lane_groups(8, 2, two).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]  # type: ignore[arg-type]


def test_lanes_out_of_step_write_their_own_rows_only(tmp_path: Path) -> None:
  """A lane that takes over from a diverged one goes on alone; the other's steps beyond its end leave no row."""
  config = dataclasses.replace(CONFIG, optimizer="momentum")
  wild, *calm = make_trial(config, Hparams(200.0), 0), *trials_of(config, rates=(0.1,), seeds=range(1, 3))
  run(tmp_path / "both", [wild, *calm], plan=Plan(2, 1))
  run(tmp_path / "calm", calm, plan=Plan(2, 1))
  both, alone = contents(tmp_path / "both"), contents(tmp_path / "calm")
  assert {name: both[name] for name in alone} == alone
  assert [row["step"] for row in read_record(tmp_path / "both" / calm[0].id).metrics] == list(range(4, 601, 4))


def count_segments(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
  """Lets a test see the segments that a pool dispatches: the rows of each."""
  import bsjax.train.pool as pool

  calls: list[np.ndarray] = []
  real = pool.build_segment

  def counted(*arguments):  # type: ignore[no-untyped-def]
    segment = real(*arguments)
    return lambda *inputs: calls.append(inputs[3]) or segment(*inputs)

  monkeypatch.setattr(pool, "build_segment", counted)
  return calls


def test_diverged_trial_costs_no_further_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Its lane is free after the segment in flight: the pool dispatches two or three segments, not 5120 / 256."""
  calls = count_segments(monkeypatch)
  run(tmp_path, [make_trial(dataclasses.replace(CONFIG, num_steps=5120), Hparams(200.0), 0)])
  assert len(calls) <= 3


def test_probes_are_made_at_their_steps(tmp_path: Path) -> None:
  config = dataclasses.replace(CONFIG, probes=("norm",), probe_steps=(0, 100, 600))
  trials = trials_of(config)
  run(tmp_path, trials, probe=norm_probe)
  for trial in trials:
    rows = read_record(tmp_path / trial.id).probes
    assert [row["step"] for row in rows] == [0, 100, 600]
    assert rows[0]["norm"] == 16.0  # w_0 = (1, ..., 1)


def test_trials_of_different_configs_are_refused(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="share their config"):
    run(tmp_path, [*trials_of(CONFIG), *trials_of(dataclasses.replace(CONFIG, batch_size=4))])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_learning_rate_must_be_positive_and_finite(rate: float) -> None:
  with pytest.raises(ValueError, match="wanted a finite number above 0"):
    make_trial(CONFIG, Hparams(rate), 0)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("batch_size", 0),
    ("num_steps", -4),
    ("num_steps", 6),
    ("probe_steps", (3,)),
    ("optimizer", "sdg"),
    ("schedule", "cos"),
  ],
)
def test_bad_config_is_refused(field: str, value: object) -> None:
  with pytest.raises(ValueError, match=str(value) if not isinstance(value, tuple) else "3"):
    dataclasses.replace(CONFIG, **{field: value})


class _Stop(Exception):
  pass


def interrupted(folder: Path, trials: list[Trial], after: int, **options: object) -> None:
  """Runs until `after` trial-steps were reported, checkpointing all the time, and breaks off."""
  left = after

  def count(steps: int) -> None:
    nonlocal left
    left -= steps
    if left <= 0:
      raise _Stop

  with pytest.raises(_Stop):
    run(folder, trials, on_progress=count, probe=norm_probe, checkpoint_seconds=0.0, **options)


NOISE = {"microbatch_size": 2, "noise_route": "microbatch", "noise_every": 7}


@pytest.mark.parametrize(("after", "options"), [(1, {}), (1000, {}), (2500, NOISE), (4000, {})])
def test_resume_gives_the_same_bits(tmp_path: Path, after: int, options: dict) -> None:
  config = dataclasses.replace(CONFIG, probes=("norm",), probe_steps=(0, 300, 600), optimizer="momentum", **options)
  trials = trials_of(config)
  run(tmp_path / "whole", trials, probe=norm_probe)
  interrupted(tmp_path / "parts", trials, after)
  run(tmp_path / "parts", trials, probe=norm_probe)
  assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
  assert not (tmp_path / "parts" / "checkpoints").exists()


def test_checkpoints_are_gone_at_the_end(tmp_path: Path) -> None:
  run(tmp_path, trials_of(CONFIG), checkpoint_seconds=0.0)
  assert names(tmp_path) == sorted([PLANS_FILE, *(trial.id for trial in trials_of(CONFIG))])


def test_resume_continues_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """What lies before the checkpoint is not computed again: 600 steps are three segments, the rest of them fewer."""
  trials = trials_of(CONFIG, rates=(0.1,), seeds=range(1))
  interrupted(tmp_path, trials, 300)
  calls = count_segments(monkeypatch)
  run(tmp_path, trials)
  resumed = len(calls)
  run(tmp_path / "whole", trials)
  assert (resumed, len(calls) - resumed) == (2, 3)


SWEEP = """
import sys
sys.path[:0] = ["tests/train", "."]
from pathlib import Path
from test_pool import CONFIG, norm_probe, run, trials_of
import dataclasses
config = dataclasses.replace(CONFIG, num_steps=40000, eval_every=8, probes=("norm",), probe_steps=(0, 20000, 40000))
told = []

def tell(steps):  # the first rows are on disk
  if steps and not told:
    told.append(print("begun", flush=True))

run(Path(sys.argv[1]), trials_of(config, seeds=range(5)), probe=norm_probe, checkpoint_seconds=0.2, on_progress=tell)
print("done", flush=True)
"""


def test_kill_nine_at_random_moments(tmp_path: Path) -> None:
  """A real process, killed for real, several times: the records equal an uninterrupted run's bit for bit."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)}

  def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SWEEP, str(folder)]
    return subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

  moments, kills = random.Random(0), 0
  for _ in range(4):
    child = start(tmp_path / "parts")
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    time.sleep(moments.uniform(0.0, 0.8))
    kills += child.poll() is None
    child.kill()
    child.communicate()
  assert kills > 0
  read_records(tmp_path / "parts")  # never unreadable
  for folder in ("parts", "whole"):
    child = start(tmp_path / folder)
    out, _ = child.communicate(timeout=240)
    assert out == "begun\ndone\n"
  assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
  assert {record.status["state"] for record in read_records(tmp_path / "parts")} == {"complete"}


def saved(folder: Path, count: int) -> TrainState:
  state = init_state(classifier("mlp"), "adamw", Hparams(*map(jnp.float32, Hparams(0.1))), jnp.uint32(0))
  for number in range(count):
    state = jax.tree.map(lambda leaf: leaf + 1, state)
    save_checkpoint(folder, state, [{"id": f"trial{number}", "step": number}])
  return state


def test_checkpoint_round_trip(tmp_path: Path) -> None:
  assert restore_checkpoint(tmp_path / "none", None) is None  # type: ignore[arg-type]
  state = saved(tmp_path / "c", 3)
  found = restore_checkpoint(tmp_path / "c", state)
  assert found is not None
  states, lanes = found
  assert lanes == [{"id": "trial2", "step": 2}]
  for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(state), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert len([path for path in (tmp_path / "c").iterdir() if path.is_dir()]) == 2


def damage(folder: Path) -> None:
  """Changes what the newest restore would return, as a flipped bit on disk does: silently."""
  meta = next(path for path in folder.rglob("metadata") if path.parent.name == "meta")
  content = json.loads(meta.read_text())
  content["crc32"][0] ^= 1
  meta.write_text(json.dumps(content))


def newest(folder: Path) -> list[Path]:
  return sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: int(path.name), reverse=True)


def test_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  state = saved(tmp_path / "c", 3)
  damage(newest(tmp_path / "c")[0])
  found = restore_checkpoint(tmp_path / "c", state)
  assert found is not None
  assert found[1] == [{"id": "trial1", "step": 1}]
  assert "does not match its checksums" in capsys.readouterr().out


def test_truncated_checkpoint_is_passed_over(tmp_path: Path) -> None:
  state = saved(tmp_path / "c", 3)
  for path in newest(tmp_path / "c")[0].rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:3])
  found = restore_checkpoint(tmp_path / "c", state)
  assert found is not None
  assert found[1] == [{"id": "trial1", "step": 1}]


def test_all_checkpoints_damaged_is_an_error(tmp_path: Path) -> None:
  state = saved(tmp_path / "c", 3)
  for folder in newest(tmp_path / "c"):
    damage(folder)
  with pytest.raises(RecordError, match="no whole checkpoint in"):
    restore_checkpoint(tmp_path / "c", state)


def test_flipped_bit_in_the_arrays_is_found(tmp_path: Path) -> None:
  """Orbax itself returns wrong numbers without a word; over many flips, none may pass as the newest state."""
  state = saved(tmp_path / "c", 2)
  files = [path for path in newest(tmp_path / "c")[0].rglob("d/*") if path.is_file()]
  assert files
  flips = random.Random(1)
  for _ in range(12):
    path = flips.choice(files)
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[flips.randrange(len(broken))] ^= 1 << flips.randrange(8)
    path.write_bytes(bytes(broken))
    found = restore_checkpoint(tmp_path / "c", state)
    assert found is not None
    if found[1][0]["step"] == 1:  # the flip hit bytes that no array is read from
      for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    path.write_bytes(whole)
