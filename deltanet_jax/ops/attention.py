"""Softmax attention with grouped heads; causal, window and segment masks.

`attention` is the definition and keeps all scores [B,H,T,S]. `attend` computes
it in blocks (online softmax, arXiv:2205.14135): memory grows with T + S,
forward and backward, and for consecutive tokens only those pairs of blocks are
computed in which a query sees a key. For each block of keys, from m = -inf,
l = 0, o = 0 and with s = scale q k^T,

    n = max(m, max_s s);   p = e^(s - n)
    l = e^(m - n) l + sum_s p;   o = e^(m - n) o + p v;   m = n

and o / l at the end. The backward pass recomputes p = e^(s - m) / l block by
block (m and l are two arrays: in m + log l, log l would be lost beside scores
of thousands), and

    dv = p^T do;   ds = scale p (do v^T - do o^T);   dq = ds k;   dk = ds^T q
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops.compiler import hoisting_barrier
from deltanet_jax.ops.shapes import check_shapes

F32 = jnp.float32
BLOCK = 512
# position of padding and of unwritten cache slots: after every query
NO_KEY = 2**30


class Place(NamedTuple):
  """Tokens' index along the sequence (not the rotary position) and their
  segments, as `documents.number_segments` numbers them."""

  positions: jax.Array  # [T] int32, or [B,T] where rows differ
  segments: jax.Array | None  # [B,T] int32, None: one segment in every row


def visible(
  query_positions: jax.Array,
  key_positions: jax.Array,
  *,
  window: int | None = None,
  query_segments: jax.Array | None = None,
  key_segments: jax.Array | None = None,
) -> jax.Array:
  """Which keys each query sees: [B,T,S] bool.

  query_positions [B,T], key_positions [B,S] and their segments are as in
  `Place`. A query sees the keys of its own segment at or before its position,
  the last `window` of them.
  """
  # positions may be one row for all
  check_shapes(
    query_positions=(query_positions, 'PT'),
    key_positions=(key_positions, 'PS'),
    query_segments=(query_segments, 'BT'),
    key_segments=(key_segments, 'BS'),
  )
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  seen = distance >= 0
  if window is not None:
    seen &= distance < window
  if query_segments is not None:
    seen &= query_segments[:, :, None] == key_segments[:, None, :]  # type: ignore[index]
  return seen


def causal_mask(at: Place, seen: Place, window: int | None = None) -> jax.Array:
  """`visible` for queries with Place `at` and keys with Place `seen`: [B,T,S],
  or [1,T,S] where rows do not differ."""
  rows = lambda x: x if x.ndim == 2 else x[None]
  return visible(
    rows(at.positions),
    rows(seen.positions),
    window=window,
    query_segments=at.segments,
    key_segments=seen.segments,
  )


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float
) -> jax.Array:
  """o_t = sum_s softmax_s(scale q_t^T k_s) v_s over keys s where mask is true.

  q [B,T,H,K]   k [B,S,J,K]   v [B,S,J,V]   H a multiple of J
  mask [B,T,S] or [1,T,S] bool: a key or more for every query

  Returns o [B,T,H,V] in v's type; the softmax is float32.
  """
  # one mask may serve all rows
  _check(q, k, v, mask=(mask, 'MTS'))
  V, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
  # jax.nn wants one width; zero channels change neither scores nor values
  q, k, v = (
    x
    if x.shape[-1] == width
    else jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),))
    for x in (q, k, v)
  )
  o = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
  return o[..., :V]


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  at: Place,
  seen: Place,
  *,
  scale: float,
  window: int | None = None,
  ahead: int | None = None,
  block: int = BLOCK,
) -> jax.Array:
  """`attention` of queries with Place `at` over the visible keys, Place `seen`.

  ahead: the index of the first query minus that of the first key, if queries
  and keys are consecutive tokens: pairs of blocks without a visible key are
  then skipped. None: positions in any order. Products take q's, k's and v's
  type, sums are float32.
  """
  places = {
    'at.positions': (at.positions, 'T|BT'),
    'at.segments': (at.segments, 'BT'),
    'seen.positions': (seen.positions, 'S|BS'),
    'seen.segments': (seen.segments, 'BS'),
  }
  _check(q, k, v, **places)
  T, S, J = q.shape[1], k.shape[1], k.shape[2]
  if T == 0:
    return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype)
  if T == 1:
    return attention(q, k, v, causal_mask(at, seen, window), scale=scale)
  N, M = -(-T // block), -(-S // block)
  pairs = _pairs(N, -(-T // N), M, -(-S // M), ahead, window)
  settings = {'scale': scale, 'window': window}

  def forward(q, k, v, at, seen):
    at, seen = hoisting_barrier((at, seen), q[:1, :1, :1, :1])
    queries, keys = cut_queries(q, at, J, N), cut_keys(k, v, seen, M)
    # blocks of unwritten cache slots are skipped at run time
    skip = ahead is None
    sums = accumulate(
      empty_sums(queries, v), queries, keys, pairs, skip=skip, **settings
    )
    o = join(normalize(sums), T).astype(v.dtype)
    return o, (q, k, v, at, seen, o, sums.row_max, sums.row_sum)

  def backward(residuals, d_o):
    q, k, v, at, seen, o, row_max, row_sum = residuals
    queries, keys = cut_queries(q, at, J, N), cut_keys(k, v, seen, M)
    rows = RowGradients.of(cut(d_o, J, N), cut(o, J, N), row_max, row_sum)
    d = zeros(queries.q), (zeros(keys.k), zeros(keys.v))
    d_q, (d_k, d_v) = accumulate_gradients(
      d, queries, keys, rows, pairs, **settings
    )
    d = ((d_q, q), (d_k, k), (d_v, v))
    return *(join(d, x.shape[1]).astype(x.dtype) for d, x in d), None, None

  call = jax.custom_vjp(lambda *args: forward(*args)[0])
  call.defvjp(forward, backward)
  return call(q, k, v, at, seen)


def _check(q, k, v, **others):
  sizes = check_shapes(q=(q, 'BTHK'), k=(k, 'BSJK'), v=(v, 'BSJV'), **others)
  if sizes['H'] % sizes['J']:
    raise ValueError(
      f'{sizes["H"]} query heads are no multiple of {sizes["J"]} key heads;'
      ' change one of them'
    )


def _pairs(N, C, M, D, ahead, window):
  """The pairs (i, j) of N blocks of C queries and M blocks of D keys in which a
  key may be visible: indices i [n] and j [n]."""

  def may_see(i, j):
    if ahead is None:
      return True
    first = ahead + C * i
    before = window is not None and D * (j + 1) - 1 <= first - window
    return D * j < first + C and not before

  pairs = [(i, j) for i in range(N) for j in range(M) if may_see(i, j)]
  return tuple(zip(*pairs, strict=True))


# In blocks arrays are [N,B,J,G,C,K]: N blocks of C tokens, G = H/J query heads
# of a key head, 1 for keys and values.


class QueryBlocks(NamedTuple):
  q: jax.Array  # [N,B,J,G,C,K]
  at: Place  # positions [N,C] or [N,B,C], segments [N,B,C] or None


class KeyBlocks(NamedTuple):
  k: jax.Array  # [M,B,J,1,C,K]
  v: jax.Array  # [M,B,J,1,C,V]
  seen: Place  # positions [M,C] or [M,B,C], segments [M,B,C] or None


# indices of query blocks and of the key blocks that they attend to
Pairs = tuple[Sequence[int] | jax.Array, Sequence[int] | jax.Array]
Gradients = tuple[jax.Array, tuple[jax.Array, jax.Array]]  # dq, (dk, dv)


class Sums(NamedTuple):
  """The online softmax of a query over the keys so far, in float32."""

  o: jax.Array  # [N,B,J,G,C,V]
  row_max: jax.Array  # [N,B,J,G,C], m
  row_sum: jax.Array  # [N,B,J,G,C], l


class RowGradients(NamedTuple):
  """What the backward pass needs for each query; all but d_o float32."""

  d_o: jax.Array  # [N,B,J,G,C,V]
  dot: jax.Array  # [N,B,J,G,C], do o^T
  row_max: jax.Array  # [N,B,J,G,C], m
  row_sum: jax.Array  # [N,B,J,G,C], l

  @classmethod
  def of(
    cls, d_o: jax.Array, o: jax.Array, row_max: jax.Array, row_sum: jax.Array
  ) -> 'RowGradients':
    return cls(d_o, (d_o.astype(F32) * o).sum(-1), row_max, row_sum)


def cut(x: jax.Array, J: int, N: int) -> jax.Array:
  """Cuts [B,T,H,K] into blocks [N,B,J,H/J,C,K], padded with zeros."""
  B, T, H, K = x.shape
  C = -(-T // N)
  x = jnp.pad(x, ((0, 0), (0, N * C - T), (0, 0), (0, 0)))
  return x.reshape(B, N, C, J, H // J, K).transpose(1, 0, 3, 4, 2, 5)


def join(x: jax.Array, T: int) -> jax.Array:
  """The inverse of `cut`."""
  N, B, J, G, C, K = x.shape
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * C, J * G, K)[:, :T]


def cut_queries(q: jax.Array, at: Place, J: int, N: int) -> QueryBlocks:
  """`cut` of queries and their Place."""
  # padding has the last query's position, so it sees a key
  return QueryBlocks(cut(q, J, N), _cut_place(at, N, mode='edge'))


def cut_keys(k: jax.Array, v: jax.Array, seen: Place, M: int) -> KeyBlocks:
  """`cut` of keys, values and their Place."""
  J = k.shape[2]
  return KeyBlocks(
    cut(k, J, M), cut(v, J, M), _cut_place(seen, M, constant_values=NO_KEY)
  )


def _cut_place(place, N, **fill):
  def pad_and_cut(x, **fill):
    T = x.shape[-1]
    C = -(-T // N)
    pad = ((0, 0),) * (x.ndim - 1) + ((0, N * C - T),)
    x = jnp.pad(x, pad, **fill).reshape(*x.shape[:-1], N, C)
    return jnp.moveaxis(x, -2, 0)

  positions = pad_and_cut(place.positions, **fill)
  if place.segments is None:
    return Place(positions, None)
  return Place(positions, pad_and_cut(place.segments, mode='edge'))


def zeros(x: jax.Array) -> jax.Array:
  """Float32 zeros of x's shape."""
  return jnp.zeros(x.shape, F32)


def empty_sums(queries: QueryBlocks, v: jax.Array) -> Sums:
  """The Sums of queries before any key."""
  rows = queries.q.shape[:-1]
  # not -inf: exp(m - n) would be NaN where no key is visible yet
  least = jnp.full(rows, jnp.finfo(F32).min)
  return Sums(jnp.zeros((*rows, v.shape[-1])), least, jnp.zeros(rows))


def normalize(sums: Sums) -> jax.Array:
  """o / l, the attention outputs [N,B,J,G,C,V] of finished Sums."""
  return sums.o / sums.row_sum[..., None]


def accumulate(
  sums: Sums,
  queries: QueryBlocks,
  keys: KeyBlocks,
  pairs: Pairs,
  *,
  scale: float,
  window: int | None = None,
  skip: bool = False,
) -> Sums:
  """Adds to `sums` of query blocks pairs[0] the key blocks pairs[1], in turn.

  skip: a pair of blocks without a visible key is not computed.
  """

  def update(i, j, o, row_max, row_sum):
    s, _, (_, v) = _scores(queries, keys, i, j, scale, window)
    new_max = jnp.maximum(row_max, s.max(-1))
    p, rescale = jnp.exp(s - new_max[..., None]), jnp.exp(row_max - new_max)
    o = rescale[..., None] * o + _product(
      'bjgts,bjsv->bjgtv', p.astype(v.dtype), v
    )
    return Sums(o, new_max, rescale * row_sum + p.sum(-1))

  def body(sums, pair):
    i, j = pair
    args = i, j, *(x[i] for x in sums)
    if skip:
      some = _mask(queries, keys, i, j, window).any()
      new = jax.lax.cond(some, update, lambda i, j, *old: Sums(*old), *args)
    else:
      new = update(*args)
    return jax.tree.map(lambda x, y: x.at[i].set(y), sums, new), None

  return _scan(body, sums, pairs)


def accumulate_gradients(
  d: Gradients,
  queries: QueryBlocks,
  keys: KeyBlocks,
  rows: RowGradients,
  pairs: Pairs,
  *,
  scale: float,
  window: int | None = None,
) -> Gradients:
  """Adds the gradients of these pairs of blocks to d = (dq, (dk, dv)), in
  float32."""

  def body(d, pair):
    i, j = pair
    s, q, (k, v) = _scores(queries, keys, i, j, scale, window)
    d_o, dot, row_max, row_sum = (x[i] for x in rows)
    p = jnp.exp(s - row_max[..., None]) / row_sum[..., None]
    d_v = _product('bjgts,bjgtv->bjsv', p.astype(v.dtype), d_o)
    d_p = _product('bjgtv,bjsv->bjgts', d_o, v)
    d_s = (scale * p * (d_p - dot[..., None])).astype(k.dtype)
    d_k = _product('bjgts,bjgtk->bjsk', d_s, q)
    d_q = _product('bjgts,bjsk->bjgtk', d_s, k)
    to_q, (to_k, to_v) = d
    add = lambda x, y: x.at[j].add(y[:, :, None])
    return (to_q.at[i].add(d_q), (add(to_k, d_k), add(to_v, d_v))), None

  return _scan(body, d, pairs)


def _scan(body, carry, pairs):
  # arrays made here: inside shard_map the backward pass cannot close over
  # arrays of the forward pass
  pairs = tuple(jnp.asarray(x, jnp.int32) for x in pairs)
  return jax.lax.scan(body, carry, pairs)[0]


def _scores(queries, keys, i, j, scale, window):
  """Scores [B,J,G,C,D] of query block i and key block j, -inf where masked; the
  block's queries; its keys and values."""
  q, k, v = queries.q[i], keys.k[j][:, :, 0], keys.v[j][:, :, 0]
  mask = _mask(queries, keys, i, j, window)[:, None, None]
  s = scale * _product('bjgtk,bjsk->bjgts', q, k)
  return jnp.where(mask, s, -jnp.inf), q, (k, v)


def _mask(queries, keys, i, j, window):
  """`causal_mask` of query block i and key block j."""
  at = jax.tree.map(lambda x: x[i], queries.at)
  seen = jax.tree.map(lambda x: x[j], keys.seen)
  return causal_mask(at, seen, window)


def _product(shapes, x, y):
  return jnp.einsum(shapes, x, y, preferred_element_type=F32)
