"""What the doctor looks at, what it says, and how two numbers are compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.types import Array, Batch, Key, ModelState, Params, Variables
from bsjax.workloads import Workload

Status = Literal["ok", "fix", "note"]
BATCH_SIZE, LEAST_BATCH_SIZE = 32, 2
"""Examples of a batch that the loss is looked at with, at most: a power of two, of which the data set holds two."""
BATCH_FLOPS = 3e10
"""Floating-point operations of the losses of a batch, about a second on a CPU core: where more, the batch has fewer examples, at least
`LEAST_BATCH_SIZE`."""
KEYS = 32
"""Keys over which a loss that depends on its key is averaged."""
ROUNDING, HALF_ROUNDING = 1e-5, 2e-2
"""How far apart, relatively, two ways to compute a loss may come out: a hundred roundings of float32, five of bfloat16."""
STANDARD_ERRORS = 5
NAMES_SHOWN = 4
NUDGE = 0.02
"""Standard deviation of the noise added to initial parameters, to tell what is only stuck at first from what never matters."""
NOT_FINITE = "look for log or sqrt of 0, a division by 0, too large initial weights"


class Diagnosis(NamedTuple):
  """What one check found."""

  check: str
  status: Status
  """"fix": the laboratory would fail, or measure something else than it says. "note": good to know."""
  message: str
  """One line: the measured number, and for "fix" what to do."""
  numbers: Mapping[str, float] = {}
  """What was measured, by name."""

  def __str__(self) -> str:
    return f"{self.status:<5} {self.check:<14} {self.message}"


class Case(NamedTuple):
  """A workload at its initial parameters, with two batches of its training set."""

  workload: Workload
  variables: Variables
  batch: Batch
  other: Batch
  key: Key
  train_loss: Callable[[Params, ModelState, Batch, Key], tuple[Array, ModelState]]
  """The workload's, compiled."""
  uses_key: bool
  """Whether the training loss changes with the key."""
  rounding: float
  loss_flops: float
  """Floating-point operations of one example's loss."""

  def train_losses(self, batch: Batch) -> np.ndarray:
    """Returns the training loss of a batch, f64[K]: at K = `KEYS` keys where it depends on the key, else at one."""
    keys = jax.random.split(self.key, KEYS if self.uses_key else 1)
    losses = [self.train_loss(*self.variables, batch, key)[0] for key in keys]
    return np.asarray(jax.device_get(losses), np.float64)


def make_case(workload: Workload) -> Case:
  """Draws the initial parameters, and two batches without common examples where the training set allows."""
  count, flops = len(workload.train), _loss_flops(workload)
  size = _batch_size(workload, flops)
  chosen = np.random.default_rng(0).permutation(count)
  batch, other = (
    {name: jnp.asarray(array) for name, array in workload.train.fetch(np.sort(half)).items()}
    for half in (chosen[:size], chosen[-size:])
  )
  key, init_key = jax.random.split(jax.random.key(0))
  variables = workload.init(init_key)
  text = str(jax.make_jaxpr(workload.train_loss)(*variables, batch, key))
  train_loss = jax.jit(workload.train_loss)
  losses = [float(train_loss(*variables, batch, jax.random.fold_in(key, number))[0]) for number in range(3)]
  uses_key = len(set(losses)) > 1 and bool(np.isfinite(losses).all())
  rounding = HALF_ROUNDING if "f16[" in text else ROUNDING  # of float16, and of bfloat16: "bf16["
  return Case(workload, variables, batch, other, key, train_loss, uses_key, rounding, flops)


def _batch_size(workload: Workload, loss_flops: float) -> int:
  """Chooses a power of two; the smallest size of the preset where training takes no such batch, as in ghost batches of another size."""
  affordable = max(LEAST_BATCH_SIZE, BATCH_FLOPS / loss_flops)
  size = 2 ** int(np.log2(min(BATCH_SIZE, affordable, max(1, len(workload.train) // 2))))
  batch = {name: jax.ShapeDtypeStruct((size, *one.shape), one.dtype) for name, one in workload.train.spec.items()}
  key = jax.random.key(0)
  try:
    jax.eval_shape(workload.train_loss, *jax.eval_shape(workload.init, key), batch, key)
  except Exception:  # what else is wrong comes again with the other size, and is told then
    return min(workload.preset.batch_sizes)
  return size


def nudged(params: Params, key: Key) -> Params:
  """Adds normal noise of standard deviation `NUDGE` to every parameter."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  moved = [
    leaf + NUDGE * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(structure, moved)


def _loss_flops(workload: Workload) -> float:
  """Counts the operations of one example's loss, on paper; 1 where the backend does not count."""
  variables = jax.eval_shape(workload.init, jax.random.key(0))
  example = {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in workload.train.spec.items()}
  lowered = jax.jit(workload.example_loss).lower(variables.params, variables.model_state, example)
  return max(1.0, (lowered.cost_analysis() or {}).get("flops", 1.0))


class Comparison(NamedTuple):
  """Two ways to compute one number."""

  first: float
  second: float
  difference: float
  """|first - second|, relative to the larger."""
  allowed: float

  @property
  def agrees(self) -> bool:
    """Whether they are the same but for rounding, and for the noise of the keys; never where a number is not finite."""
    return self.difference <= self.allowed


def compare(first: Any, second: Any, rounding: float) -> Comparison:
  """Compares the means of two samples, f[K]; for K > 1 with `STANDARD_ERRORS` of their difference allowed."""
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  means = first.mean(), second.mean()
  scale = max(abs(means[0]), abs(means[1]), np.finfo(np.float32).tiny)
  sem = np.sqrt(sum(x.var(ddof=1) / len(x) for x in (first, second) if x.size > 1))
  return Comparison(*means, abs(means[0] - means[1]) / scale, rounding + STANDARD_ERRORS * sem / scale)


def listed(names: Sequence[str]) -> str:
  """Writes the first few names, and how many more there are."""
  more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
  return ", ".join(names[:NAMES_SHOWN]) + more


def join(first: Batch, second: Batch) -> Batch:
  """Puts two batches one behind the other."""
  return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), first, second)
