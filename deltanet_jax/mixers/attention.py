"""Softmax attention and its KV cache."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.mixers import AttentionConfig
from deltanet_jax.layers.norm import RMSNorm
from deltanet_jax.mixers import base
from deltanet_jax.ops import rope
from deltanet_jax.ops.attention import Place
from deltanet_jax.ops.compiler import write_slots
from deltanet_jax.parallel import softmax


class KVCache(NamedTuple):
  """S slots: max_len, or the window where that is shorter.

  Without a window, tokens beyond max_len in all are dropped.
  """

  k: jax.Array  # [B,S,J,K] rotated keys
  v: jax.Array  # [B,S,J,K]
  positions: jax.Array  # [B,S] int32, index along the sequence
  length: jax.Array  # [B] int32, tokens so far

  @staticmethod
  def describe_parts() -> dict[str, str]:
    return dict.fromkeys('kv', 'tokens') | base.COUNTED


def _append(cache, ctx, k, v, now):
  """Writes new tokens behind the last; the keys are all slots."""
  cache = base.append_tokens(cache, ctx, now, k=k, v=v)
  return cache.k, cache.v, cache.positions, cache


def _overwrite_oldest(cache, ctx, k, v, now):
  """Writes new tokens over the oldest. The keys are the old slots and the new
  tokens, since a long prefill overwrites keys that its first tokens see."""
  T, S = now.shape[1], cache.positions.shape[1]
  padding = base.find_padding(ctx, T)
  k, v = base.clear_tokens(k, padding), base.clear_tokens(v, padding)
  new = now if padding is None else jnp.where(padding, base.UNWRITTEN, now)
  length = cache.length + base.count_tokens(ctx, T)
  last = (now >= length[:, None] - S) & (now < length[:, None])
  slots = jnp.where(last, now % S, S + now)
  whole = cache.k, cache.v, cache.positions
  keys, values, positions = (
    jnp.concatenate([old, x], axis=1)
    for old, x in zip(whole, (k, v, new), strict=True)
  )
  written = map(write_slots, whole, (k, v, now), (slots,) * 3)
  return keys, values, positions, KVCache(*written, length)


class Attention(base.Mixer):
  """o = softmax(q k^T / sqrt(K)) v, with H/J query heads for each key head.

  q and k are RMS-normalized (`qk_norm`) per head or, with `joint_norm`, over
  all heads, then rotated; with `gate` o is multiplied by sigmoid(x gate) per
  channel.
  """

  cfg: AttentionConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    ctx: base.Context = base.WHOLE_ROWS,
    cache: KVCache | None = None,
  ) -> tuple[jax.Array, base.Aux]:
    base.check_mode(ctx, cache, base.MODES[: 1 if self.cfg.window else 2])
    ctx = base.add_positions(ctx, x, cache and cache.length)
    c = self.cfg
    H, J, K = c.heads, c.kv_heads, c.head_dim
    q = self.project(x, 'q', (H, K), ('heads', 'head_k'))
    k = self.project_keys(x, 'k', J, K)
    v = self.project(x, 'v', (J, K), ('kv_heads', 'head_v'))
    if c.qk_norm:
      q, k = self._normalize(q, 'q_norm'), self._normalize(k, 'k_norm')
    if c.rotary_dim:
      turn = lambda y: rope.rotate(y, ctx.positions, **c.turn)  # type: ignore[arg-type]
      q, k = turn(q), turn(k)
    o, cache = self._attend(q, k, v, ctx, cache)
    if c.gate:
      o *= jax.nn.sigmoid(self.project_values(x, 'gate', H, K))
    return self.heads_out(o), base.Aux(cache)

  def _normalize(self, x, name):
    norm = RMSNorm(self.cfg.norm_eps, self.zero_centered, name=name)
    if not self.cfg.joint_norm:
      return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

  def _attend(self, q, k, v, ctx, cache):
    c = self.cfg
    now = base.index_tokens(q.shape[1], cache)
    at, seen = base.place_tokens(ctx, now)
    if cache is not None:
      k, v = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
      write = _append if c.window is None else _overwrite_oldest
      k, v, seen, cache = write(cache, ctx, k, v, now)
      k, v, seen = k.astype(q.dtype), v.astype(q.dtype), Place(seen, None)
    o = softmax.attend(
      q,
      (k, v),
      at,
      seen,
      scale=c.head_dim**-0.5,
      window=c.window,
      form=c.form,
    )
    return o, cache

  @staticmethod
  def init_cache(
    cfg: AttentionConfig, batch: int, max_len: int, dtype: DTypeLike
  ) -> KVCache:
    S = max_len if cfg.window is None else min(max_len, cfg.window)
    # two arrays, since both are donated
    keys = lambda: jnp.zeros((batch, S, cfg.kv_heads, cfg.head_dim), dtype)
    return KVCache(
      keys(),
      keys(),
      jnp.full((batch, S), base.UNWRITTEN, jnp.int32),
      jnp.zeros((batch,), jnp.int32),
    )
