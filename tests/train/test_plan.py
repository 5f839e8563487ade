"""Plans: what is chosen, that it is remembered, that it compiles once, and that it changes nothing but the time."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import classifier, in_float64, quadratic

import bsjax.train.plan as plan_module
from bsjax.records import RecordError, read_record
from bsjax.train import (
  Trial,
  TrialConfig,
  build_segment,
  chunked,
  device_arrays,
  init_state,
  make_mesh,
  make_trial,
  run_trials,
)
from bsjax.train.evaluate import spread_chunks
from bsjax.train.plan import (
  CROWD,
  CROWD_PLAN,
  MEASURE_FROM,
  PLANS,
  PLANS_FILE,
  TABLES,
  Choice,
  Plan,
  candidates,
  choose_plan,
  measure_plan,
  num_lanes,
  remember_plan,
  remembered_plan,
  step_flops,
)
from bsjax.train.segment import _build, program_config
from bsjax.types import Hparams
from bsjax.workloads import Workload

CONFIG = TrialConfig("mlp", 4, 60, 3, optimizer="momentum")
QUADRATIC = TrialConfig("quadratic", 8, 600, 4)
MESH = make_mesh(data=1)


def trials_of(config: TrialConfig, count: int) -> list[Trial]:
  """Rates and seeds, the seeds out of order, as the caller of a pool may have them."""
  return [make_trial(config, Hparams(0.02 * (1 + number // 4)), number % 4) for number in range(count)]


def numbers(folder: Path, trials: list[Trial]) -> np.ndarray:
  """All that the trials logged, [trials, rows, columns]."""
  rows = [read_record(folder / trial.id).metrics for trial in trials]
  return np.array([[list(row.values()) for row in trial_rows] for trial_rows in rows], float)


def test_plans_change_no_number(tmp_path: Path) -> None:
  """In turn without vmap, bitwise; side by side, with idle lanes, to 1e-6 for nine steps: sixteen float32 roundings, not yet amplified."""
  trials = trials_of(CONFIG, 10)
  found = {}
  for plan in (PLANS["sequential"], PLANS["map"], Plan(3, 2)):
    folder = tmp_path / "x".join(map(str, plan))
    run_trials(classifier("mlp"), trials, folder, mesh=MESH, plan=plan)
    found[plan] = numbers(folder, trials)
    assert read_record(folder / trials[0].id).trial["plan"] == plan._asdict() | {"devices": 1}
  alone, in_turn, side_by_side = found.values()
  assert alone.shape == (10, 20, 6)
  assert len(np.unique(alone[:, -1, 2])) == 10
  np.testing.assert_array_equal(in_turn, alone)
  np.testing.assert_allclose(side_by_side[:, :3], alone[:, :3], rtol=1e-6)


def losses_under(workload: Workload, plan: Plan, num_steps: int) -> np.ndarray:
  """Each step's loss in so many steps of four trials, of two rates and two seeds, [trials, steps]."""
  config = TrialConfig(workload.name, 4, num_steps, 1, optimizer="momentum")
  seeds, lanes = jnp.uint32([0, 1, 0, 1]), num_lanes(plan, MESH)
  zero = Hparams(*(jnp.zeros(4, jnp.float32) for _ in Hparams._fields))
  hparams = zero._replace(learning_rate=jnp.float32([0.01, 0.01, 0.02, 0.02]), momentum=jnp.full(4, 0.9, jnp.float32))
  one = lambda index: jax.tree.map(lambda leaf: leaf[index], (hparams, seeds))  # noqa: E731
  starts = [init_state(workload, config.optimizer, *one(index)) for index in range(4)]
  states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
  data = device_arrays(workload.train.arrays, MESH), jax.device_put(chunked(workload.validation.arrays))
  segment = build_segment(workload, config, lanes, MESH, plan.in_turn)
  rows = []
  for first in range(0, 4, lanes):
    part = jax.tree.map(lambda leaf, first=first: jnp.copy(leaf[first : first + lanes]), (states, hparams, seeds))
    rows.append(segment(*part, np.full(plan.in_turn, num_steps, np.int32), *data)[1].minibatch_loss[:, :num_steps])
  return np.concatenate(rows)


@pytest.mark.parametrize(
  ("kind", "num_steps", "later"), [("mlp", 256, 1e-10), ("cnn", 64, 1e-10), ("mlp_bn", 256, 1e-7)]
)
def test_plans_differ_by_rounding_alone(kind: str, num_steps: int, later: float) -> None:
  """Side by side against alone: float64 steps, the first to some roundings of 1.1e-16, the last to what training makes of them.

  Batch norm at B = 4 amplifies a rounding ten million times in 256 steps, the others ten thousand times. In float32 those are 1e-1 and
  1e-3; another batch or key would show in the first steps in any precision.
  """
  with jax.enable_x64(True):
    workload = in_float64(classifier(kind))
    alone, side_by_side = (losses_under(workload, plan, num_steps) for plan in (Plan(), Plan(4, 1)))
  assert alone.dtype == np.float64
  assert len(np.unique(alone[:, -1])) == 4
  np.testing.assert_allclose(side_by_side[:, :3], alone[:, :3], rtol=1e-15)
  np.testing.assert_allclose(side_by_side, alone, rtol=later)


@pytest.mark.parametrize(("number", "name"), list(enumerate(["auto", *PLANS])))
def test_one_compilation_for_64_trials(tmp_path: Path, number: int, name: str) -> None:
  """One program is built, and it is compiled once, whatever its lanes hold and under every plan; another batch size is another program."""
  plan = PLANS.get(name)
  config = dataclasses.replace(QUADRATIC, batch_size=20 + number, num_steps=8)  # of no other test
  built = _build.cache_info().misses
  run_trials(quadratic(), trials_of(config, 64), tmp_path, mesh=MESH, plan=plan)
  run_trials(quadratic(), trials_of(dataclasses.replace(config, num_steps=16), 5), tmp_path, mesh=MESH)
  assert _build.cache_info().misses == built + 1
  settled = remembered_plan(tmp_path, config, MESH)
  assert settled == (plan or CROWD_PLAN)
  assert build_segment(quadratic(), config, num_lanes(settled, MESH), MESH, settled.in_turn)._cache_size() == 1


def test_timing_a_plan_compiles_what_its_pool_uses(tmp_path: Path) -> None:
  config, plan = dataclasses.replace(QUADRATIC, batch_size=11, num_steps=8), Plan(2, 2)
  validation = jax.device_put(chunked(quadratic().validation.arrays), spread_chunks(MESH))
  data = device_arrays(quadratic().train.arrays, MESH), validation
  seconds = measure_plan(quadratic(), config, plan, MESH, [0, 1], *data)
  # A step of 16 numbers takes about 5 microseconds; a compilation of a second, over 1024 trial-steps, would be ten times the bound.
  assert 0 < seconds < 1e-4
  run_trials(quadratic(), trials_of(config, 4), tmp_path, mesh=MESH, plan=plan)
  assert build_segment(quadratic(), config, num_lanes(plan, MESH), MESH, plan.in_turn)._cache_size() == 1


def test_candidates_are_the_neighbours_of_a_break_even() -> None:
  small, middle = (row.below for row in TABLES["cpu"][:2])
  plans = [row.plan for row in TABLES["cpu"]]
  assert candidates(1e5, 8, "cpu") == plans[:1]
  assert candidates(small * 0.9, 8, "cpu") == [plans[0], plans[1]]
  assert candidates(small * 1.1, 8, "cpu") == [plans[1], plans[0]]
  assert candidates(small * 3, 8, "cpu") == plans[1:2]
  assert candidates(middle * 0.9, 8, "cpu") == [plans[1], plans[2]]
  assert candidates(middle * 1.1, 8, "cpu") == [plans[2], plans[1]]
  assert candidates(1e12, 64, "cpu") == plans[2:]
  assert candidates(1e4, CROWD, "cpu") == [CROWD_PLAN]
  assert candidates(1e4, CROWD - 1, "cpu") == plans[:1]
  assert candidates(1e4, CROWD, "gpu") == candidates(1e4, 1, "tpu") == [TABLES["gpu"][0].plan]


def test_plans_are_timed_only_where_it_pays() -> None:
  seconds = {Plan(1, 1): 2.0, Plan(8, 1): 1.0}
  timed: list[Plan] = []

  def measure(plan: Plan) -> float:
    timed.append(plan)
    return seconds[plan]

  both = list(seconds)
  assert choose_plan(both[:1], 10 * MEASURE_FROM, measure) == Choice(Plan(1, 1), "table")
  assert choose_plan(both, MEASURE_FROM - 1, measure) == Choice(Plan(1, 1), "table")
  assert timed == []
  assert choose_plan(both, MEASURE_FROM, measure) == Choice(Plan(8, 1), "measured", tuple(seconds.items()))
  assert timed == both


def test_flops_of_a_step() -> None:
  """Dense layers: 6 P B and a little; 3 x 3 convolutions with padding, of n x n images: 6 (3n - 2)^2 in out, which 6 P B misses."""
  mlp, cnn = classifier("mlp"), classifier("cnn")
  products = 6 * 4 * (36 * 7 + 7 * 3)
  assert products < step_flops(mlp, 4) < 1.3 * products
  products = 6 * 4 * (16**2 * 1 * 32 + 7**2 * 32 * 64)
  assert products < step_flops(cnn, 4) < 1.3 * products


class _Stop(Exception):
  pass


def broken_off(folder: Path, trials: list[Trial], plan: Plan | None) -> None:
  """Runs until rows were written and a checkpoint made, and breaks off."""
  told = 0

  def stop(steps: int) -> None:
    nonlocal told
    told += steps > 0
    if told > len(trials) + 1:
      raise _Stop

  with pytest.raises(_Stop):
    run_trials(quadratic(), trials, folder, mesh=MESH, plan=plan, on_progress=stop, checkpoint_seconds=0.0)


def contents(folder: Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.glob("*/*.json*"))
    if path.name in ("trial.json", "metrics.jsonl")
  }


def test_a_rerun_goes_on_with_the_plan_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """The first run times two plans; after a kill the other would win, but is not asked: the bits are those of one uninterrupted run."""
  both = [Plan(1, 2), Plan(3, 1)]
  trials = trials_of(QUADRATIC, 5)
  monkeypatch.setattr(plan_module, "candidates", lambda *arguments: both)
  monkeypatch.setattr(plan_module, "MEASURE_FROM", 0)
  monkeypatch.setattr(plan_module, "measure_plan", lambda workload, config, plan, *rest: 1.0 / plan.side_by_side)
  broken_off(tmp_path / "parts", trials, None)
  entry = next(iter(json.loads((tmp_path / "parts" / PLANS_FILE).read_text()).values()))
  assert (entry["basis"], entry["side_by_side"], entry["batch_size"]) == ("measured", 3, 8)
  assert [timed["seconds"] for timed in entry["seconds_per_step"]] == [1.0, 1.0 / 3.0]
  monkeypatch.setattr(plan_module, "measure_plan", lambda workload, config, plan, *rest: 1.0 * plan.side_by_side)
  run_trials(quadratic(), trials, tmp_path / "parts", mesh=MESH)
  run_trials(quadratic(), trials, tmp_path / "whole", mesh=MESH, plan=both[1])
  assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
  assert len(contents(tmp_path / "whole")) == 10


def test_another_plan_than_that_of_begun_trials_is_refused(tmp_path: Path) -> None:
  trials = trials_of(QUADRATIC, 4)
  broken_off(tmp_path, trials, Plan(3, 1))
  with pytest.raises(
    RecordError, match=r"the trials of .* were begun under \(3, 1\), wanted plan=\(1, 2\): leave plan out"
  ):
    run_trials(quadratic(), trials, tmp_path, mesh=MESH, plan=Plan(1, 2))
  plans = (tmp_path / PLANS_FILE).read_text()
  (tmp_path / PLANS_FILE).unlink()
  with pytest.raises(RecordError, match="holds 3 lanes, this pool has 2 .*: delete that folder"):
    run_trials(quadratic(), trials, tmp_path, mesh=MESH, plan=Plan(1, 2))
  (tmp_path / PLANS_FILE).write_text(plans)
  run_trials(quadratic(), trials, tmp_path, mesh=MESH, plan=Plan(3, 1))
  run_trials(
    quadratic(), trials_of(QUADRATIC, 5), tmp_path, mesh=MESH, plan=Plan(1, 2)
  )  # nothing is begun: it may change
  assert remembered_plan(tmp_path, QUADRATIC, MESH) == Plan(1, 2)


def test_a_plan_is_remembered_for_its_program_and_devices(tmp_path: Path) -> None:
  """Every budget shares it; another batch size or optimizer, or another device, does not."""
  remember_plan(tmp_path, QUADRATIC, MESH, Choice(Plan(2, 4), "forced"))
  remember_plan(tmp_path, CONFIG, MESH, Choice(Plan(1, 8), "forced"))
  longer = dataclasses.replace(QUADRATIC, num_steps=6000, stop_at_target=True)
  assert program_config(longer) == program_config(QUADRATIC)
  assert remembered_plan(tmp_path, longer, MESH) == Plan(2, 4)
  assert remembered_plan(tmp_path, CONFIG, MESH) == Plan(1, 8)
  for other in ({"batch_size": 16}, {"optimizer": "adamw"}):
    assert remembered_plan(tmp_path, dataclasses.replace(QUADRATIC, **other), MESH) is None
  path = tmp_path / PLANS_FILE
  path.write_text(path.read_text().replace('"device_kind": "', '"device_kind": "another '))
  assert remembered_plan(tmp_path, QUADRATIC, MESH) is None
  path.write_text("{")
  with pytest.raises(RecordError, match=f"{PLANS_FILE} is not whole JSON: delete that file"):
    remembered_plan(tmp_path, QUADRATIC, MESH)
