"""The functions of flash-linear-attention by its names, in its order of
arguments, so that a port is one import.

  from deltanet_jax.fla import chunk_gated_delta_rule

Sizes as there: q, k [B,T,H,K], v [B,T,HV,V], HV a multiple of H; g and beta
[B,T,HV], of KDA g [B,T,HV,K]; all decays are logarithms. Everywhere

  scale: of the queries; None: K^-1/2
  initial_state, and the final one: [N,HV,K,V], N = B or the documents that
    cu_seqlens [N+1] tells apart in one row; None: zeros
  output_final_state: False: None is returned in its place
  use_qk_l2norm_in_kernel: q and k are divided by sqrt(sum x^2 + 1e-6)

and (o [B,T,HV,V], final state in float32 or None) is returned. The functions
`chunk_...` and `fused_recurrent_...` are the forms 'chunked' and 'recurrent' of
those of `deltanet_jax.functional`, which say what is computed and what a
ValueError may be; both have gradients. Arguments that are not here, as
`use_gate_in_kernel`, are a TypeError: compute gates before the call. What has
other places in other versions of that library is taken by name alone.
"""

import functools

import jax
import jax.numpy as jnp

from deltanet_jax import functional
from deltanet_jax.layers.norm import l2_normalize

Result = tuple[jax.Array, jax.Array | None]


def chunk_gated_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  beta: jax.Array,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  use_qk_l2norm_in_kernel: bool = False,
  *,
  cu_seqlens: jax.Array | None = None,
) -> Result:
  """`functional.gated_delta_rule`, in chunks."""
  run = functools.partial(
    functional.gated_delta_rule, beta=beta, g=g, form='chunked'
  )
  how = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
  return _call(run, q, k, v, *how, cu_seqlens)


def fused_recurrent_gated_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None = None,
  gk: jax.Array | None = None,
  gv: jax.Array | None = None,
  beta: jax.Array | None = None,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  use_qk_l2norm_in_kernel: bool = False,
  *,
  cu_seqlens: jax.Array | None = None,
) -> Result:
  """The gated delta rule token by token. g None: no decay; beta None: 1; gk and
  gv, decays of channels, have to be None."""
  if gk is not None or gv is not None:
    raise ValueError('gk or gv is given; fused_recurrent_kda has such a decay')
  g = jnp.zeros(v.shape[:3]) if g is None else g
  beta = jnp.ones(v.shape[:3]) if beta is None else beta
  run = functools.partial(
    functional.gated_delta_rule, beta=beta, g=g, form='recurrent'
  )
  how = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
  return _call(run, q, k, v, *how, cu_seqlens)


def chunk_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  use_qk_l2norm_in_kernel: bool = False,
  *,
  cu_seqlens: jax.Array | None = None,
) -> Result:
  """`functional.delta_rule`, in chunks."""
  run = functools.partial(functional.delta_rule, beta=beta, form='chunked')
  how = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
  return _call(run, q, k, v, *how, cu_seqlens)


def fused_recurrent_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array | None = None,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  use_qk_l2norm_in_kernel: bool = False,
  *,
  cu_seqlens: jax.Array | None = None,
) -> Result:
  """The delta rule token by token; beta None: 1."""
  beta = jnp.ones(v.shape[:3]) if beta is None else beta
  run = functools.partial(functional.delta_rule, beta=beta, form='recurrent')
  how = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
  return _call(run, q, k, v, *how, cu_seqlens)


def chunk_kda(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  beta: jax.Array,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  use_qk_l2norm_in_kernel: bool = False,
  *,
  cu_seqlens: jax.Array | None = None,
) -> Result:
  """`functional.kda`, in chunks."""
  run = functools.partial(functional.kda, beta=beta, g=g, form='chunked')
  how = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
  return _call(run, q, k, v, *how, cu_seqlens)


def fused_recurrent_kda(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  beta: jax.Array,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  use_qk_l2norm_in_kernel: bool = False,
  cu_seqlens: jax.Array | None = None,
) -> Result:
  """`functional.kda` token by token."""
  run = functools.partial(functional.kda, beta=beta, g=g, form='recurrent')
  how = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel
  return _call(run, q, k, v, *how, cu_seqlens)


def chunk_simple_gla(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None = None,
  g_gamma: jax.Array | None = None,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  *,
  cu_seqlens: jax.Array | None = None,
) -> Result:
  """Linear attention in chunks, with a decay g of each token or g_gamma [HV] of
  each head, or none."""
  run = functools.partial(_simple_gla(g, g_gamma), form='chunked')
  how = scale, initial_state, output_final_state, False
  return _call(run, q, k, v, *how, cu_seqlens)


def fused_recurrent_simple_gla(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None = None,
  g_gamma: jax.Array | None = None,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  *,
  cu_seqlens: jax.Array | None = None,
) -> Result:
  """`chunk_simple_gla` token by token."""
  run = functools.partial(_simple_gla(g, g_gamma), form='recurrent')
  how = scale, initial_state, output_final_state, False
  return _call(run, q, k, v, *how, cu_seqlens)


def _simple_gla(g, g_gamma):
  if g is not None and g_gamma is not None:
    raise ValueError('g and g_gamma are given; give one of them')
  if g is not None:
    return functools.partial(functional.gated_linear_attention, g=g)
  if g_gamma is not None:
    return functools.partial(functional.lightning_attention, g=g_gamma)
  return functional.linear_attention


def _call(
  run, q, k, v, scale, state, output_final_state, normalize, cu_seqlens
):
  if normalize:
    q, k = l2_normalize(q), l2_normalize(k)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q = (q * scale).astype(q.dtype)
  o, state = run(q, k, v, state=state, cu_seqlens=cu_seqlens)
  return o, state if output_final_state else None
