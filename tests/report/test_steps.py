"""The page of the study of steps to result: its answer and tables hold the numbers of its records, and its misses."""

import math

import pytest

from bsjax.analysis import judge_lr_sensitivity, judge_momentum_extends_scaling, judge_three_regimes
from bsjax.analysis.claims_steps import SweepRecords
from bsjax.analysis.steps_to_result import steps_to_result
from bsjax.analysis.sweep_curves import fit_sweep, steps_by_batch_size
from bsjax.analysis.sweep_table import sweep_table
from bsjax.records import Record
from bsjax.report import steps_page
from tests.analysis.simulate_sweep import FINAL_SEEDS, TARGET, trial_record
from tests.analysis.test_claims_steps import SIZES, swept

STUDY = {
  "workload": "made_up",
  "dataset": "made_up",
  "train_size": 1024,
  "validation_size": 256,
  "test_size": 256,
  "num_params": 100,
  "target": TARGET,
}
PLANNED = {
  "momentum": 0.9,
  "weight_decay": 0.0,
  "schedule": "constant",
  "warmup": "none",
  "warmup_fraction": 0.0,
  "scaling_rule": "sqrt",
  "noise_scale": 0.0,
  "half_life": 0.0,
  "microbatch_size": 0,
  "num_trials": 48,
  "give_up_factor": 4,
  "quality_trials": 8,
}


def timing(size, seconds) -> Record:
  """Five repeats, one of them disturbed."""
  rows = [
    {"step": i, "repeat": i, "seconds_per_step": seconds * (9 if i == 2 else 1), "examples_per_second": size / seconds}
    for i in range(5)
  ]
  config = {"batch_size": size, "num_steps": 1, "eval_every": 1}
  trial = {"kind": "timing", "config": config, "hparams": {}, "seed": 0}
  return Record(f"timing-{size}", trial, {"state": "complete"}, rows, [])


@pytest.fixture(scope="module")
def sweeps():
  """sgd never reached the target at the largest batch size, and sits on an edge at 4."""
  study, records = swept("sgd", critical=16.0, diverged=2, edges={4: {"learning_rate": "high"}})
  records = [r if r.trial["config"]["batch_size"] < SIZES[-1] else r._replace(metrics=r.metrics[:3]) for r in records]
  best = steps_to_result(study, records)[0]
  records += [
    trial_record(study, 1, seed, 1.25 * best.steps, kind="final", rate=best.hparams["learning_rate"], momentum=0.0)
    for seed in FINAL_SEEDS
  ]
  records += [timing(size, 1e-3 * size) for size in SIZES[:-2]]
  momentum = swept("momentum", critical=128.0, seed=1)
  return {
    "sgd": SweepRecords(study | PLANNED, records),
    "momentum": SweepRecords(momentum.study | PLANNED, momentum.records),
  }


@pytest.fixture(scope="module")
def page(sweeps):
  findings = [judge(sweeps) for judge in (judge_three_regimes, judge_momentum_extends_scaling, judge_lr_sensitivity)]
  return steps_page(STUDY, sweeps, findings)


def test_the_answer_tells_the_steps_and_how_far_scaling_is_perfect(page, sweeps):
  curve = fit_sweep(steps_by_batch_size(*sweeps["momentum"]))
  assert (
    f"With momentum it takes {curve.steps[0]:,.0f} steps at batch size 1 and {curve.steps[-1]:,.0f} at 1,024"
    in page.answer
  )
  assert f"no more than 20 % more examples up to about {curve.fit_perfect_until.value:.1f}" in page.answer
  assert "until validation accuracy was at least 0.97" in page.lead
  assert f"{2 * 48 * len(SIZES) + len(FINAL_SEEDS)} trials with sgd, momentum" in page.lead  # timings are none


def test_a_curve_that_begins_bent_says_so():
  study, records = swept("sgd", critical=4.0)
  answer = steps_page(STUDY, {"sgd": SweepRecords(study | PLANNED, records)}, []).answer
  assert "even batch size 1 takes over 20 % more examples than very small ones would" in answer


def test_the_curve_table_holds_the_fit(page, sweeps):
  curve = fit_sweep(steps_by_batch_size(*sweeps["momentum"]))
  rows = {row[0]: row for row in page.tables[0].rows}
  assert rows["momentum"][1] == pytest.approx(tuple(curve.fit.critical))
  assert rows["momentum"][3] == pytest.approx(tuple(curve.e_min))
  assert rows["momentum"][6][0] >= 1  # half the trials need no fewer steps
  assert len(page.tables[0].header) == len(rows["sgd"])


def test_the_table_of_rates_names_the_rules(page):
  rows = {row[0]: row for row in page.tables[1].rows}
  assert "square root" in rows["momentum"][2]
  assert rows["momentum"][1][0] == pytest.approx(0.5, abs=0.1)


def test_every_batch_size_has_its_row(page, sweeps):
  table = page.tables[2]
  results = steps_to_result(*sweeps["sgd"])
  assert [row[0] for row in table.rows] == list(SIZES)
  assert [row[1] for row in table.rows[:-1]] == [r.steps for r in results[:-1]]
  assert [row[2] for row in table.rows[:-1]] == [r.steps * r.batch_size for r in results[:-1]]
  assert table.rows[-1][2] is None
  seconds = [row[table.header.index("Seconds")] for row in table.rows]
  assert seconds[:-2] == pytest.approx([1e-3 * r.batch_size * r.steps for r in results[:-2]])
  assert seconds[-2:] == [None, None]  # one was not timed, one not reached
  assert table.rows[-1][1].startswith("not reached, nearest 0.")
  assert table.rows[1][table.header.index("Edge")] == "high learning rate"
  assert table.rows[0][table.header.index("Fresh seeds / best")][0] == pytest.approx(1.25, rel=0.02)
  assert table.rows[0][table.header.index("learning rate")] == results[0].hparams["learning_rate"]
  reached, missed, cut, diverged = map(int, table.rows[0][-1].split(" / "))
  assert (diverged, cut, reached + missed) == (2, 0, 46)
  assert all(len(row) == len(table.header) for row in table.rows)


def test_what_was_held_fixed_is_told(page):
  fixed = dict(page.fixed)
  assert fixed["Hyperparameters"] == "momentum 0.9, weight decay 0; constant schedule"
  assert fixed["Search"].startswith("48 quasi-random trials for each batch size")
  assert fixed["Quality"].startswith("8 trials")


def test_what_is_not_at_its_default_is_told(sweeps):
  changed = {"half_life": 1e5, "microbatch_size": 16, "scaling_rule": "noise", "noise_scale": 80.0}
  study = sweeps["sgd"].study | changed
  fixed = dict(steps_page(STUDY, {"sgd": SweepRecords(study, sweeps["sgd"].records)}, []).fixed)
  assert (
    "beta2 forgets half in 100,000 examples, gradients accumulated over microbatches of 16;" in fixed["Hyperparameters"]
  )
  assert "centred by the rule 'noise (noise scale 80)'" in fixed["Search"]


def test_the_table_of_trials_of_a_text_counts_tokens(sweeps):
  of_text = {
    name: SweepRecords(sweep.study | {"tokens_per_example": 64}, sweep.records) for name, sweep in sweeps.items()
  }
  rows = sweep_table(of_text)
  assert all(row.pop("tokens_per_batch") == 64 * row["batch_size"] for row in rows)
  assert rows == sweep_table(sweeps)


def test_the_table_of_trials_is_tidy(sweeps):
  rows = sweep_table(sweeps)
  assert len(rows) == sum(r.trial["kind"] != "timing" for sweep in sweeps.values() for r in sweep.records)
  assert len({tuple(row) for row in rows}) == 1
  assert [row["optimizer"] for row in rows] == sorted((row["optimizer"] for row in rows), reverse=True)
  sgd = [row for row in rows if row["optimizer"] == "sgd" and row["kind"] == "sweep"]
  assert [row["point"] if "point" in row else row["seed"] for row in sgd[:48]] == list(range(48))
  assert {row["state"] for row in sgd} == {"complete", "infeasible"}
  assert all((row["state"] == "infeasible") == (row["diverged_at"] is not None) for row in sgd)
  assert all(row["steps_to_target"] is None for row in sgd if row["batch_size"] == SIZES[-1])
  assert all(math.isfinite(row["best_validation_accuracy"]) for row in sgd if row["state"] == "complete")
