"""DeepSeek sparse attention: latent attention over keys that an indexer
chooses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.config.mixers import DSAConfig
from deltanet_jax.layers.norm import LayerNorm
from deltanet_jax.mixers import base, mla
from deltanet_jax.ops import latent_attention, rope, sparse_attention
from deltanet_jax.parallel import softmax


class IndexedCache(NamedTuple):
  """S = max_len slots; tokens beyond max_len in all are dropped."""

  latent: jax.Array  # [B,S,R] normalized
  key: jax.Array  # [B,S,P] rotated, one for all heads
  index_key: jax.Array  # [B,S,K] the indexer's keys
  positions: jax.Array  # [B,S] int32, index along the sequence
  length: jax.Array  # [B] int32, tokens so far

  @staticmethod
  def describe_parts() -> dict[str, str]:
    return mla.LatentCache.describe_parts() | {'index_key': 'tokens'}


class DSA(mla.MLA):
  """Latent attention over `top` keys (DeepSeek-V3.2 report, sec. 2.1).

    iq = u index_q   ik = layernorm(x index_k)   both rotated, pairs (i, i+P/2)
    w = x index_w / sqrt(I K)

  u is the query latent of `MLA`; no gradient reaches u and x through the
  indexer. `ops.sparse_attention` has the rest. The report is the indexer's
  loss, a mean over tokens, of the stage `cfg.stage`.
  """

  cfg: DSAConfig

  def _attend(self, inputs, ctx, cache):
    B, T = inputs.q.shape[:2]
    index_q, index_k, weight = self._indexer(inputs, ctx)
    k_b, v_b = self._up()
    latent, key = inputs.latent, inputs.key
    now = seen = base.index_tokens(T, cache)
    at, _ = base.place_tokens(ctx, now)
    if cache is not None:
      cache = base.append_tokens(
        cache, ctx, now, latent=latent, key=key, index_key=index_k
      )
      latent, key, index_k = (y.astype(latent.dtype) for y in cache[:3])
      seen = cache.positions
    rows = lambda x: jnp.broadcast_to(x, (B, x.shape[-1]))
    o, loss = softmax.call_on_all_keys(
      self._sparse,
      sparse_attention.SparseQueries(
        latent_attention.absorb(inputs.q, k_b),
        index_q,
        weight,
        rows(at.positions),
        at.segments,
      ),
      sparse_attention.SparseKeys(
        jnp.concatenate([latent, key], -1),
        latent,
        index_k,
        rows(seen),
        at.segments,
      ),
    )
    o = latent_attention.release(o, v_b)
    return o, cache, loss.mean()

  def _sparse(self, queries, keys):
    c = self.cfg
    top = c.top if c.stage == 'sparse' else None
    return sparse_attention.attend(queries, keys, top=top, scale=c.scale)

  def _indexer(self, inputs, ctx):
    """iq [B,T,I,K], ik [B,T,K] and w [B,T,I] float32."""
    c = self.cfg
    I, K = c.index_heads, c.index_dim
    x, u = jax.lax.stop_gradient((inputs.x, inputs.u))
    q = self.project(u, 'index_q', (I, K), ('heads', 'head_k'), source='latent')
    k = self.project(x, 'index_k', (K,), ('head_k',))
    k = LayerNorm(c.norm_eps, name='index_norm')(k)
    if c.rotary:
      turn = lambda y: rope.rotate(
        y, ctx.positions, **c.turn | {'interleaved': False}
      )
      q, k = turn(q), turn(k[:, :, None])[:, :, 0]
    w = self.project(x, 'index_w', (I,), ('heads',), dtype=jnp.float32)
    return q, k, w * (I * K) ** -0.5

  @staticmethod
  def init_cache(  # type: ignore[override]
    cfg: DSAConfig, batch: int, max_len: int, dtype: DTypeLike
  ) -> IndexedCache:
    latent, key, *rest = mla.MLA.init_cache(cfg, batch, max_len, dtype)
    index = jnp.zeros((batch, max_len, cfg.index_dim), dtype)
    return IndexedCache(latent, key, index, *rest)
