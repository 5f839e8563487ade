"""A language model with one layer of long short-term memory, as McCandlish et al. (2018) and Shallue et al. (2019) trained on LM1B."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bsjax.models.model import Model
from bsjax.models.tokens import Logits, make_token_model
from bsjax.types import Array, Key

BILLION_WORD_LSTMS: dict[str, dict[str, Any]] = {
  "512": {"width": 512, "embedding": 256},
  "1024": {"width": 1024, "embedding": 512},
  "2048": {"width": 2048, "embedding": 512},
}
"""The size study of McCandlish et al. (2018), appendix A.4, as arguments of `lstm`; they take 40,000 tokens and sequences of 20, and "2048"
is their main one. They give embeddings of 512 there and of 256 in the smallest; we take 512 in the middle. The sizes of the LSTM of
Shallue et al. (2019) on LM1B are in no source that we have: we take "2048" for it too."""


def lstm(
  vocab_size: int, length: int, *, width: int = 128, embedding: int = 128, dtype: DTypeLike | None = None
) -> Model:
  """Builds a causal language model: token embedding, one LSTM layer that starts each sequence from zeros, logits of the next token.

  With x_t the embedding of token t, h_-1 = c_-1 = 0 and s the logistic function,

      (i, f, g, o) = x_t W_input + h_{t-1} W_recurrent + b            4 blocks of `width` columns, in this order
      c_t = s(f) c_{t-1} + s(i) tanh(g),        h_t = s(o) tanh(c_t),        logits_t = h_t W_logits + b_logits

  The map of all x_t is one product before the loop over t, a `jax.lax.scan` that holds W_recurrent only.

  Args:
    vocab_size: Number of tokens, V.
    length: Tokens per sequence, L; all sequences have it.
    width: Units of the layer, W.
    embedding: Entries of a token's embedding.
    dtype: What is computed in, for example `jnp.bfloat16`; by default the parameters' dtype. Parameters, the cell state c and the
      logits are float32 all the same.

  Returns:
    A model whose `apply(params, model_state, tokens i32[B, L], *, train)` gives `(logits f32[B, L, V], model_state)`; the
    state is an empty dict and `train` changes nothing.

  Holds: the logits at position t depend on tokens 0 to t only. A token of `vocab_size` or above makes the logits of its and all
  later positions NaN. Per-example gradient norms (`bsjax.probes.ghost_norms`) need no per-example gradients: the recurrent kernel is
  a dense layer applied at L positions, g = sum_t h_{t-1} d_t'.

  Source: Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), no peepholes, one layer, no dropout and a state
  that is reset, as in McCandlish et al. (2018), appendix A.4. Neither paper tells how it starts. Here embeddings are normal with variance 1
  and kernels LeCun normal (variance 1 / fan-in), so that the inputs' share of a gate has variance 1; biases are zero but for the
  forget gates', which start at 1 so that c is kept (Jozefowicz et al., 2015, section 2.2).
  """
  return make_token_model(_Lstm(vocab_size, width, embedding, dtype), length)


def _forget_bias(key: Key, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
  """Makes the biases (i, f, g, o) = (0, 1, 0, 0)."""
  del key
  return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)


class _Recurrence(nn.Module):
  """The loop over time, from the inputs' share of the gates to h, `f[B, L, 4 W] -> f[B, L, W]`; parameter `kernel` `[W, 4 W]`."""

  @nn.compact
  def __call__(self, gates: Array) -> Array:
    batch, _, columns = gates.shape
    width = columns // 4
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, columns)).astype(gates.dtype)

    def step(state: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
      hidden, cell = state
      i, f, g, o = jnp.split(inputs + hidden @ kernel, 4, axis=-1)
      cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
      hidden = (nn.sigmoid(o) * jnp.tanh(cell)).astype(hidden.dtype)
      return (hidden, cell), hidden

    start = (
      jnp.zeros((batch, width), gates.dtype),
      jnp.zeros((batch, width), jnp.promote_types(gates.dtype, jnp.float32)),
    )
    return jax.lax.scan(step, start, gates.swapaxes(0, 1))[1].swapaxes(0, 1)


class _Lstm(nn.Module):
  vocab_size: int
  width: int
  embedding: int
  dtype: DTypeLike | None

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    embed = nn.Embed(
      self.vocab_size, self.embedding, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype, name="tokens"
    )
    gates = nn.Dense(4 * self.width, bias_init=_forget_bias, dtype=self.dtype, name="input")(embed(tokens))
    return Logits(self.vocab_size, name="logits")(_Recurrence(name="recurrent")(gates))
