"""The preconditioner read off an optimizer's state is the one that its next step applies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.optim import make_optimizer, make_schedule
from bsjax.study.preconditioner import PRECONDITIONED, preconditioner_scale
from bsjax.train import TrainState
from bsjax.types import Hparams

RATE = 0.25


@pytest.mark.parametrize("optimizer", PRECONDITIONED)
def test_a_step_along_a_constant_gradient(optimizer):
  """With the same gradient g at every step, the corrected moments are g and g^2 exactly, and a step is eta s^2 g."""
  draw = np.random.default_rng(0)
  params = {"kernel": draw.normal(size=(3, 4)).astype(np.float32), "bias": draw.normal(size=4).astype(np.float32)}
  grad = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), params)
  hparams = Hparams(RATE, momentum=0.9 if optimizer != "lars" else 0.0, beta2=0.99)
  transform = make_optimizer(optimizer, hparams, make_schedule("constant", hparams))
  opt_state = transform.init(params)
  for _ in range(3):
    updates, opt_state = transform.update(grad, opt_state, params)
  scale = preconditioner_scale(optimizer, hparams, TrainState(jnp.int32(3), params, {}, opt_state), grad)
  expected = jax.tree.map(lambda s, g: -RATE * s**2 * g, scale, grad)
  for name in params:
    # float32: a dozen roundings of 6e-8, and the moments are the gradient's to as many
    np.testing.assert_allclose(updates[name], expected[name], rtol=3e-6, err_msg=name)
  spread = {name: np.ptp(np.asarray(leaf)) > 0 for name, leaf in scale.items()}
  assert spread == dict.fromkeys(params, optimizer != "lars")  # LARS has one ratio for an array


@pytest.mark.parametrize("optimizer", PRECONDITIONED)
def test_first_step_and_zero_norms_stay_finite(optimizer):
  params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
  transform = make_optimizer(optimizer, Hparams(RATE), make_schedule("constant", Hparams(RATE)))
  state = TrainState(jnp.int32(0), params, {}, transform.init(params))
  scale = preconditioner_scale(optimizer, Hparams(RATE), state, params)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(scale))
  assert optax.tree.norm(scale) > 0
