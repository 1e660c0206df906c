"""Softmax attention with grouped heads; causal, window and segment masks."""

import jax
import jax.numpy as jnp


def visible(
  query_positions,
  key_positions,
  *,
  window=None,
  query_segments=None,
  key_segments=None,
):
  """Which keys each query sees: [B,T,S] bool.

  query_positions [B,T], key_positions [B,S] (index along the sequence, not
  the rotary position), segments likewise or None. A query sees the keys at or
  before it, at most `window` of them, in its own segment.
  """
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  seen = distance >= 0
  if window is not None:
    seen &= distance < window
  if query_segments is not None:
    seen &= query_segments[:, :, None] == key_segments[:, None, :]
  return seen


def attention(q, k, v, mask, *, scale):
  """o_t = sum_s softmax_s(scale q_t' k_s) v_s over the keys `mask` shows.

  q [B,T,H,K], k [B,S,J,K], v [B,S,J,V], H a multiple of J, mask [B,T,S]
  bool with at least one key per query. Softmax in float32. Returns [B,T,H,V].
  """
  V, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
  # the library wants one width; zero channels change neither score nor value
  q, k, v = (
    x
    if x.shape[-1] == width
    else jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),))
    for x in (q, k, v)
  )
  o = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
  return o[..., :V]
