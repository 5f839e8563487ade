"""The autoencoder: the layers of InfoGAN, images out of images."""

import functools

import jax
import numpy as np
import pytest
from by_hand import KEY, assert_is, convolved, layers_of, mapped, normalised, num_parameters, random_variables

from bsjax.models import autoencoder


def doubled(x, p):
  """The transposed convolution as JAX has it: the transpose of a convolution of stride 2, whose kernel is [4, 4, out, in]."""
  return jax.lax.conv_transpose(x, p["kernel"].swapaxes(2, 3), (2, 2), "SAME", transpose_kernel=True) + p["bias"]


def test_by_hand():
  def by_hand(p, state, x):
    leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)

    def normed(x, number):
      return normalised(x, p[f"BatchNorm_{number}"], state[f"BatchNorm_{number}"])

    x = leaky(convolved(x, p["Conv_0"], stride=2))
    for number in (0, 1):
      x = leaky(normed(convolved(x, p[f"Conv_{number + 1}"], stride=2), number))
    code = mapped(leaky(normed(mapped(x, p["Dense_0"]), 2)), p["code"])
    x = jax.nn.relu(normed(mapped(code, p["Dense_1"]), 3)).reshape(len(x), 1, 2, -1)
    x = jax.nn.relu(normed(doubled(x, p["TransposedConv_0"]), 4))
    for number in (1, 2):
      x = jax.nn.relu(doubled(x, p[f"TransposedConv_{number}"]))
    return jax.nn.sigmoid(doubled(x, p["TransposedConv_3"]))

  assert_is(autoencoder((16, 32, 3), code_size=5, channels=2), by_hand, (2, 16, 32, 3))


def test_the_layers_are_those_of_infogan_on_svhn():
  model = autoencoder((32, 32, 3))
  expected = """
    c64/4/2@32 c128/4/2@16 n c256/4/2@8 n f128 n f128
    f1792 n t256@2 n t128@4 t64@8 t3@16
  """
  assert layers_of(model, (32, 32, 3)) == expected.split()
  convolutions = sum(16 * i * o + o for i, o in ((3, 64), (64, 128), (128, 256)))
  transposed = sum(16 * i * o + o for i, o in ((448, 256), (256, 128), (128, 64), (64, 3)))
  dense = sum(i * o + o for i, o in ((4096, 128), (128, 128), (128, 1792)))
  norms = 2 * (128 + 256 + 128 + 1792 + 256)
  assert num_parameters(model) == convolutions + transposed + dense + norms == 3_929_987


def test_reconstructions_are_images():
  model = autoencoder((16, 16, 2), code_size=3, channels=2)
  params, state = random_variables(model, "float32")
  images = np.random.default_rng(0).uniform(size=(3, 16, 16, 2)).astype(np.float32)
  reconstructions, _ = jax.jit(functools.partial(model.apply, train=True))(params, state, images)
  assert reconstructions.shape == images.shape
  assert ((reconstructions > 0) & (reconstructions < 1)).all()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 24), (24, 32)])
def test_sides_that_cannot_be_halved_four_times_are_refused(height, width):
  with pytest.raises(ValueError, match=rf"input_shape=\({height}, {width}, 1\); wanted .* multiples of 16"):
    autoencoder((height, width, 1))


def test_sides_may_differ():
  assert jax.eval_shape(autoencoder((48, 16, 1)).init, KEY)
