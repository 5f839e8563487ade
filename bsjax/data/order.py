"""The order of examples, as a pure function of (key, step).

An endless stream runs through the data set epoch after epoch, each epoch in a fresh permutation. Step `t` of batch size B
reads positions `t B .. t B + B - 1` of that stream. Nothing is remembered between steps, so resuming at any step equals
never having stopped, and two batch sizes under one key read the very same stream.
"""

import math

import jax
import jax.numpy as jnp

from bsjax.types import Array, Key

_MAX_NUM_EXAMPLES = (2**31 - 1) // 3


def epoch_permutation(key: Key, epoch: int | Array, num_examples: int) -> Array:
  """Return the order of one epoch: a uniform permutation of 0..N-1 from `fold_in(key, epoch)`.

  Args:
    key: names the whole stream; may be traced.
    epoch: which pass over the data, from 0; may be traced.
    num_examples: N, static.

  Returns:
    i32[N].
  """
  return jax.random.permutation(jax.random.fold_in(key, epoch), jnp.arange(num_examples, dtype=jnp.int32))


def segment_indices(
  key: Key,
  first_step: int | Array,
  *,
  num_steps: int,
  batch_size: int,
  num_examples: int,
  num_read: int | Array | None = None,
) -> Array:
  """Return which examples the steps `first_step .. first_step + num_steps - 1` read.

  With N = `num_examples`, B = `batch_size` and position `p = t B + j`, entry (t - first_step, j) is

      epoch_permutation(key, p // N, N)[p % N].

  Args:
    key: names the stream; may be traced.
    first_step: i32[], from 0; may be traced.
    num_steps: K, static.
    batch_size: B, static, at most N.
    num_examples: N, static.
    num_read: i32[], how many of the steps, the first, will be read: what else a permutation would be drawn for stays 0. May be traced;
      None: all.

  Returns:
    i32[K, B].

  Raises:
    ValueError: B > N, a size below one, or sizes whose products leave 32 bits.

  Holds: every example is read exactly once per epoch, a batch may span two epochs, nothing is dropped; the result does not
  depend on how the steps are cut into segments. Cost: a permutation for each epoch that is read,
  at most ceil(K B / N) + 1. Steps are 32-bit: `first_step + num_steps` must stay below 2**31; `first_step * B` may be larger than that.
  """
  check_sizes(num_steps, batch_size, num_examples)
  length = num_steps * batch_size
  # Offsets are multiples of gcd(B, N), so the last possible one is N - gcd(B, N): full-batch steps never span two epochs.
  num_epochs = (num_examples - math.gcd(batch_size, num_examples) + length - 1) // num_examples + 1
  if num_epochs * num_examples >= 2**31:
    raise ValueError(f"{num_steps=} of {batch_size=} are more than 32-bit positions allow; cut the segment in pieces.")

  first_epoch, offset = _divmod_product(first_step, batch_size, num_examples)
  wanted = length if num_read is None else num_read * batch_size
  needed = (offset + wanted + num_examples - 1) // num_examples  # often one epoch less than fits

  def draw(epoch: Array, stream: Array) -> Array:
    return stream.at[epoch].set(epoch_permutation(key, first_epoch + epoch, num_examples))

  stream = jax.lax.fori_loop(0, needed, draw, jnp.zeros((num_epochs, num_examples), jnp.int32)).reshape(-1)
  return jax.lax.dynamic_slice_in_dim(stream, offset, length).reshape(num_steps, batch_size)


def independent_indices(
  key: Key, first_step: int | Array, *, num_steps: int, batch_size: int, num_examples: int
) -> Array:
  """Return which examples the steps read if every batch is drawn anew, each example with replacement.

  The sampling that theories of stochastic gradients assume: batches of different steps are independent, and there are no epochs.
  Arguments and result as of `segment_indices`; step t depends on `fold_in(key, t)` alone.
  """

  def draw(step: Array) -> Array:
    return jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, num_examples, jnp.int32)

  return jax.vmap(draw)(first_step + jnp.arange(num_steps, dtype=jnp.int32))


def check_sizes(num_steps: int, batch_size: int, num_examples: int) -> None:
  """Refuses sizes of which there is no order.

  Raises:
    ValueError: a size below one, a batch larger than the data set, or a data set beyond 32-bit positions.
  """
  if min(num_steps, batch_size, num_examples) < 1:
    raise ValueError(f"{num_steps=}, {batch_size=}, {num_examples=}: all must be at least 1.")
  if batch_size > num_examples:
    raise ValueError(
      f"{batch_size=} is larger than the data set of {num_examples} examples; use {num_examples} or less."
    )
  if num_examples > _MAX_NUM_EXAMPLES:
    raise ValueError(f"{num_examples=} is more than 32-bit positions allow; use {_MAX_NUM_EXAMPLES} or fewer.")


def _divmod_product(step: int | Array, factor: int, modulus: int) -> tuple[Array, Array]:
  """Return `divmod(step * factor, modulus)` in 32 bits though the product may need 62.

  Multiplies bit by bit of `factor`, highest first, and carries whole multiples of `modulus` into the quotient, so that no
  intermediate exceeds 3 `modulus`. The quotient fits because `factor <= modulus`.
  """
  whole, rest = jnp.divmod(jnp.asarray(step, jnp.int32), jnp.int32(modulus))
  quotient, remainder = jnp.zeros_like(rest), jnp.zeros_like(rest)
  for bit in bin(factor)[2:]:
    carry, remainder = jnp.divmod(2 * remainder + int(bit) * rest, jnp.int32(modulus))
    quotient = 2 * quotient + carry
  return whole * factor + quotient, remainder
