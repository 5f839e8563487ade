"""A study from plan to report, and the command line around it."""

from bsjax.study.command import describe_environment, run_command
from bsjax.study.large_batch import report_large_batch_study, run_large_batch_study
from bsjax.study.large_batch_plan import LargeBatchPlan, make_large_batch_plan
from bsjax.study.noise import report_noise_study, run_noise_study
from bsjax.study.noise_plan import NoisePlan, make_noise_plan
from bsjax.study.plan import Plan, make_plan
from bsjax.study.pretrain import report_pretrain_study, run_pretrain_study
from bsjax.study.pretrain_plan import PretrainPlan, make_pretrain_plan
from bsjax.study.run import report_study, run_study
from bsjax.study.scaling_rules import ScalingPlan, make_scaling_plan, report_scaling_study, run_scaling_study
from bsjax.study.sharp import report_sharp_study, run_sharp_study
from bsjax.study.sharp_plan import SharpPlan, make_sharp_plan

__all__ = [
  "LargeBatchPlan",
  "NoisePlan",
  "Plan",
  "PretrainPlan",
  "ScalingPlan",
  "SharpPlan",
  "describe_environment",
  "make_large_batch_plan",
  "make_noise_plan",
  "make_plan",
  "make_pretrain_plan",
  "make_scaling_plan",
  "make_sharp_plan",
  "report_large_batch_study",
  "report_noise_study",
  "report_pretrain_study",
  "report_scaling_study",
  "report_sharp_study",
  "report_study",
  "run_command",
  "run_large_batch_study",
  "run_noise_study",
  "run_pretrain_study",
  "run_scaling_study",
  "run_sharp_study",
  "run_study",
]
