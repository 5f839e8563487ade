"""Trace estimates against the trace: unbiased, with calibrated errors, and less noise where that is promised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax.probes import Eigenpairs, hutchinson_trace

SIZE, NUM_PROBES, NUM_KEYS = 40, 12, 400


def symmetric(eigenvalues):
  rng = np.random.default_rng(0)
  vectors, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
  return vectors, vectors @ np.diag(eigenvalues) @ vectors.T


LOW_RANK = np.array([50.0, 20.0, -10.0, *[0.01] * (SIZE - 3)])
FLAT = np.linspace(0.9, 1.1, SIZE)


@functools.partial(jax.jit, static_argnames="deflated")
def estimates(matrix, pairs, *, deflated):
  def of_key(key):
    like = {"a": jnp.zeros(15), "b": jnp.zeros((5, 5))}

    def matvec(tree):
      flat = matrix @ jnp.concatenate([tree["a"], tree["b"].ravel()])
      return {"a": flat[:15], "b": flat[15:].reshape(5, 5)}

    return hutchinson_trace(matvec, like, key, num_probes=NUM_PROBES, deflate=pairs if deflated else None)

  return jax.vmap(of_key)(jax.random.split(jax.random.key(3), NUM_KEYS))


def pairs_from(vectors, values):
  """The leading eigenpairs of LOW_RANK, or any others, as `eigenpairs` would return them."""
  rows = np.asarray(vectors, np.float32)
  tree = {"a": rows[:, :15], "b": rows[:, 15:].reshape(-1, 5, 5)}
  return Eigenpairs(np.asarray(values, np.float32), tree, np.zeros(len(values)), np.int32(0))


def check_calibration(values, sems, truth):
  """Unbiased within 4 standard errors; variance as stated (the variance of 400 values is known to 7 %, 4 times that here)."""
  assert abs(np.mean(values) - truth) < 4 * np.std(values, ddof=1) / NUM_KEYS**0.5
  np.testing.assert_allclose(np.mean(np.square(sems)) / np.var(values, ddof=1), 1, rtol=0, atol=0.3)


@pytest.mark.parametrize("eigenvalues", [LOW_RANK, FLAT], ids=["low rank", "flat"])
def test_plain_estimate_is_unbiased_with_calibrated_error(eigenvalues):
  _, matrix = symmetric(eigenvalues)
  got = estimates(matrix.astype(np.float32), pairs_from(np.zeros((3, SIZE)), np.zeros(3)), deflated=False)
  check_calibration(got.value, got.sem, eigenvalues.sum())
  np.testing.assert_array_equal(got.value, got.plain_value)
  np.testing.assert_array_equal(got.sem, got.plain_sem)
  # Var z'Hz = 2 sum of squares off the diagonal.
  variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / NUM_PROBES
  np.testing.assert_allclose(np.var(got.value, ddof=1), variance, rtol=0.3)


def test_control_variate_removes_the_noise_of_a_low_rank_part():
  vectors, matrix = symmetric(LOW_RANK)
  got = estimates(matrix.astype(np.float32), pairs_from(vectors[:, :3].T, LOW_RANK[:3]), deflated=True)
  # What remains is 0.01 times an identity less a projection: a deviation of at most 0.01 sqrt(2 * 3) per probe, and float32's rounding
  # of terms of some thousands, 40 epsilons of which are 1e-3 * 5.
  assert np.std(got.value) < 0.02
  assert np.std(got.plain_value) > 100 * np.std(got.value)
  np.testing.assert_allclose(np.mean(got.value), LOW_RANK.sum(), rtol=0, atol=0.01)


def test_bad_pairs_add_noise_but_no_bias():
  rng = np.random.default_rng(4)
  _, matrix = symmetric(FLAT)
  got = estimates(matrix.astype(np.float32), pairs_from(rng.normal(size=(3, SIZE)), [1.0, -2.0, 0.5]), deflated=True)
  check_calibration(got.value, got.sem, FLAT.sum())
  assert np.std(got.value) > 10 * np.std(got.plain_value)


def test_one_probe_has_no_error():
  with pytest.raises(ValueError, match="num_probes=1 must be at least 2"):
    hutchinson_trace(lambda v: v, jnp.ones(3), jax.random.key(0), num_probes=1)
