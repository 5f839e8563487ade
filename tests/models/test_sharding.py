"""A batch spread over eight (fake) devices gives the values of one device: convolutions, pools, batch norm and dropout; ghost batches of
the devices' share give the norm of each device by itself.

The number of CPU devices is fixed when JAX starts, so all cases run in one process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from bsjax.models import cnn, imagenet_resnet, mlp

mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
generator = np.random.default_rng(0)

def normal(shape):
  return generator.normal(size=shape).astype(np.float32)

def variables_of(model, *lanes):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda leaf: 0.3 * normal(lanes + leaf.shape), shapes)

images = normal((16, 8, 8, 1)) + np.arange(16, dtype=np.float32)[:, None, None, None]  # the devices' means differ
sharded = jax.device_put(images, NamedSharding(mesh, P("data")))
assert len(sharded.sharding.device_set) == 8

def difference(actual, expected):
  scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
  return max(float(jnp.max(jnp.abs(a - e))) for a, e in zip(*map(jax.tree.leaves, (actual, expected)))) / scale

models = {
  "cnn": cnn((8, 8, 1), 10, channels=(4, 6)),
  "batch norm": mlp((8, 8, 1), (16, 16), 10, batch_norm="running"),
  "images": imagenet_resnet((8, 8, 1), 10, blocks=(1,), channels=2),
  "dropout": cnn((8, 8, 1), 10, channels=(4,), widths=(16,), dropout=0.5),
}
for name, model in models.items():
  params, state = variables_of(model)

  def loss(params, state, images):
    logits, state = model.apply(params, state, images, train=True, key=jax.random.key(1))
    return jnp.mean(jnp.sin(logits)), state

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  print(f"{name}: {difference(step(params, state, sharded), step(params, state, images))}")

# The norm of Goyal et al.: ghost batches of the two examples of a device, against each device normalising its own.
norms = {size: imagenet_resnet((8, 8, 1), 10, blocks=(), channels=4, ghost_size=size) for size in (0, 2)}
params, state = variables_of(norms[0])

def logits_of(size):
  return lambda images: norms[size].apply(params, state, images, train=True)[0]

alone = jax.jit(jax.shard_map(logits_of(0), mesh=mesh, in_specs=P("data"), out_specs=P("data")))
ghost = jax.jit(logits_of(2))
print(f"ghost: {difference(ghost(sharded), alone(sharded))}")
for name, size in (("reductions of ghosts", 2), ("reductions of the batch", 0)):
  print(f"{name}: {jax.jit(logits_of(size)).lower(sharded).compile().as_text().count('all-reduce(')}")

params, state = variables_of(models["cnn"])

def mean_grad(params, images):
  def loss(params):
    return jax.lax.pmean(jnp.mean(jnp.sin(models["cnn"].apply(params, state, images, train=True)[0])), "data")
  return jax.grad(loss)(params)

mapped = jax.jit(jax.shard_map(mean_grad, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
whole = jax.jit(jax.grad(lambda p: jnp.mean(jnp.sin(models["cnn"].apply(p, state, images, train=True)[0]))))(params)
print(f"shard_map: {difference(mapped(params, sharded), whole)}")

# One trial per device: both operands of each convolution vary.
trials = variables_of(models["cnn"], 8).params
grads = jax.vmap(jax.grad(lambda p, x: jnp.mean(jnp.sin(models["cnn"].apply(p, state, x, train=True)[0]))), (0, None))
mapped = jax.jit(jax.shard_map(grads, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))
print(f"trials: {difference(mapped(trials, images), jax.jit(grads)(trials, images))}")
"""


@pytest.fixture(scope="module")
def differences():
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  root = Path(__file__).parents[2]
  command = [sys.executable, "-W", "error", "-c", PROGRAM]
  done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return dict(line.split(": ") for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", ["cnn", "batch norm", "images", "dropout", "ghost", "shard_map", "trials"])
def test_sharded_equals_single_device(differences, case):
  # float32 sums of up to 1,000 terms, split in eight: 1000 x 6e-8 in the worst case; relative to the largest entry.
  assert float(differences[case]) < 6e-5


def test_moments_of_ghost_batches_cross_no_device(differences):
  """The network has one norm; its mean and its variance take an all-reduce each, or none."""
  assert int(differences["reductions of ghosts"]) == 0
  assert int(differences["reductions of the batch"]) == 2
