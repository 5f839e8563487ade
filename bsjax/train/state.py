"""The state of one training run: arrays only."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bsjax.optim import AbsorbedMomentumState, make_optimizer, make_schedule
from bsjax.types import Array, Hparams, Key, ModelState, Params
from bsjax.workloads import Workload

INIT_STREAM, ORDER_STREAM, LOSS_STREAM, PROBE_STREAM = range(4)
"""What `fold_in(key(seed), stream)` feeds: independent streams from one seed, none of them kept in the state."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
  """Everything that a step changes; with the seed and the config it determines the rest of the run."""

  step: Array
  params: Params
  model_state: ModelState
  opt_state: Any


def stream(seed: Array, name: int) -> Key:
  """Derives the key of one stream from the integer seed of a trial (which may be traced)."""
  return jax.random.fold_in(jax.random.key(seed), name)


def init_state(workload: Workload, optimizer: str, hparams: Hparams, seed: Array) -> TrainState:
  """Makes the state before the first step; no optimizer's initial state depends on the schedule."""
  variables = workload.init(stream(seed, INIT_STREAM))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables.params,
    model_state=variables.model_state,
    opt_state=make_optimizer(optimizer, hparams, make_schedule("constant", hparams)).init(variables.params),
  )


def branch_state(state: TrainState) -> TrainState:
  """Makes the state before the first step of a trial that starts where another ended.

  Step and schedule begin anew. Momentum and Adam's moments go on, with the count that corrects their bias.
  """

  def restart(node: Any) -> Any:
    if isinstance(node, optax.ScaleByScheduleState):
      return node._replace(count=jnp.zeros_like(node.count))
    return node._replace(step=jnp.zeros_like(node.step)) if isinstance(node, AbsorbedMomentumState) else node

  counts_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState | AbsorbedMomentumState)  # noqa: E731
  return TrainState(
    step=jnp.zeros_like(state.step),
    params=state.params,
    model_state=state.model_state,
    opt_state=jax.tree.map(restart, state.opt_state, is_leaf=counts_schedule),
  )
