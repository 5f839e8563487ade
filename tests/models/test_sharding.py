"""A batch spread over eight (fake) devices gives the values of one device: convolutions, pools and batch norm.

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
from bsjax.models import cnn, mlp

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
}
for name, model in models.items():
  params, state = variables_of(model)

  def loss(params, state, images):
    logits, state = model.apply(params, state, images, train=True)
    return jnp.mean(jnp.sin(logits)), state

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  print(f"{name}: {difference(step(params, state, sharded), step(params, state, images))}")

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
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  root = Path(__file__).parents[2]
  command = [sys.executable, "-W", "error", "-c", PROGRAM]
  done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return dict(line.split(": ") for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", ["cnn", "batch norm", "shard_map", "trials"])
def test_sharded_equals_single_device(differences, case):
  # float32 sums of up to 1,000 terms, split in eight: 1000 x 6e-8 in the worst case; relative to the largest entry.
  assert float(differences[case]) < 6e-5
