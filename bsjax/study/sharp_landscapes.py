"""The landscapes of the study of sharp minima: between a small-batch and a large-batch solution, and around each."""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bsjax.probes import (
  curve_coefficients,
  direction_corner,
  filter_normalised,
  line_coefficients,
  lines_coefficients,
  plane_coefficients,
  stack_corners,
  trajectory_plane,
)
from bsjax.records import Record, write_atomically
from bsjax.study.landscape import (
  LINE_POINTS,
  PLANE_POINTS,
  Row,
  compute_landscape,
  grid_around,
  grid_points,
  landscape_statistics,
  line_points,
  lines_points,
  path_rows,
  read_landscape,
  split_metrics_fn,
)
from bsjax.study.sharp_plan import SharpPlan, geometric_steps, solution_config
from bsjax.train import TrainState, Trial, init_state, make_trial, restore_final, run_trials
from bsjax.types import Hparams, Params, Variables
from bsjax.workloads import Workload

FOLDER = "landscapes"
RANDOM_LINES = 5
TRAJECTORY_CHECKPOINTS = 16
"""Points of a trajectory whose parameters are held at once."""


def num_points(plan: SharpPlan) -> int:
  """Counts the points of all landscapes."""
  return 2 * plan.seeds * len(LINE_POINTS) + 2 * (RANDOM_LINES * len(PLANE_POINTS) + 2 * len(PLANE_POINTS) ** 2)


def draw_landscapes(
  workload: Workload,
  plan: SharpPlan,
  folder: Path,
  minimisers: Mapping[str, Sequence[Record]],
  *,
  mesh: Mesh,
  on_progress: Callable[[int], None],
) -> None:
  """Computes what is missing of the landscapes into `folder/landscapes/`.

  Lines and curves join the ends of training of the smallest and the largest batch size, seed by seed. The planes and lines around each,
  and the plane through its trajectory, are those of the first seed for which both exist. A solution that diverged has none.

  Args:
    minimisers: the solutions of batch sizes "small" and "large", in the same order of seeds, whose last states were kept.
    on_progress: told how many points were settled.
  """
  metrics_fn, data = split_metrics_fn(workload, num_examples=plan.num_examples)
  compute = functools.partial(
    _compute,
    folder / FOLDER,
    metrics_fn=metrics_fn,
    data=data,
    batch_norm=landscape_statistics(workload),
    on_progress=on_progress,
  )
  pairs = [pair for pair in zip(minimisers["small"], minimisers["large"], strict=True) if all(map(_complete, pair))]
  for small, large in pairs:
    ends = stack_corners(*(_final_variables(workload, plan, folder, record) for record in (small, large)))
    seed = small.trial["seed"]
    for kind, coefficients in (("line", line_coefficients), ("curve", curve_coefficients)):
      compute(f"{kind}_{seed}", line_points(LINE_POINTS), coefficients(LINE_POINTS), ends)
  for name, record in zip(("small", "large"), pairs[0] if pairs else (), strict=False):
    _draw_around(name, _final_variables(workload, plan, folder, record), compute)
    _draw_trajectory(name, record, workload, plan, folder, mesh, compute, on_progress)


def _complete(record: Record) -> bool:
  return record.status["state"] == "complete"


def _compute(folder: Path, name: str, points: Sequence[Row], coefficients: Any, corners: Any, **options: Any) -> None:
  compute_landscape(folder / f"{name}.jsonl", name, points, coefficients, corners, **options)


def _config_of(plan: SharpPlan, workload: Workload, record: Record) -> Any:
  return solution_config(plan, workload, record.trial["config"]["batch_size"])


def _final_variables(workload: Workload, plan: SharpPlan, folder: Path, record: Record) -> Variables:
  config = dataclasses.replace(_config_of(plan, workload, record), parent=record.id)
  hparams = Hparams(**record.trial["hparams"])
  shapes = jax.eval_shape(lambda: init_state(workload, config.optimizer, hparams, jnp.uint32(0)))
  state = restore_final(folder, config, like=shapes)
  return Variables(state.params, state.model_state)


def _draw_around(name: str, centre: Variables, compute: Callable[..., None]) -> None:
  """Draws lines and a plane in filter-normalised random directions, the same for both solutions up to their filters' norms."""
  directions = [
    direction_corner(filter_normalised(jax.random.key(number), centre.params), centre.model_state)
    for number in range(RANDOM_LINES)
  ]
  grid = grid_points(PLANE_POINTS, PLANE_POINTS)
  compute(
    f"random_line_{name}",
    lines_points(PLANE_POINTS, RANDOM_LINES),
    lines_coefficients(PLANE_POINTS, RANDOM_LINES),
    stack_corners(centre, *directions),
  )
  compute(f"random_{name}", grid, _plane(grid), stack_corners(centre, *directions[:2]))


def _plane(grid: Sequence[Row]) -> Any:
  return plane_coefficients([point["x"] for point in grid], [point["y"] for point in grid])


def _draw_trajectory(
  name: str,
  record: Record,
  workload: Workload,
  plan: SharpPlan,
  folder: Path,
  mesh: Mesh,
  compute: Callable[..., None],
  on_progress: Callable[[int], None],
) -> None:
  """Draws the plane through the checkpoints of a solution; batch-norm statistics are re-estimated at every point."""
  path = folder / FOLDER / f"path_{name}.jsonl"
  if path.exists():  # written last
    on_progress(len(PLANE_POINTS) ** 2)
    return
  states = _retrace(workload, plan, record, mesh)
  try:
    plane = trajectory_plane(stack_corners(*(state.params for state in states)))
  except ValueError:  # too short a training for a plane: the picture says that there is none
    on_progress(len(PLANE_POINTS) ** 2)
    return
  centre = Variables(states[-1].params, states[-1].model_state)
  corners = [direction_corner(_direction(plane.directions, number), centre.model_state) for number in range(2)]
  grid = grid_points(*grid_around(plane.coordinates))
  compute(f"trajectory_{name}", grid, _plane(grid), stack_corners(centre, *corners))
  rows = path_rows(f"path_{name}", plane, [int(state.step) for state in states])
  write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _direction(directions: Params, number: int) -> Params:
  return jax.tree.map(lambda leaf: leaf[number], directions)


def _retrace(workload: Workload, plan: SharpPlan, record: Record, mesh: Mesh) -> list[TrainState]:
  """Trains a solution once more, to the same bits, and returns its states at checkpoints, the end last."""
  config = _config_of(plan, workload, record)
  steps = geometric_steps(config.num_steps, config.eval_every, TRAJECTORY_CHECKPOINTS)
  trial = make_trial(
    dataclasses.replace(config, probe_steps=steps), Hparams(**record.trial["hparams"]), record.trial["seed"]
  )
  states: list[TrainState] = []

  def collect(trial: Trial, state: TrainState) -> list[Row]:
    del trial
    states.append(jax.device_get(state))
    return []

  with tempfile.TemporaryDirectory() as folder:
    run_trials(workload, [trial], Path(folder), mesh=mesh, probe=collect)
  return states


def read_landscapes(folder: Path) -> dict[str, list[Row]]:
  """Reads the rows of every landscape below `folder`, by its name."""
  return {path.stem: read_landscape(path) for path in sorted((folder / FOLDER).glob("*.jsonl"))}
