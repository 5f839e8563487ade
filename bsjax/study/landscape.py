"""A landscape computed in pieces that outlive a kill: rows of metrics at the points of a line, a curve or a plane."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.probes.landscape import TrajectoryPlane, landscape
from bsjax.records import RecordError, append_rows, write_atomically
from bsjax.train import chunked, eval_chunk, evaluate
from bsjax.types import Array, Batch, Metrics, ModelState, Params, Variables
from bsjax.workloads import Workload

LINE_POINTS = np.linspace(-1, 2, 25)
"""alpha on the line and on the curve: 25 points, as in Keskar et al.'s code."""
PLANE_POINTS = np.linspace(-1, 1, 25)
"""Each coordinate of a plane of random directions, and x of a random line."""
STATISTICS_BATCH, STATISTICS_BATCHES = 1024, 8
"""Size and largest number of the batches from which batch-norm statistics are estimated anew."""
PIECE = 5
"""Points computed and written at a time: what a kill can lose."""

Row = dict[str, Any]

_landscape = jax.jit(landscape, static_argnums=0)
"""One program for each `metrics_fn` and shape of corners, shared by all landscapes."""


def landscape_statistics(workload: Workload) -> str:
  """Names the batch-norm statistics that `split_metrics_fn` uses, for the rows."""
  return "none" if workload.batch_norm == "none" else "reestimated"


def split_metrics_fn(
  workload: Workload, *, num_examples: int | None = None
) -> tuple[Callable[..., Metrics], tuple[Any, ...]]:
  """Builds the metrics of a landscape and the data they need: averages over the training and the test set.

  With batch norm, running statistics are estimated anew at every point, from training examples (`reestimated_state`). Those of the
  corners would not do: extrapolated beyond two solutions a variance falls below zero, and away from a solution its statistics are
  another network's.

  Args:
    num_examples: how many examples of each split, the first; all where not given.

  Returns: `metrics_fn(variables, *data) -> {"train_loss", "train_accuracy", "test_loss", ...}`, and `data`. Where a loss is NaN, so are the
    other metrics of its split: an accuracy would be that of an arbitrary class.
  """
  train, test = (
    source.first(len(source) if num_examples is None else num_examples).arrays
    for source in (workload.train, workload.test)
  )
  shapes = jax.eval_shape(workload.init, jax.random.key(0))
  size = eval_chunk(workload.example_metrics, shapes.params, shapes.model_state, workload.train.spec)
  splits = {"train": chunked(train, size), "test": chunked(test, size)}
  data = jax.device_put((splits, _whole_batches(train)))

  def metrics_fn(variables: Variables, splits: dict[str, Any], batches: Batch) -> Metrics:
    params, model_state = variables
    model_state = reestimated_state(workload, params, model_state, batches)
    metrics: Metrics = {}
    for split, examples in splits.items():
      found = evaluate(workload.example_metrics, params, model_state, examples)
      unknown = jnp.isnan(found["loss"])
      metrics |= {f"{split}_{name}": jnp.where(unknown, jnp.nan, value) for name, value in found.items()}
    return metrics

  return metrics_fn, data


def _whole_batches(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Cuts the first examples into batches `[count, size, ...]` of `STATISTICS_BATCH`, or into one of all where there are fewer."""
  num_examples = len(next(iter(arrays.values())))
  size = min(num_examples, STATISTICS_BATCH)
  count = min(num_examples // size, STATISTICS_BATCHES)
  return {name: array[: count * size].reshape(count, size, *array.shape[1:]) for name, array in arrays.items()}


def reestimated_state(workload: Workload, params: Params, model_state: ModelState, batches: Batch) -> ModelState:
  """Estimates running statistics anew: the mean over batches of the statistics of each batch in training mode.

  A step of training moves a running average from s to m s + (1 - m) b, where b are the statistics of its batch, and does not look at s
  otherwise. So b is read off the steps from s = 0 and from s = 1, whatever the momentum m; the batch passes through the network once.

  Args:
    model_state: what of it training never changes (m = 1) is returned as it is.
    batches: leading axes [count, size].

  Source: Izmailov et al. (2018), "Averaging weights leads to wider optima", section 3.2, and Garipov et al. (2018), who do the same on
    curves between networks.
  """
  if not jax.tree.leaves(model_state):
    return model_state

  def of_batch(batch: Batch) -> ModelState:
    def step_from(start: Array) -> ModelState:
      state = jax.tree.map(lambda leaf: jnp.full_like(leaf, start), model_state)
      return workload.train_loss(params, state, batch, jax.random.key(0))[1]

    return jax.vmap(step_from)(jnp.array([0.0, 1.0]))

  def estimate(steps: Array, leaf: Array) -> Array:
    from_zero, from_one = steps[:, 0], steps[:, 1]
    weight = 1 - (from_one - from_zero)
    return jnp.where(jnp.all(weight > 0, axis=0), jnp.mean(from_zero / weight, axis=0), leaf)

  return jax.tree.map(estimate, jax.lax.map(of_batch, batches), model_state)


def compute_landscape(
  path: Path,
  name: str,
  points: Sequence[Mapping[str, Any]],
  coefficients: Array,
  corners: Any,
  metrics_fn: Callable[..., Metrics],
  *,
  data: tuple[Any, ...] = (),
  batch_norm: str,
  on_progress: Callable[[int], None] = lambda count: None,
) -> list[Row]:
  """Computes what is missing of a landscape's rows, and returns all of them.

  Args:
    path: a `.jsonl` file; made, with its folder, where missing.
    name: which landscape it is: the first column of each row.
    points: what each row says about its point, such as `{"x": 0.5, "y": 0.0}`; M plain dicts for JSON.
    coefficients, corners, metrics_fn, data: as for `landscape`, f32[M, K] and so on. Landscapes share a compiled program if they share
      `metrics_fn`, which has to be the same function object, and the shape of the corners.
    batch_norm: which statistics the metrics use; the last column of each row.
    on_progress: told how many points were settled, whenever some were.

  Returns: M rows, `{"landscape": name, **point, **metrics, "batch_norm": batch_norm}`; a metric that is not finite is null.

  Holds: after a kill at any moment a rerun computes what is not whole on disk, and leaves the bytes of an uninterrupted run: every piece
    goes through one program of `PIECE` points, and a point does not depend on its neighbours there.

  Raises:
    RecordError: the file is damaged, or holds other points.
  """
  if len(points) != len(coefficients):
    raise ValueError(f"{len(points)} points and {len(coefficients)} coefficients, wanted one of each per point")
  path.parent.mkdir(parents=True, exist_ok=True)
  fixed = [{"landscape": name, **point} for point in points]
  done = len(_whole_rows(path, fixed, batch_norm))
  on_progress(done)
  for start in range(done, len(points), PIECE):
    piece = np.asarray(coefficients[start : start + PIECE])
    count = len(piece)
    padded = np.concatenate([piece, np.repeat(piece[-1:], PIECE - count, axis=0)])
    metrics = jax.device_get(_landscape(metrics_fn, corners, padded, *data))
    append_rows(
      path,
      (
        {**fixed[start + i], **{key: values[i] for key, values in metrics.items()}, "batch_norm": batch_norm}
        for i in range(count)
      ),
    )
    on_progress(count)
  return read_landscape(path)


def _whole_rows(path: Path, fixed: Sequence[Row], batch_norm: str) -> list[Row]:
  """Reads the rows of an earlier run, drops a torn last line, and checks that they belong to the first points."""
  if not path.exists():
    return []
  text = path.read_bytes()
  whole = text[: text.rfind(b"\n") + 1]
  if whole != text:
    write_atomically(path, whole)
  rows = read_landscape(path)
  expected = json.loads(json.dumps([row | {"batch_norm": batch_norm} for row in fixed]))
  same = len(rows) <= len(expected) and all(
    want.items() <= row.items() for row, want in zip(rows, expected, strict=False)
  )
  if not same:
    raise RecordError(f"{path} holds other points than were asked for: delete it and run again to compute it anew")
  return rows


def read_landscape(path: Path) -> list[Row]:
  """Reads the rows of a landscape.

  Raises:
    RecordError: a line is garbled; the message names it and says how to compute it anew.
  """
  rows = []
  for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise RecordError(f"{path} is damaged in line {number}: delete it and run again to compute it anew") from error
  return rows


def line_points(alphas: np.ndarray) -> list[Row]:
  """Returns the points of a line or a curve: x is alpha, y is 0."""
  return [{"x": alpha, "y": 0.0} for alpha in np.asarray(alphas, float).tolist()]


def lines_points(x: np.ndarray, num_directions: int) -> list[Row]:
  """Returns the points of lines along several directions, one line after the other; column "direction" counts them."""
  return [{"direction": direction, **point} for direction in range(num_directions) for point in line_points(x)]


def grid_points(x: np.ndarray, y: np.ndarray) -> list[Row]:
  """Returns the points of a rectangular grid, x fastest."""
  return [{"x": a, "y": b} for b in np.asarray(y, float).tolist() for a in np.asarray(x, float).tolist()]


def grid_around(coordinates: np.ndarray, *, margin: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
  """Lays out the two axes of a grid over a trajectory, with a margin on every side, in parts of its extent.

  A trajectory that hardly leaves one axis gets a strip of at least half its length, so that the picture is no thread.
  """
  low, high = np.min(coordinates, axis=0), np.max(coordinates, axis=0)
  extent = np.maximum(high - low, np.max(high - low) / 2)
  middle, half = (low + high) / 2, (0.5 + margin) * extent
  x, y = (np.linspace(middle[i] - half[i], middle[i] + half[i], len(PLANE_POINTS)) for i in (0, 1))
  return x, y


def path_rows(name: str, plane: TrajectoryPlane, steps: Sequence[int]) -> list[Row]:
  """Returns the rows of a trajectory in its plane: coordinates and step of every checkpoint, and what each direction explains."""
  explained = dict(zip(("explained_x", "explained_y"), plane.explained.tolist(), strict=True))
  coordinates = plane.coordinates.tolist()
  return [
    {"landscape": name, "x": x, "y": y, "step": int(step)} | explained
    for (x, y), step in zip(coordinates, steps, strict=True)
  ]
