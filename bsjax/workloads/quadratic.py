"""A quadratic with a known Hessian and known gradient noise: the problem on which every measure has a closed form."""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.data import Source
from bsjax.types import Array, Example, Key, Metrics, ModelState, Params, Variables
from bsjax.workloads.splits import DataOptions
from bsjax.workloads.workload import Preset, Target, Workload, mean_train_loss

DIMENSION = 16
NUM_EXAMPLES = 512
SPECTRUM = np.geomspace(1.0, 0.05, DIMENSION)
"""The eigenvalues h of the Hessian H = diag(h)."""
CENTER_STD = 0.5


def _source(split: str, seed: int) -> Source:
  """Draws centres c_i ~ N(0, CENTER_STD^2 I), shifted so that their mean is exactly the minimiser 0."""
  centers = CENTER_STD * np.random.default_rng(seed).standard_normal((NUM_EXAMPLES, DIMENSION))
  return Source("quadratic", split, {"center": (centers - centers.mean(axis=0)).astype(np.float32)})


def quadratic(**data: Unpack[DataOptions]) -> Workload:
  """Builds L(w) = mean_i 1/2 (w - c_i)' H (w - c_i), H = diag(SPECTRUM), with w_0 = (1, ..., 1).

  Holds: G = H w; Sigma = H Cov(c) H; the largest eigenvalue is SPECTRUM[0] = 1 everywhere. Needs no files.
  The noise model is McCandlish et al. (2018), Appendix C (L_i = L(theta - c_i)).
  """
  del data  # made here
  hessian = jnp.asarray(SPECTRUM, jnp.float32)

  def init(key: Key) -> Variables:
    del key  # always from the same point
    return Variables({"w": jnp.ones(DIMENSION, jnp.float32)}, {})

  def example_loss(params: Params, model_state: ModelState, example: Example) -> Array:
    del model_state
    return 0.5 * jnp.sum(hessian * (params["w"] - example["center"]) ** 2)

  def example_metrics(params: Params, model_state: ModelState, example: Example) -> Metrics:
    del model_state, example
    return {"loss": 0.5 * jnp.sum(hessian * params["w"] ** 2)}  # the excess loss: 0 at the minimiser

  return Workload(
    name="quadratic",
    init=jax.jit(init),
    example_loss=example_loss,
    train_loss=mean_train_loss(example_loss),
    example_metrics=example_metrics,
    train=_source("train", 0),
    validation=_source("validation", 1),
    test=_source("test", 2),
    target=Target("validation_loss", 0.05, "min"),
    preset=Preset(
      batch_sizes=tuple(2**k for k in range(10)),
      base_learning_rate=0.2,
      reference_batch_size=8,
      num_epochs=4,
      num_steps=256,
    ),
  )
