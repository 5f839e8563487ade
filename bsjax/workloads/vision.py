"""The image workloads by name: those of the papers, at laptop size and at full size.

Each is a `Recipe`. Those on CIFAR, SVHN and ImageNet were never trained here: shapes and parameter counts are tested, and of some a step, a
probe and an evaluation on random data; their presets are the papers' numbers where a paper has them, else a guess.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

from bsjax.data import chain, flip, scaled_crop, shifted_crop
from bsjax.models import (
  Model,
  cifar_resnet,
  cnn,
  deep,
  f1,
  imagenet_resnet,
  lenet,
  mlp,
  shallow,
  simple_cnn,
  vgg11,
  vit,
  vit_s16,
)
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
RUNNING: dict[str, Any] = {"batch_norm": "running"}

# Mean and standard deviation of each colour, in [0, 1].
CIFAR_COLOURS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_CROPS: dict[str, Any] = {"augment": chain(shifted_crop(4), flip), "standardise": CIFAR_COLOURS}
IMAGENET_CROPS: dict[str, Any] = {
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
    "Keskar et al. (2017), table 1, F1: 784, five layers of 512 with batch norm and ReLU, 10, evaluated with running averages, "
    "so that the loss of one example is defined (their code: with the statistics of whatever batch is given); P = 1,462,794",
    "mnist",
    lambda: f1(MNIST_IMAGE, 10, batch_norm="running"),
    0.97,
    F1,
    RUNNING,
  ),
  "mnist_f1_ghost": Recipe(
    "F1 normalised in ghost batches of 64 in training (Hoffer et al., 2017), so that all batch sizes are normalised alike",
    "mnist",
    lambda: f1(MNIST_IMAGE, 10, batch_norm="running", ghost_size=64),
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
      f"Shallue et al. (2019): fully connected network with ReLU on MNIST, hidden layers {', '.join(map(str, widths))}",
      "mnist",
      functools.partial(mlp, MNIST_IMAGE, widths, 10),
      0.97,
      MNIST,
    )
    for name, widths in FULLY_CONNECTED.items()
  },
  "mnist_simple_cnn": Recipe(
    "Shallue et al. (2019), appendix B, Simple CNN (base): 5x5 convolutions of 32 and 64 channels, each with ReLU and a 2x2 max "
    "pool, a dense layer of 1,024; their target is an error of 1 %; P = 3,274,634",
    "mnist",
    lambda: simple_cnn(MNIST_IMAGE, 10),
    0.97,
    SIMPLE_CNN,
  ),
  "mnist_simple_cnn_narrow": Recipe(
    "Simple CNN (narrow): half of every width, our choice, as theirs was not to be found; P = 821,706",
    "mnist",
    lambda: simple_cnn(MNIST_IMAGE, 10, size="narrow"),
    0.97,
    SIMPLE_CNN,
  ),
  "mnist_simple_cnn_wide": Recipe(
    "Simple CNN (wide): twice every width, our choice, as theirs was not to be found; P = 13,074,186",
    "mnist",
    lambda: simple_cnn(MNIST_IMAGE, 10, size="wide"),
    0.97,
    SIMPLE_CNN,
  ),
  "fashion_simple_cnn": Recipe(
    "Shallue et al. (2019): Simple CNN (base) on Fashion-MNIST; their target is an error of 10 %; P = 3,274,634",
    "fashion_mnist",
    lambda: simple_cnn(MNIST_IMAGE, 10),
    0.9,
    SIMPLE_CNN._replace(num_epochs=10, num_steps=4096),
  ),
  "mnist_dropout_cnn": Recipe(
    "McCandlish et al. (2018), appendix A.4: Simple CNN (base) with dropout 0.4 on the dense layer; P = 3,274,634",
    "mnist",
    lambda: simple_cnn(MNIST_IMAGE, 10, dropout=0.4),
    0.97,
    SIMPLE_CNN,
    {"dropout": True},
  ),
  "mnist_lenet": Recipe(
    "You et al. (2019), table 8: LeNet on MNIST, batches of 1,024, 30 epochs; P = 61,706",
    "mnist",
    lambda: lenet(MNIST_IMAGE, 10),
    0.99,
    MNIST._replace(batch_sizes=(64, 256, 1024, 4096), num_epochs=30, num_steps=1600),
  ),
  "cifar10_c1": Recipe(
    "Keskar et al. (2017), C1 as their code builds it: two 5x5 convolutions, dense 384 and 192, batch norm, dropout; evaluated "
    "with running averages (theirs: with the statistics of the batch); P = 1,757,834",
    "cifar10_all",
    lambda: shallow(CIFAR_IMAGE, 10, batch_norm="running"),
    0.75,
    KESKAR,
    RUNNING | {"dropout": True},
  ),
  "cifar10_c2": Recipe(
    "Keskar et al. (2017), C2 as their code builds it: thirteen 3x3 convolutions, dense 512, batch norm, dropout; evaluated with "
    "running averages (theirs: with the statistics of the batch); P = 14,991,946",
    "cifar10_all",
    lambda: deep(CIFAR_IMAGE, 10, batch_norm="running"),
    0.85,
    KESKAR,
    RUNNING | {"dropout": True},
  ),
  "cifar100_c3": Recipe(
    "Keskar et al. (2017), C3: C1 with 100 classes; P = 1,775,204",
    "cifar100_all",
    lambda: shallow(CIFAR_IMAGE, 100, batch_norm="running"),
    0.45,
    KESKAR,
    RUNNING | {"dropout": True},
  ),
  "cifar100_c4": Recipe(
    "Keskar et al. (2017), C4: C2 with 100 classes; P = 15,038,116",
    "cifar100_all",
    lambda: deep(CIFAR_IMAGE, 100, batch_norm="running"),
    0.55,
    KESKAR,
    RUNNING | {"dropout": True},
  ),
  "cifar10_resnet8": Recipe(
    "Shallue et al. (2019): ResNet-8 on CIFAR-10; their target is an error of 30 %; P = 75,290",
    "cifar10",
    lambda: cifar_resnet(CIFAR_IMAGE, 10, depth=8),
    0.7,
    CIFAR,
    RUNNING | CIFAR_CROPS,
  ),
  "cifar10_resnet32": Recipe(
    "McCandlish et al. (2018): ResNet-32 (He et al., 2016) on CIFAR-10; P = 467,194",
    "cifar10",
    lambda: cifar_resnet(CIFAR_IMAGE, 10, depth=32, shortcut="project"),
    0.9,
    CIFAR,
    RUNNING | CIFAR_CROPS,
  ),
  "svhn_dropout_cnn": Recipe(
    "McCandlish et al. (2018): the network of mnist_dropout_cnn on SVHN's extended training set; P = 4,259,274",
    "svhn_extra",
    lambda: simple_cnn(CIFAR_IMAGE, 10, dropout=0.4),
    0.9,
    CIFAR,
    {"dropout": True},
  ),
  "imagenet_resnet50": Recipe(
    "Goyal et al. (2017): ResNet-50, last gamma of a block zero, batch norm over the global batch (theirs: in ghost batches of "
    "32), weight decay by the optimizer; P = 25,557,032",
    "imagenet2012_all",
    lambda: imagenet_resnet(IMAGENET_IMAGE, 1000),
    0.75,
    GOYAL,
    RUNNING | IMAGENET_CROPS,
  ),
  "imagenet_resnet50_ghost": Recipe(
    "Goyal et al. (2017), with their batch norm: in ghost batches of 32 at every batch size; P = 25,557,032",
    "imagenet2012_all",
    lambda: imagenet_resnet(IMAGENET_IMAGE, 1000, ghost_size=32),
    0.75,
    GOYAL,
    RUNNING | IMAGENET_CROPS,
  ),
  "imagenet_vgg11": Recipe(
    "Shallue et al. (2019): VGG-11; their target is an error of 35 %; P = 132,863,336",
    "imagenet2012",
    lambda: vgg11(IMAGENET_IMAGE, 1000),
    0.65,
    GOYAL._replace(base_learning_rate=0.01),
    IMAGENET_CROPS | {"dropout": True},
  ),
  "imagenet_vit_s16": Recipe(
    "ViT-S/16 (Dosovitskiy et al., 2021), for advice on pre-training and fine-tuning; P = 22,045,288",
    "imagenet2012",
    vit_s16,
    0.75,
    GOYAL._replace(base_learning_rate=0.001),
    IMAGENET_CROPS,
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
