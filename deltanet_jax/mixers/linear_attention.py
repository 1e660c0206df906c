"""Normalized linear attention and Lightning attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.mixers import LightningConfig, LinearAttentionConfig
from deltanet_jax.layers.norm import GatedRMSNorm
from deltanet_jax.mixers import base
from deltanet_jax.ops import linear_attention


class LinearAttention(base.Mixer):
  """Linear attention with a normalizer (arXiv:2006.16236 eq. 5 and 7).

    S_t = S_{t-1} + k_t v_t^T   z_t = z_{t-1} + k_t
    o_t = S_t^T q_t / (z_t^T q_t)

  q and k are elu(x W) + 1; z is the last column of the state [B,H,K,V+1]. q is
  not scaled, since a scale cancels.
  """

  cfg: LinearAttentionConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    ctx: base.Context = base.WHOLE_ROWS,
    cache: base.RecurrentCache | None = None,
  ) -> tuple[jax.Array, base.Aux]:
    c = self.cfg
    H, K, V = c.heads, c.key_dim, c.value_dim
    q, k = (self.project_keys(x, name, H, K) for name in 'qk')
    v = self.project_values(x, 'v', H, V)
    (q, k, v), past = base.convolve_inputs(c, q, k, v, ctx, cache)
    # in float32: bfloat16 would round small values of elu + 1 to 0
    q, k = (jax.nn.elu(y.astype(jnp.float32)) + 1 for y in (q, k))
    rule = lambda q, k, v, g, **_: base.run_rule(
      linear_attention, c, (q, k, v, g), ctx, cache
    )
    o, state = linear_attention.normalized(rule, q, k, v)
    return self.heads_out(o), base.make_aux(cache, state, past)

  @staticmethod
  def init_cache(
    cfg: LinearAttentionConfig, batch: int, max_len: int, dtype: DTypeLike
  ) -> base.RecurrentCache:
    del max_len
    H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
    return base.init_recurrent_cache(
      cfg, batch, dtype, (H, K), (H, V), (H, K, V + 1)
    )


class Lightning(base.Mixer):
  """Linear attention with a constant decay per head (arXiv:2501.08313).

  S_t = e^-slope S_{t-1} + k_t v_t^T   o_t = S_t^T q_t   q, k, v after silu
  slope_h = 2^(-8 (h+1) / H) (1 - depth + 1e-5)
  y = (rms(o) w sigmoid(x gate)) W_o, the norm over all heads together
  """

  cfg: LightningConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    ctx: base.Context = base.WHOLE_ROWS,
    cache: base.RecurrentCache | None = None,
  ) -> tuple[jax.Array, base.Aux]:
    c = self.cfg
    H, V = c.heads, c.head_dim
    B, T, _ = x.shape
    q, k = (self.project_keys(x, name, H, V) for name in 'qk')
    v = self.project_values(x, 'v', H, V)
    qkv, past = base.convolve_inputs(c, q, k, v, ctx, cache)
    q, k, v = (jax.nn.silu(y) for y in qkv)
    slope = 2.0 ** (-8 * jnp.arange(1, H + 1) / H) * (1 - ctx.depth + 1e-5)
    g = jnp.broadcast_to(-slope.astype(jnp.float32), (B, T, H))
    o, state = base.run_rule(linear_attention, c, (q, k, v, g), ctx, cache)
    z = self.project_values(x, 'gate', H, V)
    norm = GatedRMSNorm(c.norm_eps, 'sigmoid', name='norm')
    o = norm(o.reshape(B, T, H * V), z.reshape(B, T, H * V))
    y = self.heads_out(o.reshape(B, T, H, V))
    return y, base.make_aux(cache, state, past)

  @staticmethod
  def init_cache(
    cfg: LightningConfig, batch: int, max_len: int, dtype: DTypeLike
  ) -> base.RecurrentCache:
    del max_len
    H, V = cfg.heads, cfg.head_dim
    return base.init_recurrent_cache(
      cfg, batch, dtype, (H, V), (H, V), (H, V, V)
    )
