"""The judges of pre-training and fine-tuning, on studies whose answer is known."""

import numpy as np
import pytest

from bsjax.analysis.claims_pretrain import (
  FINETUNE,
  judge_finetune_small,
  judge_pretrain_large,
  noise_at_reference,
  pretrain_table,
  thirds,
)
from tests.analysis.simulate_pretrain import ERRORS, FINETUNE_SIZES, LOSSES, SIZES, world


def pretrain(**changes):
  return judge_pretrain_large(*world(**changes))


def finetune(**changes):
  return judge_finetune_small(*world(**changes))


def test_the_noise_scale_is_the_geometric_mean_over_the_better_arm_s_seeds():
  study, records = world(noise=100.0)
  value, low, high = noise_at_reference(study["parts"]["pretrain"], records["pretrain"])
  assert value == pytest.approx(100.0)
  # Student with 7 degrees of freedom: the logarithms are +- log 1.1
  half = 2.3646 * np.log(1.1) * np.sqrt(8 / 7) / np.sqrt(8)
  assert np.log([low, high]) == pytest.approx(np.log(100.0) + [-half, half], rel=1e-4)


def test_nothing_lost_up_to_the_noise_scale_holds_whatever_is_lost_beyond():
  finding = pretrain(losses=LOSSES | {128: 2.0, 256: 3.0})
  claim = finding.claim
  assert claim.verdict == "holds"
  assert claim.unit.endswith("batch size 32")
  assert claim.measured == pytest.approx(0.0, abs=0.02)
  assert claim.n == 8
  assert "Beyond the noise scale, and not judged: 128, 256" in finding.reading


def test_a_loss_within_the_noise_scale_fails_and_shows_the_largest_relative_to_the_smallest_batch_size():
  claim = pretrain(losses={8: 2.0, 32: 3.0, 128: 2.4, 256: 2.0}, noise=200.0).claim
  assert claim.verdict == "fails"
  assert claim.measured == pytest.approx(0.5, abs=0.03)
  assert claim.unit.endswith("batch size 32")


def test_what_holds_shows_the_largest_batch_size_and_less_loss_is_no_loss():
  claim = pretrain(losses=LOSSES | {32: 1.03, 128: 0.8}, noise=200.0).claim
  assert claim.verdict == "holds"
  assert claim.unit.endswith("batch size 128")
  assert claim.measured == pytest.approx(-0.2, abs=0.03)


def test_a_difference_that_straddles_the_margin_is_open():
  assert pretrain(losses=LOSSES | {32: 1.05}, spread=0.05).claim.verdict == "inconclusive"
  assert pretrain(losses=LOSSES | {32: 1.03}, spread=0.005).claim.verdict == "holds"
  assert pretrain(losses=LOSSES | {32: 1.08}, spread=0.005).claim.verdict == "fails"


def test_without_a_noise_scale_or_a_batch_size_below_it_nothing_is_judged():
  for changes in ({"noise": None}, {"noise": 20.0}, {"seeds": ()}):
    claim = pretrain(**changes).claim
    assert (claim.verdict, claim.measured) == ("inconclusive", None)
  assert "not known" in pretrain(noise=None).reading


def test_the_better_arm_counts_by_validation_loss():
  """LAMB's losses are `losses` where it is the better; AdamW's are then half as large again, which would fail."""
  finding = pretrain(better="lamb_warmup_cosine")
  assert finding.claim.verdict == "holds"
  assert "at 32 (LAMB + warm-up + cosine)" in finding.reading


def test_diverged_seeds_of_a_batch_size_within_the_noise_scale_fail():
  finding = pretrain(diverged={("pretrain", "adamw_warmup_cosine", 32): 2})
  assert finding.claim.verdict == "fails"
  assert "2 of 8 seeds diverged at 32" in finding.reading
  smallest = pretrain(diverged={("pretrain", "adamw_warmup_cosine", 8): 2})
  assert smallest.claim.verdict == "inconclusive"
  assert "the smallest batch size has nothing to compare with" in smallest.reading


def test_pretraining_series_hold_every_seed_of_every_arm():
  series = pretrain(losses={8: 1.0, 32: 1.1, 128: 1.2, 256: 1.3}, spread=0.0).series
  assert len(series["seed"]) == 8 * 2 * len(SIZES)
  at = (series["mean_arm"] == "adamw_warmup_cosine") & (series["mean_batch_size"] == 128)
  assert series["mean"][at] == pytest.approx([1.2])
  assert series["excess"] == pytest.approx([0.1, 0.2, 0.3])
  assert series["excess_batch_size"].tolist() == [32, 128, 256]
  assert float(series["noise_scale"]) == pytest.approx(100.0)


def test_finetuning_compares_the_thirds_of_each_start():
  finding = finetune(spread=0.0)
  assert finding.claim.verdict == "holds"
  assert finding.claim.measured == pytest.approx(1.0)  # 3.0 at 256 minus 2.0 at 4
  assert finding.claim.n == 8 * len(FINETUNE_SIZES)
  assert finding.claim.unit == (
    "percentage points of test error, largest third minus smallest third, pre-trained at batch size 8"
  )
  assert finding.series["difference"] == pytest.approx([1.0, 1.0])
  assert (
    "The lowest mean test error in percent is 2 at 4, pre-trained at 8; 2 at 4, pre-trained at 256" in finding.reading
  )


def test_a_start_that_does_not_hold_decides():
  flat = dict.fromkeys(FINETUNE_SIZES, 2.0)
  finding = finetune(errors_large=flat)
  assert finding.claim.verdict == "fails"
  assert finding.claim.unit.endswith("pre-trained at batch size 256")
  assert finding.claim.measured == pytest.approx(0.0, abs=0.03)
  assert finetune(errors_large=flat, spread=1.0).claim.verdict == "inconclusive"
  assert finetune(errors=ERRORS | {256: 1.0}).claim.verdict == "fails"


def test_a_difference_below_one_test_example_is_none():
  """One of 500 examples is 0.2 points; a tenth of the mean error, 0.05, would leave this open."""
  finding = finetune(errors=dict.fromkeys(FINETUNE_SIZES, 0.5), spread=0.1)
  assert 0.05 < finding.series["difference_high"].max() < 0.2
  assert finding.claim.verdict == "fails"


def test_a_difference_below_a_tenth_of_the_error_is_none():
  finding = finetune(errors=dict.fromkeys(FINETUNE_SIZES, 5.0), spread=0.2)
  assert 0.2 < finding.series["difference_high"].max() < 0.5
  assert finding.claim.verdict == "fails"


def test_thirds_are_means_of_several_batch_sizes():
  errors = {
    size: np.full(2, mean) for size, mean in zip((1, 2, 4, 8, 16, 32), (1.0, 2.0, 9.0, 9.0, 3.0, 6.0), strict=True)
  }
  assert thirds(errors).value == pytest.approx(4.5 - 1.5)


def test_batch_sizes_with_diverged_seeds_are_left_out_and_told():
  finding = finetune(diverged={("finetune_small", "adamw_warmup_cosine", 256): 1}, spread=0.0)
  assert finding.series["difference"] == pytest.approx([0.5, 1.0])  # 2.5 at 64 is the largest that is left
  assert "Left out, for seeds that diverged: batch size 256." in finding.reading
  first = finetune(diverged={("finetune_small", "adamw_warmup_cosine", 4): 1}, spread=0.0)
  assert "is 2.2 at 16, pre-trained at 8; 2 at 4, pre-trained at 256" in first.reading


def test_a_task_without_accuracy_is_judged_by_its_loss():
  finding = finetune(accuracy=False, spread=0.0)
  assert finding.claim.unit.startswith("test loss, largest third")
  assert not finding.series["in_percent"]


def test_nothing_fine_tuned_is_open_and_one_start_judges_alone():
  nothing = finetune(parts=())
  assert nothing.claim.verdict == "inconclusive"
  assert "no pre-training trial completed" in nothing.reading
  assert finetune(parts=FINETUNE[1:]).claim.unit.endswith("pre-trained at batch size 256")


def test_the_table_has_a_row_for_each_trial_of_each_part():
  study, records = world()
  rows = pretrain_table(study, records)
  assert len(rows) == sum(len(of_part) for of_part in records.values())
  assert {row["part"] for row in rows} == {"pretrain", *FINETUNE}
