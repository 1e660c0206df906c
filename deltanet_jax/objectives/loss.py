"""Cross-entropy that never holds the logits of a whole batch."""

import chex
import jax
import jax.numpy as jnp

from deltanet_jax.model import compute_logits
from deltanet_jax.parallel.sharding import split_time_to_rows


def cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  block: int = 128,
) -> jax.Array:
  """Weighted sum of next-token losses in nats.

    total = sum_bt w_bt (log sum_z exp(l_btz) - l_bt,y_bt),   l = hidden head

  hidden [B,T,D]   head [D,Z]   targets [B,T] int   weights [B,T]   -> [] f32

  The time axis, of a device's own span where a mesh splits it, is scanned in
  blocks whose logits [B,block,Z], in float32, are
  made again in the backward pass; the batch axis is left whole, so that it
  stays sharded. `head` is cast to the type of `hidden` inside a block, which
  keeps the sum of its gradient over the blocks in its own type.
  """
  chex.assert_shape([targets, weights], hidden.shape[:2])
  chex.assert_axis_dimension(head, 0, hidden.shape[2])
  hidden, targets, weights = map(split_time_to_rows, (hidden, targets, weights))
  B, T = targets.shape
  C = min(block, T)
  N = -(-T // C)

  def split(x):
    pad = [(0, 0), (0, N * C - T)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(B, N, C, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)  # [N,B,C,...]

  @jax.checkpoint
  def add_block(total, xs):
    return total + _block_loss(*xs, head), None

  # the padding has weight 0
  xs = split(hidden), split(targets), split(weights.astype(jnp.float32))
  return jax.lax.scan(add_block, jnp.float32(0), xs)[0]


def _block_loss(hidden, targets, weights, head):
  logits = compute_logits(hidden, head)
  # a comparison instead of a gather: it stays local when Z is sharded, and its
  # gradient is no scatter
  chosen = targets[..., None] == jnp.arange(head.shape[1])
  picked = jnp.sum(jnp.where(chosen, logits, 0), -1)
  return jnp.sum(weights * (jax.nn.logsumexp(logits, -1) - picked))
