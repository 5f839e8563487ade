"""The image workloads by name: those of the papers, at laptop size and at full size.

Each is a `Recipe`. Those on CIFAR, SVHN and ImageNet were never trained here: shapes and parameter counts are tested, and a step, a probe
and an evaluation on random data; their presets are the papers' numbers where a paper has them, else a guess.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

from bsjax.data import chain, flip, scaled_crop, shifted_crop
from bsjax.models import Model, cnn, mlp, vit
from bsjax.workloads.classification import classification
from bsjax.workloads.splits import DataOptions
from bsjax.workloads.workload import Preset, Target, Workload


class Recipe(NamedTuple):
  """A named image workload."""

  about: str
  """What it is, where it comes from, its number of parameters P."""
  dataset: str
  model: Callable[[], Model]
  goal: float
  """Of the target: validation accuracy."""
  preset: Preset
  options: Mapping[str, Any] = {}
  """Further arguments of `classification`."""


DIGIT_IMAGE, MNIST_IMAGE, CIFAR_IMAGE, IMAGENET_IMAGE = (8, 8, 1), (28, 28, 1), (32, 32, 3), (224, 224, 3)
RUNNING: Mapping[str, Any] = {"batch_norm": "running"}

# Mean and standard deviation of each colour, in [0, 1].
CIFAR_COLOURS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_CROPS: Mapping[str, Any] = {"augment": chain(shifted_crop(4), flip), "standardise": CIFAR_COLOURS}
IMAGENET_CROPS: Mapping[str, Any] = {
  "augment": chain(scaled_crop(224), flip),
  "standardise": IMAGENET_COLOURS,
  "crop": 224,
}

DIGITS = Preset(batch_sizes=tuple(2**k for k in range(11)), base_learning_rate=0.2, num_epochs=32, num_steps=1024)
FEW_DIGITS = DIGITS._replace(num_rates=3, tuning_seeds=2, final_seeds=3)
MNIST = Preset(
  batch_sizes=tuple(2**k for k in range(5, 13)),
  base_learning_rate=0.1,
  num_epochs=2,
  num_steps=512,
  num_rates=3,
  tuning_seeds=2,
  final_seeds=3,
)
F1 = MNIST._replace(batch_sizes=(64, 256, 1024, 4096), base_learning_rate=0.05, reference_batch_size=256, num_steps=256)
SIMPLE_CNN = MNIST._replace(
  batch_sizes=(16, 64, 256, 1024), base_learning_rate=0.05, reference_batch_size=64, num_steps=128, final_seeds=2
)
# Keskar et al. (2017): 256 against a tenth of CIFAR, 100 epochs in figure 4, five trials. They train by Adam: the rate is a guess for SGD.
KESKAR = Preset((64, 256, 1024, 5000), 0.05, reference_batch_size=256, num_epochs=100, num_steps=19_600)
# Shallue et al. (2019): all powers of two; budgets and rate are guesses.
CIFAR = Preset(tuple(2**k for k in range(1, 14)), 0.1, reference_batch_size=128, num_epochs=50, num_steps=20_000)
# Goyal et al. (2017), section 5.1: 0.1 at 256, 90 epochs, five runs each.
GOYAL = Preset(
  tuple(2**k for k in range(8, 17)),
  0.1,
  reference_batch_size=256,
  num_epochs=90,
  num_steps=450_000,
  num_rates=3,
  tuning_seeds=1,
)


def simple_cnn(width: float = 1.0) -> Model:
  """Builds Shallue et al.'s Simple CNN, with every width times `width`."""
  channels, units = (round(32 * width), round(64 * width)), round(1024 * width)
  return cnn(MNIST_IMAGE, 10, channels=channels, kernel_size=5, pool_every=1, widths=(units,))


SMALL = {
  "digits_mlp": Recipe(
    "64-64-10 network with ReLU on the 1,797 digits of 8x8 pixels, 1,024 to train on; P = 4,810",
    "digits",
    lambda: mlp(DIGIT_IMAGE, (64,), 10),
    0.95,
    DIGITS,
    {"pixel_max": 16.0},
  ),
  "digits_cnn": Recipe(
    "two 3x3 convolutions, one pool and a dense layer on the digits; P = 9,930",
    "digits",
    lambda: cnn(DIGIT_IMAGE, 10),
    0.95,
    FEW_DIGITS._replace(batch_sizes=tuple(2**k for k in range(2, 11, 2)), num_epochs=4, num_steps=128),
    {"pixel_max": 16.0},
  ),
  "digits_vit": Recipe(
    "two transformer blocks over the 16 patches of 2x2 pixels of the digits, width 32 and two heads; P = 18,090",
    "digits",
    lambda: vit(DIGIT_IMAGE, 10),
    0.9,
    FEW_DIGITS._replace(batch_sizes=(4, 16, 64, 256), base_learning_rate=0.1, num_epochs=8, num_steps=256),
    {"pixel_max": 16.0},
  ),
  "mnist_mlp": Recipe(
    "784-64-10 network with ReLU on MNIST, 55,000 to train on (Shallue et al.'s split); P = 50,890",
    "mnist",
    lambda: mlp(MNIST_IMAGE, (64,), 10),
    0.95,
    MNIST,
  ),
  "mnist_f1": Recipe(
    "Keskar et al. (2017), table 1, F1: 784, five layers of 512 with batch norm and ReLU, 10, evaluated with running averages, so that "
    "the loss of one example is defined (their code: with the statistics of whatever batch is given); P = 1,462,794",
    "mnist",
    lambda: mlp(MNIST_IMAGE, (512,) * 5, 10, batch_norm="running"),
    0.97,
    F1,
    RUNNING,
  ),
  "mnist_f1_ghost": Recipe(
    "F1 normalised in ghost batches of 64 in training (Hoffer et al., 2017), so that all batch sizes are normalised alike",
    "mnist",
    lambda: mlp(MNIST_IMAGE, (512,) * 5, 10, batch_norm="running", ghost_size=64),
    0.97,
    F1,
    RUNNING,
  ),
}

FULLY_CONNECTED = {
  "1024": (1024,),
  "1024_1024": (1024,) * 2,
  "1024x3": (1024,) * 3,
  "2048x3": (2048,) * 3,
  "512x3": (512,) * 3,
  "256x3": (256,) * 3,
  "128x3": (128,) * 3,
  "64x3": (64,) * 3,
}
"""Shallue et al.'s networks on MNIST, by the end of their names."""

PAPERS = {
  **{
    f"mnist_fc_{name}": Recipe(
      f"Shallue et al. (2019), fully connected network with ReLU, hidden layers {', '.join(map(str, widths))}",
      "mnist",
      functools.partial(mlp, MNIST_IMAGE, widths, 10),
      0.97,
      MNIST,
    )
    for name, widths in FULLY_CONNECTED.items()
  },
  "mnist_simple_cnn": Recipe(
    "Shallue et al. (2019), appendix B, Simple CNN (base): 5x5 convolutions of 32 and 64 channels, each with ReLU and a 2x2 max pool, "
    "a dense layer of 1,024; their target is an error of 1 %; P = 3,274,634",
    "mnist",
    simple_cnn,
    0.97,
    SIMPLE_CNN,
  ),
  "mnist_simple_cnn_narrow": Recipe(
    "Simple CNN (narrow): half of every width, our choice, as theirs was not to be found; P = 821,706",
    "mnist",
    lambda: simple_cnn(0.5),
    0.97,
    SIMPLE_CNN,
  ),
  "mnist_simple_cnn_wide": Recipe(
    "Simple CNN (wide): twice every width, our choice, as theirs was not to be found; P = 13,100,170",
    "mnist",
    lambda: simple_cnn(2.0),
    0.97,
    SIMPLE_CNN,
  ),
}

RECIPES: Mapping[str, Recipe] = SMALL | PAPERS


def vision_workload(name: str, **data: Unpack[DataOptions]) -> Workload:
  """Makes the image workload called `name`, one of `RECIPES`."""
  recipe = RECIPES[name]
  target = Target("validation_accuracy", recipe.goal, "max")
  return classification(
    name, recipe.dataset, recipe.model(), target=target, preset=recipe.preset, **recipe.options, **data
  )
