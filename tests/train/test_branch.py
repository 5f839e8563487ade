"""Trials that start from another trial's end."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import quadratic
from test_pool import contents, damage, interrupted, newest, run, trials_of
from test_segment import hparams_of, plain_loop

from bsjax.records import RecordError, read_record, set_status
from bsjax.train import Trial, TrialConfig, init_state, make_trial
from bsjax.train.checkpoint import FINAL, restore_checkpoint
from bsjax.train.plan import PLANS_FILE
from bsjax.types import Hparams

# As in test_pool.py: Orbax leaves reads of a damaged checkpoint behind.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")

COSINE = TrialConfig("quadratic", 8, 12, 4, optimizer="adamw", schedule="cosine", warmup="gradual")
PARENT = make_trial(COSINE, Hparams(0.05, warmup_steps=2), 3)


def child_of(parent: Trial, **changes: object) -> TrialConfig:
  """Another batch size and length: the temperature test's change in the middle of training."""
  return dataclasses.replace(parent.config, parent=parent.id, batch_size=16, num_steps=8, **changes)  # type: ignore[arg-type]


def test_child_continues_its_parent(tmp_path: Path) -> None:
  """Parameters and Adam's moments with their count go on; step, schedule and order of examples begin anew."""
  child = make_trial(child_of(PARENT), Hparams(0.02, warmup_steps=2, decay_steps=10), 7)
  run(tmp_path, [make_trial(COSINE, Hparams(0.01), 3), PARENT], keep_final=True)  # not the first lane
  run(tmp_path, [*trials_of(child.config, rates=(0.01,), seeds=range(5)), child])  # waits for a lane of five
  end, _ = plain_loop(quadratic(), PARENT.config, 0.05, 3, 12)
  adam, decay, schedule = end.opt_state
  assert (int(adam.count), int(schedule.count)) == (12, 12)
  start = dataclasses.replace(
    end, step=jnp.int32(0), opt_state=(adam, decay, schedule._replace(count=jnp.zeros((), jnp.int32)))
  )
  _, losses = plain_loop(quadratic(), child.config, 0.02, 7, 8, start=start)
  rows = read_record(tmp_path / child.id).metrics
  assert [row["step"] for row in rows] == [4, 8]
  assert [row["examples_seen"] for row in rows] == [64, 128]
  # 20 float32 steps that round differently, as in test_segment.py
  np.testing.assert_allclose([row["train_loss"] for row in rows], np.reshape(losses, (2, 4)).mean(axis=1), rtol=1e-5)
  assert not (tmp_path / child.id / FINAL).exists()  # not asked for


LONG = [
  make_trial(TrialConfig("quadratic", 8, 600, 4, optimizer="momentum"), Hparams(rate), 0) for rate in (0.1, 0.3, 0.5)
]


@pytest.mark.parametrize("after", [1, 1000])
def test_interruption_changes_no_bit(tmp_path: Path, after: int) -> None:
  """Of a parent's final state, nor of its children's rows."""
  for part in ("whole", "parts"):
    folder = tmp_path / part
    children = trials_of(dataclasses.replace(LONG[1].config, parent=LONG[1].id), rates=(0.1, 0.2), seeds=range(2))
    for trials in (LONG, children):
      if part == "parts":
        interrupted(folder, trials, after, keep_final=True)
      run(folder, trials, keep_final=True)
  assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
  hparams = hparams_of(0.1)
  like = init_state(quadratic(), "momentum", hparams, jnp.uint32(0))
  for trial in (*LONG, *children):
    ends = [restore_checkpoint(tmp_path / part / trial.id / FINAL, like) for part in ("whole", "parts")]
    assert ends[0] is not None
    assert int(ends[0][0].step) == 600
    for a, b in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(ends[1]), strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def refusal(folder: Path, config: TrialConfig) -> str:
  with pytest.raises(RecordError) as caught:
    run(folder, [make_trial(config, Hparams(0.1), 0)])
  return str(caught.value)


def test_parent_that_cannot_be_a_start(tmp_path: Path) -> None:
  """Each message names what to do; the child's folder is not begun."""
  folder, config = tmp_path / PARENT.id, child_of(PARENT)
  assert f"there is no parent trial {folder}" in refusal(tmp_path, config)
  run(tmp_path, [PARENT])
  remedy = f"delete the folder {folder} and run that trial again with keep_final"
  assert remedy in refusal(tmp_path, config)
  for state in ("running", "diverged"):
    set_status(folder, state)  # type: ignore[arg-type]
    assert f"{folder} is {state}" in refusal(tmp_path, config)
  run(tmp_path, [other := make_trial(PARENT.config, Hparams(0.06), 3)], keep_final=True)
  kept = child_of(other)
  with pytest.raises(ValueError, match="has optimizer='adamw', its child 'sgd'"):
    run(tmp_path, [make_trial(dataclasses.replace(kept, optimizer="sgd"), Hparams(0.1), 0)])
  damage(newest(tmp_path / other.id / FINAL)[0])
  assert f"delete the folder {tmp_path / other.id}" in refusal(tmp_path, kept)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PARENT.id, other.id, PLANS_FILE])


def test_diverged_trial_leaves_no_final_state(tmp_path: Path) -> None:
  trial = make_trial(TrialConfig("quadratic", 8, 400, 4), Hparams(200.0), 0)
  run(tmp_path, [trial], keep_final=True)
  assert read_record(tmp_path / trial.id).status["state"] == "diverged"
  assert not (tmp_path / trial.id / FINAL).exists()
