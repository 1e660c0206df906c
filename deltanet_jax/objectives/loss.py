"""Cross-entropy in blocks, without the logits of a whole batch in memory."""

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
  """Weighted sum of next-token losses in nats, [] float32.

    total = sum_bt w_bt (log sum_z exp(l_btz) - l_bt,y_bt),   l = hidden head

  hidden [B,T,D]   head [D,Z]   targets [B,T] int   weights [B,T]

  The time axis (of each device's span where a mesh splits it) is scanned in
  blocks. The float32 logits [B,block,Z] of a block are recomputed in the
  backward pass. The batch axis is not cut, so that it stays sharded. `head` is
  cast to the type of `hidden` inside a block, so that its gradient is summed
  over blocks in its own type.
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
  # a comparison, not a gather: it needs no communication when Z is sharded, and
  # its gradient is no scatter
  chosen = targets[..., None] == jnp.arange(head.shape[1])
  picked = jnp.sum(jnp.where(chosen, logits, 0), -1)
  return jnp.sum(weights * (jax.nn.logsumexp(logits, -1) - picked))
