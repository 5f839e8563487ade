"""How fast is a training step, against an ordinary JAX loop, against PyTorch, and against our own step outside the scan?

  python -m scripts.bench_train                                  all cases, some minutes on one core
  python -m scripts.bench_train --only=tiny_b8 --versus=entry    one case against one opponent

Prints one JSON object per case and opponent. `ratio` is our time per step over theirs, below 1 is faster: the median of
the ratios of alternating repetitions, `low` and `high` the smallest and the largest of them, `n` their number. On the CPU
the process is pinned to one core and times are CPU times of all its threads, which other load on the machine hardly moves;
elsewhere they are wall times. Compilation is timed apart. `gflops` counts only the multiplications and additions of
matrix products and convolutions, and is to be compared with `gemm_gflops`, a 512 x 512 float32 product in the same run.

Opponents, all with the same batches, initial parameters, float32, and SGD with momentum 0.9:
  jax_loop  a Python loop over the jitted step, which indexes numpy arrays for each batch and sends them to the device
  torch     the same network in PyTorch, on batches indexed from a tensor (`pip install -r requirements-bench.txt`)
  entry     our own step, jitted by itself, with the data on the device: what the scan costs or saves
Before anything is timed, each opponent trains from the same start as the segment, and their losses must agree.
"""
# ruff: noqa: E402  (the process is pinned before JAX is imported)

import os

_ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
if _ALL_CORES:
  os.sched_setaffinity(0, {max(_ALL_CORES)})  # before JAX starts as many threads as there are cores

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from bsjax.data import Source, segment_indices
from bsjax.models import Model, cnn, mlp
from bsjax.train import TrialConfig, build_segment, chunked, device_arrays, init_state, make_mesh, make_step, stream
from bsjax.train.segment import STEPS_PER_SEGMENT
from bsjax.train.state import LOSS_STREAM, ORDER_STREAM
from bsjax.types import Array, Batch, Example, Hparams, Key, Metrics, ModelState, Params
from bsjax.workloads import Preset, Target, Workload, mean_train_loss

NUM_EXAMPLES = 2048
SEED = 0
HPARAMS = Hparams(learning_rate=0.01)
GEMM_SIZE = 512
CHECK_STEPS = 8
LOSS_TOLERANCE = 1e-5
"""Largest relative difference of the mean losses of so many steps: some 100 float32 roundings. Over hundreds of steps rounding is
amplified without limit where training is chaotic: batch norm at B = 8 is 0.4 % apart after 256."""


@dataclasses.dataclass(frozen=True)
class Case:
  """A network and a batch size. `widths` are hidden dense layers, `channels` convolutions; one of the two is empty.

  `steps` are made per timed call: by default a whole segment, as in a sweep. A segment computes the order of all its steps
  even when it makes fewer, so a smaller number charges that cost to fewer steps; it is below 1 % where that is done here.
  """

  batch_size: int
  input_shape: tuple[int, ...]
  num_classes: int
  widths: tuple[int, ...] = ()
  channels: tuple[int, ...] = ()
  batch_norm: bool = False
  steps: int = STEPS_PER_SEGMENT

  def make_model(self) -> Model:
    if self.channels:
      return cnn(self.input_shape, self.num_classes, channels=self.channels)
    return mlp(self.input_shape, self.widths, self.num_classes, batch_norm="running" if self.batch_norm else "none")

  @property
  def flops_per_step(self) -> float:
    """Two per multiply-add, forward and for both gradients, less the gradient with respect to the images."""
    layers = []
    if self.channels:
      height, width, fan = self.input_shape
      for number, features in enumerate(self.channels, start=1):
        layers.append(height * width * 9 * fan * features)
        fan = features
        if number % 2 == 0:
          height, width = height // 2, width // 2
      layers.append(height * width * fan * self.num_classes)
    else:
      sizes = (math.prod(self.input_shape), *self.widths, self.num_classes)
      layers = [fan * features for fan, features in zip(sizes[:-1], sizes[1:], strict=True)]
    return 2.0 * self.batch_size * (3 * sum(layers) - layers[0])


CASES = {
  "tiny_b8": Case(8, (16,), 2, widths=(32,)),
  **{f"mlp512_b{size}": Case(size, (28, 28, 1), 10, widths=(512, 512)) for size in (8, 32, 128, 512)},
  **{f"mlp_bn_b{size}": Case(size, (28, 28, 1), 10, widths=(512,) * 5, batch_norm=True) for size in (8, 128)},
  **{f"cnn_b{size}": Case(size, (28, 28, 1), 10, channels=(32, 64), steps=1024 // size) for size in (8, 128)},
}
OPPONENTS = ("jax_loop", "torch", "entry")

_ONLY = flags.DEFINE_list("only", list(CASES), "Cases to run.")
_VERSUS = flags.DEFINE_list("versus", list(OPPONENTS), "Opponents to run against.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Alternating repetitions per ratio.", lower_bound=1)
flags.register_validator("only", lambda names: set(names) <= set(CASES), f"wanted some of {', '.join(CASES)}")
flags.register_validator("versus", lambda names: set(names) <= set(OPPONENTS), f"wanted some of {', '.join(OPPONENTS)}")


def make_workload(case: Case) -> Workload:
  """Makes a classification problem of normal images with random labels; one validation example, so that evaluation is free."""
  model = case.make_model()

  def losses(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

  def example_loss(params: Params, model_state: ModelState, example: Example) -> Array:
    logits, _ = model.apply(params, model_state, example["image"][None], train=False)
    return losses(logits[0], example["label"])

  def example_metrics(params: Params, model_state: ModelState, example: Example) -> Metrics:
    return {"loss": example_loss(params, model_state, example)}

  def batch_loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> tuple[Array, ModelState]:
    del key
    logits, new_model_state = model.apply(params, model_state, batch["image"], train=True)
    return jnp.mean(losses(logits, batch["label"])), new_model_state

  generator = np.random.default_rng(SEED)
  arrays = {
    "image": generator.normal(size=(NUM_EXAMPLES, *case.input_shape)).astype(np.float32),
    "label": generator.integers(case.num_classes, size=NUM_EXAMPLES).astype(np.int32),
  }
  train = Source("normal", "train", arrays)
  held_out = Source("normal", "validation", {name: array[:1] for name, array in arrays.items()})
  return Workload(
    name="bench",
    init=model.init,
    example_loss=example_loss,
    train_loss=batch_loss if case.batch_norm else mean_train_loss(example_loss),
    example_metrics=example_metrics,
    train=train,
    validation=held_out,
    test=held_out,
    target=Target("validation_loss", 0.0, "min"),
    preset=Preset((case.batch_size,), HPARAMS.learning_rate),
    batch_norm="running" if case.batch_norm else "none",
  )


Train = Callable[[], float]
"""Makes `Case.steps` further steps and returns their mean loss, when all of its work is done."""


class Bench:
  """One case: its workload, and the start and the order of examples that all sides share."""

  def __init__(self, case: Case):
    self.case = case
    self.workload = make_workload(case)
    self.steps = case.steps
    self.config = TrialConfig(
      "bench", case.batch_size, num_steps=self.steps, eval_every=self.steps, optimizer="momentum"
    )
    self.mesh = make_mesh(data=1)
    self.key = stream(jnp.int32(SEED), LOSS_STREAM)

  def start(self) -> Any:
    return jax.jit(lambda seed: init_state(self.workload, "momentum", HPARAMS, seed))(jnp.int32(SEED))

  def orders(self) -> Iterator[np.ndarray]:
    """Yields `[steps, B]`, the examples of each call: the same stream that the segment reads, computed ahead of its use."""
    key = stream(jnp.int32(SEED), ORDER_STREAM)
    indices = jax.jit(
      lambda first: segment_indices(
        key, first, num_steps=self.steps, batch_size=self.case.batch_size, num_examples=NUM_EXAMPLES
      )
    )
    calls = [np.asarray(indices(jnp.int32(call * self.steps))) for call in range(_REPEATS.value + 1)]
    return iter(calls)

  def segment(self) -> Train:
    """Our training: gather, steps and order of examples in one compiled call."""
    program = build_segment(self.workload, self.config, 1, self.mesh)
    train = device_arrays(self.workload.train.arrays, self.mesh)
    validation = jax.device_put(chunked(self.workload.validation.arrays))
    hparams, seeds = jax.tree.map(lambda value: jnp.asarray(value)[None], (HPARAMS, SEED))
    states = jax.tree.map(lambda array: array[None], self.start())
    # As they come back from the segment: other shardings would compile a second program at the second call.
    states = jax.device_put(states, NamedSharding(self.mesh, PartitionSpec("trial")))

    def call() -> float:
      nonlocal states
      states, rows = program(states, hparams, seeds, jnp.int32(1), train, validation)
      jax.block_until_ready(states)
      return float(rows.train_loss[0, 0])

    return call

  def entry(self) -> Train:
    step = make_step(self.workload, self.config)
    train = device_arrays(self.workload.train.arrays, self.mesh)

    def gather_and_step(state: Any, hparams: Hparams, train: Batch, index: Array, key: Key) -> tuple[Any, Array]:
      return step(state, hparams, jax.tree.map(lambda array: array[index], train), key)

    program = jax.jit(gather_and_step, donate_argnums=0)
    calls = iter([[jnp.asarray(index) for index in order] for order in self.orders()])
    return self._loop(lambda state, index: program(state, HPARAMS, train, index, self.key), calls)

  def jax_loop(self) -> Train:
    program = jax.jit(make_step(self.workload, self.config), donate_argnums=0)
    arrays = self.workload.train.arrays

    def step(state: Any, index: np.ndarray) -> tuple[Any, Array]:
      return program(state, HPARAMS, {name: array[index] for name, array in arrays.items()}, self.key)

    return self._loop(step, self.orders())

  def _loop(self, step: Callable[[Any, Any], tuple[Any, Array]], calls: Iterator[Any]) -> Train:
    state = self.start()

    def call() -> float:
      nonlocal state
      losses = []
      for index in next(calls):
        state, loss = step(state, index)
        losses.append(loss)
      jax.block_until_ready(state)
      return float(np.mean(jax.device_get(losses)))

    return call

  def torch(self) -> Train:
    """PyTorch, in the layout that is its fastest for these networks: NCHW, the rows of the dense layer reordered to match."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    case = self.case
    params = jax.device_get(self.start().params)
    images, labels = (torch.from_numpy(self.workload.train.arrays[name]) for name in ("image", "label"))
    layers: list[nn.Module] = []

    def dense(name: str, kernel: np.ndarray | None = None) -> nn.Linear:
      kernel = params[name]["kernel"] if kernel is None else kernel
      layer = nn.Linear(*kernel.shape)
      layer.load_state_dict({"weight": torch.tensor(kernel.T), "bias": torch.tensor(params[name]["bias"])})
      return layer

    for number, features in enumerate(case.channels):
      kernel = params[f"Conv_{number}"]["kernel"]
      layer = nn.Conv2d(kernel.shape[2], features, 3, padding=1)
      weight = torch.tensor(kernel.transpose(3, 2, 0, 1))
      layer.load_state_dict({"weight": weight, "bias": torch.tensor(params[f"Conv_{number}"]["bias"])})
      layers += [layer, nn.ReLU(), *([nn.MaxPool2d(2)] if number % 2 else [])]
    if case.channels:
      images = images.permute(0, 3, 1, 2).contiguous()
      halvings = 2 ** (len(case.channels) // 2)
      height, width, channels = case.input_shape[0] // halvings, case.input_shape[1] // halvings, case.channels[-1]
      kernel = params["Dense_0"]["kernel"].reshape(height, width, channels, -1)
      layers += [nn.Flatten(), dense("Dense_0", kernel.transpose(2, 0, 1, 3).reshape(-1, case.num_classes))]
    else:
      images = images.reshape(NUM_EXAMPLES, -1)
      for number, features in enumerate(case.widths):
        layers += [dense(f"Dense_{number}"), *([nn.BatchNorm1d(features)] if case.batch_norm else []), nn.ReLU()]
      layers.append(dense(f"Dense_{len(case.widths)}"))
    network = nn.Sequential(*layers).to(device)
    images, labels = images.to(device), labels.long().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=HPARAMS.learning_rate, momentum=HPARAMS.momentum)
    calls = iter([torch.tensor(order, dtype=torch.long, device=device) for order in self.orders()])

    def call() -> float:
      losses = []
      for index in next(calls):
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(network(images[index]), labels[index])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
      return float(torch.stack(losses).mean())

    return call


def clock() -> float:
  return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def seconds(function: Callable[[], Any]) -> float:
  start = clock()
  function()
  return clock() - start


def gemm_gflops() -> float:
  """The rate of a float32 matrix product, best of ten: the speed limit of this run."""
  a = jnp.ones((GEMM_SIZE, GEMM_SIZE))
  product = jax.jit(jnp.dot)
  product(a, a).block_until_ready()
  return 2e-9 * GEMM_SIZE**3 / min(seconds(lambda: product(a, a).block_until_ready()) for _ in range(10))


def run_case(name: str, versus: str) -> dict[str, Any]:
  """Checks that both sides train alike, then times them in turn.

  Raises:
    RuntimeError: if their losses differ by more than rounding can.
  """
  check = Bench(dataclasses.replace(CASES[name], steps=CHECK_STEPS))
  loss, other_loss = check.segment()(), getattr(check, versus)()()
  if not math.isclose(loss, other_loss, rel_tol=LOSS_TOLERANCE):
    raise RuntimeError(f"{name}: mean loss {loss} of ours and {other_loss} of {versus}, so they do not train alike.")
  bench = Bench(CASES[name])
  ours, theirs = bench.segment(), getattr(bench, versus)()
  started = time.perf_counter()
  ours()
  first_call = time.perf_counter() - started
  theirs()
  gemm = gemm_gflops()
  times = [(seconds(ours) / bench.steps, seconds(theirs) / bench.steps) for _ in range(_REPEATS.value)]
  ratios = [mine / other for mine, other in times]
  step = statistics.median(mine for mine, _ in times)
  flops = bench.case.flops_per_step
  return {
    "bench": "train",
    "case": name,
    "versus": versus,
    "ratio": round(statistics.median(ratios), 4),
    "low": round(min(ratios), 4),
    "high": round(max(ratios), 4),
    "n": len(ratios),
    "device": jax.devices()[0].device_kind,
    "clock": "cpu, one core" if jax.default_backend() == "cpu" else "wall",
    "seconds_per_step": step,
    "flops_per_step": flops,
    "gflops": round(flops / step * 1e-9, 2),
    "gemm_gflops": round(gemm, 1),
    "first_call_seconds": round(first_call, 2),
  }


def has_torch() -> bool:
  """Tells whether PyTorch can run on JAX's kind of device, and says on stderr why not."""
  try:
    import torch
  except ImportError:
    print("torch is not installed, skipped: pip install -r requirements-bench.txt", file=sys.stderr)
    return False
  if jax.default_backend() != "cpu" and not torch.cuda.is_available():
    print(f"torch has no {jax.default_backend()} device, skipped", file=sys.stderr)
    return False
  return True


def main(arguments: list[str]) -> None:
  if len(arguments) > 1:
    raise app.UsageError(f"unknown arguments {arguments[1:]}; options begin with --")
  if _ALL_CORES and jax.default_backend() != "cpu":
    os.sched_setaffinity(0, _ALL_CORES)
  opponents = [name for name in _VERSUS.value if name != "torch" or has_torch()]
  for name in _ONLY.value:
    for versus in opponents:
      print(json.dumps(run_case(name, versus)), flush=True)


if __name__ == "__main__":
  app.run(main)
