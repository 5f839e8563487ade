"""A study from plan to report, and the command line around it."""

from bsjax.study.command import describe_environment, run_command
from bsjax.study.noise import report_noise_study, run_noise_study
from bsjax.study.noise_plan import NoisePlan, make_noise_plan
from bsjax.study.plan import Plan, make_plan
from bsjax.study.run import report_study, run_study
from bsjax.study.sharp import report_sharp_study, run_sharp_study
from bsjax.study.sharp_plan import SharpPlan, make_sharp_plan

__all__ = [
  "NoisePlan",
  "Plan",
  "SharpPlan",
  "describe_environment",
  "make_noise_plan",
  "make_plan",
  "make_sharp_plan",
  "report_noise_study",
  "report_sharp_study",
  "report_study",
  "run_command",
  "run_noise_study",
  "run_sharp_study",
  "run_study",
]
