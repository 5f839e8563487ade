"""One update, as a pure function."""

from collections.abc import Callable

import jax
import optax

from bsjax.optim import make_optimizer, make_schedule
from bsjax.train.state import TrainState
from bsjax.train.trial import TrialConfig
from bsjax.types import Array, Batch, Hparams, Key
from bsjax.workloads import Workload


def make_step(workload: Workload, config: TrialConfig) -> Callable[..., tuple[TrainState, Array]]:
  """Builds `step(state, hparams, batch, key) -> (new state, loss of the batch before the update)`.

  The optimizer is built inside the trace from `hparams`, so rates may be traced or vmapped over. `key` is the trial's
  loss stream; the step folds its own number in, so resuming equals never having stopped.
  """
  schedule = make_schedule(config.schedule, num_steps=config.num_steps, warmup_steps=config.warmup_steps)

  def step(state: TrainState, hparams: Hparams, batch: Batch, key: Key) -> tuple[TrainState, Array]:
    optimizer = make_optimizer(config.optimizer, hparams, schedule)
    (loss, model_state), grads = jax.value_and_grad(workload.train_loss, has_aux=True)(
      state.params, state.model_state, batch, jax.random.fold_in(key, state.step)
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), model_state, opt_state), loss

  return step
