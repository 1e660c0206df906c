"""DeepSeek sparse attention (DeepSeek-V3.2 report, sec. 2.1).

An indexer scores every visible key, attention runs over the X best ones, and
the indexer is trained to predict the attention's distribution:

    I_ts = sum_i w_ti relu(iq_ti^T ik_s)
    S_t  = the X visible s with the largest I_ts, ties to the smaller s
    o_th = sum over s in S_t of softmax_s(scale q_th^T k_s) v_s
    loss_t = KL(p_t || softmax_s I_ts),  p_t = mean over heads of that softmax

In the sparse stage all sums run over s in S_t, in the dense warm-up (top None)
over all visible keys. One key and value serve all heads: the absorbed form of
latent attention. `attend` gathers the chosen keys; `masked` is the definition.
No gradient passes through p: with detached indexer inputs the loss trains the
indexer alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops.attention import visible
from deltanet_jax.ops.compiler import hoisting_barrier
from deltanet_jax.ops.shapes import check_shapes

F32 = jnp.float32


class SparseQueries(NamedTuple):
  q: jax.Array  # [B,T,H,M]
  index_q: jax.Array  # [B,T,I,K], iq
  weight: jax.Array  # [B,T,I] float32, w
  positions: jax.Array  # [B,T] int32, index along the sequence
  segments: jax.Array | None  # [B,T] int32


class SparseKeys(NamedTuple):
  k: jax.Array  # [B,S,M]
  v: jax.Array  # [B,S,R]
  index_k: jax.Array  # [B,S,K], ik
  positions: jax.Array  # [B,S] int32
  segments: jax.Array | None  # [B,S] int32


def attend(
  queries: SparseQueries,
  keys: SparseKeys,
  *,
  top: int | None,
  scale: float,
  block: int = 64,
) -> tuple[jax.Array, jax.Array]:
  """Returns o [B,T,H,R] in v's type and the indexer's loss [B,T] float32.

  top: X, or None for all visible keys. Blocks of queries are computed one after
  the other and recomputed in the backward pass: memory grows with
  block (X + S), not with T S.
  """
  _check(queries, keys)
  B, T, H, _ = queries.q.shape
  if T == 0:
    o = jnp.zeros((B, 0, H, keys.v.shape[-1]), keys.v.dtype)
    return o, jnp.zeros((B, 0), F32)
  # so that masks made from the positions stay inside the loop
  queries, keys = hoisting_barrier((queries, keys), ())
  C = min(block, T)
  N = -(-T // C)

  def split(x):
    # padding repeats the last query, so that no softmax is empty
    pad = [(0, 0), (0, N * C - T)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, mode='edge').reshape(-1, N, C, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)  # [N,B,C,...]

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(-1, N * C, *x.shape[3:])[:, :T]

  part = jax.checkpoint(lambda queries: _block(queries, keys, top, scale))
  return jax.tree.map(join, jax.lax.map(part, jax.tree.map(split, queries)))


def masked(
  queries: SparseQueries, keys: SparseKeys, *, top: int | None, scale: float
) -> tuple[jax.Array, jax.Array]:
  """`attend` by its definition: all scores, keys that are not chosen masked."""
  _check(queries, keys)
  mask, scores = _visible(queries, keys), index_scores(queries, keys)
  if top is not None:
    mask = selected(*select(scores, mask, top), keys.k.shape[1])
  o, p = _all(queries.q, keys, mask, scale)
  return o, divergence(p, scores, mask)


def _check(queries, keys):
  axes = {
    'queries': ('BTHM', 'BTIK', 'BTI', 'BT', 'BT'),
    'keys': ('BSM', 'BSR', 'BSK', 'BS', 'BS'),
  }
  check_shapes(
    **{
      f'{name}.{field}': (getattr(arrays, field), letters)
      for name, arrays in (('queries', queries), ('keys', keys))
      for field, letters in zip(arrays._fields, axes[name], strict=True)
    }
  )


def index_scores(queries: SparseQueries, keys: SparseKeys) -> jax.Array:
  """The indexer's scores I [B,T,S] float32."""
  dots = jnp.einsum(
    'BTIK,BSK->BTIS', queries.index_q, keys.index_k, preferred_element_type=F32
  )
  return jnp.einsum('BTIS,BTI->BTS', jax.nn.relu(dots), queries.weight)


def select(
  scores: jax.Array, mask: jax.Array, top: int
) -> tuple[jax.Array, jax.Array]:
  """The `top` best visible keys: their index [B,T,X], and [B,T,X] bool, false
  where fewer are visible."""
  best, index = jax.lax.top_k(
    jnp.where(mask, scores, -jnp.inf), min(top, scores.shape[-1])
  )
  return index, best > -jnp.inf


def selected(index: jax.Array, chosen: jax.Array, S: int) -> jax.Array:
  """The mask [B,T,S] of what `select` returned."""
  places = jax.nn.one_hot(index, S, dtype=bool)
  return jnp.any(places & chosen[..., None], axis=2)


def divergence(
  target: jax.Array, scores: jax.Array, mask: jax.Array
) -> jax.Array:
  """KL(target || softmax of scores over mask) [...]; no gradient reaches target
  [...,S], which is zero outside mask."""
  target = jax.lax.stop_gradient(target)
  log_q = jax.nn.log_softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
  some = target > 0
  log_p = jnp.log(jnp.where(some, target, 1.0))
  return jnp.sum(jnp.where(some, target * (log_p - log_q), 0.0), axis=-1)


def _visible(queries, keys):
  return visible(
    queries.positions,
    keys.positions,
    query_segments=queries.segments,
    key_segments=keys.segments,
  )


def _block(queries, keys, top, scale):
  mask, scores = _visible(queries, keys), index_scores(queries, keys)
  if top is None or top >= keys.k.shape[1]:
    o, p = _all(queries.q, keys, mask, scale)
    return o, divergence(p, scores, mask)
  index, chosen = select(scores, mask, top)
  take = jax.vmap(lambda x, index: x[index])  # [S,M], [T,X] -> [T,X,M]
  p = _softmax(
    jnp.einsum(
      'BTHM,BTXM->BTHX',
      queries.q,
      take(keys.k, index),
      preferred_element_type=F32,
    ),
    chosen,
    scale,
  )
  v = take(keys.v, index)
  o = jnp.einsum('BTHX,BTXR->BTHR', p.astype(v.dtype), v)
  scores = jnp.take_along_axis(scores, index, axis=-1)
  return o, divergence(p.mean(2), scores, chosen)


def _all(q, keys, mask, scale):
  """Attention over all keys: o [B,T,H,R] and the heads' mean softmax
  [B,T,S]."""
  p = _softmax(
    jnp.einsum('BTHM,BSM->BTHS', q, keys.k, preferred_element_type=F32),
    mask,
    scale,
  )
  o = jnp.einsum('BTHS,BSR->BTHR', p.astype(keys.v.dtype), keys.v)
  return o, p.mean(2)


def _softmax(dots, mask, scale):
  return jax.nn.softmax(
    jnp.where(mask[:, :, None], scale * dots, -jnp.inf), axis=-1
  )
