"""Model + data + loss + target = `Workload`; the registry; a user's own file."""

from bsjax.workloads.check import check_workload
from bsjax.workloads.logits import workload_from_logits
from bsjax.workloads.registry import WORKLOADS, load_workload, workload_settings
from bsjax.workloads.workload import Preset, Target, Workload, mean_train_loss, num_params

__all__ = [
  "WORKLOADS",
  "Preset",
  "Target",
  "Workload",
  "check_workload",
  "load_workload",
  "mean_train_loss",
  "num_params",
  "workload_from_logits",
  "workload_settings",
]
