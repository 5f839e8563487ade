"""Two small transformers of pre-LayerNorm blocks: a classifier of image patches and a causal language model.

Both stack the block of Vaswani et al. (2017), section 3, with each LayerNorm moved to the input of its branch and one more at
the end, as Dosovitskiy et al. (2021), equations 2 to 4, write it:

  x <- x + attention(LN(x)),        x <- x + mlp(LN(x)),        mlp(x) = W_2 gelu(W_1 x)

With a `dtype` such as `jnp.bfloat16` products and sums are computed in it; parameters, the moments of LayerNorm, the softmax of the
attention and the logits are float32 all the same.

Differences from both papers: no dropout, and positions are learned in the language model too. Kernels start LeCun normal
(variance 1 / fan-in), biases at zero; gelu is its tanh approximation; LayerNorm adds 1e-6 to a variance taken by centring.
Every parameter enters one dense map, gather, product or sum per use, which is all that per-example gradient norms need to know.

Shape letters: B examples, L tokens, W width, H heads, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from bsjax.models.model import Model, make_model
from bsjax.models.tokens import Logits, make_token_model, token_logits
from bsjax.types import Array

PATCH_POSITION_STD = 0.5
"""Deviation of the initial positions of `vit`, near that of a patch's map. The code of Dosovitskiy et al. (2021) has 0.02 (the
paper does not say); but a blank patch is its position alone, which LayerNorm would then magnify fifty times. On the digits
(SGD, batches of 32, 640 steps, two seeds at the best of three rates) validation accuracy came to 0.97 and 0.98 from 0.5, to
0.93 and 0.92 from 0.02."""

TRANSFORMERS: dict[str, dict[str, Any]] = {
  "base": {"width": 512, "depth": 6, "num_heads": 8, "mlp_ratio": 4},
  "shallow": {"width": 512, "depth": 2, "num_heads": 8, "mlp_ratio": 4},
  "narrow_and_shallow": {"width": 256, "depth": 2, "num_heads": 4, "mlp_ratio": 4},
  "wide": {"width": 1024, "depth": 6, "num_heads": 16, "mlp_ratio": 4},
}
"""The transformers of Shallue et al. (2019) on LM1B, as arguments of `language_model`. We know their names, not their sizes: "base" is
the decoder of the base model of Vaswani et al. (2017, table 3), "wide" has the widths of their big one (feed-forward layers of 4,096);
"shallow" keeps two blocks of base and "narrow_and_shallow" half of their width, by our choice. All have heads of 64 entries."""


def vit(
  input_shape: Sequence[int],
  num_classes: int,
  *,
  patch_size: int = 2,
  width: int = 32,
  depth: int = 2,
  num_heads: int = 2,
  mlp_ratio: int = 2,
  dtype: DTypeLike | None = None,
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
    dtype: What is computed in; see the top of this file. By default the parameters' dtype.

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
  return make_model(_Vit(num_classes, patch_size, width, depth, num_heads, mlp_ratio, dtype), tuple(input_shape))


def vit_s16(
  input_shape: Sequence[int] = (224, 224, 3), num_classes: int = 1000, *, dtype: DTypeLike | None = None
) -> Model:
  """Builds ViT-S/16: patches of 16x16 pixels, 12 blocks of width 384, 6 heads, a feed-forward layer of 1,536.

  At the sizes of ImageNet it has 22,045,288 parameters. The published model with a class token has 22,050,664: 768 more for the class
  token and its position, and 4,608 for the biases of the keys, which change no output (`vit`).

  Source: Steiner et al. (2022), table 2, for the sizes; `vit` for what else differs, the scale of the positions among it.
  """
  return vit(input_shape, num_classes, patch_size=16, width=384, depth=12, num_heads=6, mlp_ratio=4, dtype=dtype)


def language_model(
  vocab_size: int,
  length: int,
  *,
  width: int = 128,
  depth: int = 2,
  num_heads: int = 4,
  mlp_ratio: int = 4,
  tie_embeddings: bool = True,
  dtype: DTypeLike | None = None,
) -> Model:
  """Builds a causal decoder: token embedding plus learned position, `depth` blocks, LayerNorm, logits of the next token.

  The logits at position t depend on tokens 0 to t only, so `length` predictions are trained by one pass. The defaults are a small
  decoder for bytes; `TRANSFORMERS` has the sizes of Shallue et al. (2019).

  Args:
    vocab_size: Number of tokens, V.
    length: Tokens per sequence, L; all sequences have it.
    width: Entries per token, W; `num_heads` divides it.
    depth: Number of blocks.
    num_heads: Heads of `width / num_heads` entries each.
    mlp_ratio: Hidden units of a block's perceptron, in widths.
    tie_embeddings: Whether the logits are the inner products with the token embeddings, `logits = LN(x) E'`: one table
      used twice. Otherwise a dense layer with bias.
    dtype: What is computed in; see the top of this file. By default the parameters' dtype.

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
  return make_token_model(_LanguageModel(vocab_size, width, depth, num_heads, mlp_ratio, tie_embeddings, dtype), length)


def _check_heads(width: int, num_heads: int) -> None:
  if width % num_heads:
    raise ValueError(f"num_heads={num_heads} does not divide width={width}; use a width that is a multiple of it.")


def _layer_norm(dtype: DTypeLike | None) -> nn.LayerNorm:
  """Makes a LayerNorm over the last axis with scale and bias; the variance is centred, not E[x^2] - E[x]^2."""
  return nn.LayerNorm(use_fast_variance=False, dtype=dtype)


class _Positions(nn.Module):
  """Adds a learned vector to each position, `f[B, L, W] -> f[B, L, W]`; parameter `embedding` `[L, W]`, normal at first."""

  std: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    embedding = self.param("embedding", nn.initializers.normal(self.std), x.shape[1:])
    return x + embedding.astype(x.dtype)[None]


class _Attention(nn.Module):
  """Multi-head self-attention, softmax(Q K' / sqrt(W / H)) V per head, then a dense map, `f[B, L, W] -> f[B, L, W]`.

  Vaswani et al. (2017), equation 1 and section 3.2.2. A causal one gives weight to no later token. The dense maps have
  biases but for the keys' one: it would add the same number to all scores of a query, which the softmax cancels, and be a
  parameter without a gradient.
  """

  num_heads: int
  causal: bool
  dtype: DTypeLike | None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    *_, length, width = x.shape
    head_width = width // self.num_heads

    def heads(flat: Array) -> Array:
      return flat.reshape(-1, length, self.num_heads, head_width)

    query = heads(nn.Dense(width, dtype=self.dtype, name="query")(x))
    key = heads(nn.Dense(width, use_bias=False, dtype=self.dtype, name="key")(x))
    value = heads(nn.Dense(width, dtype=self.dtype, name="value")(x))
    # Not jax.nn.dot_product_attention: its softmax is float32 in a float64 network too.
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(head_width)
    if self.causal:
      scores = jnp.where(jnp.tri(length, dtype=bool)[None, None], scores, -jnp.inf)
    weights = nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    return nn.Dense(width, dtype=self.dtype, name="out")(mixed.reshape(x.shape))


class _Block(nn.Module):
  """A pre-LayerNorm block, `f[B, L, W] -> f[B, L, W]`."""

  num_heads: int
  mlp_ratio: int
  causal: bool
  dtype: DTypeLike | None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    attention = _Attention(self.num_heads, self.causal, self.dtype, name="attention")
    x = x + attention(_layer_norm(self.dtype)(x))
    hidden = nn.gelu(nn.Dense(self.mlp_ratio * width, dtype=self.dtype)(_layer_norm(self.dtype)(x)))
    return x + nn.Dense(width, dtype=self.dtype)(hidden)


class _Vit(nn.Module):
  num_classes: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_ratio: int
  dtype: DTypeLike | None

  @nn.compact
  def __call__(self, images: Array, train: bool) -> Array:
    del train
    x = nn.Dense(self.width, dtype=self.dtype, name="patches")(_patches(images, self.patch_size))
    x = _Positions(PATCH_POSITION_STD, name="positions")(x)
    for number in range(self.depth):
      x = _Block(self.num_heads, self.mlp_ratio, causal=False, dtype=self.dtype, name=f"Block_{number}")(x)
    pooled = jnp.mean(_layer_norm(self.dtype)(x), axis=1)
    return nn.Dense(self.num_classes, name="logits")(pooled)


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
  dtype: DTypeLike | None

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="tokens")
    x = _Positions(self.width**-0.5, name="positions")(embed(tokens))
    for number in range(self.depth):
      x = _Block(self.num_heads, self.mlp_ratio, causal=True, dtype=self.dtype, name=f"Block_{number}")(x)
    x = _layer_norm(self.dtype)(x)
    return token_logits(x, embed.embedding.T) if self.tie_embeddings else Logits(self.vocab_size, name="logits")(x)
