"""The page of pre-training and fine-tuning: its answer, a table for each part, and what was held fixed."""

import pytest

from bsjax.analysis import judge_finetune_small, judge_pretrain_large
from bsjax.report import pretrain_page
from tests.analysis.simulate_pretrain import ARMS, ERRORS, FINETUNE_SIZES, LOSSES, SIZES, world


def page_of(**changes):
  study, records = world(**changes)
  return pretrain_page(
    study, records, [judge(study, records) for judge in (judge_pretrain_large, judge_finetune_small)]
  )


def test_the_answer_says_what_came_of_each_half_of_the_advice():
  assert page_of().answer.endswith("large batches: yes. Do small batches fine-tune better: yes.")
  worse = page_of(losses=LOSSES | {32: 2.0}, errors=ERRORS | {256: 1.0})
  assert worse.answer.endswith("large batches: no. Do small batches fine-tune better: no.")
  assert "large batches: left open" in page_of(noise=None).answer


def test_every_part_has_a_table_of_all_its_arms():
  first, *finetuned = page_of().tables
  assert [(row[0], row[1][:4]) for row in first.rows] == [(size, arm) for size in SIZES for arm in ("Adam", "LAMB")]
  assert first.header[4] == "Test loss"
  assert [row[0] for row in finetuned[0].rows] == list(FINETUNE_SIZES)
  assert finetuned[0].header[4] == "Test error, %"
  assert finetuned[0].rows[0][4][0] == pytest.approx(ERRORS[4], abs=0.02)
  assert "what batch size 8 pre-trained" in finetuned[0].caption
  assert "what batch size 256 pre-trained" in finetuned[1].caption
  assert (
    "over 8 fresh seeds, which share at most 4 pre-trained networks, with the 95 % interval" in finetuned[0].caption
  )
  assert "over 8 fresh seeds, with the 95 % interval" in first.caption


def test_the_question_names_both_tasks_and_what_was_fixed_tells_of_the_head():
  page = page_of()
  assert page.question == "Which batch size to pre-train with, and which to fine-tune with: first, then second?"
  fixed = dict(page.fixed)
  assert fixed["Starts"] == "each fine-tuning seed draws one of 4 pre-trained networks; the head (Dense_1) starts anew"
  assert fixed["Weight decay"] == "0.01 for adamw; 0.01 for lamb"
  study, records = world()
  study["head"] = []
  findings = [judge(study, records) for judge in (judge_pretrain_large, judge_finetune_small)]
  assert "every parameter is kept" in dict(pretrain_page(study, records, findings).fixed)["Starts"]


def test_a_study_that_pretrained_nothing_has_a_page():
  page = page_of(parts=())
  assert page.question.endswith("fine-tune with: first?")
  assert len(page.tables) == 1
  assert len(page.tables[0].rows) == len(SIZES) * len(ARMS)
