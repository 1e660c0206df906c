"""DeltaNet."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deltanet_jax.layers.norm import RMSNorm, l2_normalise
from deltanet_jax.layers.proj import Proj
from deltanet_jax.mixers import base
from deltanet_jax.ops import delta_rule


class DeltaNet(base.Mixer):
  """The delta rule without decay (arXiv:2406.06484).

  q, k = l2(silu(conv(x W)))   v = silu(conv(x W))   q is scaled by K^-1/2
  beta = sigmoid(x b), twice that with negative_eigenvalues
  y = (rms(o) w) W_o, the norm over each head
  """

  @nn.compact
  def __call__(self, x, ctx, cache=None):
    c, D = self.cfg, self.d_model
    H, K, V = c.heads, c.key_dim, c.value_dim
    keys = (D, H, K), ('embed', 'kv_heads', 'head_k'), 'BTD,DHK->BTHK'
    q = Proj(*keys, self.dtype, name='q')(x)
    k = Proj(*keys, self.dtype, name='k')(x)
    v = Proj(
      (D, H, V),
      ('embed', 'heads', 'head_v'),
      'BTD,DHV->BTHV',
      self.dtype,
      name='v',
    )(x)
    qkv, past = base.convolve(c, q, k, v, ctx, cache)
    q, k, v = (jax.nn.silu(y) for y in qkv)
    q, k = l2_normalise(q) * K**-0.5, l2_normalise(k)
    b = Proj(
      (D, H),
      ('embed', 'heads'),
      'BTD,DH->BTH',
      self.dtype,
      jnp.float32,
      name='b',
    )(x)
    beta = jax.nn.sigmoid(b) * (2 if c.negative_eigenvalues else 1)
    o, state = base.run_rule(delta_rule, c, (q, k, v, beta, None), ctx, cache)
    y = Proj(
      (H, V, D),
      ('heads', 'head_v', 'embed'),
      'BTHV,HVD->BTD',
      self.dtype,
      scale=self.out_scale,
      name='o',
    )(RMSNorm(c.norm_eps, name='norm')(o))
    return y, base.next_cache(cache, state, past), None

  @staticmethod
  def init_cache(cfg, batch, max_len, dtype):
    del max_len
    H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
    return base.init_recurrent(cfg, batch, dtype, (H, K), (H, V), (H, K, V))
