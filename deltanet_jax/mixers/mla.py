"""Multi-head latent attention and its cache of latents."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.mixers import MLAConfig
from deltanet_jax.layers.norm import RMSNorm
from deltanet_jax.layers.proj import name_axes, scaled_normal
from deltanet_jax.mixers import base
from deltanet_jax.ops import latent_attention, rope
from deltanet_jax.ops.attention import Place, causal_mask
from deltanet_jax.parallel import softmax


class LatentCache(NamedTuple):
  """S = max_len slots; tokens beyond max_len in all are dropped."""

  latent: jax.Array  # [B,S,R] normalized
  key: jax.Array  # [B,S,P] rotated, one for all heads
  positions: jax.Array  # [B,S] int32, index along the sequence
  length: jax.Array  # [B] int32, tokens so far

  @staticmethod
  def describe_parts() -> dict[str, str]:
    return dict.fromkeys(('latent', 'key'), 'tokens') | base.COUNTED


class Inputs(NamedTuple):
  """The inputs of attention."""

  q: jax.Array  # [B,T,H,K+P], the last P rotated
  latent: jax.Array  # [B,T,R]
  key: jax.Array  # [B,T,P]
  x: jax.Array  # [B,T,D], the layer's input
  u: jax.Array  # the input of the query projection: x, or the query latent


class MLA(base.Mixer):
  """Latent attention (arXiv:2405.04434 sec. 2.1).

    u = rms(x q_a), or x without a query latent;  q = [q_n | q_r] = u q_b
    c = rms(x kv_a)   r = x k_shared   q_r and r rotated, unless NoPE
    k = [c k_b | r]   v = c v_b   o = softmax(scale q k^T) v
    y = (o * sigmoid(x gate)) W_o, the gate per head or channel, or none

  Training and prefill compute keys and values; a single token takes the
  absorbed form, which attends to the cached c and r.
  """

  cfg: MLAConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    ctx: base.Context = base.WHOLE_ROWS,
    cache: LatentCache | None = None,
  ) -> tuple[jax.Array, base.Aux]:
    base.check_mode(ctx, cache, base.MODES)
    ctx = base.add_positions(ctx, x, cache and cache.length)
    c = self.cfg
    o, cache, report = self._attend(self._inputs(x, ctx), ctx, cache)
    if c.gate == 'channel':
      gate = self.project_values(x, 'gate', c.heads, c.value_dim)
      o *= jax.nn.sigmoid(gate)
    elif c.gate == 'head':
      gate = self.project(x, 'gate', (c.heads,), ('heads',))
      o *= jax.nn.sigmoid(gate)[..., None]
    return self.heads_out(o), base.Aux(cache, report)

  def _inputs(self, x, ctx):
    c = self.cfg
    u, source = x, 'embed'
    if c.query_latent is not None:
      u, source = self._make_latent(x, 'q', c.query_latent), 'latent'
    widths = c.heads, c.key_dim + c.shared_dim
    q = self.project(u, 'q_b', widths, ('heads', 'head_k'), source=source)
    latent = self._make_latent(x, 'kv', c.latent)
    key = self.project(x, 'k_shared', (c.shared_dim,), ('head_k',))
    if c.rotary:
      turn = lambda y: rope.rotate(y, ctx.positions, **c.turn)
      plain, turned = jnp.split(q, (c.key_dim,), axis=-1)
      q = jnp.concatenate([plain, turn(turned)], -1)
      key = turn(key[:, :, None])[:, :, 0]
    return Inputs(q, latent, key, x, u)

  def _make_latent(self, x, name, width):
    """rms(x name_a) [B,T,width]."""
    norm = RMSNorm(self.cfg.norm_eps, self.zero_centered, name=f'{name}_norm')
    return norm(self.project(x, f'{name}_a', (width,), ('latent',)))

  def _up(self):
    """The weights k_b [R,H,K] and v_b [R,H,V]."""
    c, R = self.cfg, self.cfg.latent
    make = lambda name, axis, width: self.param(
      name,
      name_axes(scaled_normal(R**-0.5), ('latent', 'heads', axis)),
      (R, c.heads, width),
      jnp.float32,
    )
    return make('k_b', 'head_k', c.key_dim), make('v_b', 'head_v', c.value_dim)

  def _attend(self, inputs, ctx, cache):
    q, latent, key, *_ = inputs
    now = base.index_tokens(q.shape[1], cache)
    at, seen = base.place_tokens(ctx, now)
    if cache is not None:
      cache = base.append_tokens(cache, ctx, now, latent=latent, key=key)
      latent, key = (y.astype(q.dtype) for y in (cache.latent, cache.key))
      seen = Place(cache.positions, None)
    up, scale = self._up(), self.cfg.scale
    if cache is not None and q.shape[1] == 1:
      mask = causal_mask(at, seen)
      return (
        latent_attention.absorbed(q, latent, key, *up, mask, scale=scale),
        cache,
        None,
      )
    o = softmax.attend(
      q,
      (latent, key),
      at,
      seen,
      weights=up,
      make=latent_attention.expand,
      scale=scale,
      form=self.cfg.form,
    )
    return o, cache, None

  @staticmethod
  def init_cache(
    cfg: MLAConfig, batch: int, max_len: int, dtype: DTypeLike
  ) -> LatentCache:
    return LatentCache(
      jnp.zeros((batch, max_len, cfg.latent), dtype),
      jnp.zeros((batch, max_len, cfg.shared_dim), dtype),
      jnp.full((batch, max_len), base.UNWRITTEN, jnp.int32),
      jnp.zeros((batch,), jnp.int32),
    )
