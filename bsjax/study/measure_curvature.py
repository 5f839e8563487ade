"""When curvature is measured: at a solution's two comparisons, along an escape, along the way to the edge of stability."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bsjax.analysis.selection import probe_rows
from bsjax.probes.leaves import group_leaves, leaf_names
from bsjax.records import read_record
from bsjax.study.flatness import (
  ERROR_KINDS,
  PROGRAMS,
  At,
  gradient,
  layer_block,
  make_view,
  program_names,
  spectral_nodes,
)
from bsjax.study.measure import metrics_of, split_metrics
from bsjax.study.sharp_plan import STATISTICS, SharpPlan, Statistics, solution_grid
from bsjax.train import INIT_STREAM, PROBE_STREAM, TrainState, Trial, restore_final, stream
from bsjax.types import Batch, Hparams, Key, Params
from bsjax.workloads import Workload

COMPARED = ("hessian_top", "keskar")
"""What a network with batch norm is measured for under all statistics, to show that they change the answer."""
ALONG_ESCAPES = ("hessian_top", "keskar")
TOWARDS_THE_EDGE = ("hessian_top", "gradient_curvature", "batch_sharpness")

Row = dict[str, Any]


class Curvature:
  """The curvature probes of one workload under one kind of statistics; a program is compiled when it is first asked for."""

  def __init__(
    self,
    workload: Workload,
    mesh: Mesh,
    optimizer: str,
    *,
    num_examples: int,
    statistics: Statistics,
    group: int | None = None,
  ) -> None:
    self.view = make_view(workload, statistics, num_examples, group)
    self.statistics = "none" if workload.batch_norm == "none" else statistics

    def compile_one(measure: Callable[[At], Any], batch_size: int = 0) -> Callable[..., Any]:
      def run(state: TrainState, examples: Batch, key: Key, hparams: Hparams) -> Any:
        return measure(At(self.view, workload, mesh, optimizer, batch_size, state, examples, key, hparams))

      return jax.jit(run)

    self._program = functools.cache(compile_one)

  def _run(self, program: Callable[..., Any], trial: Trial, state: TrainState, number: int) -> Any:
    """Fetches what a program finds; its random draws follow from (seed, step, number)."""
    key = jax.random.fold_in(stream(jnp.uint32(trial.seed), PROBE_STREAM), state.step)
    hparams = Hparams(*(jnp.float32(value) for value in trial.hparams))
    return jax.device_get(program(state, self.view.examples, jax.random.fold_in(key, number), hparams))

  def rows(self, names: tuple[str, ...], trial: Trial, state: TrainState, *, minibatch_size: int = 0) -> Iterator[Row]:
    """Runs the named `PROGRAMS` and returns a row for each measure, all with the loss and the gradient norm there.

    Args:
      minibatch_size: of the batch sharpness.
    """
    loss, grad_norm = self._run(self._program(gradient), trial, state, 0)
    found: dict[str, Any] = {}
    for name in names:
      size = minibatch_size if name == "batch_sharpness" else 0
      found |= self._run(self._program(PROGRAMS[name], size), trial, state, list(PROGRAMS).index(name))
    for measure in (name for name in ERROR_KINDS if name in found):
      value, error = found[measure]
      yield {
        "probe": "measure",
        "measure": measure,
        "value": value,
        "error": error,
        "error_kind": ERROR_KINDS[measure],
        "loss": loss,
        "grad_norm": grad_norm,
        "num_examples": self.view.num_examples,
        "minibatch_size": minibatch_size if measure == "batch_sharpness" else None,
        "batch_norm": self.statistics,
      }

  def layers(self, trial: Trial, state: TrainState) -> Iterator[Row]:
    """Measures the block of the Hessian that belongs to each layer."""
    for number, layer in enumerate(group_leaves(dict.fromkeys(leaf_names(state.params)))):
      found = self._run(self._program(_block_of(layer)), trial, state, number)
      names = ("top_eigenvalue", "residual", "trace", "trace_sem")
      yield {"probe": "layer", "layer": layer} | dict(zip(names, found, strict=True))

  def spectrum(self, trial: Trial, state: TrainState) -> Iterator[Row]:
    """Measures the density of all eigenvalues: the nodes of each random draw, and their weights."""
    nodes, weights = self._run(self._program(spectral_nodes), trial, state, 0)
    for draw in range(len(nodes)):
      for node, weight in zip(nodes[draw], weights[draw], strict=True):
        yield {"probe": "spectrum", "draw": draw, "node": node, "weight": weight}


@functools.cache
def _block_of(layer: str) -> Callable[[At], Any]:
  return functools.partial(layer_block, layer=layer)


class SharpMeasurements:
  """The probe of solutions and escapes; calling it is the `probe` of `run_trials`."""

  def __init__(self, workload: Workload, plan: SharpPlan, folder: Path, mesh: Mesh) -> None:
    self.workload, self.plan, self.folder = workload, plan, folder
    self.names = program_names(workload, plan)
    self.test = split_metrics(workload)
    first = workload.train.first(plan.num_examples)
    self.train = metrics_of("train", workload, {"train": first})
    self.glance = metrics_of("test", workload, {"test": workload.test, "train": first})
    make = functools.partial(Curvature, workload, mesh, plan.optimizer, num_examples=plan.num_examples)
    self.curvature = make(statistics=plan.statistics)
    self.compared = [make(statistics=name) for name in STATISTICS] if workload.batch_norm != "none" else []

  def __call__(self, trial: Trial, state: TrainState) -> list[Row]:
    """Makes the measurements of the trial's kind and returns their rows."""
    (kind,) = trial.config.probes
    rows = self.solution(trial, state) if kind == "solution" else self.escape(trial, state)
    return [row | {"step": int(state.step)} for row in rows]

  def solution(self, trial: Trial, state: TrainState) -> Iterator[Row]:
    """Measures the training loss on the examples of the curvature; and everything at the first checkpoint where it is below the level,
    and at equal epochs; test metrics there and at the end.

    Whether an earlier checkpoint was below is read from the trial's own rows, so that a resumed trial decides as an uninterrupted one.
    """
    train = self.train(state)
    yield train
    level = self.plan.train_loss
    seen = [row["train_loss"] for row in probe_rows(read_record(self.folder / trial.id), "train")]
    first_below = train["train_loss"] <= level and not any(loss is not None and loss <= level for loss in seen)
    at_budget = int(state.step) == solution_grid(self.plan, self.workload, trial.config.batch_size).budget
    phases = [name for name, here in (("level", first_below), ("budget", at_budget)) if here]
    if phases or int(state.step) == trial.config.num_steps:
      yield self.test(state)
    # One minibatch size for all: batch sharpness falls with it by its definition, and solutions are compared.
    size = self.workload.preset.reference_batch_size
    measured = list(self.curvature.rows(self.names, trial, state, minibatch_size=size)) if phases else []
    for phase in phases:
      yield from (row | {"phase": phase} for row in measured)
      yield self._distance(trial, state) | {"phase": phase}
    if first_below:
      for curvature in self.compared:
        yield from (row | {"phase": "statistics"} for row in curvature.rows(COMPARED, trial, state))
      yield from (row | {"phase": "level"} for row in self.curvature.layers(trial, state))
      if trial.seed == 0:
        yield from (row | {"phase": "level"} for row in self.curvature.spectrum(trial, state))

  def escape(self, trial: Trial, state: TrainState) -> Iterator[Row]:
    """Measures test and training metrics, the latter on the examples of the curvature, a few measures, and how far the parameters have
    moved."""
    yield self.glance(state)
    yield from self.curvature.rows(ALONG_ESCAPES, trial, state)
    yield self._distance(trial, state)

  def _distance(self, trial: Trial, state: TrainState) -> Row:
    start = self.workload.init(stream(jnp.uint32(trial.seed), INIT_STREAM)).params
    parent = restore_final(self.folder, trial.config, like=state).params if trial.config.parent else None
    return {
      "probe": "distance",
      "from_start": _distance_between(state.params, start),
      "from_parent": None if parent is None else _distance_between(state.params, parent),
    }


def _distance_between(params: Params, others: Params) -> Any:
  return jax.device_get(optax.tree.norm(optax.tree.sub(params, others)))


class EdgeMeasurements:
  """The probe of plain gradient descent.

  With batch norm, the Hessian is that of the loss which is descended: its statistics are those of batches of the trial's size.
  """

  def __init__(self, workload: Workload, mesh: Mesh) -> None:
    self.test = split_metrics(workload)
    self.has_batch_norm = workload.batch_norm != "none"
    make = functools.partial(Curvature, workload, mesh, "sgd", num_examples=len(workload.train), statistics="batch")
    self._in_groups = functools.cache(lambda size: make(group=size))

  def __call__(self, trial: Trial, state: TrainState) -> list[Row]:
    """Measures test and training metrics and the curvature, and returns their rows."""
    curvature = self._in_groups(trial.config.batch_size if self.has_batch_norm else None)
    size = trial.config.batch_size
    rows = [self.test(state), *curvature.rows(TOWARDS_THE_EDGE, trial, state, minibatch_size=size)]
    return [row | {"step": int(state.step)} for row in rows]
