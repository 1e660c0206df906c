"""Kimi Delta Attention and Gated DeltaNet-2."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.mixers import KDAConfig
from deltanet_jax.layers.norm import GatedRMSNorm, l2_normalize
from deltanet_jax.layers.proj import name_axes
from deltanet_jax.mixers import base
from deltanet_jax.ops import kda


class KDA(base.Mixer):
  """The delta rule with a decay for every key channel (arXiv:2510.26692).

  q, k = l2(silu(conv(x W)))   v = silu(conv(x W))   q is scaled by K^-1/2
  f = (x f_a) f_b + dt_bias [H,K], in float32
  g = -exp(A_log) softplus(f), or lower_bound sigmoid(exp(A_log) f)
  beta = sigmoid(x b) [H]; with separate_gates (Gated DeltaNet-2) instead
  erase = sigmoid(x erase) [H,K] and beta = sigmoid(x write) [H,V]
  y = (rms(o) w sigmoid((x gate_a) gate_b)) W_o, the norm over each head
  """

  cfg: KDAConfig

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
    beta, erase = self._write_and_erase(x)
    o, state = base.run_rule(
      kda, c, (q, k, v, beta, self._decay(x)), ctx, cache, erase=erase
    )
    z = self._low_rank(x, 'gate', 'head_v', V)
    o = GatedRMSNorm(c.norm_eps, 'sigmoid', name='norm')(o, z)
    return self.heads_out(o), base.make_aux(cache, state, past)

  def _low_rank(self, x, name, axis, width):
    """(x name_a) name_b [B,T,H,width], float32."""
    c = self.cfg
    R = c.value_dim if c.gate_rank is None else c.gate_rank
    return self.project(
      self.project(x, f'{name}_a', (R,), ('latent',)),
      f'{name}_b',
      (c.heads, width),
      ('heads', axis),
      source='latent',
      out_dtype=jnp.float32,
    )

  def _decay(self, x):
    c, H, K = self.cfg, self.cfg.heads, self.cfg.key_dim
    A_log = self.param(
      'A_log', name_axes(base.log_uniform_decay(1.0), ('heads',)), (H,)
    )
    dt_bias = self.param(
      'dt_bias', name_axes(base.log_uniform_dt, ('heads', 'head_k')), (H, K)
    )
    f = self._low_rank(x, 'f', 'head_k', K) + dt_bias[None, None]
    A = jnp.exp(A_log)[None, None, :, None]
    if c.lower_bound is None:
      return -A * jax.nn.softplus(f)
    return c.lower_bound * jax.nn.sigmoid(A * f)

  def _write_and_erase(self, x):
    """beta [B,T,H] and None, or beta [B,T,H,V] and erase [B,T,H,K]."""
    c = self.cfg
    if not c.separate_gates:
      return jax.nn.sigmoid(self.project_gate(x, 'b', c.heads)), None
    gate = lambda name, axis, width: jax.nn.sigmoid(
      self.project(
        x,
        name,
        (c.heads, width),
        ('heads', axis),
        out_dtype=jnp.float32,
      )
    )
    beta = gate('write', 'head_v', c.value_dim)
    return beta, gate('erase', 'head_k', c.key_dim)

  @staticmethod
  def init_cache(
    cfg: KDAConfig, batch: int, max_len: int, dtype: DTypeLike
  ) -> base.RecurrentCache:
    del max_len
    H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
    return base.init_recurrent_cache(
      cfg, batch, dtype, (H, K), (H, V), (H, K, V)
    )
