"""One solution becomes one record for each comparison."""

from bsjax.analysis.phases import split_phases
from bsjax.records import Record


def metrics_row(step):
  return {"probe": "test", "step": step, "test_loss": step / 10}


def measured(step, phase):
  return {"probe": "measure", "step": step, "phase": phase, "measure": "trace", "value": step}


def solution(name, rows, state="complete"):
  return Record(name, {"kind": "solution", "rate_part": 1.0}, {"state": state}, [], rows)


def test_each_phase_has_its_rows_and_the_test_metrics_of_its_step():
  rows = [
    metrics_row(1),
    metrics_row(2),
    measured(2, "level"),
    measured(2, "statistics"),
    metrics_row(8),
    measured(8, "budget"),
  ]
  other = Record("e", {"kind": "edge"}, {"state": "complete"}, [], [metrics_row(3)])
  level, budget, same = split_phases([solution("a", rows), other])
  assert (level.trial["phase"], level.probes) == ("level", [metrics_row(2), measured(2, "level")])
  assert (budget.trial["phase"], budget.probes) == ("budget", [metrics_row(8), measured(8, "budget")])
  assert (level.id, level.trial["rate_part"], same) == ("a", 1.0, other)


def test_a_solution_above_the_level_has_no_twin_and_a_diverged_one_is_kept_to_be_counted():
  high = solution("a", [metrics_row(1), metrics_row(8), measured(8, "budget")])
  lost = solution("b", [metrics_row(1)], state="diverged")
  records = split_phases([high, lost])
  assert [(record.id, record.trial["phase"], len(record.probes)) for record in records] == [
    ("a", "budget", 2),
    ("b", "budget", 0),
  ]
