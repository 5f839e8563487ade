"""The page of the study of sharp minima: its answer counts verdicts, and its tables hold the means and slopes of its records."""

import numpy as np
import pytest

from bsjax.analysis import judge_flat_generalizes, judge_flat_measures
from bsjax.records import Record
from bsjax.report import sharp_page
from tests.analysis import simulate_sharpness as simulate

STUDY = simulate.make_study() | {
  "dataset": "made_up",
  "train_size": 1024,
  "validation_size": 256,
  "test_size": 256,
  "num_params": 100,
  "num_examples": 512,
  "statistics": "running",
  "optimizer": "sgd",
  "momentum": 0.9,
  "learning_rates": {"8": [0.1, 0.4]},
  "num_epochs": 32,
  "train_loss_level": 0.05,
  "escape": {"small": 8, "large": 512, "small_rate": 0.1, "large_rate": 0.8},
  "edge": {"batch_sizes": [32, 512], "learning_rates": [0.1], "seeds": [0, 1], "train_size": 512},
  "counts": {"complete": 80, "diverged": 1},
}


def page_of(records, extra=()):
  findings = [judge(STUDY, records) for judge in (judge_flat_measures, judge_flat_generalizes)]
  return sharp_page(STUDY, [*records, *extra], findings)


@pytest.fixture(scope="module")
def records():
  """Every measure grows with the batch size at equal epochs; at equal training loss none does."""
  return simulate.solutions(slope=lambda measure, phase: 0.3 if phase == "budget" else -0.3)


def test_the_answer_counts_measures(records):
  answer = page_of(records).answer
  assert "At equal training loss yes by 0 of 5 measures, no by 5, open by 0" in answer
  assert "at equal epochs yes by 5 of 5 measures, no by 0, open by 0" in answer


def test_the_table_holds_geometric_means_and_slopes(records):
  table = page_of(records).tables[1]
  assert "at equal epochs" in table.caption
  assert table.header[1:3] == ("B = 8", "B = 512")
  by_name = {row[0]: row[1:] for row in table.rows}
  small, large, ratio, (slope, low, high), verdict = by_name["Hessian trace"]
  values = {
    size: [
      row["value"]
      for record in records
      if record.trial["phase"] == "budget" and record.trial["config"]["batch_size"] == size
      for row in record.probes
      if row.get("measure") == "trace"
    ]
    for size in (8, 512)
  }
  assert small == pytest.approx(np.exp(np.mean(np.log(values[8]))))
  assert ratio == pytest.approx(np.exp(np.mean(np.log(values[512]))) / small)
  assert large == pytest.approx(ratio * small)
  assert low < slope < high
  assert verdict == "yes"
  assert "smallest Hessian eigenvalue" not in by_name


def raw(size, rows):
  """A solution as it lies on disk, before it is cut into phases."""
  trial = {
    "kind": "solution",
    "rate_part": 1.0,
    "seed": 0,
    "config": {"batch_size": size},
    "hparams": {"learning_rate": 1.0},
  }
  return Record(f"raw{size}", trial, {"state": "running"}, [], rows)


def test_layers_and_statistics_are_compared_between_the_ends(records):
  def rows(factor):
    layer = {"probe": "layer", "layer": "Dense_0", "top_eigenvalue": 2.0 * factor, "trace": 7.0 * factor}
    measure = {"probe": "measure", "phase": "statistics", "measure": "top_eigenvalue"}
    return [
      layer,
      measure | {"value": 3 * factor, "batch_norm": "batch"},
      measure | {"value": factor, "batch_norm": "ghost"},
    ]

  tables = page_of(records, [raw(8, rows(1.0)), raw(512, rows(10.0)), raw(32, rows(99.0))]).tables
  assert list(tables[2].rows) == [("Dense_0", 2.0, 20.0, 7.0, 70.0)]
  assert [row[0] for row in tables[3].rows] == ["largest Hessian eigenvalue"] * 2
  assert [row[1] for row in tables[3].rows] == [
    "batch norm: statistics of the batch",
    "batch norm: statistics of ghost batches",
  ]
  np.testing.assert_allclose([row[2:] for row in tables[3].rows], [(3, 30, 10), (1, 10, 10)])


def test_facts_name_the_statistics_and_what_was_looked_at(records):
  facts = dict(page_of(records).fixed)
  assert "the first 512 training examples" in facts["Curvature"]
  assert "running statistics" in facts["Curvature"]
  assert facts["Trials"] == "80 complete, 1 diverged"


def test_without_solutions_the_page_says_what_is_missing():
  page = page_of([])
  assert page.tables == []
  assert "would decide" in page.answer
