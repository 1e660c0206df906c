"""DeltaNet."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from deltanet_jax.config.mixers import DeltaNetConfig
from deltanet_jax.layers.norm import RMSNorm, l2_normalize
from deltanet_jax.mixers import base
from deltanet_jax.ops import delta_rule


class DeltaNet(base.Mixer):
  """The delta rule without decay (arXiv:2406.06484).

  q, k = l2(silu(conv(x W)))   v = silu(conv(x W))   q is scaled by K^-1/2
  beta = sigmoid(x b), twice that with negative_eigenvalues
  y = (rms(o) w) W_o, the norm over each head
  """

  cfg: DeltaNetConfig

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
    qkv, past = base.convolve_inputs(c, q, k, v, ctx, cache)
    q, k, v = (jax.nn.silu(y) for y in qkv)
    q, k = l2_normalize(q) * K**-0.5, l2_normalize(k)
    beta = jax.nn.sigmoid(self.project_gate(x, 'b', H))
    beta *= 2 if c.negative_eigenvalues else 1
    o, state = base.run_rule(delta_rule, c, (q, k, v, beta, None), ctx, cache)
    o = RMSNorm(c.norm_eps, name='norm')(o)
    return self.heads_out(o), base.make_aux(cache, state, past)

  @staticmethod
  def init_cache(
    cfg: DeltaNetConfig, batch: int, max_len: int, dtype: DTypeLike
  ) -> base.RecurrentCache:
    del max_len
    H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
    return base.init_recurrent_cache(
      cfg, batch, dtype, (H, K), (H, V), (H, K, V)
    )
