"""The page of the scaling rules: its answer and its tables hold the numbers of the finding, and its gaps."""

import pytest

from bsjax.analysis import judge_no_rule_fits_all
from bsjax.report import render_experiment, scaling_page
from tests.analysis.simulate_lattice import FEWEST, SIZES, lattice_record, power_law, simulate


def page_of(study, records):
  finding = judge_no_rule_fits_all(study, records)
  return scaling_page(study, [finding]), finding


@pytest.fixture(scope="module")
def made():
  study, records = simulate(power_law(0.5), noise=0.01, optimizers=("sgd", "adam"), scales=dict.fromkeys(SIZES, 20.0))
  records += [lattice_record("adam", 64, 0.3, number, 1.5 * FEWEST, kind="adam_sqrt") for number in range(4)]
  study["lattices"]["sgd"]["256"]["reason"] = "every trial diverged"
  study["adam_sqrt_skipped"] = {"256": "from 4 the rule holds up to 39.", "64": "made up"}
  page, finding = page_of(study, records)
  return page, finding, study


def table(page, begins):
  (found,) = [table for table in page.tables if table.caption.startswith(begins)]
  return found


def test_the_answer_names_the_cheapest_rule_of_each_optimizer(made):
  page, finding, _ = made
  cost = {
    (rule, selection): regret
    for optimizer, rule, selection, regret in zip(
      *(finding.series[f"summary_{name}"].tolist() for name in ("optimizer", "rule", "selection", "regret")),
      strict=True,
    )
    if optimizer == "sgd"
  }
  # At 1, 4, 16 and 64 the rates of `none` are too small upwards, which costs less than too large ones, that diverge, downwards.
  assert cost["none", "up"] < 0.9 * cost["none", "down"]
  assert f"none {cost['none', 'up']:.2f}" in page.answer
  assert page.answer.startswith(
    "From smaller to larger batches, what loses least on average is with sgd the rule sqrt (1.0"
  )
  assert "with adam the rule sqrt (1.0" in page.answer
  assert page.answer.endswith("One rule loses less than a fifth of the steps at every pair of batch sizes.")


def test_tables_hold_the_findings_numbers(made):
  page, finding, study = made
  series = finding.series
  summary = table(page, "Steps at the carried rate")
  assert len(summary.rows) == 2 * 4
  assert all(len(row) == len(each.header) for each in page.tables for row in each.rows)
  at = (series["summary_optimizer"] == "adam") & (series["summary_rule"] == "linear")
  row = next(row for row in summary.rows if row[:2] == ("adam", "linear"))
  for column, name in ((2, "all"), (3, "up"), (4, "down"), (5, "near"), (6, "from_smallest"), (7, "from_largest")):
    where = at & (series["summary_selection"] == name)
    assert row[column] == tuple(series[f"summary_{end}"][where].item() for end in ("regret", "low", "high"))
  assert row[8] == 20
  assert row[9] == 1.0
  worst = table(page, "The worst pair")
  assert [row[0] for row in worst.rows[:4]] == ["all together"] * 4
  ratios = table(page, "The same by the ratio")
  assert ratios.header[2:] == ("× 4", "× 16", "× 64", "× 256")
  assert next(row for row in ratios.rows if row[:2] == ("sgd", "none"))[5] is None  # 256 is left out for sgd
  reference = table(page, "From batch size 4 alone")
  assert "at batch sizes 64, 256." in reference.caption
  adam = next(row for row in reference.rows if row[1] == "adam_sqrt")
  assert adam[2 + [1, 16, 64, 256].index(64)][0] == pytest.approx(1.5, rel=0.05)
  rates = table(page, "The best rate")
  assert [row[:2] for row in rates.rows][:4] == [("sgd", size) for size in SIZES[:4]]
  slopes = table(page, "The exponent")
  assert {name: value[0] for name, value in slopes.rows} == pytest.approx({"sgd": 0.5, "adam": 0.5}, abs=0.03)
  assert table(page, "Batch sizes that are left out").rows == [("sgd", 256, "every trial diverged")]
  assert dict(page.fixed)["Learning rates"].startswith("sgd: 0.1 × 2^(k/2); adam: 0.1 × 2^(k/2)")
  html = render_experiment(page, findings=[finding], environment={}, figures={})
  assert "Scaling rules" in html
  assert study["workload"] in html


def test_without_data_the_page_says_so():
  page, finding = page_of(simulate()[0], [])
  assert page.answer == finding.reading
  assert [table.caption for table in page.tables] == ["Batch sizes that are left out."]
  render_experiment(page, findings=[finding], environment={}, figures={})
