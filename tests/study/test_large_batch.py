"""The study of large batches: equal budgets and searches, the choice of a point, the linear rule, and what an interruption changes."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bsjax.study.large_batch as module
from bsjax.records import read_records
from bsjax.study.large_batch import run_large_batch_study
from bsjax.study.large_batch_plan import (
  ARMS,
  FIRST_REPEAT_SEED,
  RECIPES,
  REPEATED_POINTS,
  REPEATS,
  Budget,
  arm_config,
  arm_hparams,
  arm_space,
  budget_of,
  make_large_batch_plan,
  recipe_point,
)
from bsjax.study.sweep_plan import FIRST_FINAL_SEED
from bsjax.train import make_mesh, make_trial
from bsjax.workloads import Workload, load_workload

OPTIONS = {
  "batch_sizes": (32,),
  "arms": ("momentum_warmup", "adamw_warmup_cosine"),
  "num_epochs": 1,
  "num_trials": 8,
  "final_seeds": 2,
}


@pytest.fixture(scope="module")
def quadratic() -> Workload:
  return load_workload("quadratic")


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Iterator[None]:
  """Leaves `study.json` in place of a report: that is a function of the records, with tests of its own."""

  def describe_only(description, folder, out, *, environment):
    (out / "study.json").write_text(json.dumps(description))
    return out / "study.json"

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "report_large_batch_study", describe_only)
    yield


def studied(workload: Workload, out: Path, **options: object) -> dict:
  """Runs a small study of the quadratic, and returns its description."""
  out.mkdir(exist_ok=True)
  plan = make_large_batch_plan(workload, **OPTIONS | options)
  path = run_large_batch_study(workload, plan, out, mesh=make_mesh(data=1), environment={})
  return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(quadratic, tmp_path_factory) -> tuple[Path, dict]:
  out = tmp_path_factory.mktemp("large") / "out"
  return out, studied(quadratic, out)


def records_of(out: Path, **wanted: object) -> list:
  def value(record, name):
    return record.trial["config"][name] if name == "batch_size" else record.trial[name]

  found = [r for r in read_records(out / "large_batch") if all(value(r, k) == v for k, v in wanted.items())]
  return sorted(found, key=lambda record: record.trial["seed"])


def loss_of(record) -> float:
  return record.metrics[-1]["validation_loss"] if record.status["state"] == "complete" else math.inf


def entries_of(description: dict) -> Iterator[tuple[int, str, dict]]:
  for size, arms in description["tuned"].items():
    for arm, entry in arms.items():
      if arm not in RECIPES:
        yield int(size), arm, entry


def contents(out: Path) -> dict[str, bytes]:
  files = (path for path in sorted(out.glob("large_batch/*/*.json*")) if path.name != "status.json")
  return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_an_interrupted_study_ends_with_the_same_records(quadratic, whole, tmp_path):
  out, description = whole
  shutil.copytree(out, tmp_path / "again")
  for path in sorted((tmp_path / "again" / "large_batch").glob("*/"))[::3]:
    shutil.rmtree(path)
  left = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("large_batch/*/*.json*")}
  assert studied(quadratic, tmp_path / "again") == description
  assert contents(tmp_path / "again") == contents(out)
  assert {path: path.stat().st_mtime_ns for path in left} == left


def test_every_arm_is_searched_alike(whole):
  out, description = whole
  entries = list(entries_of(description))
  assert [(size, arm) for size, arm, _ in entries] == [
    (8, "momentum_constant"),
    *((32, arm) for arm in OPTIONS["arms"]),
  ]
  for size, arm, entry in entries:
    search = records_of(out, kind="search", arm=arm, batch_size=size)
    assert entry["num_trials"] in (8, 10, 12, 14)  # a quarter more for each time that the space was widened
    assert [r.trial["seed"] for r in search] == list(range(entry["num_trials"]))
    assert entry["num_diverged"] == sum(r.status["state"] == "diverged" for r in search)
    assert not any(r.probes for r in search)  # the test set chooses nothing


def test_the_point_with_the_best_repeats_is_chosen_and_judged_at_fresh_seeds(whole):
  out, description = whole
  for size, arm, entry in entries_of(description):
    search = records_of(out, kind="search", arm=arm, batch_size=size)
    best = sorted(search, key=loss_of)[:REPEATED_POINTS]
    repeats = records_of(out, kind="repeat", arm=arm, batch_size=size)
    assert len(repeats) == REPEATED_POINTS * REPEATS
    means = {}
    for trial in best:
      again = [r for r in repeats if r.trial["hparams"] == trial.trial["hparams"]]
      assert [r.trial["seed"] for r in again] == list(range(FIRST_REPEAT_SEED, FIRST_REPEAT_SEED + REPEATS))
      assert not any(r.probes for r in again)
      means[trial.id] = np.mean([loss_of(r) for r in again])
    chosen = min(best, key=lambda trial: means[trial.id])
    assert entry["validation_loss"] == pytest.approx(means[chosen.id])
    assert entry["point"].items() <= chosen.trial["hparams"].items()
    finals = records_of(out, kind="final", arm=arm, batch_size=size)
    assert [r.id for r in finals] == entry["final"]
    assert [r.trial["seed"] for r in finals] == [FIRST_FINAL_SEED, FIRST_FINAL_SEED + 1]
    for record in finals:
      assert record.trial["hparams"] == chosen.trial["hparams"]
      (row,) = record.probes
      assert (row["probe"], row["step"]) == ("test", entry["num_steps"])


def test_the_linear_rule_scales_the_baselines_rate(whole):
  out, description = whole
  rate = description["tuned"]["8"]["momentum_constant"]["point"]["learning_rate"]
  for recipe in RECIPES:
    finals = records_of(out, kind="final", arm=recipe, batch_size=32)
    assert [r.id for r in finals] == description["tuned"]["32"][recipe]["final"]
    assert len(finals) == 2
    for record in finals:
      assert record.trial["hparams"]["learning_rate"] == pytest.approx(rate * 32 / 8)
      assert record.trial["config"]["optimizer"] == "momentum"
      assert record.trial["config"].get("warmup", "none") == ("gradual" if recipe == "rule_warmup" else "none")


def test_the_recipe_warms_up_from_the_small_rate_for_five_of_ninety_epochs(quadratic):
  plan = make_large_batch_plan(quadratic)
  point = recipe_point("rule_warmup", plan, 0.3, batch_size=128, budget=Budget(1800, 1))
  assert point == {"learning_rate": 0.3 * 16, "warmup_steps": 100, "warmup_factor": pytest.approx(1 / 16)}
  assert recipe_point("rule_warmup", plan, 0.3, batch_size=128, budget=Budget(4, 1))["warmup_steps"] == 1
  assert recipe_point("rule_constant", plan, 0.3, batch_size=128, budget=Budget(1800, 1)) == {"learning_rate": 0.3 * 16}


@pytest.mark.parametrize(("base", "side"), [(1e-4, "high"), (1e3, "low")])
def test_a_best_rate_on_an_edge_widens_the_space(quadratic, tmp_path, base, side):
  """Momentum's best rates lie near 0.1; a centre a thousand times off has none of them within its factor of 16."""
  options = {"arms": ("momentum_warmup",), "base_learning_rate": base}
  description = studied(quadratic, tmp_path / side, **options)
  plan = make_large_batch_plan(quadratic, **OPTIONS | options)
  first, _ = arm_space("momentum_warmup", plan, batch_size=32, budget=Budget(16, 1))
  entry = description["tuned"]["32"]["momentum_warmup"]
  found = entry["space"]["learning_rate"]
  rate = entry["point"]["learning_rate"]
  assert entry["num_trials"] > 8
  if side == "high":
    assert found["low"] == first.low
    assert rate > first.high
  else:
    assert found["high"] == first.high
    assert rate < first.low
  assert found["low"] <= rate <= found["high"] * (1 + 1e-12)


def test_where_all_trials_diverge_there_is_no_point_and_no_rule(quadratic, tmp_path):
  """Curvature 1: 1e12 times the stable rate overflows float32 within two steps, and so do 16^4 times smaller ones."""
  description = studied(quadratic, tmp_path / "lost", arms=("momentum_warmup",), base_learning_rate=1e15, num_trials=4)
  assert set(description["tuned"]["32"]) == {"momentum_warmup"}
  for _, _, entry in entries_of(description):
    assert (entry["point"], entry["final"], entry["validation_loss"]) == (None, [], None)
    assert entry["num_diverged"] == entry["num_trials"] == 4 + 3


@pytest.mark.parametrize("num_epochs", [0.7, 1, 3.3, 32])
def test_every_batch_size_sees_the_same_epochs(quadratic, num_epochs):
  """Rounded to a whole step, or where an evaluation takes several, to half of 1/64 of the budget."""
  plan = make_large_batch_plan(quadratic, num_epochs=num_epochs, batch_sizes=(32, 128))
  for size in (1, 7, 8, 31, 32, 100, 128):
    budget = budget_of(plan, batch_size=size, train_size=512)
    exact = num_epochs * 512 / size
    assert budget.num_steps % budget.every == 0
    assert abs(budget.num_steps - exact) <= max(0.5, exact / 128)
    assert budget.every <= max(1, exact / 64)


@pytest.mark.parametrize("name", ARMS)
def test_arms_train_as_they_are_called(name, quadratic):
  plan, budget = make_large_batch_plan(quadratic), Budget(40, 1)
  optimizer, *rest = name.split("_")
  config = arm_config(name, quadratic, batch_size=128, budget=budget)
  assert config.optimizer == optimizer
  assert config.warmup == ("gradual" if "warmup" in rest else "none")
  assert config.schedule == ("cosine" if "cosine" in rest else "constant")
  rate, *others = arm_space(name, plan, batch_size=128, budget=budget)
  k = 128 / 8
  factor = {"momentum": 0.2 * (1 - 0.9) * k, "lars": k**0.5, "lamb": 0.01 * k**0.5, "adamw": 0.004 * k**0.5}[optimizer]
  assert (rate.low, rate.high) == pytest.approx((factor / 16, factor * 16))
  assert [(other.name, other.low, other.high) for other in others] == (
    [("warmup_steps", 2, 20)] if "warmup" in rest else []
  )
  trial = make_trial(config, arm_hparams(name, {"learning_rate": 0.5} | {other.name: 8.0 for other in others}), 0)
  assert trial.hparams.momentum == 0.9
  assert trial.hparams.decay_steps == (40 - 8 * len(others) if "cosine" in rest else 0)


@pytest.mark.parametrize("steps", [2, 3, 5, 1000])
def test_warm_ups_fit_every_budget(steps, quadratic):
  plan = make_large_batch_plan(quadratic)
  _, warmup = arm_space("lamb_warmup_cosine", plan, batch_size=128, budget=Budget(steps, 1))
  assert 1 <= warmup.low <= warmup.high < steps
  assert abs(warmup.high - steps / 2) <= 0.5  # rounded to whole steps
  for value in (warmup.low, warmup.high):
    config = arm_config("lamb_warmup_cosine", quadratic, batch_size=128, budget=Budget(steps, 1))
    make_trial(config, arm_hparams("lamb_warmup_cosine", {"learning_rate": 0.1, "warmup_steps": value}), 0)


def test_the_largest_batch_sizes_of_a_preset():
  plan = make_large_batch_plan(load_workload("digits_mlp"))
  assert (plan.batch_sizes, plan.reference_batch_size) == ((64, 256, 1024), 32)
  assert make_large_batch_plan(load_workload("digits_mlp"), reference_batch_size=64).batch_sizes == (256, 1024)
  assert make_large_batch_plan(load_workload("digits_vit")).batch_sizes == (64, 256)


BAD = {
  "batch_sizes": ((64, 2000), "--batch_sizes has 2000, wanted more than 32, .* and at most 1024"),
  "reference_batch_size": (1024, "--batch_sizes is empty, wanted at least one above 1024"),
  "arms": (("adamw_warmup_cosine", "adam"), "--arms=adamw_warmup_cosine,adam, wanted some of momentum_constant, "),
  "num_epochs": (1.5, "--num_epochs=1.5 is less than 2 steps at batch size 1024, wanted at least 2"),
  "num_trials": (3, "--num_trials=3, wanted 4 to 500"),
  "final_seeds": (1, "--final_seeds=1, wanted 2 to 1000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_named(name):
  value, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    make_large_batch_plan(load_workload("digits_mlp"), **{name: value})


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_sizes": (32, 64)}, "--batch_sizes has 32, wanted more than 32"),
    ({"batch_sizes": ()}, "--batch_sizes is empty"),
    ({"arms": ()}, "--arms=, wanted some of"),
    ({"reference_batch_size": 0}, "--reference_batch_size=0, wanted 1 to 1024"),
    ({"num_epochs": math.nan}, "--num_epochs=nan, wanted a finite number above 0"),
    ({"num_epochs": math.inf}, "--num_epochs=inf, wanted a finite number above 0"),
  ],
)
def test_bad_edges_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    make_large_batch_plan(load_workload("digits_mlp"), **options)
