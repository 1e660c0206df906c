"""What the recurrences share: the token scan and segment boundaries."""

import jax
import jax.numpy as jnp


def token_scan(step, inputs, state, segment_ids):
  """Runs `step(*token, state) -> (o, state)` over time.

  inputs: arrays [B,T,...] or None, one token of each goes to `step`.
  state [B,H,K,V] f32 belongs to the first token's segment; it is zero again
  wherever segment_ids [B,T] change. Returns o [B,T,H,V] and the last state.
  """
  T = next(x for x in inputs if x is not None).shape[1]
  fresh = None
  if segment_ids is not None:
    first = jnp.zeros_like(segment_ids[:, :1], bool)
    fresh = jnp.concatenate(
      [first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )

  def body(state, token):
    xs, fresh = token
    if fresh is not None:
      state = jnp.where(fresh[:, None, None, None], 0.0, state)
    o, state = step(*xs, state)
    return state, o

  time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, fresh))
  state, o = jax.lax.scan(body, state, time_first, length=T)
  return jnp.moveaxis(o, 0, 1), state
