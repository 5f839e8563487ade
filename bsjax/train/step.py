"""One update, as a pure function."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bsjax.optim import make_optimizer, make_schedule
from bsjax.probes.two_batch import GroupedGradient, accumulated_gradient, check_device_groups, device_gradient
from bsjax.train.state import TrainState
from bsjax.train.trial import TrialConfig
from bsjax.types import Array, Batch, Hparams, Key, ModelState, Params
from bsjax.workloads import Workload

NOISE_COLUMNS = {"small_sq_norm": jnp.float32, "big_sq_norm": jnp.float32, "noise_steps": jnp.int32}
"""What a config with a `noise_route` adds to every row."""


class StepLog(NamedTuple):
  """What one step tells, of the parameters before its update."""

  loss: Array
  """Mean loss of the batch, f32[]."""
  noise: Mapping[str, Array]
  """Empty without a `noise_route`, else the squared norms, 0 where this step is not logged, and `noise_steps`: 1 where it is."""


def make_step(
  workload: Workload, config: TrialConfig, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, Array]]:
  """Builds `step(state, hparams, batch, key) -> (new state, loss of the batch before the update)`; see `make_logged_step`."""
  logged_step = make_logged_step(workload, config, mesh)

  def step(state: TrainState, hparams: Hparams, batch: Batch, key: Key) -> tuple[TrainState, Array]:
    new_state, log = logged_step(state, hparams, batch, key)
    return new_state, log.loss

  return step


def make_logged_step(
  workload: Workload, config: TrialConfig, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, StepLog]]:
  """Builds `step(state, hparams, batch, key) -> (new state, StepLog)`.

  The optimizer is built inside the trace from `hparams`, so rates may be traced or vmapped over. `key` is the trial's
  loss stream; the step folds its own number in, so resuming equals never having stopped. With `microbatch_size` = b the
  gradient is the mean over the microbatches of b consecutive examples: that of the whole batch, to rounding.

  Args:
    mesh: spreads each microbatch over its axis "data" where that divides b; the device route needs it.

  Raises:
    ValueError: microbatches of a model that carries state (batch norm), which would depend on how a batch is cut; or the
      device route on a mesh with another number of devices than microbatches.

  Holds: states and losses do not depend on `noise_every`, nor under accumulation on whether norms are logged: on the CPU not
  by a bit (tests). With the device route they equal those without a route to rounding.
  """
  grouped_gradient = _make_grouped_gradient(workload, config, mesh) if config.microbatch_size else None

  def step(state: TrainState, hparams: Hparams, batch: Batch, key: Key) -> tuple[TrainState, StepLog]:
    schedule = make_schedule(config.schedule, hparams, warmup=config.warmup, milestones=config.milestones)
    optimizer = make_optimizer(config.optimizer, hparams, schedule)
    step_key = jax.random.fold_in(key, state.step)
    noise: dict[str, Array] = {}
    if grouped_gradient is None:
      value_and_grad = jax.value_and_grad(workload.train_loss, has_aux=True)
      (loss, model_state), grads = value_and_grad(state.params, state.model_state, batch, step_key)
      gradients = lambda params: value_and_grad(params, state.model_state, batch, step_key)[1]  # noqa: E731
    else:
      logged = state.step % config.noise_every == 0 if config.noise_route else jnp.asarray(False)
      loss, grads, small, big = grouped_gradient(state.params, state.model_state, batch, step_key, logged)
      model_state = state.model_state
      quiet = jnp.asarray(False)
      gradients = lambda params: grouped_gradient(params, state.model_state, batch, step_key, quiet).mean_grad  # noqa: E731
      if config.noise_route:
        noise = {"small_sq_norm": small, "big_sq_norm": big, "noise_steps": logged.astype(jnp.int32)}

    def grad_fn(params: Params, _: int) -> Params:  # for optimizers that look at the same batch from elsewhere
      return gradients(params)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, grad_fn=grad_fn)
    new_state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), model_state, opt_state)
    return new_state, StepLog(loss, noise)

  return step


def row_noise(noise: Mapping[str, Array]) -> dict[str, Array]:
  """Averages the norms of a row's steps, f32[steps] each, over those logged: NaN where there are none."""
  if not noise:
    return {}
  count = jnp.sum(noise["noise_steps"])
  means = {name: jnp.sum(noise[name]) / count for name in ("small_sq_norm", "big_sq_norm")}
  return means | {"noise_steps": count}


def _make_grouped_gradient(
  workload: Workload, config: TrialConfig, mesh: Mesh | None
) -> Callable[[Params, ModelState, Batch, Key, Array], GroupedGradient]:
  size = config.microbatch_size
  if workload.batch_norm != "none" or jax.tree.leaves(jax.eval_shape(workload.init, jax.random.key(0)).model_state):
    raise ValueError(
      f"microbatch_size={size} with {workload.name!r}, whose model carries state (batch norm {workload.batch_norm!r}): "
      "its statistics would be those of a microbatch; use a model without, or microbatch_size=0"
    )
  if config.noise_route == "device":
    if mesh is None:
      raise ValueError("noise_route='device' needs a mesh: pass the one whose axis 'data' holds the microbatches")
    if (per_device := check_device_groups(config.batch_size, mesh)) != size:
      raise ValueError(
        f"noise_route='device' puts {per_device} examples on each of {mesh.shape['data']} devices: "
        f"set microbatch_size={per_device}, it is {size}"
      )
  spread = mesh is not None and mesh.shape["data"] > 1 and size % mesh.shape["data"] == 0

  def gradient(params: Params, model_state: ModelState, batch: Batch, key: Key, logged: Array) -> GroupedGradient:
    def loss_fn(params: Params, microbatch: Batch, key: Key) -> Array:
      return workload.train_loss(params, model_state, microbatch, key)[0]

    if mesh is not None and config.noise_route == "device":
      return device_gradient(loss_fn, params, batch, key, mesh=mesh, with_norms=logged)
    microbatches = jax.tree.map(lambda array: array.reshape(-1, size, *array.shape[1:]), batch)
    if mesh is not None and spread:
      microbatches = jax.lax.with_sharding_constraint(microbatches, NamedSharding(mesh, P(None, "data")))
    return accumulated_gradient(loss_fn, params, microbatches, key, with_norms=logged)

  return gradient
