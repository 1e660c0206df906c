"""Gated DeltaNet."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.mixers import GatedDeltaNetConfig
from deltanet_jax.layers.norm import GatedRMSNorm, l2_normalize
from deltanet_jax.layers.proj import name_axes
from deltanet_jax.mixers import base
from deltanet_jax.ops import delta_rule


class GatedDeltaNet(base.Mixer):
  """The gated delta rule between short convolutions and a gated norm
  (arXiv:2412.06464; with J < H key heads, Qwen3-Next's layer).

    q, k = l2(silu(conv(x W)))   v = silu(conv(x W))   q is scaled by K^-1/2
    beta = sigmoid(x b), twice that with negative_eigenvalues
    g = -exp(A_log) softplus(x a + dt_bias), in float32
    y = (rms(o) w silu(x gate)) W_o, the norm over each value head

  The weights a, b, A_log and dt_bias are named as in flash-linear-attention.
  """

  cfg: GatedDeltaNetConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    ctx: base.Context = base.WHOLE_ROWS,
    cache: base.RecurrentCache | None = None,
  ) -> tuple[jax.Array, base.Aux]:
    c = self.cfg
    J, H, K, V = c.key_heads, c.value_heads, c.key_dim, c.value_dim
    q, k = (self.project_keys(x, name, J, K) for name in 'qk')
    v = self.project_values(x, 'v', H, V)
    qkv, past = base.convolve_inputs(c, q, k, v, ctx, cache)
    q, k, v = (jax.nn.silu(y) for y in qkv)
    q, k = l2_normalize(q) * K**-0.5, l2_normalize(k)

    beta = jax.nn.sigmoid(self.project_gate(x, 'b', H))
    if c.negative_eigenvalues:
      beta *= 2
    # A from 0.01, not from 0 as in the paper: log 0 is -inf
    A_log = self.param(
      'A_log', name_axes(base.log_uniform_decay(1e-2), ('heads',)), (H,)
    )
    dt_bias = self.param(
      'dt_bias', name_axes(base.log_uniform_dt, ('heads',)), (H,)
    )
    a = self.project_gate(x, 'a', H)
    A_log, dt_bias = A_log[None, None], dt_bias[None, None]
    g = -jnp.exp(A_log) * jax.nn.softplus(a + dt_bias)

    o, state = base.run_rule(delta_rule, c, (q, k, v, beta, g), ctx, cache)
    z = self.project_values(x, 'gate', H, V)
    o = GatedRMSNorm(c.norm_eps, 'silu', name='norm')(o, z)
    return self.heads_out(o), base.make_aux(cache, state, past)

  @staticmethod
  def init_cache(
    cfg: GatedDeltaNetConfig, batch: int, max_len: int, dtype: DTypeLike
  ) -> base.RecurrentCache:
    del max_len
    J, H, K, V = cfg.key_heads, cfg.value_heads, cfg.key_dim, cfg.value_dim
    return base.init_recurrent_cache(
      cfg, batch, dtype, (J, K), (H, V), (H, K, V)
    )
