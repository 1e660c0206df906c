"""Softmax attention on TPUs by splash attention, a Pallas kernel of jax.

`jax.experimental.pallas.ops.tpu.splash_attention` computes o = softmax(q k^T) v
of one row in blocks, as `ops.attention.attend` does, with keys and values of
any widths. Here are the scale, rows filled up to whole blocks, and the mask.

Two differences to `attend`: scale q is rounded to q's type, and what is kept
for the backward pass is m + log l in one float32, so that p has an error of
6e-8 times the largest score.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
  splash_attention_mask as masks,
  splash_attention_mask_info as mask_info,
)

from deltanet_jax.kernels.guard import differentiate_once
from deltanet_jax.kernels.tpu import interpret

F32 = jnp.float32
LANES = 128
BLOCK = 512  # at most, of queries and of keys
WIDEST = 512
# tables of pairs of blocks must fit in the chip's scalar memory
LONGEST = 262_144


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
  B, T, H = q.shape[:3]
  if not B * T:
    return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype)
  count = -(-T // BLOCK)
  block = LANES * -(-T // (LANES * count))
  # no query sees the padding, which comes after it
  fill = lambda x, **mode: jnp.pad(
    x, ((0, 0), (0, count * block - T)) + ((0, 0),) * (x.ndim - 2), **mode
  )
  q = (scale * q.astype(F32)).astype(q.dtype)
  q, k, v = (jnp.swapaxes(fill(x), 1, 2) for x in (q, k, v))
  if segments is not None:
    segments = fill(segments, mode='edge')
  kernel = _make_kernel(H, count, block, window, bool(interpret.value))

  def attend(q, k, v, segments):
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    return jax.vmap(kernel)(q, k, v, ids)

  o = differentiate_once(
    attend,
    q,
    k,
    v,
    segments,
    form='splash',
    instead='blocks',
    platform=None if interpret.value else 'tpu',
    # float32 operands are not rounded; the kernel has 'default' for bfloat16
    precision='highest' if q.dtype == F32 else 'default',
  )
  return jnp.swapaxes(o, 1, 2)[:, :T]


def lacks(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
  """What is not covered, and what to give; None: nothing."""
  types = {str(x.dtype) for x in (q, k, v)}
  if len(types) > 1 or not types <= {'bfloat16', 'float32'}:
    return (
      f'q, k, v of {", ".join(sorted(types))}; give all three in bfloat16 or in'
      ' float32'
    )
  for name, size, most in (
    ('channels', max(k.shape[3], v.shape[3]), WIDEST),
    ('tokens', q.shape[1], LONGEST),
  ):
    if size > most:
      return f'{size} {name}; give {most} at most'
  return None


def covers(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> bool:
  """Whether the form 'auto' is splash attention."""
  del segments
  return lacks(q, k, v) is None


@dataclasses.dataclass(frozen=True)
class _Mask(masks.Mask):
  """`ops.attention.visible` of a row. The masks of the library compare all
  pairs of tokens while a program is made: 25 s for 65,536 tokens."""

  tokens: int
  window: int | None

  @property
  def shape(self):
    return self.tokens, self.tokens

  @property
  def q_sequence(self):
    return np.arange(self.tokens, dtype=np.int32)

  def mask_function(self, queries, keys):
    distance = queries - keys
    seen = distance >= 0
    return seen if self.window is None else seen & (distance < self.window)

  def __getitem__(self, block):
    queries, keys = (np.arange(part.start, part.stop) for part in block)
    nearest, farthest = queries[0] - keys[-1], queries[-1] - keys[0]
    ends = self.mask_function(np.array([[nearest, farthest]]), 0)
    before = self.window is not None and nearest >= self.window
    if ends.all() or farthest < 0 or before:
      return ends
    return self.mask_function(queries[:, None], keys)


@functools.lru_cache(64)
def _make_kernel(heads, count, block, window, interpreted):
  """Splash attention of a row of `count` blocks. Its tables are numpy arrays,
  so that nothing is run, on devices of a mesh, while a program is made."""
  mask = masks.MultiHeadMask([_Mask(count * block, window)] * heads)
  queries, function = mask_info.process_mask(mask, (block, block))
  keys, _ = mask_info.process_mask_dkv(mask, (block, block))
  return splash.SplashAttentionKernel(
    queries,
    queries,
    keys,
    block_sizes=splash.BlockSizes(*[block] * 8),
    is_mqa=False,
    save_residuals=False,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    mask_function=function,
    interpret=interpreted,
  )
