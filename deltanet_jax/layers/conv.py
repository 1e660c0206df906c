"""Short causal depthwise convolution with a state and segment resets."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from deltanet_jax.layers.proj import named


def init_state(batch, taps, channels, dtype):
  """The last W-1 inputs, zero before the first: [B,W-1,*channels]."""
  return jnp.zeros((batch, taps - 1, *channels), dtype)


def _taps(key, shape, dtype=jnp.float32):
  bound = 1 / math.sqrt(shape[0])
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class ShortConv(nn.Module):
  """y_t = sum_d w_{W-1-d} x_{t-d}, d = 0 .. W-1, per channel, without bias.

  x [B,T,*channels]; the weight `taps` [W,*channels] is uniform within
  1/sqrt(W). Inputs before the first are `state` [B,W-1,*channels], or zero
  when it is None; inputs of another segment count as zero. Summed in float32.
  Returns y in x's type and the next state in the old one's, None from None.
  """

  taps: int
  axes: tuple[str, ...]  # of the channels

  @nn.compact
  def __call__(self, x, state=None, segment_ids=None):
    W, (B, T, *channels) = self.taps, x.shape
    w = self.param(
      'taps', named(_taps, ('conv', *self.axes)), (W, *channels), jnp.float32
    )
    past = init_state(B, W, channels, x.dtype) if state is None else state
    padded = jnp.concatenate([past.astype(x.dtype), x], axis=1)
    if segment_ids is not None:
      ids = jnp.pad(segment_ids, ((0, 0), (W - 1, 0)))
    y = jnp.zeros(x.shape, jnp.float32)
    for i in range(W):
      shifted = padded[:, i : i + T].astype(jnp.float32)
      if segment_ids is not None:
        same = ids[:, i : i + T] == segment_ids
        same = same.reshape(B, T, *(1 for _ in channels))
        shifted = jnp.where(same, shifted, 0.0)
      y += w[i] * shifted
    if state is not None:
      state = padded[:, T:].astype(state.dtype)
    return y.astype(x.dtype), state
