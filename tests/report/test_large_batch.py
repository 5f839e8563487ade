"""The page of large batches: its answer, its tables of arms and comparisons, and what was held fixed."""

import numpy as np
import pytest

from bsjax.analysis import judge_cosine_helps, judge_lars_lamb_help, judge_warmup_needed
from bsjax.report import large_batch_page
from tests.analysis import simulate_large_batch as simulate
from tests.analysis.simulate_large_batch import SEEDS, SIZES, world

JUDGES = (judge_warmup_needed, judge_cosine_helps, judge_lars_lamb_help)


def page_of(change=lambda study: study, **changes):
  study, records = world(**changes)
  study = change(study)
  return large_batch_page(study, records, [judge(study, records) for judge in JUDGES])


def row_of(table, size, arm):
  (row,) = [row for row in table.rows if (row[0], row[1]) == (size, arm)]
  return dict(zip(table.header, row, strict=True))


def test_the_answer_names_the_best_arm_the_baseline_and_what_helps():
  answer = page_of(spread=0.01).answer
  assert answer.startswith("At batch size 1,024 the best arm by validation loss is LAMB + warm-up + cosine, with 3")
  assert "the tuned baseline at batch size 32 ends at 2" in answer
  assert "after the same 4 epochs" in answer
  assert answer.endswith("a warm-up: yes, a cosine: yes, LARS or LAMB: yes.")
  worse = simulate.ERRORS | {"momentum_warmup": 6.0}
  assert "a warm-up: no, a cosine: yes" in page_of(errors=worse, spread=0.01).answer
  assert "a warm-up: left open" in page_of(seeds=SEEDS[:1]).answer


def test_the_best_arm_is_chosen_by_validation_loss_and_not_by_test_error():
  answer = page_of(losses={"adamw_warmup_cosine": 0.001}).answer
  assert "is AdamW + warm-up + cosine, with 4.2" in answer or "is AdamW + warm-up + cosine, with 4.1" in answer


def test_the_first_table_has_every_arm_at_every_batch_size():
  study, records = world()
  study["tuned"]["256"]["lars_warmup_cosine"] |= {
    "point": {"learning_rate": 2.5, "warmup_steps": 4.0},
    "edges": {"learning_rate": "high"},
  }
  page = large_batch_page(study, records, [judge(study, records) for judge in JUDGES])
  table = page.tables[0]
  assert [(row[0], row[1]) for row in table.rows][0] == (32, "momentum")
  assert len(table.rows) == 1 + len(SIZES) * len(simulate.ARMS)
  row = row_of(table, 256, "LARS + warm-up + cosine")
  assert row["Rate"] == "2.50 (high edge)"
  assert row["Warm-up"] == "25 %"  # of 16 steps
  errors = [
    100 * (1 - r.probes[0]["test_accuracy"]) for r in records if r.id.startswith("final-lars_warmup_cosine-00256")
  ]
  mean, low, high = row["Test error, %"]
  assert mean == pytest.approx(np.mean(errors))
  assert low < mean < high
  assert row["Validation loss"][0] == pytest.approx(0.0256)
  assert row["Steps to target"] == "16 (8 of 8)"
  assert row["Trials"] == "3, 1 diverged"
  assert row_of(table, 64, "momentum")["Warm-up"] is None


def test_diverged_seeds_stand_in_place_of_an_error():
  page = page_of(diverged={("momentum_cosine", 64): 2}, failed=[("lars_warmup_cosine", 64)])
  row = row_of(page.tables[0], 64, "momentum + cosine")
  assert row["Test error, %"] == "2 of 8 seeds diverged"
  assert row["Steps to target"] == "64 (6 of 8)"
  row = row_of(page.tables[0], 64, "LARS + warm-up + cosine")
  assert (row["Rate"], row["Test error, %"], row["Steps to target"]) == (
    None,
    "all trials of the search diverged",
    None,
  )


def test_a_target_that_was_not_reached_is_told():
  page = page_of(change=lambda study: study | {"target": study["target"] | {"goal": 2.0}})
  assert {row[6] for row in page.tables[0].rows} == {"not reached"}


def test_the_second_table_has_all_comparisons():
  table = page_of(errors=simulate.ERRORS | {("rule_constant", 64): 7.0}, spread=0.02).tables[1]
  assert len(table.rows) == 3 * 3 + 2 * 3 + 3
  chosen = [row for row in table.rows if row[:3] == (64, "linear rule, untuned", "linear rule + warm-up, untuned")]
  assert [row[4] for row in chosen] == ["no"]
  ((_, first, second, (value, low, high), answer),) = [
    row for row in table.rows if row[0] == 1024 and row[1] == "momentum" and "cosine" in row[2]
  ]
  assert (first, second, answer) == ("momentum", "momentum + cosine", "yes")
  assert low < value < high
  assert value == pytest.approx(0.5, abs=0.1)


def test_the_rule_as_it_stands_has_a_table_unless_there_is_no_rate_to_scale():
  table = page_of().tables[2]
  assert [row[1] for row in table.rows] == ["linear rule, untuned", "linear rule + warm-up, untuned"] * len(SIZES)
  assert "batch size 32" in table.caption
  page = page_of(failed=[("momentum_constant", simulate.REFERENCE)])
  assert len(page.tables) == 2
  assert "no error that was measured at all seeds" in page.answer


def test_where_every_arm_diverged_the_answer_says_so():
  page = page_of(failed=[(arm, 1024) for arm in simulate.ARMS])
  assert page.answer.startswith("At batch size 1,024 no arm was trained to its end.")


def test_a_loss_is_told_where_there_is_no_accuracy():
  page = page_of(accuracy=False)
  assert "Test loss" in page.tables[0].header
  assert "test loss" in page.tables[1].caption
  assert "%" not in page.answer


def test_facts_name_what_was_the_same():
  facts = dict(page_of().fixed)
  assert facts["Epochs"] == "4 at every batch size"
  assert facts["Weight decay"] == "0.0001 for momentum, lars, lamb; 0.01 for adamw"
  assert "3 quasi-random trials" in facts["Tuning"]
  assert "best 4 points at 3 fresh seeds" in facts["Tuning"]
  assert facts["Final seeds"] == "8, from 1000; they chose nothing"
  assert facts["Trials"] == "90 complete, 7 diverged"
