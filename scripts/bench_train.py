"""How fast is a training step, against an ordinary JAX loop, against PyTorch, and against our own step outside the scan?

  python -m scripts.bench_train                                  all cases, some minutes on one core
  python -m scripts.bench_train --only=tiny_b8 --versus=entry    one case against one opponent
  python -m scripts.bench_train --cores=2 --only=resnet8_b128    on two cores, against PyTorch

Prints one JSON object per case and opponent. `ratio` is our time per step over theirs, below 1 is faster: the median of
the ratios of alternating repetitions, `low` and `high` the smallest and the largest of them, `n` their number. On the CPU
the process is pinned to one core and times are CPU times of all its threads, which other load on the machine hardly moves;
elsewhere, and with --cores above 1, they are wall times. Compilation is timed apart. `gflops` counts only the multiplications and
additions of matrix products and convolutions, and is to be compared with `gemm_gflops`, a 512 x 512 float32 product in the same run.

Opponents, all with the same batches, initial parameters, float32, and SGD with momentum 0.9:
  jax_loop    a Python loop over the jitted step, which indexes numpy arrays for each batch and sends them to the device
  torch       the same network in PyTorch, on batches indexed from a tensor (`pip install -r requirements-bench.txt`); images NCHW
  torch_nhwc  the same in PyTorch's other layout, channels last; only where there are convolutions
  entry       our own step, jitted by itself, with the data on the device: what the scan costs or saves
With --cores=N the batch is spread over N host devices of a core each, batch norm over all of it, and PyTorch has N threads.
Before anything is timed, each opponent trains from the same start as the segment, and their losses must agree.
"""
# ruff: noqa: E402  (the process is pinned before JAX is imported)

import os
import sys

_ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
_NUM_CORES = next((int(word.partition("=")[2]) for word in sys.argv if word.startswith("--cores=")), 1)
if _ALL_CORES:
  os.sched_setaffinity(0, set(sorted(_ALL_CORES)[-_NUM_CORES:]))  # before JAX starts as many threads as there are cores
if _NUM_CORES > 1:
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={_NUM_CORES}"

import dataclasses
import json
import math
import statistics
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
from bsjax.models import Model, cifar_resnet, cnn, mlp
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
  """A network and a batch size: `widths` are hidden dense layers, `channels` convolutions, `depth` a residual network's; two are empty.

  `steps` are made per timed call: by default a whole segment, as in a sweep. A segment computes the order of all its steps
  even when it makes fewer, and touches its memory for the first time in every call, so a smaller number charges both to
  fewer steps: about 1 % where that is done here.
  """

  batch_size: int
  input_shape: tuple[int, ...]
  num_classes: int
  widths: tuple[int, ...] = ()
  channels: tuple[int, ...] = ()
  depth: int = 0
  batch_norm: bool = False
  steps: int = STEPS_PER_SEGMENT

  def make_model(self) -> Model:
    if self.depth:
      return cifar_resnet(self.input_shape, self.num_classes, depth=self.depth)
    if self.channels:
      return cnn(self.input_shape, self.num_classes, channels=self.channels)
    return mlp(self.input_shape, self.widths, self.num_classes, batch_norm="running" if self.batch_norm else "none")

  @property
  def has_convolutions(self) -> bool:
    return bool(self.channels or self.depth)

  @property
  def flops_per_step(self) -> float:
    """Two per multiply-add, forward and for both gradients, less the gradient with respect to the images."""
    layers = []
    if self.depth:
      height, width, fan = self.input_shape
      for number in range(self.depth - 1):
        stage = max(0, number - 1) // ((self.depth - 2) // 3)
        layers.append((height >> stage) * (width >> stage) * 9 * fan * (16 << stage))
        fan = 16 << stage
      layers.append(fan * self.num_classes)
    elif self.channels:
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
  **{
    f"cnn_b{size}": Case(size, (28, 28, 1), 10, channels=(32, 64), steps=steps) for size, steps in ((8, 256), (128, 64))
  },
  **{
    f"resnet8_b{size}": Case(size, (32, 32, 3), 10, depth=8, batch_norm=True, steps=steps)
    for size, steps in ((8, 256), (128, 64))
  },
}
OPPONENTS = ("jax_loop", "torch", "torch_nhwc", "entry")
PEERS = {"torch", "torch_nhwc"}

_ONLY = flags.DEFINE_list("only", list(CASES), "Cases to run.")
_VERSUS = flags.DEFINE_list("versus", list(OPPONENTS), "Opponents to run against.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Alternating repetitions per ratio.", lower_bound=1)
flags.DEFINE_integer(
  "cores", 1, "Cores; above 1 against PyTorch only.", lower_bound=1, upper_bound=len(_ALL_CORES or [0])
)
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
    self.mesh = make_mesh(data=_NUM_CORES)
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
    validation = jax.device_put(chunked(self.workload.validation.arrays, devices=_NUM_CORES))
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

  def torch(self, *, channels_last: bool = False) -> Train:
    """PyTorch, the rows of a dense layer after convolutions reordered to match."""
    import torch
    from torch import nn

    torch.set_num_threads(_NUM_CORES)
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    network = _torch_network(self.case, jax.device_get(self.start().params)).to(device)
    images, labels = (torch.from_numpy(self.workload.train.arrays[name]).to(device) for name in ("image", "label"))
    if self.case.has_convolutions:
      layout = torch.channels_last if channels_last else torch.contiguous_format
      images, network = images.permute(0, 3, 1, 2).contiguous(memory_format=layout), network.to(memory_format=layout)
    else:
      images = images.reshape(NUM_EXAMPLES, -1)
    labels = labels.long()
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

  def torch_nhwc(self) -> Train:
    return self.torch(channels_last=True)


def _torch_network(case: Case, params: Params) -> Any:
  """Builds the case's network in PyTorch with our initial parameters."""
  import torch
  from torch import nn

  def dense(layer_params: Params, kernel: np.ndarray | None = None) -> nn.Linear:
    kernel = layer_params["kernel"] if kernel is None else kernel
    layer = nn.Linear(*kernel.shape)
    layer.load_state_dict({"weight": torch.tensor(kernel.T), "bias": torch.tensor(layer_params["bias"])})
    return layer

  def convolution(layer_params: Params, stride: int = 1) -> nn.Conv2d:
    kernel = layer_params["kernel"]
    layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, stride=stride, padding=1, bias="bias" in layer_params)
    weight = {"weight": torch.tensor(kernel.transpose(3, 2, 0, 1))}
    layer.load_state_dict(
      weight | {name: torch.tensor(layer_params[name]) for name in ("bias",) if name in layer_params}
    )
    return layer

  class Block(nn.Module):
    def __init__(self, block_params: Params, stride: int) -> None:
      super().__init__()
      first, second = (block_params[f"Conv_{number}"] for number in range(2))
      self.stride, self.features = stride, first["kernel"].shape[3]
      self.first, self.second = convolution(first, stride), convolution(second)
      self.first_norm, self.second_norm = nn.BatchNorm2d(self.features), nn.BatchNorm2d(self.features)

    def forward(self, x: Any) -> Any:
      y = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
      if x.shape != y.shape:
        x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.features - x.shape[1]))
      return torch.relu(x + y)

  layers: list[nn.Module] = []
  if case.depth:
    blocks = [(stage, number) for stage in range(3) for number in range((case.depth - 2) // 6)]
    layers = [convolution(params["Conv_0"]), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [Block(params[f"Stage_{s}_Block_{n}"], stride=2 if s and not n else 1) for s, n in blocks]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense(params["Dense_0"])]
  elif case.channels:
    for number in range(len(case.channels)):
      layers += [convolution(params[f"Conv_{number}"]), nn.ReLU(), *([nn.MaxPool2d(2)] if number % 2 else [])]
    halvings = 2 ** (len(case.channels) // 2)
    height, width, channels = case.input_shape[0] // halvings, case.input_shape[1] // halvings, case.channels[-1]
    kernel = params["Dense_0"]["kernel"].reshape(height, width, channels, -1)
    rows = kernel.transpose(2, 0, 1, 3).reshape(-1, case.num_classes)
    layers += [nn.Flatten(), dense(params["Dense_0"], rows)]
  else:
    for number, features in enumerate(case.widths):
      norm = [nn.BatchNorm1d(features)] if case.batch_norm else []
      layers += [dense(params[f"Dense_{number}"]), *norm, nn.ReLU()]
    layers.append(dense(params[f"Dense_{len(case.widths)}"]))
  return nn.Sequential(*layers)


def clock() -> float:
  return time.process_time() if jax.default_backend() == "cpu" and _NUM_CORES == 1 else time.perf_counter()


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
    "clock": "cpu, one core" if jax.default_backend() == "cpu" and _NUM_CORES == 1 else "wall",
    "cores": _NUM_CORES,
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
  opponents = [name for name in _VERSUS.value if name in PEERS or _NUM_CORES == 1]
  if not PEERS.isdisjoint(opponents) and not has_torch():
    opponents = [name for name in opponents if name not in PEERS]
  for name in _ONLY.value:
    for versus in opponents:
      if versus == "torch_nhwc" and not CASES[name].has_convolutions:
        continue
      print(json.dumps(run_case(name, versus)), flush=True)


if __name__ == "__main__":
  app.run(main)
