"""What does exact gradient noise cost: ghost norms against a gradient pass, vmap(grad), BackPACK and Opacus.

  python -m scripts.bench_noise                                  all cases, about a quarter of an hour on one core
  python -m scripts.bench_noise --only=mlp512 --versus=grad      one case against one opponent

Prints one JSON object per case and opponent. Our side computes G and every |g_i|^2, leaf by leaf (`*_interval`: every g_i . G
too, all that an interval needs) for all examples in chunks. `ratio` is our time over theirs, below 1 is faster: the median of
the ratios of alternating repetitions, `low` and `high` the smallest and the largest, `n` their number. On the CPU the process
is pinned to one core and times are CPU times of all its threads; elsewhere wall times. Compilation is not timed.
`temp_bytes` and `temp_bytes_grad` are the temporary memory that the compiler plans for ours and for a gradient pass,
`temp_bytes_theirs` for a JAX opponent. `gflops` counts the multiplications and additions of the gradient pass alone, so
`gflops / gemm_gflops` (a 512 x 512 float32 product in the same run) is how near our side comes to the floor.

Opponents, all in float32 with the same weights and data, for G and all norms; in the same chunks but for PyTorch on the transformer:
  grad      a plain scanned gradient pass: G only, no norms
  vmap      jax.vmap(jax.grad) per chunk, norms of the gradients formed; vmap_one the same with one example per chunk
  backpack  BackPACK's BatchL2Grad; it has no rule for LayerNorm, so not the transformers
  opacus    Opacus' norms per parameter, by ghost clipping or fast gradient clipping, whichever is faster (`mode`)
and for segment_noise_kK, a training segment that logs the two-batch norms every K steps, 4 microbatches of 32:
  accumulated, whole_batch     the same segment without logging, with microbatches and without
Before anything is timed both sides must agree in every leaf, sum_i |a_i - b_i| <= 1e-4 sum_i b_i over the squared norms of all
examples, and in |G|^2; `difference` is the largest found.
"""
# ruff: noqa: E402  (the process is pinned before JAX is imported)

import os

_ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
if _ALL_CORES:
  os.sched_setaffinity(0, {max(_ALL_CORES)})  # before JAX starts as many threads as there are cores

import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from bsjax.data import Source
from bsjax.models import mlp
from bsjax.probes import mean_gradient, per_example_grads
from bsjax.probes.chunks import scan_over_chunks
from bsjax.probes.ghost import ghost_norms, ghost_projections
from bsjax.probes.leaves import leaf_names, leaf_sq_norms, sum_squares
from bsjax.train import TrialConfig, build_segment, chunked, device_arrays, init_state, make_mesh
from bsjax.types import Array, Batch, Example, Hparams, Params, Variables
from bsjax.workloads import Preset, Target, Workload, mean_train_loss
from scripts.noise_peers import backpack_side, opacus_side
from scripts.noise_problems import SEED, Numbers, Problem, Side, cnn, mlp512, seconds, transformer

GEMM_SIZE = 512
TOLERANCE = 1e-4
"""Largest relative difference of the squared norms of a leaf, summed over examples. Rounding alone makes some 1e-6; but where it
turns the winner of a max pool or the sign before a ReLU, an example's gradient jumps, seen once in 256 images by 0.3 %."""
BATCH_SIZE, MICROBATCH_SIZE, STEPS = 128, 32, 40


# The JAX sides: functions `(params, examples) -> (G, {leaf: |g_i|^2}, ...)`.


def ghost(problem: Problem, params: Params, examples: Batch) -> tuple[Any, ...]:
  norms = ghost_norms(problem.loss_fn, params, examples, chunk_size=problem.chunk_size)
  return norms.mean_grad, norms.sq_norms


def ghost_interval(problem: Problem, params: Params, examples: Batch) -> tuple[Any, ...]:
  mean_grad, sq_norms = ghost(problem, params, examples)
  projections = ghost_projections(problem.loss_fn, params, examples, mean_grad, chunk_size=problem.chunk_size)
  return mean_grad, sq_norms, projections


def grad(problem: Problem, params: Params, examples: Batch) -> tuple[Any, ...]:
  return mean_gradient(problem.loss_fn, params, examples, chunk_size=problem.chunk_size)[1], {}


def vmap(problem: Problem, params: Params, examples: Batch) -> tuple[Any, ...]:
  def chunk_fn(chunk: Batch) -> tuple[Params, dict[str, Array]]:
    grads = per_example_grads(problem.loss_fn, params, chunk)
    norms = [jax.vmap(sum_squares)(leaf) for leaf in jax.tree.leaves(grads)]
    sums = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), grads)
    return sums, dict(zip(leaf_names(params), norms, strict=True))

  sums, norms = scan_over_chunks(chunk_fn, examples, chunk_size=problem.chunk_size)
  return optax.tree.scale(1 / len(examples["label"]), sums), norms


def vmap_one(problem: Problem, params: Params, examples: Batch) -> tuple[Any, ...]:
  return vmap(problem._replace(chunk_size=1), params, examples)


def jax_side(function: Callable[..., tuple[Any, ...]], problem: Problem) -> Side:
  def numbers(result: tuple[Any, ...]) -> Numbers:
    mean_grad, sq_norms, *projections = result
    squares = {f"G {name}": square for name, square in leaf_sq_norms(mean_grad).items()}
    if projections:  # the mean of g_i . G over examples is |G|^2
      squares |= {f"G {name}": jnp.mean(dots) for name, dots in projections[0].items()}
    return jax.tree.map(np.asarray, sq_norms | squares)

  arguments = problem.params, problem.examples
  compiled = jax.jit(functools.partial(function, problem)).lower(*arguments).compile()
  temp_bytes = compiled.memory_analysis().temp_size_in_bytes
  return Side(lambda: jax.block_until_ready(compiled(*arguments)), numbers, temp_bytes)


# The training segment.


def segment_side(**options: Any) -> Side:
  """A segment of the 784-512-512-10 perceptron, batch 128, SGD with momentum."""
  problem = mlp512()

  def example_loss(params: Params, model_state: Any, example: Example) -> Array:
    del model_state
    return problem.loss_fn(params, example)

  source = Source("normal", "train", jax.tree.map(np.asarray, problem.examples))
  held_out = Source("normal", "validation", {name: array[:1] for name, array in source.arrays.items()})
  workload = Workload(
    name="bench",
    init=lambda key: Variables(mlp((28, 28, 1), (512, 512), 10).init(key).params, {}),
    example_loss=example_loss,
    train_loss=mean_train_loss(example_loss),
    example_metrics=lambda params, model_state, example: {"loss": example_loss(params, model_state, example)},
    train=source,
    validation=held_out,
    test=held_out,
    target=Target("validation_loss", 0.0, "min"),
    preset=Preset((BATCH_SIZE,), 0.01),
  )
  config = TrialConfig("bench", BATCH_SIZE, num_steps=STEPS, eval_every=STEPS, optimizer="momentum", **options)
  mesh = make_mesh(data=1)
  hparams = Hparams(learning_rate=0.01)
  train, validation = device_arrays(source.arrays, mesh), jax.device_put(chunked(held_out.arrays))
  start = jax.jit(lambda seed: init_state(workload, "momentum", hparams, seed))(jnp.int32(SEED))
  state = jax.device_put(jax.tree.map(lambda array: array[None], start), NamedSharding(mesh, PartitionSpec("trial")))
  rest = jax.tree.map(lambda value: jnp.asarray(value)[None], (hparams, SEED))
  compiled = build_segment(workload, config, 1, mesh).lower(state, *rest, jnp.int32(1), train, validation).compile()

  def call() -> Any:
    nonlocal state
    state, rows = compiled(state, *rest, jnp.int32(1), train, validation)
    return jax.block_until_ready((state, rows))[1]

  temp_bytes = compiled.memory_analysis().temp_size_in_bytes
  return Side(call, lambda rows: {"loss": np.asarray(rows.train_loss[0, 0])}, temp_bytes)


# The table of cases.


class Case(NamedTuple):
  """Our side and its opponents; each is built when its turn comes."""

  ours: Callable[[], Side]
  opponents: dict[str, Callable[[], Side]]
  flops: Callable[[], float]
  """Of the gradients alone, per call."""


def problem_case(make_problem: Callable[[], Problem], function: Callable[..., tuple[Any, ...]], *versus: str) -> Case:
  sides: dict[str, Callable[[Problem], Side]] = {"backpack": backpack_side, "opacus": opacus_side}
  sides |= {opponent.__name__: functools.partial(jax_side, opponent) for opponent in (grad, vmap, vmap_one)}

  def flops() -> float:
    problem = make_problem()
    return problem.flops * len(problem.examples["label"])

  return Case(
    lambda: jax_side(function, make_problem()),
    {name: lambda name=name: sides[name](make_problem()) for name in versus},  # type: ignore[misc]
    flops,
  )


def segment_case(every: int) -> Case:
  def logged() -> Side:
    return segment_side(microbatch_size=MICROBATCH_SIZE, noise_route="microbatch", noise_every=every)

  opponents = {"accumulated": lambda: segment_side(microbatch_size=MICROBATCH_SIZE), "whole_batch": segment_side}
  return Case(logged, opponents, lambda: mlp512().flops * BATCH_SIZE * STEPS)


untied, tied = functools.partial(transformer, tied=False), functools.partial(transformer, tied=True)
CASES = {
  "mlp512": problem_case(mlp512, ghost, "grad", "vmap", "vmap_one", "backpack", "opacus"),
  "mlp512_interval": problem_case(mlp512, ghost_interval, "grad"),
  "cnn": problem_case(cnn, ghost, "grad", "vmap", "vmap_one", "backpack", "opacus"),
  "cnn_interval": problem_case(cnn, ghost_interval, "grad"),
  "transformer": problem_case(untied, ghost, "grad", "vmap", "vmap_one", "opacus"),
  "transformer_interval": problem_case(untied, ghost_interval, "grad"),
  "transformer_tied": problem_case(tied, ghost, "grad", "vmap", "vmap_one", "opacus"),
  "segment_noise_k1": segment_case(1),
  "segment_noise_k10": segment_case(10),
}
OPPONENTS = ("grad", "vmap", "vmap_one", "backpack", "opacus", "accumulated", "whole_batch")

_ONLY = flags.DEFINE_list("only", list(CASES), "Cases to run.")
_VERSUS = flags.DEFINE_list("versus", list(OPPONENTS), "Opponents to run against.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Alternating repetitions per ratio.", lower_bound=1)
flags.register_validator("only", lambda names: set(names) <= set(CASES), f"wanted some of {', '.join(CASES)}")
flags.register_validator("versus", lambda names: set(names) <= set(OPPONENTS), f"wanted some of {', '.join(OPPONENTS)}")


def gemm_gflops() -> float:
  """The rate of a float32 matrix product, best of ten: the speed limit of this run."""
  a = jnp.ones((GEMM_SIZE, GEMM_SIZE))
  product = jax.jit(jnp.dot)
  product(a, a).block_until_ready()
  return 2e-9 * GEMM_SIZE**3 / min(seconds(lambda: product(a, a).block_until_ready()) for _ in range(10))


def largest_difference(ours: Numbers, theirs: Numbers) -> tuple[float, str]:
  """Compares what both have, leaf by leaf: sum_i |a_i - b_i| / sum_i |b_i| over examples."""
  return max(
    (float(np.sum(np.abs(ours[name] - theirs[name])) / np.sum(np.abs(theirs[name]))), name)
    for name in ours.keys() & theirs.keys()
  )


def run_case(name: str, opponents: list[str]) -> None:
  """Checks that both sides find the same, then times them in turn; prints a line for each opponent.

  Raises:
    RuntimeError: if a number differs by more than rounding can.
  """
  case = CASES[name]
  versus = [opponent for opponent in opponents if opponent in case.opponents]
  temp_bytes_grad = case.opponents["grad"]().temp_bytes if versus and "grad" in case.opponents else None
  for opponent in versus:
    # Both from the start: a segment's next call goes on from where the last one ended.
    ours, theirs = case.ours(), case.opponents[opponent]()
    difference, where = largest_difference(ours.numbers(ours.call()), theirs.numbers(theirs.call()))
    if not difference <= TOLERANCE:
      raise RuntimeError(
        f"{name}: ours and {opponent} differ by {difference:.1e} in {where}, wanted {TOLERANCE} at most."
      )
    gemm = gemm_gflops()
    times = [(seconds(ours.call), seconds(theirs.call)) for _ in range(_REPEATS.value)]
    ratios = [mine / other for mine, other in times]
    mine, other = (statistics.median(side) for side in zip(*times, strict=True))
    row = {
      "bench": "noise",
      "case": name,
      "versus": opponent,
      "ratio": statistics.median(ratios),
      "low": min(ratios),
      "high": max(ratios),
      "n": len(ratios),
      "device": jax.devices()[0].device_kind,
      "clock": "cpu, one core" if jax.default_backend() == "cpu" else "wall",
      "seconds": mine,
      "seconds_theirs": other,
      "difference": difference,
      "temp_bytes": ours.temp_bytes,
      "temp_bytes_grad": temp_bytes_grad,
      "temp_bytes_theirs": theirs.temp_bytes,
      "gflops": case.flops() / mine * 1e-9,
      "gemm_gflops": gemm,
    } | theirs.note
    print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}))
    sys.stdout.flush()


def has_peer(name: str) -> bool:
  """Tells whether a PyTorch opponent can run on JAX's kind of device, and says on stderr why not."""
  if jax.default_backend() != "cpu":
    print(f"{name} is compared on the CPU only, skipped", file=sys.stderr)
    return False
  if importlib.util.find_spec(name) is None or importlib.util.find_spec("torch") is None:
    print(f"{name} is not installed, skipped: pip install -r requirements-bench.txt", file=sys.stderr)
    return False
  import torch

  torch.set_num_threads(1)
  return True


def main(arguments: list[str]) -> None:
  if len(arguments) > 1:
    raise app.UsageError(f"unknown arguments {arguments[1:]}; options begin with --")
  if _ALL_CORES and jax.default_backend() != "cpu":
    os.sched_setaffinity(0, _ALL_CORES)
  opponents = [name for name in _VERSUS.value if name not in ("backpack", "opacus") or has_peer(name)]
  for name in _ONLY.value:
    run_case(name, opponents)


if __name__ == "__main__":
  app.run(main)
