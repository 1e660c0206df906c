"""Softmax attention with grouped heads; causal, window and segment masks.

`attention` is the definition and keeps all scores [B,H,T,S]. `attend` is the
same in blocks (online softmax, arXiv:2205.14135): memory grows with T + S,
forward and backward, and of a row of consecutive tokens only the pairs of
blocks are computed in which a query sees a key. Over a block of keys, from
m = -inf, l = 0, o = 0 and with s = scale q k',

    m' = max(m, max_s s);   p = e^(s - m')
    l = e^(m - m') l + sum_s p;   o = e^(m - m') o + p v;   m = m'

and o / l at the end. Backward p = e^(s - m) / l is made again, block by block
(m and l are kept apart: in their one number m + log l, log l would be lost
beside scores of thousands), and

    dv = p' do;   ds = scale p (do v' - do o');   dq = ds k;   dk = ds' q
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops.compiler import tied
from deltanet_jax.ops.shapes import check_shapes

F32 = jnp.float32
BLOCK = 512
# the position of what is no key: later than any query, so never seen
NEVER = 2**30


class Place(NamedTuple):
  """Where tokens stand: their index along the sequence (not the rotary
  position), and the number of the document of each (`documents.runs_of`), or
  None."""

  positions: jax.Array  # [T] int32, or [B,T] where rows differ
  segments: jax.Array | None  # [B,T] int32


def visible(
  query_positions: jax.Array,
  key_positions: jax.Array,
  *,
  window: int | None = None,
  query_segments: jax.Array | None = None,
  key_segments: jax.Array | None = None,
) -> jax.Array:
  """Which keys each query sees: [B,T,S] bool.

  query_positions [B,T], key_positions [B,S] (index along the sequence, not
  the rotary position), segments likewise, one number a document
  (`documents.runs_of`), or None. A query sees the keys at or before it, at most
  `window` of them, in its own segment.
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


def between(at: Place, seen: Place, window: int | None = None) -> jax.Array:
  """`visible` from queries at one Place to keys at another; B is 1 where rows
  do not differ."""
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
  """o_t = sum_s softmax_s(scale q_t' k_s) v_s over the keys `mask` shows.

  q [B,T,H,K], k [B,S,J,K], v [B,S,J,V], H a multiple of J, mask [B,T,S]
  bool with at least one key per query. Softmax in float32. Returns [B,T,H,V].
  """
  # one mask may serve all rows
  _check(q, k, v, mask=(mask, 'MTS'))
  V, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
  # the library wants one width; zero channels change neither score nor value
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
  """`attention` of queries at one Place over the visible keys at another.

  ahead: how many tokens the first query stands after the first key, where both
  are stretches of consecutive tokens: blocks of which nothing is visible are
  then left out. None: positions in any order. Products in the type of q, k and
  v, sums in float32.
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
    return attention(q, k, v, between(at, seen, window), scale=scale)
  N, M = -(-T // block), -(-S // block)
  pairs = _pairs(N, -(-T // N), M, -(-S // M), ahead, window)
  settings = {'scale': scale, 'window': window}

  def forward(q, k, v, at, seen):
    at, seen = tied((at, seen), q[:1, :1, :1, :1])
    queries, keys = cut_queries(q, at, J, N), cut_keys(k, v, seen, M)
    # slots of a cache that are not written yet cost nothing
    skip = ahead is None
    sums = fold(start(queries, v), queries, keys, pairs, skip=skip, **settings)
    o = join(finish(sums), T).astype(v.dtype)
    return o, (q, k, v, at, seen, o, sums.most, sums.total)

  def backward(residuals, d_o):
    q, k, v, at, seen, o, most, total = residuals
    queries, keys = cut_queries(q, at, J, N), cut_keys(k, v, seen, M)
    slopes = Slopes.of(cut(d_o, J, N), cut(o, J, N), most, total)
    d = zeros(queries.q), (zeros(keys.k), zeros(keys.v))
    d_q, (d_k, d_v) = unfold(d, queries, keys, slopes, pairs, **settings)
    d = ((d_q, q), (d_k, k), (d_v, v))
    return *(join(d, x.shape[1]).astype(x.dtype) for d, x in d), None, None

  call = jax.custom_vjp(lambda *args: forward(*args)[0])
  call.defvjp(forward, backward)
  return call(q, k, v, at, seen)


def _check(q, k, v, **others):
  sizes = check_shapes(q=(q, 'BTHK'), k=(k, 'BSJK'), v=(v, 'BSJV'), **others)
  if sizes['H'] % sizes['J']:
    raise ValueError(
      f'{sizes["H"]} query heads are no multiple of {sizes["J"]} key heads'
    )


def _pairs(N, C, M, D, ahead, window):
  """Which blocks meet: indices [n], [n] of N blocks of C queries and of M
  blocks of D keys."""

  def meet(i, j):
    if ahead is None:
      return True
    first = ahead + C * i
    before = window is not None and D * (j + 1) - 1 <= first - window
    return D * j < first + C and not before

  pairs = [(i, j) for i in range(N) for j in range(M) if meet(i, j)]
  return tuple(zip(*pairs, strict=True))


# ------------------------------------------------------------------- blocks
# Arrays are lists of blocks: x [N,B,J,G,C,K], G = 1 for keys and values.


class QueryBlocks(NamedTuple):
  q: jax.Array  # [N,B,J,G,C,K]
  at: Place  # positions [N,C] or [N,B,C], segments [N,B,C] or None


class KeyBlocks(NamedTuple):
  k: jax.Array  # [M,B,J,1,C,K]
  v: jax.Array  # [M,B,J,1,C,V]
  seen: Place  # positions [M,C] or [M,B,C], segments [M,B,C] or None


# indices of the blocks that meet: of queries, and of keys
Pairs = tuple[Sequence[int] | jax.Array, Sequence[int] | jax.Array]
Gradients = tuple[jax.Array, tuple[jax.Array, jax.Array]]  # dq, (dk, dv)


class Sums(NamedTuple):
  """What a query has seen so far, in float32."""

  o: jax.Array  # [N,B,J,G,C,V]
  most: jax.Array  # [N,B,J,G,C], m
  total: jax.Array  # [N,B,J,G,C], l


class Slopes(NamedTuple):
  """What the backward pass knows of its queries; all but d_o float32."""

  d_o: jax.Array  # [N,B,J,G,C,V]
  dot: jax.Array  # [N,B,J,G,C], d_o' o
  most: jax.Array  # [N,B,J,G,C], m
  total: jax.Array  # [N,B,J,G,C], l

  @classmethod
  def of(
    cls, d_o: jax.Array, o: jax.Array, most: jax.Array, total: jax.Array
  ) -> 'Slopes':
    return cls(d_o, (d_o.astype(F32) * o).sum(-1), most, total)


def cut(x: jax.Array, J: int, N: int) -> jax.Array:
  """[B,T,H,K] -> [N,B,J,H/J,C,K], filled up with zeros."""
  B, T, H, K = x.shape
  C = -(-T // N)
  x = jnp.pad(x, ((0, 0), (0, N * C - T), (0, 0), (0, 0)))
  return x.reshape(B, N, C, J, H // J, K).transpose(1, 0, 3, 4, 2, 5)


def join(x: jax.Array, T: int) -> jax.Array:
  """`cut` undone."""
  N, B, J, G, C, K = x.shape
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * C, J * G, K)[:, :T]


def cut_queries(q: jax.Array, at: Place, J: int, N: int) -> QueryBlocks:
  # what fills up stands where the last query does: it sees what that one sees
  return QueryBlocks(cut(q, J, N), _cut_place(at, N, mode='edge'))


def cut_keys(k: jax.Array, v: jax.Array, seen: Place, M: int) -> KeyBlocks:
  J = k.shape[2]
  return KeyBlocks(
    cut(k, J, M), cut(v, J, M), _cut_place(seen, M, constant_values=NEVER)
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
  return jnp.zeros(x.shape, F32)


def start(queries: QueryBlocks, v: jax.Array) -> Sums:
  rows = queries.q.shape[:-1]
  # no number is less, so that m' is never -inf where no key is seen as yet
  least = jnp.full(rows, jnp.finfo(F32).min)
  return Sums(jnp.zeros((*rows, v.shape[-1])), least, jnp.zeros(rows))


def finish(sums: Sums) -> jax.Array:
  return sums.o / sums.total[..., None]


def fold(
  sums: Sums,
  queries: QueryBlocks,
  keys: KeyBlocks,
  pairs: Pairs,
  *,
  scale: float,
  window: int | None = None,
  skip: bool = False,
) -> Sums:
  """`sums` after query blocks pairs[0] met key blocks pairs[1], in turn.

  skip: look first whether anything is visible.
  """

  def met(i, j, o, most, total):
    s, _, (_, v) = _scores(queries, keys, i, j, scale, window)
    now = jnp.maximum(most, s.max(-1))
    p, less = jnp.exp(s - now[..., None]), jnp.exp(most - now)
    o = less[..., None] * o + _product(
      'bjgts,bjsv->bjgtv', p.astype(v.dtype), v
    )
    return Sums(o, now, less * total + p.sum(-1))

  def meet(sums, pair):
    i, j = pair
    args = i, j, *(x[i] for x in sums)
    if skip:
      some = _mask(queries, keys, i, j, window).any()
      new = jax.lax.cond(some, met, lambda i, j, *old: Sums(*old), *args)
    else:
      new = met(*args)
    return jax.tree.map(lambda x, y: x.at[i].set(y), sums, new), None

  return _scan(meet, sums, pairs)


def unfold(
  d: Gradients,
  queries: QueryBlocks,
  keys: KeyBlocks,
  slopes: Slopes,
  pairs: Pairs,
  *,
  scale: float,
  window: int | None = None,
) -> Gradients:
  """`d` = (dq, (dk, dv)), float32, with what these pairs of blocks add."""

  def meet(d, pair):
    i, j = pair
    s, q, (k, v) = _scores(queries, keys, i, j, scale, window)
    d_o, dot, most, total = (x[i] for x in slopes)
    p = jnp.exp(s - most[..., None]) / total[..., None]
    d_v = _product('bjgts,bjgtv->bjsv', p.astype(v.dtype), d_o)
    d_p = _product('bjgtv,bjsv->bjgts', d_o, v)
    d_s = (scale * p * (d_p - dot[..., None])).astype(k.dtype)
    d_k = _product('bjgts,bjgtk->bjsk', d_s, q)
    d_q = _product('bjgts,bjsk->bjgtk', d_s, k)
    to_q, (to_k, to_v) = d
    add = lambda x, y: x.at[j].add(y[:, :, None])
    return (to_q.at[i].add(d_q), (add(to_k, d_k), add(to_v, d_v))), None

  return _scan(meet, d, pairs)


def _scan(meet, carry, pairs):
  # made here: the forward pass may not leave an array to the backward one
  pairs = tuple(jnp.asarray(x, jnp.int32) for x in pairs)
  return jax.lax.scan(meet, carry, pairs)[0]


def _scores(queries, keys, i, j, scale, window):
  """Scores [B,J,G,C,C'] of block i with block j, -inf where nothing is seen;
  the queries, the keys and values."""
  q, k, v = queries.q[i], keys.k[j][:, :, 0], keys.v[j][:, :, 0]
  mask = _mask(queries, keys, i, j, window)[:, None, None]
  s = scale * _product('bjgtk,bjsk->bjgts', q, k)
  return jnp.where(mask, s, -jnp.inf), q, (k, v)


def _mask(queries, keys, i, j, window):
  """`between` block i of the queries and block j of the keys."""
  at = jax.tree.map(lambda x: x[i], queries.at)
  seen = jax.tree.map(lambda x: x[j], keys.seen)
  return between(at, seen, window)


def _product(shapes, x, y):
  return jnp.einsum(shapes, x, y, preferred_element_type=F32)
