"""Softmax attention on NVIDIA GPUs by cuDNN, `jax.nn.dot_product_attention`.

cuDNN has one width for queries, keys and values, a multiple of 8: narrower ones
are filled up with zeros, values of 128 beside keys of 192 to 192; and odd rows
with a token. Documents are a mask [B,1,T,T] for it, in q's type, which has a
gradient: 4 B T^2 bytes in all, that a row of one document does not need.
"""

import jax
import jax.extend
import jax.numpy as jnp

from deltanet_jax.kernels.guard import differentiate_once
from deltanet_jax.ops.attention import Place, causal_mask

WIDEST = 256  # 128 before Hopper, says cuDNN where it is so
LONGEST_MASK = 4096  # for 'auto', with documents: 64 MiB a row


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None,
  *,
  scale: float,
  window: int | None = None,
) -> jax.Array:
  """As `kernels.attention.attend_rows`; segments [B,T] are those of `Place`."""
  B, T = q.shape[:2]
  if not B * T:
    return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype)
  V, width = v.shape[3], max(k.shape[3], v.shape[3])
  tokens, channels = T % 2, -width % 8
  if segments is not None:
    segments = jnp.pad(segments, ((0, 0), (0, tokens)), mode='edge')

  def fill(x):
    more = channels + width - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, more)))

  def attend(q, k, v, segments):
    how = {'is_causal': True}
    if segments is not None:
      index = jnp.arange(T + tokens)
      # cuDNN takes no window beside a mask
      mask = causal_mask(Place(index, segments), Place(index, segments), window)
      how['mask'] = mask[:, None]
    elif window is not None:
      how['local_window_size'] = window - 1, 0
    try:
      return jax.nn.dot_product_attention(
        q, k, v, scale=scale, implementation='cudnn', **how
      )
    except (NotImplementedError, RuntimeError) as error:
      says = str(error).rstrip('.')
      raise ValueError(f"form 'cudnn': {says}; take form='blocks'") from error

  o = differentiate_once(
    attend,
    *map(fill, (q, k, v)),
    segments,
    form='cudnn',
    instead='blocks',
    platform='cuda',
  )
  return o[:, :T, :, :V]


def lacks(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
  """What is not covered, and what to give; None: nothing."""
  types = {str(x.dtype) for x in (q, k, v)}
  if len(types) > 1 or not types <= {'bfloat16', 'float16'}:
    return (
      f'q, k, v of {", ".join(sorted(types))}; give all three in bfloat16 or in'
      ' float16'
    )
  width = max(k.shape[3], v.shape[3])
  return f'{width} channels; give {WIDEST} at most' if width > WIDEST else None


def covers(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> bool:
  """Whether the form 'auto' is cuDNN on this machine's GPUs."""
  if lacks(q, k, v) or (segments is not None and q.shape[1] > LONGEST_MASK):
    return False
  wide = max(k.shape[3], v.shape[3]) > 128
  return find_capability() >= (9.0 if wide else 8.0)


def find_capability() -> float:
  """The compute capability of the GPUs: 8.0 is Ampere, 9.0 Hopper; 0.0 where
  they are not NVIDIA's."""
  if 'cuda' not in jax.extend.backend.get_backend().platform_version:
    return 0.0
  return min(float(device.compute_capability) for device in jax.local_devices())
