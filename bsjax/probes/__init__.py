"""The mathematics of a loss: gradients per example, gradient noise, Hessian products, the top of the spectrum."""

from bsjax.probes.hvp import hessian_vector_product
from bsjax.probes.noise import (
  GradientMoments,
  NoiseStatistics,
  gradient_moments,
  minibatch_statistics,
  noise_statistics,
)
from bsjax.probes.per_example import LossFn, mean_gradient, per_example_grads, per_example_losses
from bsjax.probes.spectrum import TopEigenvalue, top_eigenvalue

__all__ = [
  "GradientMoments",
  "LossFn",
  "NoiseStatistics",
  "TopEigenvalue",
  "gradient_moments",
  "hessian_vector_product",
  "mean_gradient",
  "minibatch_statistics",
  "noise_statistics",
  "per_example_grads",
  "per_example_losses",
  "top_eigenvalue",
]
