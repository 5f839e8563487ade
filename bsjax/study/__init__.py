"""A study from plan to report, and the command line around it."""

from bsjax.study.command import describe_environment, run_command
from bsjax.study.plan import Plan, make_plan
from bsjax.study.run import report_study, run_study

__all__ = ["Plan", "describe_environment", "make_plan", "report_study", "run_command", "run_study"]
