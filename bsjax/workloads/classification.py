"""Image classification: a data set and a network become a `Workload`."""

import jax
import jax.numpy as jnp
import optax

from bsjax.data import load_source
from bsjax.models import Model, cnn, mlp, vit
from bsjax.types import Array, Batch, Example, Key, Metrics, ModelState, Params
from bsjax.workloads.workload import BatchNorm, Preset, Target, Workload, mean_train_loss

DIGITS_PRESET = Preset(
  batch_sizes=tuple(2**k for k in range(11)),
  base_learning_rate=0.2,
  num_epochs=32,
  num_steps=1024,
)
MNIST_PRESET = Preset(
  batch_sizes=tuple(2**k for k in range(5, 13)),
  base_learning_rate=0.1,
  num_epochs=2,
  num_steps=512,
  num_rates=3,
  tuning_seeds=2,
  final_seeds=3,
)
MNIST_F1_PRESET = MNIST_PRESET._replace(
  batch_sizes=(64, 256, 1024, 4096), base_learning_rate=0.05, reference_batch_size=256, num_steps=256, final_seeds=3
)
SIMPLE_CNN_PRESET = MNIST_PRESET._replace(
  batch_sizes=(16, 64, 256, 1024), base_learning_rate=0.05, reference_batch_size=64, num_steps=128, final_seeds=2
)


def classification(
  name: str,
  dataset: str,
  model: Model,
  *,
  pixel_max: float,
  target: Target,
  preset: Preset,
  batch_norm: BatchNorm = "none",
  data_dir: str | None = None,
  manual_dir: str | None = None,
) -> Workload:
  """Builds a workload with mean softmax cross-entropy (natural logarithm) over integer labels.

  Pixels stay unsigned bytes on the device and become f32 in [0, 1] (divided by `pixel_max`) inside the loss.
  """

  def scaled(images: Array) -> Array:
    return images.astype(jnp.float32) / pixel_max

  def example_logits(params: Params, model_state: ModelState, example: Example) -> Array:
    logits, _ = model.apply(params, model_state, scaled(example["image"])[None], train=False)
    return logits[0]

  def output_loss(logits: Array, example: Example) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

  def example_loss(params: Params, model_state: ModelState, example: Example) -> Array:
    return output_loss(example_logits(params, model_state, example), example)

  def example_metrics(params: Params, model_state: ModelState, example: Example) -> Metrics:
    logits = example_logits(params, model_state, example)
    return {
      "loss": output_loss(logits, example),
      "accuracy": (jnp.argmax(logits) == example["label"]).astype(jnp.float32),
    }

  def batch_loss(params: Params, model_state: ModelState, batch: Batch, key: Key) -> tuple[Array, ModelState]:
    logits, new_model_state = model.apply(params, model_state, scaled(batch["image"]), train=True, key=key)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])), new_model_state

  train, validation, test = (
    load_source(dataset, split, data_dir=data_dir, manual_dir=manual_dir) for split in ("train", "validation", "test")
  )
  return Workload(
    name=name,
    init=jax.jit(model.init),
    example_loss=example_loss,
    train_loss=mean_train_loss(example_loss) if batch_norm == "none" else batch_loss,
    example_metrics=example_metrics,
    train=train,
    validation=validation,
    test=test,
    target=target,
    preset=preset,
    batch_norm=batch_norm,
    example_outputs=example_logits,
    output_loss=output_loss,
  )


def digits_mlp(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """64-64-10 network with ReLU on the 1,797 digits of 8x8 pixels (1,024 to train on); P = 4,810."""
  return classification(
    "digits_mlp",
    "digits",
    mlp((8, 8, 1), (64,), 10),
    pixel_max=16.0,
    target=Target("validation_accuracy", 0.95, "max"),
    preset=DIGITS_PRESET,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def digits_cnn(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """Two 3x3 convolutions, one pooling and a dense layer on the digits."""
  return classification(
    "digits_cnn",
    "digits",
    cnn((8, 8, 1), 10),
    pixel_max=16.0,
    target=Target("validation_accuracy", 0.95, "max"),
    preset=DIGITS_PRESET._replace(
      batch_sizes=tuple(2**k for k in range(2, 11, 2)),
      num_epochs=4,
      num_steps=128,
      num_rates=3,
      tuning_seeds=2,
      final_seeds=3,
    ),
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def digits_vit(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """Two transformer blocks over the 16 patches of 2x2 pixels of the digits, width 32 and two heads; P = 18,090."""
  return classification(
    "digits_vit",
    "digits",
    vit((8, 8, 1), 10),
    pixel_max=16.0,
    target=Target("validation_accuracy", 0.9, "max"),
    preset=DIGITS_PRESET._replace(
      batch_sizes=(4, 16, 64, 256),
      base_learning_rate=0.1,
      num_epochs=8,
      num_steps=256,
      num_rates=3,
      tuning_seeds=2,
      final_seeds=3,
    ),
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def mnist_mlp(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """784-64-10 network with ReLU on MNIST (55,000 to train on, Shallue et al.'s split); P = 50,890."""
  return classification(
    "mnist_mlp",
    "mnist",
    mlp((28, 28, 1), (64,), 10),
    pixel_max=255.0,
    target=Target("validation_accuracy", 0.95, "max"),
    preset=MNIST_PRESET,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def mnist_simple_cnn(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """Shallue et al. (2019), appendix B, Simple CNN (base): 5x5 convolutions of 32 and 64 channels, each with ReLU and a 2x2 max pool, a
  dense layer of 1,024; P = 3,274,634. Their target on MNIST is an error of 1 %."""
  return classification(
    "mnist_simple_cnn",
    "mnist",
    cnn((28, 28, 1), 10, channels=(32, 64), kernel_size=5, pool_every=1, widths=(1024,)),
    pixel_max=255.0,
    target=Target("validation_accuracy", 0.97, "max"),
    preset=SIMPLE_CNN_PRESET,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def mnist_simple_cnn_narrow(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """Simple CNN (narrow): as `mnist_simple_cnn` with half of every width, 16 and 32 channels and 512 units; P = 821,706. The widths are our
  choice: those of Shallue et al. were not to be found."""
  return classification(
    "mnist_simple_cnn_narrow",
    "mnist",
    cnn((28, 28, 1), 10, channels=(16, 32), kernel_size=5, pool_every=1, widths=(512,)),
    pixel_max=255.0,
    target=Target("validation_accuracy", 0.97, "max"),
    preset=SIMPLE_CNN_PRESET,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def mnist_f1(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """Keskar et al. (2017), Table 1, F1: 784, five layers of 512 with batch norm and ReLU, 10; P = 1,462,794.

  Differs from the released code in evaluating with running averages (batch norm "running"), so that the loss of one
  example is defined; theirs uses the statistics of whatever batch it is given, at test time too.
  """
  return classification(
    "mnist_f1",
    "mnist",
    mlp((28, 28, 1), (512,) * 5, 10, batch_norm="running"),
    pixel_max=255.0,
    target=Target("validation_accuracy", 0.97, "max"),
    preset=MNIST_F1_PRESET,
    batch_norm="running",
    data_dir=data_dir,
    manual_dir=manual_dir,
  )


def mnist_f1_ghost(data_dir: str | None = None, manual_dir: str | None = None) -> Workload:
  """F1 as `mnist_f1`, normalised in ghost batches of 64 in training (Hoffer et al., 2017), so that all batch sizes are normalised alike."""
  return classification(
    "mnist_f1_ghost",
    "mnist",
    mlp((28, 28, 1), (512,) * 5, 10, batch_norm="running", ghost_size=64),
    pixel_max=255.0,
    target=Target("validation_accuracy", 0.97, "max"),
    preset=MNIST_F1_PRESET,
    batch_norm="running",
    data_dir=data_dir,
    manual_dir=manual_dir,
  )
