"""Multi-head latent attention (arXiv:2405.04434 sec. 2.1), in two forms.

    k_s,h = [c_s k_b_h | r_s]    v_s,h = c_s v_b_h
    o_t,h = sum_s softmax_s(scale q_t,h^T k_s,h) v_s,h

  q [B,T,H,K+P]   c: latent [B,S,R]   r: key [B,S,P], one for all heads
  k_b [R,H,K]   v_b [R,H,V]   mask [B,T,S] bool, a key or more for every query

`expand` computes k and v; `absorbed` computes o [B,T,H,V] without them.
"""

import jax
import jax.numpy as jnp

from deltanet_jax.ops.attention import attention
from deltanet_jax.ops.shapes import check_shapes


def expand(
  latent: jax.Array, key: jax.Array, k_b: jax.Array, v_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Every head's keys [B,S,H,K+P] and values [B,S,H,V] for `attention.attend`:
  the cheaper form for many queries."""
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
  """Attention with k_b applied to the queries and v_b to the outputs: one key
  [R+P] and one value [R] serve all heads, as the cache holds them."""
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
  """[q k_b^T | rest of q] [B,T,H,R+P]: queries of the latents and shared
  keys."""
  check_shapes(q=(q, 'BTHQ'), k_b=(k_b, 'RHK'))
  K = k_b.shape[2]
  moved = jnp.einsum('BTHK,RHK->BTHR', q[..., :K], k_b.astype(q.dtype))
  return jnp.concatenate([moved, q[..., K:]], -1)


def release(o: jax.Array, v_b: jax.Array) -> jax.Array:
  """Outputs [B,T,H,V] from attended latents o [B,T,H,R]."""
  check_shapes(o=(o, 'BTHR'), v_b=(v_b, 'RHV'))
  return jnp.einsum('BTHR,RHV->BTHV', o, v_b.astype(o.dtype))
