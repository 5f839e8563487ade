"""What is measured where, against closed forms on the quadratic, and under every kind of batch-norm statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import classifier

from bsjax.records import append_rows, create_trial
from bsjax.study import flatness
from bsjax.study.flatness import ERROR_KINDS, group_size, make_view, program_names
from bsjax.study.measure_curvature import Curvature, EdgeMeasurements, SharpMeasurements
from bsjax.study.sharp_plan import escape_config, make_sharp_plan, solution_config, solution_grid
from bsjax.train import init_state, make_mesh, make_trial
from bsjax.types import Hparams
from bsjax.workloads import load_workload
from bsjax.workloads.quadratic import SPECTRUM

RATE = 0.1
W = np.linspace(-1, 1, 16)
GRADIENT = SPECTRUM * W


@functools.cache
def quadratic_study():
  workload = load_workload("quadratic")
  return workload, make_sharp_plan(workload, batch_sizes=(8, 512), num_epochs=2, num_steps=4, seeds=2, train_loss=0.5)


def trial_at(workload, config, w=None, *, step=0):
  trial = make_trial(config, Hparams(RATE), 0)
  state = init_state(workload, config.optimizer, Hparams(RATE), jnp.uint32(0))
  if w is not None:
    state = dataclasses.replace(state, params={"w": jnp.asarray(w, jnp.float32)}, step=jnp.int32(step))
  return trial, state


def test_closed_forms_of_the_quadratic(monkeypatch):
  """L(w) = w'Hw/2 + const: every measure has a formula. The radii are the study's, squares of which are written out."""
  monkeypatch.setattr(flatness, "AVERAGE_DRAWS", 1024)  # an error of some 2 %, which tells plain from adaptive noise
  workload, plan = quadratic_study()
  trial, state = trial_at(workload, solution_config(plan, workload, 8), W)
  curvature = Curvature(workload, make_mesh(trial=1), "sgd", num_examples=512, statistics="running")
  rows = {row["measure"]: row for row in curvature.rows(program_names(workload, plan), trial, state, minibatch_size=8)}
  assert list(rows) == [name for name in ERROR_KINDS if name not in ("gauss_newton_top", "preconditioned_top")]
  centers = workload.train.arrays["center"].astype(np.float64)
  loss = 0.5 * np.mean(np.sum(SPECTRUM * (W - centers) ** 2, axis=1))
  grads = SPECTRUM * (W - centers)
  rise = 1e-3 * (np.abs(W) + 1) @ np.abs(GRADIENT) + 0.5e-6 * SPECTRUM @ (np.abs(W) + 1) ** 2
  expected = {
    "top_eigenvalue": (SPECTRUM[0], 1e-5),
    "bottom_eigenvalue": (SPECTRUM[-1], 1e-4),
    "trace": (SPECTRUM.sum(), 1e-5),  # a diagonal Hessian: random signs have no variance
    "fisher_top": (np.linalg.eigvalsh(grads.T @ grads / 512)[-1], 1e-4),
    "keskar_1e-3": (100 * rise / (1 + loss), 2e-4),  # a loss of 1.4 to 1e-7, in a rise of 1e-2
    "gradient_curvature": (GRADIENT @ (SPECTRUM * GRADIENT) / (GRADIENT @ GRADIENT), 1e-5),
  }
  for name, (value, tolerance) in expected.items():
    np.testing.assert_allclose(rows[name]["value"], value, rtol=tolerance, err_msg=name)
  # Random draws: four standard errors, of a mean over draws and of a mean over batches.
  average = rows["average"]
  assert abs(average["value"] - 0.5 * 0.01**2 * SPECTRUM.sum()) < 4 * average["error"] + 1e-7
  adaptive = rows["adaptive_average"]
  assert abs(adaptive["value"] - 0.5 * 0.05**2 * SPECTRUM @ W**2) < 4 * adaptive["error"] + 1e-7
  draw = np.random.default_rng(0)
  batches = np.stack([grads[draw.permutation(512)[:8]].mean(0) for _ in range(20_000)])
  quotients = np.sum(SPECTRUM * batches**2, axis=1) / np.sum(batches**2, axis=1)
  batch = rows["batch_sharpness"]
  assert abs(batch["value"] - quotients.mean()) < 4 * batch["error"]
  assert all(row["grad_norm"] == pytest.approx(np.linalg.norm(GRADIENT), rel=1e-5) for row in rows.values())
  assert all(row["loss"] == pytest.approx(loss, rel=1e-5) for row in rows.values())
  assert {row["batch_norm"] for row in rows.values()} == {"none"}
  assert {name for name, row in rows.items() if row["minibatch_size"] == 8} == {"batch_sharpness"}
  assert {name: row["error_kind"] for name, row in rows.items()}.items() <= ERROR_KINDS.items()


def test_a_solution_is_measured_once_below_the_level_and_once_at_the_budget(tmp_path):
  """Which checkpoint is the first below is read off the trial's own rows: here one above, then two below, the second at the budget."""
  workload, plan = quadratic_study()
  measure = SharpMeasurements(workload, plan, tmp_path, make_mesh(trial=1))
  measure.curvature = type(
    "Few",
    (),
    {
      "rows": lambda self, names, trial, state, minibatch_size: iter([{"probe": "measure"}]),
      "layers": lambda self, trial, state: iter([{"probe": "layer"}]),
      "spectrum": lambda self, trial, state: iter([{"probe": "spectrum"}]),
    },
  )()
  config = solution_config(plan, workload, 512)
  budget = solution_grid(plan, workload, 512).budget
  assert budget == 2
  seen = []
  for step, w in ((1, 1.0), (2, 0.1), (4, 0.05)):
    trial, state = trial_at(workload, config, w * np.ones(16), step=step)
    if step == 1:
      create_trial(tmp_path / trial.id, {})
    rows = measure(trial, state)
    append_rows(tmp_path / trial.id / "probes.jsonl", rows)
    seen.append([(row["probe"], row.get("phase"), row["step"]) for row in rows])
  assert seen == [
    [("train", None, 1)],
    [
      ("train", None, 2),
      ("test", None, 2),
      *((probe, phase, 2) for phase in ("level", "budget") for probe in ("measure", "distance")),
      ("layer", "level", 2),
      ("spectrum", "level", 2),
    ],
    [("train", None, 4), ("test", None, 4)],  # the end
  ]


def test_distances_are_from_the_trials_own_start(tmp_path):
  workload, plan = quadratic_study()
  measure = SharpMeasurements(workload, plan, tmp_path, make_mesh(trial=1))
  trial, state = trial_at(workload, escape_config(plan, workload, 8), np.ones(16) + np.eye(16)[3], step=4)
  row = measure._distance(trial, state)
  assert (row["from_start"], row["from_parent"]) == (pytest.approx(1.0), None)


@pytest.mark.parametrize(("count", "most", "size"), [(10_000, 32, 25), (1024, 5000, 1024), (9_973, 32, 32), (37, 8, 8)])
def test_groups_are_whole_and_nearly_as_large_as_asked(count, most, size):
  assert group_size(count, most) == size


@pytest.mark.parametrize(
  ("statistics", "group", "num_examples"), [("running", None, 37), ("batch", None, 37), ("ghost", 8, 32)]
)
def test_a_view_has_the_loss_of_its_statistics(statistics, group, num_examples):
  """The mean over a view's examples is inference's loss, or training's on each group, computed here group by group."""
  workload = classifier("mlp_bn")
  view = make_view(workload, statistics, 37, group)
  variables = workload.init(jax.random.key(0))
  loss_fn = view.loss_fn(variables.model_state)
  mean = jnp.mean(jax.vmap(loss_fn, (None, 0))(variables.params, view.examples))
  arrays = {name: array[:num_examples] for name, array in workload.train.arrays.items()}
  if statistics == "running":
    single = [{name: array[i] for name, array in arrays.items()} for i in range(num_examples)]
    expected = [workload.example_loss(*variables, example) for example in single]
  else:
    size = group or num_examples
    groups = [{name: array[i : i + size] for name, array in arrays.items()} for i in range(0, num_examples, size)]
    expected = [workload.train_loss(*variables, batch, jax.random.key(1))[0] for batch in groups]
  assert view.num_examples == num_examples
  np.testing.assert_allclose(mean, np.mean(expected), rtol=1e-5)  # float32 means of 37 losses


def test_statistics_change_the_measures_and_every_row_names_them():
  workload = classifier("mlp_bn")
  trial, state = trial_at(workload, solution_config(make_sharp_plan(workload), workload, 2))
  values = {}
  for statistics in ("running", "batch"):
    curvature = Curvature(workload, make_mesh(trial=1), "sgd", num_examples=36, statistics=statistics)
    (row,) = curvature.rows(("gradient_curvature",), trial, state)
    assert row["batch_norm"] == statistics
    values[statistics] = row["value"]
  assert abs(values["running"] / values["batch"] - 1) > 0.1


def test_the_edge_measures_with_the_statistics_of_its_own_batches():
  workload = classifier("mlp_bn")
  probe = EdgeMeasurements(workload, make_mesh(trial=1))
  trial, state = trial_at(workload, solution_config(make_sharp_plan(workload), workload, 4))
  rows = probe(trial, state)
  assert [row.get("measure", row["probe"]) for row in rows] == [
    "test",
    "top_eigenvalue",
    "batch_sharpness",
    "gradient_curvature",
  ]
  assert rows[2]["minibatch_size"] == 4
  assert {row["num_examples"] for row in rows[1:]} == {36}  # nine groups of 4 of the 37
  top = rows[1]

  def loss(params):
    groups = jax.tree.map(lambda x: jnp.asarray(x[:36]).reshape(9, 4, *x.shape[1:]), dict(workload.train.arrays))
    each = jax.vmap(lambda batch: workload.train_loss(params, state.model_state, batch, jax.random.key(0))[0])(groups)
    return jnp.mean(each)

  flat, unravel = ravel_pytree(state.params)
  dense = np.linalg.eigvalsh(np.asarray(jax.jit(jax.hessian(lambda flat: loss(unravel(flat))))(flat), np.float64))
  assert abs(top["value"] - dense[-1]) <= top["error"] + 1e-4 * dense[-1]
