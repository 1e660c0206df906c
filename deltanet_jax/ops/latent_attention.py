"""Multi-head latent attention (arXiv:2405.04434 sec. 2.1), in two forms.

    k_s,h = [c_s k_b_h | r_s]    v_s,h = c_s v_b_h
    o_t,h = sum_s softmax_s(scale q_t,h' k_s,h) v_s,h

  q [B,T,H,K+P]   c: latent [B,S,R]   r: key [B,S,P], one for all heads
  k_b [R,H,K]   v_b [R,H,V]   mask [B,T,S] bool, a key for every query

`expand` makes k and v, `absorbed` does without them; o is [B,T,H,V].
"""

import jax
import jax.numpy as jnp

from deltanet_jax.ops.attention import attention
from deltanet_jax.ops.shapes import check_shapes


def expand(
  latent: jax.Array, key: jax.Array, k_b: jax.Array, v_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Every head's keys [B,S,H,K+P] and values: fewest products where many
  queries meet them, in `attention.attend`."""
  check_shapes(
    latent=(latent, 'BSR'),
    key=(key, 'BSP'),
    k_b=(k_b, 'RHK'),
    v_b=(v_b, 'RHV'),
  )
  k = jnp.einsum('BSR,RHK->BSHK', latent, k_b.astype(latent.dtype))
  v = jnp.einsum('BSR,RHV->BSHV', latent, v_b.astype(latent.dtype))
  shared = jnp.broadcast_to(key[:, :, None], (*k.shape[:3], key.shape[-1]))
  return jnp.concatenate([k, shared], -1), v


def absorbed(
  q: jax.Array,
  latent: jax.Array,
  key: jax.Array,
  k_b: jax.Array,
  v_b: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Moves k_b to the query and v_b behind the sum: one key [R+P] and one value
  [R] serve all heads, so that decoding reads the cache as it lies."""
  check_shapes(
    q=(q, 'BTHQ'),
    latent=(latent, 'BSR'),
    key=(key, 'BSP'),
    k_b=(k_b, 'RHK'),
    v_b=(v_b, 'RHV'),
  )
  k = jnp.concatenate([latent, key], -1)[:, :, None]
  o = attention(absorb(q, k_b), k, latent[:, :, None], mask, scale=scale)
  return release(o, v_b)


def absorb(q: jax.Array, k_b: jax.Array) -> jax.Array:
  """[q k_b' | rest]: queries [B,T,H,R+P] of the latents and shared keys."""
  check_shapes(q=(q, 'BTHQ'), k_b=(k_b, 'RHK'))
  K = k_b.shape[2]
  moved = jnp.einsum('BTHK,RHK->BTHR', q[..., :K], k_b.astype(q.dtype))
  return jnp.concatenate([moved, q[..., K:]], -1)


def release(o: jax.Array, v_b: jax.Array) -> jax.Array:
  """Values [B,T,H,V] of attended latents o [B,T,H,R]."""
  check_shapes(o=(o, 'BTHR'), v_b=(v_b, 'RHV'))
  return jnp.einsum('BTHR,RHV->BTHV', o, v_b.astype(o.dtype))
