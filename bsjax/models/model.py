"""A network as a pair of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsjax.types import Array, Key, ModelState, Variables


class Model(NamedTuple):
  """A network as two pure functions.

  `init(key) -> Variables(params, model_state)`; it may be jitted, and vmapped over keys.

  `apply(params, model_state, inputs, *, train, key=None) -> (outputs, new_model_state)`: of a classifier, `images f32[B, *input_shape]`,
  already scaled, become `logits f32[B, classes]`. `train` normalises with the moments of the batch, where the network has batch norm, and
  drops units out, where it has dropout, by `key`. The state comes back unchanged when `train` is false, and is an empty dict for a network
  without batch norm.
  """

  init: Callable[[Key], Variables]
  apply: Callable[..., tuple[Array, ModelState]]


def make_model(network: nn.Module, input_shape: tuple[int, ...]) -> Model:
  """Turns a module called as `network(images, train)` into a `Model`."""

  @jax.jit
  def init(key: Key) -> Variables:
    variables = network.init(key, jnp.zeros((1, *input_shape)), False)
    return Variables(variables["params"], variables.get("batch_stats", {}))

  def apply(
    params: Any, model_state: ModelState, images: Array, *, train: bool, key: Key | None = None
  ) -> tuple[Array, ModelState]:
    if images.shape[1:] != input_shape or not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f"images are {images.dtype}{list(images.shape)}; wanted floats of shape [B, {', '.join(map(str, input_shape))}]: "
        "scale integers and add the batch axis first."
      )
    variables = {"params": params, "batch_stats": model_state}
    rngs = {} if key is None else {"dropout": key}
    logits, updated = network.apply(variables, images, train, mutable=["batch_stats"], rngs=rngs)
    return logits, updated["batch_stats"] if train else model_state

  return Model(init, apply)
