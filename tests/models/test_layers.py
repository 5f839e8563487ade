"""The layers that networks share: what dropout promises, and what a convolution starts from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import KEY, layers_of

from bsjax.models import Conv, Dropout, cnn, simple_cnn
from bsjax.models.layers import TransposedConv


def dropped(x, key=KEY, *, rate=0.4, train=True):
  return Dropout(rate).apply({}, x, train, rngs={"dropout": key})


def test_dropout_keeps_expectations_and_draws_every_entry_anew():
  y = np.asarray(dropped(jnp.full((100, 200), 3.0)))
  kept = y != 0
  np.testing.assert_allclose(y[kept], 3 / 0.6, rtol=1e-6)
  # 20,000 draws: the share kept has a standard error of sqrt(0.6 x 0.4 / 20,000) = 0.0035.
  assert abs(kept.mean() - 0.6) < 4 * 0.0035
  # Rows and columns are independent: over 200 draws of 0.6 deviations are sqrt(0.24 / 200) = 0.035, over 100 sqrt(0.24 / 100) = 0.049.
  assert 0.8 < kept.mean(1).std() / 0.035 < 1.2
  assert 0.8 < kept.mean(0).std() / 0.049 < 1.2


def test_dropout_is_a_pure_function_of_the_key_and_the_identity_in_inference():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
  assert (dropped(x) == dropped(x)).all()
  assert (dropped(x) != dropped(x, jax.random.key(1))).any()
  assert (dropped(x, train=False) == x).all()
  assert (dropped(x, rate=0.0) == x).all()
  assert dropped(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_training_with_dropout_needs_a_key():
  model = cnn((8, 8, 1), 3, channels=(2,), widths=(4,), dropout=0.4)
  variables = jax.eval_shape(model.init, KEY)
  images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
  with pytest.raises(ValueError, match=r"dropout \(rate 0.4\) was applied with train=True and no key: pass key="):
    jax.eval_shape(functools.partial(model.apply, train=True), *variables, images)
  assert jax.eval_shape(functools.partial(model.apply, train=False), *variables, images)


def test_the_net_of_mccandlish_drops_units_of_the_dense_layer():
  model = simple_cnn((32, 32, 3), 10, dropout=0.4)
  assert layers_of(model, (32, 32, 3)) == ["c32/5/1@32", "c64/5/1@16", "f1024", "d0.4", "f10"]


def test_convolutions_may_lack_a_bias_and_pad_by_a_number():
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  y, variables = jax.eval_shape(Conv(4, 7, 2, padding=3, use_bias=False).init_with_output, KEY, x)
  assert y.shape == (1, 4, 4, 4)
  assert set(variables["params"]) == {"kernel"}


def test_transposed_convolutions_start_with_the_variance_of_he():
  """An output sees 2 x 2 x 32 entries of the kernel; of n truncated normals the variance has an error below sqrt(2 / n)."""
  params = jax.jit(TransposedConv(64).init)(KEY, jnp.zeros((1, 2, 2, 32)))["params"]
  kernel = params["kernel"]
  assert kernel.shape == (4, 4, 32, 64)
  np.testing.assert_allclose(np.var(kernel), 2 / (2 * 2 * 32), rtol=4 * np.sqrt(2 / kernel.size))
  assert not params["bias"].any()
