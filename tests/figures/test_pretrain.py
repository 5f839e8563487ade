"""The figures of pre-training and fine-tuning draw what the findings hold, and cover nothing."""

import numpy as np
import pytest

from bsjax.analysis import Finding, judge_finetune_small, judge_pretrain_large
from bsjax.figures.pretrain import FIGURES
from tests.analysis.simulate_pretrain import FINETUNE_SIZES, world
from tests.figures.drawn import assert_draws_cleanly, line_of, texts_of
from tests.report.example import make_claim


def findings_of(**changes):
  study, records = world(**changes)
  return {
    finding.claim.id: finding
    for finding in (judge(study, records) for judge in (judge_pretrain_large, judge_finetune_small))
  }


def means_of(axes, label):
  """Returns what is drawn with error bars under this label: f64[2, K]."""
  (found,) = [bars for bars in axes.containers if bars.get_label() == label]
  return np.array(found.lines[0].get_data())


@pytest.fixture(scope="module")
def findings():
  return findings_of()


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_covered_or_cut_and_no_global_state_changes(name, findings):
  assert_draws_cleanly(FIGURES[name], findings[name])


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("keep_keys", [True, False])
def test_empty_series_say_so(name, keep_keys, findings):
  series = {
    key: np.zeros(0, array.dtype) if array.ndim else array for key, array in findings[name].series.items() if keep_keys
  }
  figure = FIGURES[name](Finding(make_claim(name, verdict="inconclusive"), series, "nothing was measured"))
  assert "no data: nothing was measured" in texts_of(figure)


def test_means_are_drawn_at_their_batch_sizes_and_the_noise_scale_as_a_line():
  finding = findings_of(losses={8: 1.0, 32: 1.1, 128: 1.2, 256: 1.3}, spread=0.0)["pretrain_large"]
  (axes,) = FIGURES["pretrain_large"](finding).axes
  x, y = means_of(axes, "AdamW + warm-up + cosine")
  np.testing.assert_allclose(x, [8, 32, 128, 256])
  np.testing.assert_allclose(y, [1.0, 1.1, 1.2, 1.3])
  np.testing.assert_allclose(line_of(axes, "gradient noise scale").get_xdata(), 100.0)


def test_each_start_has_a_line_of_errors():
  large = dict.fromkeys(FINETUNE_SIZES, 1.5)
  (axes,) = FIGURES["finetune_small"](findings_of(errors_large=large, spread=0.0)["finetune_small"]).axes
  np.testing.assert_allclose(means_of(axes, "pre-trained at batch size 8")[1], [2.0, 2.2, 2.5, 3.0])
  np.testing.assert_allclose(means_of(axes, "pre-trained at batch size 256")[1], 1.5)
  assert axes.get_ylabel() == "test error, %"


def test_a_diverged_batch_size_has_no_mean_and_a_lone_start_is_drawn_alone():
  finding = findings_of(diverged={("finetune_small", "adamw_warmup_cosine", 16): 1}, parts=("finetune_small",))[
    "finetune_small"
  ]
  (axes,) = FIGURES["finetune_small"](finding).axes
  x, _ = means_of(axes, "pre-trained at batch size 8")
  np.testing.assert_allclose(x, [4, 64, 256])
