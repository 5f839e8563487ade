"""The density of eigenvalues: it integrates to 1, smooths by the width asked for, and its band holds the truth."""

import numpy as np
import pytest

from bsjax.analysis.spectral_density import density

GRID = np.linspace(-12, 12, 4001)


def random_quadratures(num_probes, num_nodes=9, seed=0):
  rng = np.random.default_rng(seed)
  weights = rng.uniform(size=(num_probes, num_nodes))
  return rng.normal(size=(num_probes, num_nodes)), weights / weights.sum(1, keepdims=True)


def test_integrates_to_one_and_has_the_moments_of_the_nodes():
  nodes, weights = random_quadratures(5)
  mean, low, high = density(nodes, weights, GRID, 0.3)
  # The trapezoid rule of smooth functions that vanish at the ends is exact to rounding.
  np.testing.assert_allclose(np.trapezoid(mean, GRID), 1, rtol=1e-10)
  first = np.mean(np.sum(weights * nodes, 1))
  second = np.mean(np.sum(weights * nodes**2, 1)) + 0.3**2
  np.testing.assert_allclose(np.trapezoid(mean * GRID, GRID), first, rtol=1e-10)
  np.testing.assert_allclose(np.trapezoid(mean * GRID**2, GRID), second, rtol=1e-10)
  assert np.all(low <= mean)
  assert np.all(mean <= high)


def test_band_holds_the_mean_of_all_probes_19_times_in_20():
  """Intervals of 4 probes drawn from many; the share of 600 is known to 0.9 %, 4 times that here."""
  nodes, weights = random_quadratures(2400)
  point = np.array([0.4])
  truth = density(nodes, weights, point, 0.5)[0]
  held = [
    low[0] <= truth[0] <= high[0]
    for _, low, high in (density(nodes[i : i + 4], weights[i : i + 4], point, 0.5) for i in range(0, 2400, 4))
  ]
  np.testing.assert_allclose(np.mean(held), 0.95, rtol=0, atol=0.036)


def test_one_probe_has_no_band():
  mean, low, high = density(*random_quadratures(1), GRID, 0.3)
  assert np.all(np.isfinite(mean))
  assert np.all(np.isnan(low))
  assert np.all(np.isnan(high))


def test_refuses():
  nodes, weights = random_quadratures(2)
  with pytest.raises(ValueError, match="width=0 must be positive"):
    density(nodes, weights, GRID, 0)
  with pytest.raises(ValueError, match=r"nodes\[2, 9\], weights\[2, 8\]"):
    density(nodes, weights[:, 1:], GRID, 1.0)
