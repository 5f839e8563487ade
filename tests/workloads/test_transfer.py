"""Pairs of tasks: which examples and labels each keeps, and what a start from pre-trained networks takes over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.types import Variables
from bsjax.workloads import load_workload, num_params
from bsjax.workloads.transfer import TRANSFERS, start_from, with_classes


@pytest.fixture(scope="module")
def digits():
  return TRANSFERS["digits"]()


def test_the_tasks_share_no_class_and_number_theirs_from_zero(digits):
  whole = load_workload("digits_mlp")
  for split in ("train", "validation", "test"):
    parts = [getattr(workload, split) for workload in digits[:2]]
    assert sum(map(len, parts)) == len(getattr(whole, split))
    for part, first in zip(parts, (0, 5), strict=True):
      assert set(part.arrays["label"].tolist()) == set(range(5))
      assert part.arrays["label"].dtype == np.int32
      images, labels = getattr(whole, split).arrays["image"], getattr(whole, split).arrays["label"]
      kept = (labels >= first) & (labels < first + 5)
      np.testing.assert_array_equal(part.arrays["image"], images[kept])
      np.testing.assert_array_equal(part.arrays["label"], labels[kept] - first)


def test_classes_that_are_not_neighbours_are_numbered_in_their_order():
  kept = with_classes(load_workload("digits_mlp"), "odd", (9, 1, 4))
  labels = load_workload("digits_mlp").train.arrays["label"]
  np.testing.assert_array_equal(kept.train.arrays["label"], [{1: 0, 4: 1, 9: 2}[x] for x in labels if x in (1, 4, 9)])


def test_the_head_is_a_part_of_the_network_with_an_output_for_each_class(digits):
  params = jax.eval_shape(digits.finetune.init, jax.random.key(0)).params
  assert params[digits.head[0]]["kernel"].shape[-1] == 5
  assert set(digits.head) < set(params)
  assert num_params(digits.pretrain) == num_params(digits.finetune) == 64 * 64 + 64 + 64 * 5 + 5


def test_a_start_keeps_the_body_of_one_pretrained_network_and_draws_a_new_head(digits):
  one = digits.pretrain.init(jax.random.key(0)).params
  stacked = Variables(jax.tree.map(lambda leaf: np.stack([np.full_like(leaf, index) for index in range(3)]), one), {})
  workload = start_from(stacked, digits.finetune, digits.head, "fine")
  assert workload.name == "fine"
  starts = [workload.init(jax.random.key(seed)).params for seed in range(24)]
  bodies = [float(params["Dense_0"]["kernel"][0, 0]) for params in starts]
  assert set(bodies) == {0.0, 1.0, 2.0}
  for seed, params in enumerate(starts):
    for leaf in jax.tree.leaves(params["Dense_0"]):
      np.testing.assert_array_equal(leaf, bodies[seed])
    fresh = digits.finetune.init(jax.random.key(seed)).params
    jax.tree.map(np.testing.assert_array_equal, params["Dense_1"], fresh["Dense_1"])
  again = workload.init(jax.random.key(5)).params
  jax.tree.map(np.testing.assert_array_equal, again, starts[5])


def test_without_a_head_every_parameter_is_kept(digits):
  stacked = Variables(
    jax.tree.map(lambda leaf: np.ones((1, *leaf.shape), np.float32), digits.pretrain.init(jax.random.key(0)).params), {}
  )
  params = start_from(stacked, digits.finetune, (), "fine").init(jax.random.key(1)).params
  assert all(bool(jnp.all(leaf == 1)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ("task", "names"),
  [("mnist", ("mnist_0to4", "mnist_5to9")), ("shakespeare", ("shakespeare_tragedies", "shakespeare_comedies"))],
)
def test_the_other_tasks_have_one_network_and_two_data_sets(task, names):
  transfer = TRANSFERS[task](fake_data=True)
  assert (transfer.pretrain.name, transfer.finetune.name) == tuple(f"fake_{name}" for name in names)
  shapes = [jax.eval_shape(workload.init, jax.random.key(0)).params for workload in transfer[:2]]
  assert shapes[0] == shapes[1]
  assert set(transfer.head) <= set(shapes[0])
  first, second = (workload.train for workload in transfer[:2])
  assert first.name != second.name
  if task == "mnist":
    assert shapes[0][transfer.head[0]]["kernel"].shape[-1] == 5
    assert max(first.arrays["label"].max(), second.arrays["label"].max()) < 5
