"""A density of eigenvalues from the quadratures of several probe vectors."""

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def density(
  nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray, width: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Smooth quadratures into a density, with a band over probes.

      phi_r(x) = sum_j w_rj N(x; t_rj, width^2)

  Args:
    nodes, weights: t and w, f[R, M], from `bsjax.probes.spectral_quadrature`; each row of weights sums to 1.
    grid: where to evaluate, f[X].
    width: standard deviation of the Gaussian, in the unit of the nodes. What is narrower than it is not resolved.

  Returns:
    The mean over probes, and the low and high end of its 95 % interval at every point (Student's t, R - 1 degrees of freedom), f64[X]
    each. The ends are NaN for a single probe. The low one may be negative, where a density cannot.

  Raises:
    ValueError: a width that is not positive, or shapes that disagree.

  Source: Ghorbani, Krishnan and Xiao (2019), "An investigation into neural net optimization via Hessian eigenvalue density",
  section 2; the band is ours.
  """
  nodes, weights, grid = (np.asarray(x, np.float64) for x in (nodes, weights, grid))
  if nodes.ndim != 2 or nodes.shape != weights.shape or grid.ndim != 1:
    raise ValueError(
      f"nodes{list(nodes.shape)}, weights{list(weights.shape)}, grid{list(grid.shape)}: wanted [R, M], the same, and [X]."
    )
  if not width > 0:
    raise ValueError(f"width={width} must be positive: the standard deviation of the smoothing Gaussian.")
  probes = np.stack([stats.norm.pdf(grid[:, None], t, width) @ w for t, w in zip(nodes, weights, strict=True)])
  mean, count = probes.mean(0), len(probes)
  if count < 2:
    unknown = np.full_like(mean, np.nan)
    return mean, unknown, unknown
  half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * probes.std(0, ddof=1) / count**0.5
  return mean, mean - half, mean + half
