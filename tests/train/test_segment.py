"""The compiled segment against a plain loop, a closed form and its own lanes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import classifier, quadratic

from bsjax.data import Spec, independent_indices, segment_indices
from bsjax.optim import OPTIMIZERS
from bsjax.train import (
  build_segment,
  chunked,
  device_arrays,
  eval_chunk,
  evaluate,
  init_state,
  make_mesh,
  make_step,
  stream,
)
from bsjax.train.segment import Rows
from bsjax.train.state import LOSS_STREAM, ORDER_STREAM, TrainState
from bsjax.train.trial import TrialConfig, make_trial
from bsjax.types import Array, Batch, Example, Hparams, Metrics, ModelState, Params
from bsjax.workloads import Workload
from bsjax.workloads.quadratic import SPECTRUM


def hparams_of(rate: float) -> Hparams:
  """With a warm-up and a decay for the schedules that read them: 12 steps."""
  return Hparams(*(jnp.float32(value) for value in Hparams(rate, warmup_steps=2, decay_steps=10)))


def run_segment(
  workload: Workload, config: TrialConfig, rates: list[float], *, num_rows: int, seeds: list[int] | None = None
) -> tuple[TrainState, Rows]:
  lanes = len(rates)
  mesh = make_mesh(data=1)
  seed_array = jnp.asarray(seeds or list(range(lanes)), jnp.uint32)
  stacked_hparams = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[hparams_of(rate) for rate in rates])
  states = jax.vmap(lambda h, s: init_state(workload, config.optimizer, h, s))(stacked_hparams, seed_array)
  segment = build_segment(workload, config, lanes, mesh)
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays)
  return segment(states, stacked_hparams, seed_array, jnp.int32(num_rows), *data)


def plain_loop(
  workload: Workload,
  config: TrialConfig,
  rate: float,
  seed: int,
  num_steps: int,
  *,
  start: TrainState | None = None,
  look: Callable[[TrainState, Batch], None] = lambda state, batch: None,
) -> tuple[TrainState, list[float]]:
  """The same training as an ordinary Python loop over a jitted step, batches picked on the host; `look` sees each step's start."""
  hparams = hparams_of(rate)
  step = jax.jit(make_step(workload, config))
  state = start if start is not None else init_state(workload, config.optimizer, hparams, jnp.uint32(seed))
  draw_indices = independent_indices if config.with_replacement else segment_indices
  indices = np.asarray(
    draw_indices(
      stream(jnp.uint32(seed), ORDER_STREAM),
      jnp.int32(0),
      num_steps=num_steps,
      batch_size=config.batch_size,
      num_examples=len(workload.train),
    )
  )
  losses = []
  for index in indices:
    batch = {name: array[index] for name, array in workload.train.arrays.items()}
    look(state, batch)
    state, loss = step(state, hparams, batch, stream(jnp.uint32(seed), LOSS_STREAM))
    losses.append(float(loss))
  return state, losses


def relative_difference(a: object, b: object) -> float:
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(
    float(np.max(np.abs(np.asarray(x) - np.asarray(y))) / (1e-8 + np.max(np.abs(np.asarray(y))))) for x, y in leaves
  )


def test_sgd_on_the_quadratic_is_its_closed_form() -> None:
  """w <- w - rate h (w - mean of the batch's centres), in float64 numpy."""
  workload, config = quadratic(), TrialConfig("quadratic", 8, 80, 1)
  state, _ = run_segment(workload, config, [0.3], num_rows=80, seeds=[5])
  order = np.asarray(
    segment_indices(stream(jnp.uint32(5), ORDER_STREAM), jnp.int32(0), num_steps=80, batch_size=8, num_examples=512)
  )
  w = np.ones(16)
  for index in order:
    w -= 0.3 * SPECTRUM * (w - workload.train.arrays["center"][index].astype(np.float64).mean(axis=0))
  # 80 float32 updates of numbers of size one: 80 x 6e-8
  np.testing.assert_allclose(state.params["w"][0], w, atol=5e-6)


@pytest.mark.parametrize(
  ("kind", "optimizer"),
  [
    *(("mlp", name) for name in OPTIMIZERS),
    *((kind, name) for kind in ("mlp_bn", "cnn") for name in ("momentum", "lamb")),
  ],
)
def test_segment_equals_a_plain_loop(kind: str, optimizer: str) -> None:
  workload = classifier(kind)
  config = TrialConfig(workload.name, 4, 12, 3, optimizer=optimizer, schedule="cosine", warmup="gradual")
  state, rows = run_segment(workload, config, [0.05], num_rows=4, seeds=[1])
  expected, losses = plain_loop(workload, config, 0.05, 1, 12)
  # the two programs round differently in each of 12 steps; 1e-5 is 100 float32 roundings
  assert relative_difference(jax.tree.map(lambda leaf: leaf[0], state.params), expected.params) < 1e-5
  assert (
    relative_difference(jax.tree.map(lambda leaf: leaf[0], state.model_state), expected.model_state or {}) < 1e-5
    if (expected.model_state)
    else state.model_state == {}
  )
  np.testing.assert_allclose(rows.train_loss[0, :4], np.reshape(losses, (4, 3)).mean(axis=1), rtol=1e-5)
  np.testing.assert_allclose(rows.minibatch_loss[0, :4], losses[2::3], rtol=1e-5)
  assert int(state.step[0]) == 12
  full = evaluate(workload.example_metrics, expected.params, expected.model_state, chunked(workload.validation.arrays))
  np.testing.assert_allclose(rows.validation["loss"][0, 3], full["loss"], rtol=1e-5)


def test_batches_drawn_with_replacement() -> None:
  """They are those of `independent_indices`, at the trial's own steps, and not an epoch's."""
  workload, config = quadratic(), TrialConfig("quadratic", 8, 12, 3, with_replacement=True)
  _, rows = run_segment(workload, config, [0.1], num_rows=4, seeds=[1])
  _, losses = plain_loop(workload, config, 0.1, 1, 12)
  # 12 float32 steps; a different batch changes a loss by a tenth
  np.testing.assert_allclose(rows.minibatch_loss[0, :4], losses[2::3], rtol=1e-5)
  _, epoch_losses = plain_loop(workload, dataclasses.replace(config, with_replacement=False), 0.1, 1, 12)
  assert not np.allclose(losses, epoch_losses, rtol=1e-3)
  description = make_trial(config, Hparams(0.1), 1).description
  assert description["config"]["with_replacement"] is True


def test_batch_norm_statistics_move_in_training_only() -> None:
  workload = classifier("mlp_bn")
  config = TrialConfig(workload.name, 4, 3, 3)
  before = init_state(workload, "sgd", hparams_of(0.1), jnp.uint32(0)).model_state
  state, _ = run_segment(workload, config, [0.1], num_rows=1)
  moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b[0]))), before, state.model_state)
  assert min(jax.tree.leaves(moved)) > 0
  loss_fn = lambda example: workload.example_loss(jax.tree.map(lambda p: p[0], state.params), before, example)  # noqa: E731
  examples = workload.train.arrays
  alone = loss_fn({name: array[0] for name, array in examples.items()})
  together = jax.vmap(loss_fn)(examples)[0]
  np.testing.assert_allclose(alone, together, rtol=1e-6)  # an example's loss does not depend on its neighbours


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_lanes_do_not_touch_each_other(kind: str) -> None:
  """Bitwise: a diverging neighbour, or another one, changes nothing."""
  workload, config = classifier(kind), TrialConfig(kind, 4, 12, 3)
  calm, calm_rows = run_segment(workload, config, [0.05, 0.1, 0.02], num_rows=4, seeds=[1, 2, 3])
  wild, wild_rows = run_segment(workload, config, [1e30, 0.1, 0.7], num_rows=4, seeds=[9, 2, 8])
  assert not np.isfinite(np.asarray(wild_rows.train_loss[0])).all()
  for a, b in zip(jax.tree.leaves((calm, calm_rows)), jax.tree.leaves((wild, wild_rows)), strict=True):
    assert np.asarray(a)[1].tobytes() == np.asarray(b)[1].tobytes()


def test_position_among_the_lanes_does_not_matter() -> None:
  workload, config = classifier("mlp"), TrialConfig("mlp", 4, 12, 3)
  first, _ = run_segment(workload, config, [0.05, 0.1, 0.02], num_rows=4, seeds=[1, 2, 3])
  second, _ = run_segment(workload, config, [0.02, 0.05, 0.1], num_rows=4, seeds=[3, 1, 2])
  for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
    assert np.asarray(a)[[0, 1, 2]].tobytes() == np.asarray(b)[[1, 2, 0]].tobytes()


def test_lanes_of_one_seed_share_their_order_and_no_others() -> None:
  """Neighbours of one seed at one step, at different steps, and of other seeds: each reads the batches it reads alone."""
  workload, config = classifier("mlp"), TrialConfig("mlp", 4, 12, 3)
  mesh = make_mesh(data=1)
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays)
  seeds = [3, 3, 1, 3, 3]
  later = [False, False, False, False, True]
  hparams = jax.tree.map(lambda leaf: jnp.full(5, leaf), hparams_of(0.05))

  def one(seed: int, moved: bool) -> TrainState:
    """A start, or the state three steps on."""
    if moved:
      return run_segment(workload, config, [0.05], num_rows=1, seeds=[seed])[0]
    state = init_state(workload, config.optimizer, hparams_of(0.05), jnp.uint32(seed))
    return jax.tree.map(lambda leaf: leaf[None], state)

  starts = [one(seed, moved) for seed, moved in zip(seeds, later, strict=True)]
  alone = build_segment(workload, config, 1, mesh)
  expected = [
    alone(
      jax.tree.map(jnp.copy, start),
      jax.tree.map(lambda leaf: leaf[:1], hparams),
      jnp.uint32([seed]),
      jnp.int32(2),
      *data,
    )[1].minibatch_loss[0, :2]
    for start, seed in zip(starts, seeds, strict=True)
  ]
  states = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *starts)
  _, rows = build_segment(workload, config, 5, mesh)(states, hparams, jnp.uint32(seeds), jnp.int32(2), *data)
  # 6 float32 steps; other batches differ by far more
  np.testing.assert_allclose(rows.minibatch_loss[:, :2], expected, rtol=1e-5)
  assert len({float(losses[1]) for losses in expected}) == 3


@pytest.mark.parametrize("busy", [0, 1])
def test_groups_in_turn_are_lanes_and_an_idle_one_stands_still(busy: int) -> None:
  """Two groups of two: one makes 4 rows, bitwise as two lanes by themselves do; the other, before or after it, makes none."""
  workload, config = classifier("mlp"), TrialConfig("mlp", 4, 12, 3)
  mesh = make_mesh(data=1)
  rates, seeds = [0.05, 0.1, 0.02, 0.03], [1, 2, 3, 4]
  hparams = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[hparams_of(rate) for rate in rates])
  start = jax.vmap(lambda h, s: init_state(workload, config.optimizer, h, s))(hparams, jnp.uint32(seeds))
  kept = jax.device_get(start)
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays)
  segment = build_segment(workload, config, 4, mesh, 2)
  num_rows = jnp.zeros(2, jnp.int32).at[busy].set(4)
  states, rows = segment(start, hparams, jnp.uint32(seeds), num_rows, *data)
  here, idle = slice(2 * busy, 2 * busy + 2), slice(2 - 2 * busy, 4 - 2 * busy)
  two, two_rows = run_segment(workload, config, rates[here], num_rows=4, seeds=seeds[here])
  for a, b in zip(jax.tree.leaves((states, rows)), jax.tree.leaves((two, two_rows)), strict=True):
    assert np.asarray(a)[here].tobytes() == np.asarray(b).tobytes()
  for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(kept), strict=True):
    assert np.asarray(a)[idle].tobytes() == b[idle].tobytes()


@pytest.mark.parametrize("counts", [(1, 8), (8, 1)])
def test_groups_of_one_seed_read_as_much_as_each_needs(counts: tuple[int, int]) -> None:
  """Two groups of one trial at one step of one seed: 24 steps of 4 read three epochs of 37 examples, the shorter group a part of one."""
  workload, config = classifier("mlp"), TrialConfig("mlp", 4, 24, 3)
  hparams = jax.tree.map(lambda leaf: jnp.full(2, leaf), hparams_of(0.05))
  start = jax.vmap(lambda h, s: init_state(workload, config.optimizer, h, s))(hparams, jnp.uint32([1, 1]))
  mesh = make_mesh(data=1)
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays)
  _, rows = build_segment(workload, config, 2, mesh, 2)(start, hparams, jnp.uint32([1, 1]), jnp.int32(counts), *data)
  for lane, count in enumerate(counts):
    _, alone = run_segment(workload, config, [0.05], num_rows=count, seeds=[1])
    np.testing.assert_array_equal(rows.train_loss[lane, :count], alone.train_loss[0, :count])


def test_lanes_that_do_not_make_the_groups_are_refused() -> None:
  with pytest.raises(ValueError, match="6 lanes on 1 devices do not make 4 groups: use a multiple of 4 lanes"):
    build_segment(quadratic(), TrialConfig("quadratic", 8, 4, 4), 6, make_mesh(data=1), 4)


def test_lane_agrees_with_a_trial_alone() -> None:
  workload, config = classifier("mlp"), TrialConfig("mlp", 4, 12, 3)
  together, _ = run_segment(workload, config, [0.05, 0.1, 0.02], num_rows=4, seeds=[1, 2, 3])
  alone, _ = run_segment(workload, config, [0.1], num_rows=4, seeds=[2])
  lane = jax.tree.map(lambda leaf: leaf[1:2], together.params)
  assert relative_difference(lane, alone.params) < 1e-5  # another program, the same trial: rounding only


def test_cutting_into_segments_changes_no_bit() -> None:
  """One call of four rows, against calls of one and three: the state is all that a segment needs."""
  workload, config = classifier("mlp_bn"), TrialConfig("mlp_bn", 5, 12, 3, optimizer="adamw")
  whole, _ = run_segment(workload, config, [0.05], num_rows=4)
  part, _ = run_segment(workload, config, [0.05], num_rows=1)
  mesh = make_mesh(data=1)
  segment = build_segment(workload, config, 1, mesh)
  stacked = jax.tree.map(lambda leaf: leaf[None], hparams_of(0.05))
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays)
  rest, _ = segment(part, stacked, jnp.zeros(1, jnp.uint32), jnp.int32(3), *data)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_one_compilation_for_all_rates_seeds_budgets_and_lengths() -> None:
  workload = classifier("mlp")
  mesh = make_mesh(data=1)
  short, long = TrialConfig("mlp", 6, 12, 3), TrialConfig("mlp", 6, 300, 3, probes=("test",), probe_steps=(300,))
  segment = build_segment(workload, short, 1, mesh)
  assert build_segment(workload, long, 1, mesh) is segment
  for rate, seed, rows in ((0.1, 0, 4), (0.2, 1, 2)):
    run_segment(workload, short, [rate], num_rows=rows, seeds=[seed])
  assert segment._cache_size() == 1


def test_state_is_donated() -> None:
  workload, config = classifier("mlp"), TrialConfig("mlp", 4, 3, 3)
  mesh = make_mesh(data=1)
  hparams = jax.tree.map(lambda leaf: leaf[None], hparams_of(0.1))
  states = jax.tree.map(lambda leaf: leaf[None], init_state(workload, "sgd", hparams_of(0.1), jnp.uint32(0)))
  data = device_arrays(workload.train.arrays, mesh), chunked(workload.validation.arrays)
  build_segment(workload, config, 1, mesh)(states, hparams, jnp.zeros(1, jnp.uint32), jnp.int32(1), *data)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states.params))


@pytest.mark.parametrize("every", [4, 40])
def test_first_nonfinite_step_is_counted(every: int) -> None:
  """On the quadratic w grows by |1 - rate h| a step; a plain loop tells which step's loss, or evaluation, overflows first."""
  workload, config = quadratic(), TrialConfig("quadratic", 8, 40, every)
  _, rows = run_segment(workload, config, [200.0], num_rows=40 // every, seeds=[0])
  _, losses = plain_loop(workload, config, 200.0, 0, 40)
  events = [step for step, loss in enumerate(losses, start=1) if not np.isfinite(loss)]
  events += [every * (row + 1) for row in range(40 // every) if not np.isfinite(rows.validation["loss"][0, row])]
  first = min(events)
  row = (first - 1) // every
  assert 4 < first < 36
  assert [int(count) for count in rows.first_nonfinite[0, : row + 1]] == [0] * row + [first - every * row]


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_evaluation_counts_every_example_once(chunk_size: int) -> None:
  workload = classifier("mlp")
  state = init_state(workload, "sgd", hparams_of(0.1), jnp.uint32(0))
  metrics = evaluate(workload.example_metrics, state.params, {}, chunked(workload.validation.arrays, chunk_size))
  values = [
    workload.example_metrics(state.params, {}, {name: array[i] for name, array in workload.validation.arrays.items()})
    for i in range(11)
  ]
  for name in ("loss", "accuracy"):
    np.testing.assert_allclose(metrics[name], np.mean([np.float64(value[name]) for value in values]), rtol=1e-6)


def test_examples_of_an_evaluation_are_counted_by_their_largest_array() -> None:
  """64 words of 2**16 logits are 2**24 bytes an example, in a loop or not; what is made of parameters alone does not count."""

  def together(params: Params, model_state: ModelState, example: Example) -> Metrics:
    table = jnp.tanh(params["table"])
    return {"loss": jnp.mean(jax.nn.logsumexp(table[example["word"]] * 2, axis=1))}

  def in_a_loop(params: Params, model_state: ModelState, example: Example) -> Metrics:
    def one(total: Array, word: Array) -> tuple[Array, Array]:
      return total, jnp.sum(jax.nn.one_hot(word, 2**22))

    return {"loss": jnp.sum(jax.lax.scan(one, jnp.float32(0), example["word"])[1])}

  params = {"table": jax.ShapeDtypeStruct((100, 2**16), jnp.float32)}
  spec = {"word": Spec((64,), np.dtype(np.int32))}
  assert eval_chunk(together, params, {}, spec) == 2**28 // 2**24
  assert eval_chunk(in_a_loop, {}, {}, spec) == 2**28 // 2**24
  small = {"word": Spec((2,), np.dtype(np.int32))}
  assert eval_chunk(together, params, {}, small) == 2**28 // 2**19
  assert eval_chunk(together, {"table": jax.ShapeDtypeStruct((100, 8), jnp.float32)}, {}, spec) == 1024
  assert eval_chunk(together, {"table": jax.ShapeDtypeStruct((9, 2**28), jnp.float32)}, {}, spec) == 1


def test_padding_may_be_not_a_number() -> None:
  data = chunked({"x": np.ones(3, np.float32)}, chunk_size=2)
  metrics = evaluate(lambda params, model_state, example: {"inverse": 1 / example["x"]}, {}, {}, data)
  assert float(metrics["inverse"]) == 1.0  # the padded zero's infinity is not summed
