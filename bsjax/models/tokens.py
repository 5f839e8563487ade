"""What the networks over tokens share: the pair of functions around them, and the map to their logits."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsjax.models.model import Model
from bsjax.types import Array, Key, ModelState, Variables


def make_token_model(network: nn.Module, length: int) -> Model:
  """Turns a module called as `network(tokens)` into a `Model` of sequences of `length` tokens, without state or dropout."""

  @jax.jit
  def init(key: Key) -> Variables:
    return Variables(network.init(key, jnp.zeros((1, length), jnp.int32))["params"], {})

  def apply(
    params: Any, model_state: ModelState, tokens: Array, *, train: bool, key: Key | None = None
  ) -> tuple[Array, ModelState]:
    del train, key  # no dropout, no batch norm
    if tokens.shape[1:] != (length,) or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(
        f"tokens are {tokens.dtype}{list(tokens.shape)}; wanted integers of shape [B, {length}]: "
        f"cut sequences into pieces of length={length} and add the batch axis first."
      )
    logits: Any = network.apply({"params": params}, tokens)
    return logits, model_state

  return Model(init, apply)


class Logits(nn.Module):
  """A dense layer to the logits of the vocabulary, `f[B, L, W] -> f[B, L, V]`; LeCun normal kernel, zero bias; see `token_logits`."""

  vocab_size: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.vocab_size))
    bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
    return token_logits(x, kernel) + bias[None, None]


def token_logits(x: Array, kernel: Array) -> Array:
  """Multiplies `x f[B, L, W]` with `kernel f32[W, V]` in the dtype of `x`, adding up in float32 at least: the dtype of the result."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum("blw,wv->blv", x, kernel.astype(x.dtype), preferred_element_type=dtype)
