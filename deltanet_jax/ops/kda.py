"""Kimi Delta Attention: the delta rule with a decay per key channel."""

import jax
import jax.numpy as jnp

from deltanet_jax.ops.scan import token_scan


def step(q, k, v, beta, g, erase, state):
  """One token: beta [B,H] or [B,H,V], g [B,H,K], erase None or [B,H,K]."""
  G = v.shape[1] // q.shape[1]
  f32 = lambda x: x.astype(jnp.float32)
  q, k = (jnp.repeat(f32(x), G, axis=1) for x in (q, k))
  beta = f32(beta) if beta.ndim == v.ndim else f32(beta)[..., None]
  erased = (beta if erase is None else f32(erase)) * k
  state = jnp.exp(f32(g))[..., None] * state
  u = beta * f32(v) - jnp.einsum('bhk,bhkv->bhv', erased, state)
  state = state + jnp.einsum('bhk,bhv->bhkv', k, u)
  return jnp.einsum('bhk,bhkv->bhv', q, state).astype(v.dtype), state


def recurrent(
  q, k, v, beta, g, *, erase=None, state=None, segment_ids=None
):
  if state is None:
    state = jnp.zeros((*v.shape[:1], v.shape[2], q.shape[3], v.shape[3]))
  return token_scan(step, (q, k, v, beta, g, erase), state, segment_ids)


FORMS = {'recurrent': recurrent, 'associative': recurrent, 'chunked': recurrent}
