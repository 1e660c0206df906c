"""Functions with the names and the argument order of flash-linear-attention, so
that a port is one import:

  from deltanet_jax.fla import chunk_gated_delta_rule

Shapes: q, k [B,T,H,K], v [B,T,HV,V], HV a multiple of H; g and beta [B,T,HV],
for KDA g [B,T,HV,K]; all decays are logarithms. All functions take

  scale: the factor of q; None: K^-1/2
  initial_state [N,HV,K,V]: N = B, or the N documents that cu_seqlens [N+1]
    separates in one row; None: zeros
  output_final_state: True: also return the final state; False: None
  use_qk_l2norm_in_kernel: divide q and k by sqrt(sum x^2 + 1e-6)

and return (o [B,T,HV,V], final state [N,HV,K,V] in float32, or None).
`chunk_...` and `fused_recurrent_...` call the functions of
`deltanet_jax.functional` with the form 'auto' and 'recurrent'; equations and
errors are documented there. Both have gradients. Other arguments, such as
`use_gate_in_kernel`, are a TypeError: compute gates before the call. Arguments
whose position differs between versions of that library are keyword-only.
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
  """`functional.gated_delta_rule` in the form 'auto'."""
  run = functools.partial(
    functional.gated_delta_rule, beta=beta, g=g, form='auto'
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
  """`functional.gated_delta_rule` in the form 'recurrent'. g None: no decay;
  beta None: 1; gk and gv, decays per channel, must be None."""
  if gk is not None or gv is not None:
    raise ValueError(
      'gk or gv is given and must be None; for a decay per key channel call'
      ' fused_recurrent_kda'
    )
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
  """`functional.delta_rule` in the form 'auto'."""
  run = functools.partial(functional.delta_rule, beta=beta, form='auto')
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
  """`functional.delta_rule` in the form 'recurrent'; beta None: 1."""
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
  """`functional.kda` in the form 'auto'."""
  run = functools.partial(functional.kda, beta=beta, g=g, form='auto')
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
  """`functional.kda` in the form 'recurrent'."""
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
  """Linear attention in the form 'auto': `functional.gated_linear_attention`
  with g, `lightning_attention` with g_gamma [HV], else `linear_attention`."""
  run = functools.partial(_simple_gla(g, g_gamma), form='auto')
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
  """`chunk_simple_gla` in the form 'recurrent'."""
  run = functools.partial(_simple_gla(g, g_gamma), form='recurrent')
  how = scale, initial_state, output_final_state, False
  return _call(run, q, k, v, *how, cu_seqlens)


def _simple_gla(g, g_gamma):
  if g is not None and g_gamma is not None:
    raise ValueError('both g and g_gamma are given; give one of them')
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
