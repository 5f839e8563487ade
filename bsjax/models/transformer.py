"""Two small transformers of pre-LayerNorm blocks: a classifier of image patches and a causal language model.

Both stack the block of Vaswani et al. (2017), section 3, with each LayerNorm moved to the input of its branch and one more at
the end, as Dosovitskiy et al. (2021), equations 2 to 4, write it:

  x <- x + attention(LN(x)),        x <- x + mlp(LN(x)),        mlp(x) = W_2 gelu(W_1 x)

Differences from both papers: no dropout, and positions are learned in the language model too. Kernels start LeCun normal
(variance 1 / fan-in), biases at zero; gelu is its tanh approximation; LayerNorm adds 1e-6 to a variance taken by centring.
Every parameter enters one dense map, gather, product or sum per use, which is all that per-example gradient norms need to know.

Shape letters: B examples, L tokens, W width, H heads, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsjax.models.model import Model, make_model
from bsjax.types import Array, Key, ModelState, Variables

PATCH_POSITION_STD = 0.5
"""Deviation of the initial positions of `vit`, near that of a patch's map. The code of Dosovitskiy et al. (2021) has 0.02 (the
paper does not say); but a blank patch is its position alone, which LayerNorm would then magnify fifty times. On the digits
(SGD, batches of 32, 640 steps, two seeds at the best of three rates) validation accuracy came to 0.97 and 0.98 from 0.5, to
0.93 and 0.92 from 0.02."""


def vit(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  patch_size: int = 2,
  width: int = 32,
  depth: int = 2,
  num_heads: int = 2,
  mlp_ratio: int = 2,
) -> Model:
  """Builds a vision transformer: a dense map of each patch, plus a learned position, `depth` blocks, LayerNorm, the mean over
  tokens, a dense layer to the logits.

  Patches are squares read row by row, as are the pixels in one. The defaults are meant for 8x8 digits: L = 16 tokens.

  Args:
    input_shape: `(height, width, channels)`; `patch_size` divides the first two.
    num_classes: Number of logits.
    patch_size: Side of a patch in pixels; attention costs `L^2 W`, with `L = height width / patch_size^2`.
    width: Entries per token, W; `num_heads` divides it.
    depth: Number of blocks.
    num_heads: Heads of `width / num_heads` entries each.
    mlp_ratio: Hidden units of a block's perceptron, in widths.

  Raises:
    ValueError: If a division named above leaves a remainder, or `input_shape` has not three entries.

  Source: Dosovitskiy et al. (2021), equations 1 to 4. They prepend a class token and classify from it; here, the mean over
  tokens is classified, which saves the token and its position (their appendix D.3 finds the two equal with a rate tuned for
  each). Their classifier is a perceptron with a hidden layer in pre-training; here it is one layer, that starts LeCun normal.
  """
  if len(input_shape) != 3 or input_shape[0] % patch_size or input_shape[1] % patch_size:
    raise ValueError(
      f"vit got input_shape={tuple(input_shape)} and patch_size={patch_size}; wanted (height, width, channels) with height "
      "and width multiples of patch_size: choose a patch_size that divides both."
    )
  _check_heads(width, num_heads)
  return make_model(_Vit(num_classes, patch_size, width, depth, num_heads, mlp_ratio), tuple(input_shape))


def language_model(
  vocab_size: int,
  length: int,
  *,
  width: int = 128,
  depth: int = 2,
  num_heads: int = 4,
  mlp_ratio: int = 4,
  tie_embeddings: bool = True,
) -> Model:
  """Builds a causal decoder: token embedding plus learned position, `depth` blocks, LayerNorm, logits of the next token.

  The logits at position t depend on tokens 0 to t only, so `length` predictions are trained by one pass.

  Args:
    vocab_size: Number of tokens, V.
    length: Tokens per sequence, L; all sequences have it.
    width: Entries per token, W; `num_heads` divides it.
    depth: Number of blocks.
    num_heads: Heads of `width / num_heads` entries each.
    mlp_ratio: Hidden units of a block's perceptron, in widths.
    tie_embeddings: Whether the logits are the inner products with the token embeddings, `logits = LN(x) E'`: one table
      used twice. Otherwise a dense layer with bias.

  Returns:
    A model whose `apply(params, model_state, tokens i32[B, L], *, train)` gives `(logits f32[B, L, V], model_state)`; the
    state is an empty dict and `train` changes nothing.

  Raises:
    ValueError: If `num_heads` does not divide `width`.

  Holds: a token of `vocab_size` or above makes its whole sequence NaN, never the logits of another token.

  Source: the decoder of Vaswani et al. (2017), section 3, without its attention to an encoder; Press and Wolf (2017) for the
  tied table. Vaswani et al. multiply embeddings by sqrt(W) on the way in and use fixed sinusoids; here both tables start
  normal with variance 1 / W, which gives tied logits of unit variance, and neither is multiplied.
  """
  _check_heads(width, num_heads)
  network = _LanguageModel(vocab_size, width, depth, num_heads, mlp_ratio, tie_embeddings)

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


def _check_heads(width: int, num_heads: int) -> None:
  if width % num_heads:
    raise ValueError(f"num_heads={num_heads} does not divide width={width}; use a width that is a multiple of it.")


def _layer_norm() -> nn.LayerNorm:
  """Makes a LayerNorm over the last axis with scale and bias; the variance is centred, not E[x^2] - E[x]^2."""
  return nn.LayerNorm(use_fast_variance=False)


class _Positions(nn.Module):
  """Adds a learned vector to each position, `f[B, L, W] -> f[B, L, W]`; parameter `embedding` `[L, W]`, normal at first."""

  std: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    embedding = self.param("embedding", nn.initializers.normal(self.std), x.shape[1:])
    return x + embedding[None]


class _Attention(nn.Module):
  """Multi-head self-attention, softmax(Q K' / sqrt(W / H)) V per head, then a dense map, `f[B, L, W] -> f[B, L, W]`.

  Vaswani et al. (2017), equation 1 and section 3.2.2. A causal one gives weight to no later token. The dense maps have
  biases but for the keys' one: it would add the same number to all scores of a query, which the softmax cancels, and be a
  parameter without a gradient.
  """

  num_heads: int
  causal: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    *_, length, width = x.shape
    head_width = width // self.num_heads

    def heads(flat: Array) -> Array:
      return flat.reshape(-1, length, self.num_heads, head_width)

    query = heads(nn.Dense(width, name="query")(x))
    key = heads(nn.Dense(width, use_bias=False, name="key")(x))
    value = heads(nn.Dense(width, name="value")(x))
    # Not jax.nn.dot_product_attention: its softmax is float32 in a float64 network too.
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(head_width)
    if self.causal:
      scores = jnp.where(jnp.tri(length, dtype=bool)[None, None], scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
    return nn.Dense(width, name="out")(mixed.reshape(x.shape))


class _Block(nn.Module):
  """A pre-LayerNorm block, `f[B, L, W] -> f[B, L, W]`."""

  num_heads: int
  mlp_ratio: int
  causal: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    x = x + _Attention(self.num_heads, self.causal, name="attention")(_layer_norm()(x))
    hidden = nn.gelu(nn.Dense(self.mlp_ratio * width)(_layer_norm()(x)))
    return x + nn.Dense(width)(hidden)


class _Vit(nn.Module):
  num_classes: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_ratio: int

  @nn.compact
  def __call__(self, images: Array, train: bool) -> Array:
    del train
    x = nn.Dense(self.width, name="patches")(_patches(images, self.patch_size))
    x = _Positions(PATCH_POSITION_STD, name="positions")(x)
    for number in range(self.depth):
      x = _Block(self.num_heads, self.mlp_ratio, causal=False, name=f"Block_{number}")(x)
    return nn.Dense(self.num_classes, name="logits")(jnp.mean(_layer_norm()(x), axis=1))


def _patches(images: Array, size: int) -> Array:
  """Cuts images into squares, `f[B, H, W, C] -> f[B, (H / size) (W / size), size size C]`, row by row."""
  batch, height, width, channels = images.shape
  grid = images.reshape(batch, height // size, size, width // size, size, channels)
  return grid.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


class _LanguageModel(nn.Module):
  vocab_size: int
  width: int
  depth: int
  num_heads: int
  mlp_ratio: int
  tie_embeddings: bool

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    embed = nn.Embed(self.vocab_size, self.width, name="tokens")
    x = _Positions(self.width**-0.5, name="positions")(embed(tokens))
    for number in range(self.depth):
      x = _Block(self.num_heads, self.mlp_ratio, causal=True, name=f"Block_{number}")(x)
    x = _layer_norm()(x)
    return embed.attend(x) if self.tie_embeddings else nn.Dense(self.vocab_size, name="logits")(x)
