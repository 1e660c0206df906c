"""Short causal depthwise convolution with a state and segment resets."""

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
  """The last W-1 inputs, zero before the first: [B,W-1,*channels]."""
  return jnp.zeros((batch, taps - 1, *channels), dtype)


def _taps(key, shape, dtype=jnp.float32):
  bound = 1 / math.sqrt(shape[0])
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class ShortConv(nn.Module):
  """y_t = sum_d w_{W-1-d} x_{t-d}, d = 0 .. W-1, per channel, without bias.

  x [B,T,*channels]; the weight `taps` [W,*channels] is uniform within
  1/sqrt(W). Inputs before the first are `state` [B,W-1,*channels], or zero
  when it is None; inputs of another document, a run of equal segment_ids
  [B,T], count as zero. Summed in float32.
  Returns y in x's type and the next state in the old one's, None from None:
  the last W-1 inputs of each row's first `lengths` [B], of all T when None.
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
    run = number_segments(segment_ids)
    if state is None and sequence.is_split(T, least=W - 1):
      y = sequence.run_with_past(
        convolve, w, (None, *self.axes), x, self.axes, run, W - 1
      )
      return y, None
    past = init_state(B, W, channels, x.dtype) if state is None else state
    past = past.astype(x.dtype)
    before = None if run is None else jnp.zeros((B, W - 1), run.dtype)
    y = convolve(w, x, past, run, before)
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
  run: jax.Array | None,
  past_run: jax.Array | None,
) -> jax.Array:
  """The sum above for inputs x [B,T,*channels] after past [B,W-1,*channels];
  the number of their document in the row [B,T] and [B,W-1], or None for
  both."""
  W, (B, T, *channels) = w.shape[0], x.shape
  padded = jnp.concatenate([past, x], axis=1)
  if run is not None and past_run is not None:
    runs = jnp.concatenate([past_run, run], axis=1)
  y = jnp.zeros(x.shape, jnp.float32)
  for i in range(W):
    shifted = padded[:, i : i + T].astype(jnp.float32)
    if run is not None:
      same = runs[:, i : i + T] == run
      same = same.reshape(B, T, *(1 for _ in channels))
      shifted = jnp.where(same, shifted, 0.0)
    y += w[i][None, None] * shifted
  return y.astype(x.dtype)
