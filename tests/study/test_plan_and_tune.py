"""What a study decides before and between its trainings."""

import dataclasses
import math

import pytest

from bsjax.records import Record
from bsjax.study import make_plan
from bsjax.study.plan import Plan, budget_steps, eval_every, first_rates, make_config, workload_facts
from bsjax.study.tune import MOST_WIDENINGS, tune_rate
from bsjax.workloads import load_workload

TARGET = {"metric": "validation_loss", "goal": 0.5, "direction": "min"}


def plan_of(**overrides: object) -> Plan:
  return make_plan(load_workload("quadratic"), **overrides)


@pytest.mark.parametrize("train_size", [512, 1024, 55_000])
@pytest.mark.parametrize("num_epochs", [1.0, 2.0, 16.0])
def test_budgets_are_equal(train_size: int, num_epochs: float) -> None:
  plan = dataclasses.replace(plan_of(), num_epochs=num_epochs, num_steps=1000)
  for batch_size in (2**k for k in range(int(math.log2(train_size)) + 1)):
    every = eval_every(plan, batch_size=batch_size, train_size=train_size)
    steps = {
      budget: budget_steps(plan, budget, batch_size=batch_size, train_size=train_size) for budget in ("epochs", "steps")
    }
    assert all(count % every == 0 and count >= every for count in steps.values())
    # rounding to whole evaluation intervals costs less than one interval, and an interval is 1/512 of the longer budget
    exact = {"epochs": num_epochs * train_size / batch_size, "steps": 1000}
    for budget, count in steps.items():
      assert abs(count - exact[budget]) <= every
    assert every == 1 or every <= max(exact.values()) / 512


def test_both_budgets_share_one_program() -> None:
  plan = plan_of()
  for size in plan.batch_sizes:
    configs = [
      make_config(plan, "quadratic", budget, batch_size=size, train_size=512) for budget in ("epochs", "steps")
    ]
    assert configs[0].eval_every == configs[1].eval_every


def test_grids_share_their_points() -> None:
  """Every rate is the base times a power of two, and the middle follows the rule to the nearest power."""
  for rule, exponent in (("none", 0), ("sqrt", 0.5), ("linear", 1)):
    plan = plan_of(scaling_rule=rule, base_learning_rate=0.3, reference_batch_size=8, num_rates=5)
    for batch_size in (1, 8, 64):
      rates = first_rates(plan, batch_size=batch_size)
      powers = [math.log2(rate / 0.3) for rate in rates]
      assert powers == pytest.approx([round(power) for power in powers])
      assert [b - a for a, b in zip(powers, powers[1:], strict=False)] == pytest.approx([1] * 4)
      assert abs(powers[2] - exponent * math.log2(batch_size / 8)) <= 0.5


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"batch_sizes": (1024,)}, "has 1024, but the training set has 512 examples"),
    ({"batch_sizes": (0,)}, "has 0, wanted at least 1"),
    ({"batch_sizes": ()}, "is empty"),
    ({"base_learning_rate": 0.0}, "base_learning_rate=0.0, wanted a finite number above 0"),
    ({"base_learning_rate": float("inf")}, "base_learning_rate=inf"),
    ({"num_epochs": -1.0}, "num_epochs=-1.0"),
    ({"num_steps": 0}, "num_steps=0"),
    ({"final_seeds": 2}, "final_seeds=2, wanted at least 3"),
    ({"tuning_seeds": 0}, "tuning_seeds=0"),
    ({"num_rates": 0}, "num_rates=0"),
    ({"momentum": 1.0}, "momentum=1.0"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"warmup_fraction": 1.0}, "warmup_fraction=1.0"),
    ({"reference_batch_size": 0}, "reference_batch_size=0"),
  ],
)
def test_number_out_of_range_is_named(overrides: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    plan_of(**overrides)


def test_final_seeds_never_chose_a_rate() -> None:
  plan = plan_of(tuning_seeds=50, final_seeds=50)
  assert not set(plan.tuning_seed_values) & set(plan.final_seed_values)


def world(best: float, *, diverges_above: float = math.inf) -> tuple[list[list[float]], object]:
  """A made-up laboratory in which the loss is |log2(rate / best)|; remembers the grids it was asked for."""
  asked: list[list[float]] = []

  def run_rates(rates: list[float]) -> list[Record]:
    asked.append(list(rates))
    return [
      Record(
        f"{rate}",
        {"kind": "train", "config": {"batch_size": 8}, "hparams": {"learning_rate": rate}, "seed": 0},
        {"state": "diverged" if rate > diverges_above else "complete"},
        [{"step": 1, "validation_loss": abs(math.log2(rate / best))}],
        [],
      )
      for rate in rates
    ]

  return asked, run_rates


@pytest.mark.parametrize(("best", "widenings"), [(1.0, 0), (4.0, 1), (16.0, 3), (0.25, 1), (0.0625, 3)])
def test_grid_is_widened_until_the_best_is_inside(best: float, widenings: int) -> None:
  asked, run_rates = world(best)
  choice, grid = tune_rate(run_rates, [0.25, 0.5, 1.0, 2.0, 4.0], objective="validation_loss", target=TARGET, seeds=[0])  # type: ignore[arg-type]
  assert choice.learning_rate == best
  assert choice.edge is None
  assert grid[0] < best < grid[-1]
  assert len(asked) == 1 + widenings


@pytest.mark.parametrize(("best", "edge"), [(2.0**20, "high"), (2.0**-20, "low")])
def test_what_cannot_be_widened_is_marked(best: float, edge: str) -> None:
  asked, run_rates = world(best)
  choice, grid = tune_rate(run_rates, [0.5, 1.0, 2.0], objective="validation_loss", target=TARGET, seeds=[0])  # type: ignore[arg-type]
  assert choice.edge == edge
  assert len(asked) == 1 + MOST_WIDENINGS
  assert len(grid) == 3 + MOST_WIDENINGS
  assert asked[-1] == grid


def test_a_diverging_grid_is_widened_downwards() -> None:
  _, run_rates = world(0.25, diverges_above=0.3)
  choice, grid = tune_rate(run_rates, [1.0, 2.0], objective="validation_loss", target=TARGET, seeds=[0])  # type: ignore[arg-type]
  assert choice.learning_rate == 0.25
  assert choice.edge is None
  assert grid[0] == 0.125


def test_only_facts_of_a_text_count_its_tokens() -> None:
  facts = {name: workload_facts(load_workload(name, fake_data=True)) for name in ("shakespeare_lm", "digits_mlp")}
  assert facts["shakespeare_lm"].pop("tokens_per_example") == 64
  assert facts["shakespeare_lm"].keys() == facts["digits_mlp"].keys()
