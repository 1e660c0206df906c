"""Short causal depthwise convolution, with a state and packed documents."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.layers.proj import name_axes
from deltanet_jax.ops.documents import number_segments
from deltanet_jax.parallel import sequence


def init_state(
  batch: int, taps: int, channels: Sequence[int], dtype: DTypeLike
) -> jax.Array:
  """The state before the first input: zeros [B,W-1,*channels]."""
  return jnp.zeros((batch, taps - 1, *channels), dtype)


def _taps(key, shape, dtype=jnp.float32):
  bound = 1 / math.sqrt(shape[0])
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class ShortConv(nn.Module):
  """y_t = sum_d w_{W-1-d} x_{t-d}, d = 0 .. W-1, per channel, without bias.

  x [B,T,*channels]; the weight `taps` [W,*channels] is initialized uniformly
  within 1/sqrt(W).
  state [B,W-1,*channels]: the inputs before the first; None: zeros
  segment_ids [B,T]: inputs of another document, a run of equal ids, are zero
  lengths [B]: the tokens of each row, the rest is padding; None: all T

  Returns y in x's type, summed in float32, and the next state in the old one's
  type: the last W-1 inputs of each row, None for None.
  """

  taps: int
  axes: tuple[str, ...]  # of the channels

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    W, (B, T, *channels) = self.taps, x.shape
    w = self.param(
      'taps',
      name_axes(_taps, ('conv', *self.axes)),
      (W, *channels),
      jnp.float32,
    )
    segments = number_segments(segment_ids)
    if state is None and sequence.is_split(T, least=W - 1):
      y = sequence.run_with_past(
        convolve, w, (None, *self.axes), x, self.axes, segments, W - 1
      )
      return y, None
    past = init_state(B, W, channels, x.dtype) if state is None else state
    past = past.astype(x.dtype)
    before = None if segments is None else jnp.zeros((B, W - 1), jnp.int32)
    y = convolve(w, x, past, segments, before)
    if state is not None:
      inputs = jnp.concatenate([past, x], 1)
      last = inputs[:, T:] if lengths is None else _window(inputs, lengths, W)
      state = last.astype(state.dtype)
    return y, state


def _window(inputs, first, W):
  """W-1 of each row's inputs from `first` [B] on."""
  cut = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, W - 1)
  return jax.vmap(cut)(inputs, first)


def convolve(
  w: jax.Array,
  x: jax.Array,
  past: jax.Array,
  segments: jax.Array | None,
  past_segments: jax.Array | None,
) -> jax.Array:
  """The sum of `ShortConv` for x [B,T,*channels] after past [B,W-1,*channels];
  their segments' numbers are [B,T] and [B,W-1], or both None."""
  W, (B, T, *channels) = w.shape[0], x.shape
  padded = jnp.concatenate([past, x], axis=1)
  if segments is not None and past_segments is not None:
    padded_segments = jnp.concatenate([past_segments, segments], axis=1)
  y = jnp.zeros(x.shape, jnp.float32)
  for i in range(W):
    shifted = padded[:, i : i + T].astype(jnp.float32)
    if segments is not None:
      same = padded_segments[:, i : i + T] == segments
      same = same.reshape(B, T, *(1 for _ in channels))
      shifted = jnp.where(same, shifted, 0.0)
    y += w[i][None, None] * shifted
  return y.astype(x.dtype)
