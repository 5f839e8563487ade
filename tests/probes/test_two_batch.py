"""Noise from two batch sizes: exact expectations over all batches, plain gradients, one device against eight."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes.two_batch import (
  accumulated_gradient,
  device_sq_norms,
  microbatch_sq_norms,
  smoothed_parts,
  two_batch_estimates,
  two_batch_noise,
)

GRADS = np.random.default_rng(0).normal(0.5, 1.0, (6, 3))
"""The gradients of a population of six."""


@pytest.mark.parametrize("replacement", [False, True])
def test_unbiased_over_all_batches(replacement):
  """Every ordered batch of four, cut in two microbatches of two: the average of the estimates is their expectation."""
  draws = itertools.product(range(6), repeat=4) if replacement else itertools.permutations(range(6), 4)
  batches = GRADS[np.array(list(draws))]
  small = np.mean(np.sum(batches.reshape(-1, 2, 2, 3).mean(axis=2) ** 2, axis=-1), axis=1)
  big = np.sum(batches.mean(axis=1) ** 2, axis=-1)
  sq_norm, trace = two_batch_estimates(small, big, microbatch_size=2, batch_size=4)
  mean = GRADS.mean(axis=0)
  scatter = np.sum((GRADS - mean) ** 2)
  # drawn with replacement the six are the distribution; without, they are a sample from one
  expected_trace = scatter / 6 if replacement else scatter / 5
  expected_sq_norm = mean @ mean - (0 if replacement else expected_trace / 6)
  # float64 sums of about 1000 terms of size ten
  np.testing.assert_allclose(np.mean(trace), expected_trace, rtol=1e-12)
  np.testing.assert_allclose(np.mean(sq_norm), expected_sq_norm, rtol=1e-11)


@pytest.mark.parametrize(("microbatch_size", "batch_size"), [(4, 4), (0, 4), (8, 4)])
def test_two_sizes_are_needed(microbatch_size, batch_size):
  with pytest.raises(ValueError, match=f"microbatch_size={microbatch_size} and batch_size=4"):
    two_batch_estimates(1.0, 1.0, microbatch_size=microbatch_size, batch_size=batch_size)


def example_loss(params, example):
  return jnp.sum(jnp.tanh(example["x"] @ params["w"] + params["b"]) ** 2) * example["y"]


def problem(dtype):
  draw = np.random.default_rng(1)
  params = {"w": draw.normal(size=(3, 2)).astype(dtype), "b": draw.normal(size=2).astype(dtype)}
  return params, {"x": draw.normal(size=(12, 3)).astype(dtype), "y": draw.normal(size=12).astype(dtype)}


@pytest.mark.parametrize("num_microbatches", [2, 3, 12])
def test_norms_are_those_of_the_gradients(num_microbatches):
  with jax.enable_x64(True):
    params, examples = problem(np.float64)
    small, big, mean_grad = jax.jit(
      lambda params, examples: microbatch_sq_norms(example_loss, params, examples, num_microbatches=num_microbatches)
    )(params, examples)
    grads = [jax.grad(example_loss)(params, jax.tree.map(lambda a, i=i: a[i], examples)) for i in range(12)]
    flat = np.array([np.concatenate([np.ravel(grad["w"]), grad["b"]]) for grad in grads])
    groups = flat.reshape(num_microbatches, -1, 8).mean(axis=1)
    np.testing.assert_allclose(small, np.mean(np.sum(groups**2, axis=1)), rtol=1e-12)
    np.testing.assert_allclose(big, np.sum(flat.mean(axis=0) ** 2), rtol=1e-12)
    found = np.concatenate([np.ravel(mean_grad["w"]), mean_grad["b"]])
    np.testing.assert_allclose(found, flat.mean(axis=0), rtol=1e-11, atol=1e-13)


def test_one_example_per_microbatch_is_the_sample_variance():
  """b = 1 and B = N: S_hat is sum |g_i - G|^2 / (N - 1), Bessel's correction."""
  with jax.enable_x64(True):
    examples = {"g": jnp.asarray(GRADS)}
    small, big, _ = microbatch_sq_norms(
      lambda params, example: params @ example["g"], jnp.zeros(3), examples, num_microbatches=6
    )
    _, trace = two_batch_estimates(small, big, microbatch_size=1, batch_size=6)
    np.testing.assert_allclose(trace, np.sum(np.var(GRADS, axis=0, ddof=1)), rtol=1e-12)


def test_half_precision_does_not_overflow():
  """A gradient of (300, 300) has a square above 65504, the largest float16."""
  examples = {"x": np.full((4, 2), 300, np.float16)}
  small, big, mean_grad = microbatch_sq_norms(
    lambda params, example: params @ example["x"], jnp.zeros(2, jnp.float16), examples, num_microbatches=2
  )
  assert (float(small), float(big)) == (180000.0, 180000.0)
  assert mean_grad.dtype == jnp.float16


@pytest.mark.parametrize("num_microbatches", [0, 1, 5])
def test_microbatches_must_divide(num_microbatches):
  params, examples = problem(np.float32)
  with pytest.raises(ValueError, match=f"num_microbatches={num_microbatches} for 12 examples"):
    microbatch_sq_norms(example_loss, params, examples, num_microbatches=num_microbatches)


def test_every_microbatch_has_its_own_key():
  key = jax.random.key(3)
  found = accumulated_gradient(
    lambda params, batch, key: params * jax.random.uniform(key), jnp.float32(1.0), {"x": jnp.zeros((3, 2))}, key
  )
  draws = np.array([jax.random.uniform(jax.random.fold_in(key, j)) for j in range(3)])
  np.testing.assert_allclose([found.mean_grad, found.small], [draws.mean(), np.mean(draws**2)], rtol=1e-6)


def test_one_device_has_no_groups():
  params, examples = problem(np.float32)
  mesh = jax.make_mesh((1, 1), ("trial", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with pytest.raises(ValueError, match="the mesh has 1 devices on its axis 'data'"):
    device_sq_norms(example_loss, params, examples, mesh=mesh)


def gaussian_norms(mean, num_batches):
  """Norms of batches of 8 in microbatches of 2, whose example gradients are normal in 20 dimensions with tr(Sigma) = 80."""
  grads = np.random.default_rng(2).normal(mean, 2.0, (num_batches, 4, 2, 20)).mean(axis=2)
  return np.mean(np.sum(grads**2, axis=-1), axis=1), np.sum(grads.mean(axis=1) ** 2, axis=-1)


def test_replicates_find_the_known_noise():
  small, big = gaussian_norms(1.0, 500)
  found = two_batch_noise(small, big, microbatch_size=2, batch_size=8)
  # truth: |G|^2 = 20, tr(Sigma) = 20 x 4; four standard errors
  assert abs(found.grad_sq_norm - 20) < 4 * found.grad_sq_norm_sem
  assert abs(found.grad_cov_trace - 80) < 4 * found.grad_cov_trace_sem
  # each of 500 S_hat is 80 chi^2_60 / 60, as 3 degrees of freedom in 20 dimensions are left: deviation 80 sqrt(2/60);
  # the standard error of a standard deviation over 500 is 3 %
  np.testing.assert_allclose(found.grad_cov_trace_sem, 80 * np.sqrt(2 / 60 / 500), rtol=0.12)
  scale = found.noise_scale
  assert scale.verdict == "identified"
  assert scale.value == pytest.approx(
    found.grad_cov_trace / found.grad_sq_norm, rel=1e-12
  )  # of means: no mean of ratios
  assert scale.ci_low < 4.0 < scale.ci_high
  assert scale.ci_high - scale.ci_low < 0.5


def test_no_gradient_no_noise_scale():
  found = two_batch_noise(*gaussian_norms(0.0, 50), microbatch_size=2, batch_size=8)
  assert found.noise_scale.verdict == "unidentifiable"
  assert found.noise_scale.value is None
  assert abs(found.grad_cov_trace - 80) < 4 * found.grad_cov_trace_sem


def test_one_batch_has_no_spread():
  with pytest.raises(ValueError, match="1 batches tell nothing"):
    two_batch_noise(np.ones(1), np.ones(1), microbatch_size=1, batch_size=2)


def test_smoothing_is_a_weighted_mean_of_the_parts():
  """Against the sum it stands for: weights decay^(logged steps since), over their sum; rows count as often as they have steps."""
  draw = np.random.default_rng(3)
  counts = np.array([0, 2, 0, 1, 3])
  small, big = draw.uniform(2, 3, 5), draw.uniform(0.2, 1, 5)
  small[[0, 2]] = big[[0, 2]] = np.nan
  sq_norm, trace = smoothed_parts(small, big, counts, microbatch_size=2, batch_size=8, decay=0.7)
  parts = np.array(two_batch_estimates(small, big, microbatch_size=2, batch_size=8))
  for row in range(1, 5):
    steps = np.repeat(np.arange(row + 1), counts[: row + 1])
    weights = 0.7 ** np.arange(len(steps))[::-1]
    expected = np.sum(weights * parts[:, steps], axis=1) / weights.sum()
    np.testing.assert_allclose([sq_norm[row], trace[row]], expected, rtol=1e-12)
  assert np.isnan([sq_norm[0], trace[0]]).all()


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_is_checked(decay):
  with pytest.raises(ValueError, match=r"wanted a number in \[0, 1\)"):
    smoothed_parts(np.ones(1), np.ones(1), np.ones(1), microbatch_size=1, batch_size=2, decay=decay)


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from bsjax.models import cnn
from bsjax.probes.two_batch import device_sq_norms, microbatch_sq_norms

mesh = jax.make_mesh((1, 8), ("trial", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = cnn((8, 8, 1), 10, channels=(4, 6))
variables = model.init(jax.random.key(0))
draw = np.random.default_rng(0)
examples = {"x": draw.normal(size=(24, 8, 8, 1)).astype(np.float32), "y": draw.normal(size=24).astype(np.float32)}

def convolutional(params, example):
  return example["y"] * jnp.sum(jnp.sin(model.apply(params, {}, example["x"][None], train=False)[0]))

def recurrent(params, example):  # a scan from zeros, which shard_map's own bookkeeping of devices would refuse
  last, _ = jax.lax.scan(lambda h, x: (jnp.tanh(params["w"] @ h + x), None), jnp.zeros(8), example["x"][..., 0])
  return example["y"] * jnp.sum(last)

for name, loss, params in (("cnn", convolutional, variables.params), ("scan", recurrent, {"w": jnp.eye(8)})):
  one = jax.jit(lambda params, examples: microbatch_sq_norms(loss, params, examples, num_microbatches=8))(params, examples)
  every = jax.jit(lambda params, examples: device_sq_norms(loss, params, examples, mesh=mesh))(params, examples)
  assert 0.01 < float(one[1] / one[0]) < 0.99
  scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(one[2]))
  off = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (one[2], every[2]))))
  print(f"{name}: {float(every[0] / one[0] - 1)} {float(every[1] / one[1] - 1)} {off / scale}")
"""


def test_one_microbatch_per_device_equals_one_after_the_other():
  """Eight forced host devices, whose number is fixed when JAX starts: a process of its own."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
  }
  command = [sys.executable, "-W", "error", "-c", PROGRAM]
  root = Path(__file__).parents[2]
  done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
  assert done.returncode == 0, done.stderr[-2000:]
  found = dict(line.split(": ") for line in done.stdout.splitlines())
  assert set(found) == {"cnn", "scan"}
  for name, numbers in found.items():
    # float32 sums of up to 1,000 terms in another order: 1000 x 6e-8 in the worst case
    assert max(abs(float(number)) for number in numbers.split()) < 6e-5, name
