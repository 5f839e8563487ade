"""State, step, segment, trial, plan, pool of lanes, checkpoint."""

from bsjax.train.checkpoint import restore_final
from bsjax.train.evaluate import Chunked, chunked, evaluate
from bsjax.train.plan import PLANS, Plan
from bsjax.train.pool import run_trials
from bsjax.train.segment import build_segment, device_arrays, make_mesh, rows_per_segment
from bsjax.train.state import INIT_STREAM, ORDER_STREAM, PROBE_STREAM, TrainState, init_state, stream
from bsjax.train.step import StepLog, make_logged_step, make_step
from bsjax.train.trial import Trial, TrialConfig, make_trial

__all__ = [
  "INIT_STREAM",
  "ORDER_STREAM",
  "PLANS",
  "PROBE_STREAM",
  "Chunked",
  "Plan",
  "StepLog",
  "TrainState",
  "Trial",
  "TrialConfig",
  "build_segment",
  "chunked",
  "device_arrays",
  "evaluate",
  "init_state",
  "make_logged_step",
  "make_mesh",
  "make_step",
  "make_trial",
  "restore_final",
  "rows_per_segment",
  "run_trials",
  "stream",
]
