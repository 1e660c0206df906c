"""Linear attention with no, constant or per-token scalar decay."""

import jax
import jax.numpy as jnp

from deltanet_jax.ops.scan import token_scan


def step(q, k, v, g, state):
  G = v.shape[1] // q.shape[1]
  f32 = lambda x: x.astype(jnp.float32)
  q, k = (jnp.repeat(f32(x), G, axis=1) for x in (q, k))
  if g is not None:
    state = jnp.exp(f32(g))[..., None, None] * state
  state = state + jnp.einsum('bhk,bhv->bhkv', k, f32(v))
  return jnp.einsum('bhk,bhkv->bhv', q, state).astype(v.dtype), state


def recurrent(q, k, v, g, *, state=None, segment_ids=None):
  if state is None:
    state = jnp.zeros((*v.shape[:1], v.shape[2], q.shape[3], v.shape[3]))
  return token_scan(step, (q, k, v, g), state, segment_ids)


def normalised(rule, q, k, v, *, state=None, segment_ids=None, **kwargs):
  """o_t = q_t' S_t / (q_t' z_t): the normaliser z is one more value channel."""
  ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
  o, state = rule(
    q, k, jnp.concatenate([v, ones], -1), None,
    state=state, segment_ids=segment_ids, **kwargs,
  )
  return o[..., :-1] / o[..., -1:], state


FORMS = {'recurrent': recurrent, 'associative': recurrent, 'chunked': recurrent}
