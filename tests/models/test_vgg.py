"""VGG-11: configuration A, its parameter count, and images of any size."""

import jax.nn
from by_hand import assert_is, convolved, layers_of, mapped, num_parameters, pooled

from bsjax.models import vgg11


def test_configuration_a_on_imagenet():
  model = vgg11((224, 224, 3), 1000)
  assert num_parameters(model) == 132_863_336
  expected = """
    c64/3/1@224  c128/3/1@112  c256/3/1@56 c256/3/1@56  c512/3/1@28 c512/3/1@28  c512/3/1@14 c512/3/1@14
    f4096 d0.5 f4096 d0.5 f1000
  """
  assert layers_of(model, (224, 224, 3)) == expected.split()


def test_small_images_lose_the_pools_that_would_leave_nothing():
  def by_hand(p, state, x):
    number = 0
    # 11x9 -> 5x4 -> 2x2 -> 1x1
    for convolutions, pool in ((1, True), (1, True), (2, True), (2, False), (2, False)):
      for _ in range(convolutions):
        x = jax.nn.relu(convolved(x, p[f"Conv_{number}"]))
        number += 1
      x = pooled(x) if pool else x
    for layer in range(2):
      x = jax.nn.relu(mapped(x, p[f"Dense_{layer}"]))
    return mapped(x, p["Dense_2"])

  assert_is(vgg11((11, 9, 2), 3, channels=2, widths=(6, 5)), by_hand, (3, 11, 9, 2))


def test_batch_norm_follows_each_convolution():
  words = layers_of(vgg11((8, 8, 1), 2, channels=1, widths=(3,), batch_norm="running"), (8, 8, 1))
  assert [word[0] for word in words] == ["c", "n"] * 8 + ["f", "d", "f"]
