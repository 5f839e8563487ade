"""State, step, segment, trial, plan, pool of lanes, checkpoint."""

from bsjax.train.checkpoint import restore_final
from bsjax.train.evaluate import Chunked, chunked, eval_chunk, evaluate, evaluate_source
from bsjax.train.path import DATA_PATHS, DataPath, choose_data_path, examples_that_fit
from bsjax.train.plan import PLANS, Plan
from bsjax.train.pool import run_trials
from bsjax.train.segment import build_segment, device_arrays, make_mesh, rows_per_segment
from bsjax.train.state import INIT_STREAM, ORDER_STREAM, PROBE_STREAM, TrainState, init_state, stream
from bsjax.train.step import StepLog, make_logged_step, make_step
from bsjax.train.streamed import streamed_segment
from bsjax.train.trial import Trial, TrialConfig, make_trial

__all__ = [
  "DATA_PATHS",
  "INIT_STREAM",
  "ORDER_STREAM",
  "PLANS",
  "PROBE_STREAM",
  "Chunked",
  "DataPath",
  "Plan",
  "StepLog",
  "TrainState",
  "Trial",
  "TrialConfig",
  "build_segment",
  "choose_data_path",
  "chunked",
  "device_arrays",
  "eval_chunk",
  "evaluate",
  "evaluate_source",
  "examples_that_fit",
  "init_state",
  "make_logged_step",
  "make_mesh",
  "make_step",
  "make_trial",
  "restore_final",
  "rows_per_segment",
  "run_trials",
  "stream",
  "streamed_segment",
]
