"""What a study of sharp minima trains."""

import numpy as np
import pytest

from bsjax.study.sharp_plan import (
  edge_batch_sizes,
  edge_config,
  edge_rates,
  edge_workload,
  escape_config,
  extreme_part,
  extremes,
  geometric_steps,
  make_sharp_plan,
  rule_rate,
  solution_config,
  solution_grid,
  steps_between_rows,
)
from bsjax.workloads import load_workload


def test_defaults_of_digits():
  workload = load_workload("digits_mlp")
  plan = make_sharp_plan(workload)
  assert plan.batch_sizes == (4, 16, 64, 256, 1024)
  assert (plan.num_epochs, plan.num_steps, plan.num_examples) == (128, 1024, 1024)
  assert extremes(plan) == {"small": 4, "large": 1024}
  assert extreme_part(plan) == 1.0
  assert rule_rate(workload, 128) == pytest.approx(0.4)  # 0.2 sqrt(128 / 32)


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn", "digits_vit", "quadratic"])
def test_both_comparisons_happen_at_checkpoints(name):
  """Equal epochs are equal examples, to one evaluation interval; and no batch size makes fewer than num_steps steps."""
  workload = load_workload(name)
  plan = make_sharp_plan(workload)
  for size in plan.batch_sizes:
    config, grid = solution_config(plan, workload, size), solution_grid(plan, workload, size)
    assert grid.budget in config.probe_steps
    wanted = plan.num_epochs * len(workload.train) / size
    assert wanted - grid.every - 0.5 <= grid.budget <= wanted + 0.5
    assert config.num_steps > max(grid.budget, plan.num_steps) - grid.every - 1
    escape = escape_config(plan, workload, size)
    assert escape.probe_steps[0] == 0
    assert escape.probe_steps[-1] == escape.num_steps


@pytest.mark.parametrize(
  ("num_steps", "batch_size", "checkpoints", "every"),
  [
    (32_768, 4, 96, 64),  # digits: 386 / 12 = 33 steps pay for a row, and 512 rows are enough
    (2_000, 16, 96, 9),  # 386 / 48 = 9
    (2_000, 4, 96, 20),  # 33 would leave 60 checkpoints
    (50, 4, 96, 1),
    (1_024, 1024, 20, 2),
  ],
)
def test_rows_are_paid_for_by_the_steps_before_them(num_steps, batch_size, checkpoints, every):
  assert steps_between_rows(load_workload("digits_mlp"), num_steps, batch_size, checkpoints) == every


def test_geometric_steps_grow_by_a_constant_factor_where_the_grid_allows():
  steps = np.array(geometric_steps(100_000, 1, 21))
  ratios = steps[2:] / steps[1:-1]
  # 20 steps from 1 to 1e5: a factor of 1e5^(1/19), rounded to whole steps of at least 2
  assert np.all(np.abs(ratios[3:] / 1e5 ** (1 / 19) - 1) < 0.2)
  assert geometric_steps(7, 7, 5) == (0, 7)


def test_edge_trains_on_the_examples_of_the_curvature_and_says_so():
  digits = load_workload("digits_mlp")
  plan = make_sharp_plan(digits)
  assert edge_workload(plan, digits) is digits
  assert edge_batch_sizes(plan) == (64, 256, 1024)
  assert edge_rates(plan, digits) == pytest.approx([part * rule_rate(digits, 1024) for part in (0.25, 0.5, 1.0)])
  fewer = make_sharp_plan(digits, num_examples=100)
  cut = edge_workload(fewer, digits)
  assert len(cut.train) == edge_batch_sizes(fewer)[-1] == 100
  assert np.array_equal(cut.train.arrays["label"], digits.train.arrays["label"][:100])
  assert edge_config(fewer, cut, 100).workload == cut.name == "digits_mlp_first_100"
  assert len(cut.validation) == len(digits.validation)


BAD = {
  "batch_sizes": ((8,), "--batch_sizes has 1, wanted at least 2"),
  "rate_parts": ((0.5, -1.0), "--rate_parts=0.5,-1, wanted finite numbers above 0"),
  "num_epochs": (float("nan"), "--num_epochs=nan, wanted finite numbers above 0"),
  "train_loss": (0.0, "--train_loss=0, wanted finite numbers above 0"),
  "num_steps": (0, "--num_steps=0, wanted at least 1"),
  "seeds": (1, "--seeds=1, wanted at least 2"),
  "momentum": (1.0, "--momentum=1.0, wanted 0 <= momentum < 1"),
  "optimizer": ("rmsprop", "--optimizer=rmsprop, wanted one of sgd"),
  "num_examples": (5000, "--num_examples=5000, wanted 2 to 1024"),
  "statistics": ("batch", "digits_mlp has no batch norm: leave the flag out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_named(name):
  value, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    make_sharp_plan(load_workload("digits_mlp"), **{name: value})


def test_batch_sizes_out_of_range():
  with pytest.raises(ValueError, match="--batch_sizes has 2000, wanted 1 to 1024"):
    make_sharp_plan(load_workload("digits_mlp"), batch_sizes=(8, 2000))
