"""The judges of pre-training and fine-tuning, on studies whose answer is known."""

import numpy as np
import pytest
from scipy import stats

from bsjax.analysis.claims_pretrain import (
  FINETUNE,
  judge_finetune_small,
  judge_pretrain_large,
  noise_at_reference,
  pretrain_table,
  thirds,
)
from bsjax.analysis.large_batch import Outcome
from tests.analysis.simulate_pretrain import ARMS, ERRORS, FINETUNE_SIZES, LOSSES, SIZES, world


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


@pytest.mark.parametrize("noise", [122.0, 135.0])
def test_a_loss_at_a_batch_size_that_may_lie_beyond_the_critical_one_is_open(noise):
  """Eight seeds that vary by a factor of 1.1 leave 8.9 % on either side: 128 lies within the interval around 122 and around 135."""
  finding = pretrain(losses=LOSSES | {128: 2.0, 256: 3.0}, noise=noise)
  claim = finding.claim
  assert claim.verdict == "inconclusive"
  assert claim.measured == pytest.approx(1.0, abs=0.03)
  assert claim.unit.endswith("batch size 128")
  assert "within the interval of the noise scale, where a loss decides nothing: 128." in finding.reading
  assert "Beyond the noise scale, and not judged: 256." in finding.reading
  assert pretrain(losses=LOSSES | {32: 1.5, 128: 2.0}, noise=noise).claim.unit.endswith("batch size 32")


@pytest.mark.parametrize("noise", [122.0, 135.0])
def test_nothing_lost_at_a_batch_size_that_may_lie_beyond_the_critical_one_is_nothing_lost_up_to_it(noise):
  claim = pretrain(losses=LOSSES | {256: 2.0}, noise=noise).claim
  assert claim.verdict == "holds"
  assert claim.unit.endswith("batch size 128")


def test_what_is_open_shows_the_largest_batch_size_that_does_not_hold():
  """Around 1.05, eight seeds of 0.02 leave 0.02 on either side; 0.9 loses nothing."""
  sure = dict.fromkeys(SIZES[1:], 0.9)
  for unsure, shown in (({32: 1.05}, 32), ({32: 1.05, 128: 1.05}, 128)):
    claim = pretrain(losses=LOSSES | sure | unsure, spread=0.02, noise=300.0).claim
    assert claim.verdict == "inconclusive"
    assert claim.unit.endswith(f"batch size {shown}")
    assert claim.measured == pytest.approx(0.05, abs=0.03)


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
  lone = pretrain(seeds=(1000,))
  assert (lone.claim.verdict, lone.claim.measured) == ("inconclusive", None)
  assert "is 91 (no interval) examples" in lone.reading
  assert "Beyond" not in lone.reading


def test_the_better_arm_counts_by_validation_loss():
  """LAMB's losses are `losses` where it is the better; AdamW's are then half as large again, which would fail."""
  finding = pretrain(better="lamb_warmup_cosine")
  assert finding.claim.verdict == "holds"
  assert "at 32 (LAMB + warm-up + cosine)" in finding.reading


def test_diverged_seeds_of_a_batch_size_within_the_noise_scale_fail():
  finding = pretrain(diverged={("pretrain", "adamw_warmup_cosine", 32): 2})
  assert finding.claim.verdict == "fails"
  assert "2 of 8 seeds diverged at 32" in finding.reading
  assert (finding.claim.measured, finding.claim.n) == (None, 0)
  assert finding.claim.unit.endswith("batch size 32")
  smallest = pretrain(diverged={("pretrain", "adamw_warmup_cosine", 8): 2})
  assert smallest.claim.verdict == "inconclusive"
  assert "the smallest batch size has nothing to compare with" in smallest.reading


@pytest.mark.parametrize("lost", [32, 128, 256])
def test_what_fails_shows_a_loss_that_is_known_whatever_the_order(lost):
  """Of the two others one loses 0.2, the other 0.5."""
  less, most = (size for size in SIZES[1:] if size != lost)
  for losses in ({less: 1.2, most: 1.5}, {less: 1.5, most: 1.2}):
    finding = pretrain(losses=LOSSES | losses, noise=300.0, diverged={("pretrain", "adamw_warmup_cosine", lost): 1})
    assert finding.claim.verdict == "fails"
    assert finding.claim.measured == pytest.approx(0.5, abs=0.03)
    assert finding.claim.unit.endswith(f"batch size {max(losses, key=losses.get)}")


@pytest.mark.parametrize(
  ("arms", "ways"),
  [
    (ARMS, "warm-up, a cosine and the better of AdamW and LAMB, each tuned"),
    (ARMS[:1], "warm-up, a cosine and AdamW, tuned"),
    ((*ARMS, "lars_warmup_cosine"), "warm-up, a cosine and the best of AdamW, LAMB and LARS, each tuned"),
    ((ARMS[0], "momentum_cosine"), "the better of AdamW + warm-up + cosine and momentum + cosine, each tuned"),
  ],
)
def test_the_statement_names_the_arms_that_were_trained(arms, ways):
  assert pretrain(arms=arms).claim.statement == (
    f"Up to the critical batch size, large batches lose nothing in pre-training at equal epochs, with {ways}"
  )


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
  assert finding.claim.n == 8  # seeds of 4 and of 256, not of 16 and 64
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
  finding = finetune(errors=dict.fromkeys(FINETUNE_SIZES, 0.5), spread=0.08)
  assert 0.05 < finding.series["difference_high"].max() < 0.2
  assert finding.claim.verdict == "fails"


def test_a_difference_below_a_tenth_of_the_error_is_none():
  finding = finetune(errors=dict.fromkeys(FINETUNE_SIZES, 5.0), spread=0.2)
  assert 0.2 < finding.series["difference_high"].max() < 0.5
  assert finding.claim.verdict == "fails"


def outcome(seeds, errors):
  return Outcome(tuple(seeds), np.array(errors, float), 0, len(seeds))


def test_thirds_are_means_of_several_batch_sizes():
  outcomes = {
    size: outcome((1, 2), (mean, mean))
    for size, mean in zip((1, 2, 4, 8, 16, 32), (1.0, 2.0, 9.0, 9.0, 3.0, 6.0), strict=True)
  }
  difference, num_seeds = thirds(outcomes)
  assert difference == pytest.approx((3.0, 3.0, 3.0))  # (3 + 6) / 2 - (1 + 2) / 2
  assert num_seeds == 2


def test_thirds_pair_the_seeds_that_both_have():
  """Differences of seeds 1, 2 and 3: 1, 2 and 3; seeds 4 and 5 have no partner, and the middle batch size does not count."""
  outcomes = {
    4: outcome((1, 2, 3, 4), (10.0, 20.0, 30.0, 99.0)),
    16: outcome((1, 2), (0.0, 0.0)),
    64: outcome((5, 3, 2, 1), (-99.0, 33.0, 22.0, 11.0)),
  }
  half = stats.t.ppf(0.975, 2) * 1.0 / np.sqrt(3)
  difference, num_seeds = thirds(outcomes)
  assert difference == pytest.approx((2.0, 2.0 - half, 2.0 + half))
  assert num_seeds == 3


def test_thirds_need_two_batch_sizes_and_two_common_seeds():
  both = outcome((1, 2), (1.0, 2.0))
  for outcomes in ({}, {4: both}, {4: both, 16: outcome((2, 3), (1.0, 2.0))}):
    assert np.isnan(thirds(outcomes)[0]).all()


def test_what_a_start_adds_at_every_batch_size_does_not_blur_the_difference():
  finding = finetune(start_spread=5.0)
  assert finding.claim.verdict == "holds"
  assert finding.claim.ci_high - finding.claim.ci_low < 0.05


def test_batch_sizes_with_diverged_seeds_are_left_out_and_told():
  finding = finetune(diverged={("finetune_small", "adamw_warmup_cosine", 256): 1}, spread=0.0)
  assert finding.series["difference"] == pytest.approx([0.5, 1.0])  # 2.5 at 64 is the largest that is left
  assert "Left out, for seeds that diverged: batch size 256 (pre-trained at 8)." in finding.reading
  assert finding.claim.verdict == "holds"
  first = finetune(diverged={("finetune_small", "adamw_warmup_cosine", 4): 1}, spread=0.0)
  assert "is 2.2 at 16, pre-trained at 8; 2 at 4, pre-trained at 256" in first.reading


def test_a_start_without_a_whole_smallest_third_does_not_hold():
  """Of the batch sizes planned: the smallest third of six are 1 and 4, and the one of the five that are left is whole."""
  errors = dict(zip((1, 4, 16, 64, 256, 1024), (1.0, 1.2, 1.4, 1.6, 1.8, 2.0), strict=True))
  verdicts = {
    size: finetune(errors=errors, diverged={("finetune_large", "adamw_warmup_cosine", size): 1}) for size in errors
  }
  assert {size: finding.claim.verdict for size, finding in verdicts.items()} == (
    dict.fromkeys(errors, "holds") | dict.fromkeys((1, 4), "inconclusive")
  )
  open_ = verdicts[4]
  assert open_.series["difference_verdict"].tolist() == ["holds", "inconclusive"]
  assert open_.claim.unit.endswith("pre-trained at batch size 256")
  assert open_.claim.ci_low > 0
  assert "Left out, for seeds that diverged: batch size 4 (pre-trained at 256)." in open_.reading
  assert "Left open, without a whole smallest third: pre-trained at 256." in open_.reading


def test_a_start_without_a_whole_smallest_third_can_fail():
  flat = dict.fromkeys(FINETUNE_SIZES, 2.0)
  finding = finetune(errors=flat, diverged={("finetune_small", "adamw_warmup_cosine", 4): 1})
  assert finding.series["difference_verdict"].tolist() == ["fails", "fails"]


def test_a_start_that_diverged_at_every_batch_size_has_no_lowest_error():
  lost = {(part, "adamw_warmup_cosine", size): 1 for part in FINETUNE for size in FINETUNE_SIZES}
  finding = finetune(diverged=lost)
  assert (finding.claim.verdict, finding.claim.measured) == ("inconclusive", None)
  assert "The lowest mean" not in finding.reading
  assert "16 (pre-trained at 8)" in finding.reading
  assert "16 (pre-trained at 256)" in finding.reading


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
