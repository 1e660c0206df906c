"""Delta rule, plain (g=None) and gated (arXiv:2412.06464)."""

import jax
import jax.numpy as jnp

from deltanet_jax.ops.scan import token_scan


def step(q, k, v, beta, g, state):
  """One token: q, k [B,J,K], v [B,H,V], beta, g [B,H], state [B,H,K,V] f32."""
  G = v.shape[1] // q.shape[1]
  f32 = lambda x: x.astype(jnp.float32)
  q, k = (jnp.repeat(f32(x), G, axis=1) for x in (q, k))
  if g is not None:
    state = jnp.exp(f32(g))[..., None, None] * state
  u = f32(beta)[..., None] * (f32(v) - jnp.einsum('bhk,bhkv->bhv', k, state))
  state = state + jnp.einsum('bhk,bhv->bhkv', k, u)
  return jnp.einsum('bhk,bhkv->bhv', q, state).astype(v.dtype), state


def recurrent(q, k, v, beta, g, *, state=None, segment_ids=None):
  if state is None:
    state = jnp.zeros((*v.shape[:1], v.shape[2], q.shape[3], v.shape[3]))
  return token_scan(step, (q, k, v, beta, g), state, segment_ids)


FORMS = {'recurrent': recurrent, 'associative': recurrent, 'chunked': recurrent}
