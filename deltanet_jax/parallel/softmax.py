"""Softmax attention on a mesh.

Batch and heads are split as in every layer. Where time is split too, every
device has the queries of a span of T/P tokens. With a window, it receives the
keys just before its span from the devices that hold them. Without one:

  balance   Later queries see more keys. So a row is cut into 2 P halves of
            spans: device i keeps half 2 i and exchanges its other half with
            device P-1-i for half 2 P-1-2 i. Its queries then see 2 P + 1
            halves of keys, on every device.
  ring      The keys are passed from device to device (ring attention,
            arXiv:2310.01889). For the keys of each other device two pairs of
            halves are computed: its later half of queries sees the earlier
            half of keys, and either its earlier half sees that too or its
            later half sees the later half of keys. In the backward pass the
            keys go round again, with their gradients.

No device ever holds an array of the length T. The softmax is exact
(`attention.Sums`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deltanet_jax import kernels
from deltanet_jax.kernels.attention import attend_rows, choose_form
from deltanet_jax.ops import attention
from deltanet_jax.ops.attention import Place
from deltanet_jax.ops.compiler import hoisting_barrier
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sequence import (
  AXIS,
  is_split,
  receive_from_before,
  repeat_to_divide,
)

Make = Callable[..., tuple[jax.Array, jax.Array]]  # (*keys, *weights) -> k, v
Q = TypeVar('Q')
K = TypeVar('K')
R = TypeVar('R')


def attend(
  q: jax.Array,
  keys: Sequence[jax.Array],
  at: Place,
  seen: Place | None = None,
  *,
  weights: Sequence[jax.Array] = (),
  make: Make | None = None,
  scale: float,
  window: int | None = None,
  form: str = 'auto',
) -> jax.Array:
  """`attention.attend` on the current mesh: q [B,T,H,K] -> o [B,T,H,V].

  keys: arrays [B,S,...]   weights: arrays [.,H,.]
  make(*keys, *weights) -> k, v; None: the keys are k and v
  at: the queries' Place
  seen: the keys' Place; None: keys and queries are the same whole row
  form: of `kernels.attention`, for such rows where their time is not split
  """
  T, H = q.shape[1:3]
  make = make or (lambda k, v: (k, v))
  split = seen is None and is_split(T)
  if split or seen is not None or T == 1:
    form = 'blocks'
  else:
    k, v = jax.eval_shape(make, *keys, *weights)
    form = choose_form(form, q, k, v, at.segments)
  kernels.report_form('softmax attention', form)

  def whole(q, keys, weights, at, seen):
    k, v = make(*keys, *weights)
    if seen is None:
      return attend_rows(form, q, k, v, at, scale=scale, window=window)
    return attention.attend(q, k, v, at, seen, scale=scale, window=window)

  def span(q, keys, weights, at, _):
    if window is None or window >= T:
      return _balanced_ring(q, keys, weights, at.segments, make, scale)
    return _near(q, keys, weights, at.segments, make, scale, window)

  mesh = sharding.get_current_mesh()
  if mesh is None or T == 1:
    return whole(q, keys, weights, at, seen)
  local, time = (span, 'time') if split else (whole, None)
  place = lambda x, *axes: sharding.make_spec(axes, x.shape, mesh)
  heads = lambda x: ('heads', None) if x.ndim == 4 else (None,) * (x.ndim - 2)
  row = lambda x: place(x, 'batch', time, *heads(x))
  keys = [repeat_to_divide(x, H) if x.ndim == 4 else x for x in keys]
  args = q, keys, list(weights), at, seen
  of_place = lambda x: row(x) if x.ndim == 2 else PartitionSpec()
  specs = (
    row(q),
    [row(x) for x in keys],
    [place(x, None, 'heads', None) for x in weights],
    jax.tree.map(of_place, at),
    jax.tree.map(of_place, seen),
  )
  return jax.shard_map(
    local, in_specs=specs, out_specs=specs[0], check_vma=False
  )(*args)


def _near(q, keys, weights, ids, make, scale, window):
  """Attention of a span's queries, with the window - 1 keys before the span."""
  L, P = q.shape[1], jax.lax.axis_size(AXIS)
  reach = min(window - 1, L * (P - 1))

  def extended(x):
    # the farthest device sends only the tokens within the window
    far = range(-(-reach // L), 0, -1)
    before = [
      receive_from_before(x[:, -min(L, reach - L * (n - 1)) :], n) for n in far
    ]
    return jnp.concatenate([*before, x], axis=1)

  keys, key_ids = jax.tree.map(extended, (keys, ids))
  first = L * jax.lax.axis_index(AXIS)
  positions = first - reach + jnp.arange(reach + L)
  return attention.attend(
    q,
    *make(*keys, *weights),
    Place(first + jnp.arange(L), ids),
    Place(jnp.where(positions < 0, attention.NO_KEY, positions), key_ids),
    ahead=reach,
    scale=scale,
    window=window,
  )


def call_on_all_keys(f: Callable[[Q, K], R], queries: Q, keys: K) -> R:
  """f(queries, keys) with the keys of all spans, for an f that sums over heads.

  queries, keys and the result: pytrees of arrays [B,T,...]. The mesh's 'tensor'
  axis splits the queries' time too, since f needs all heads.
  """
  B, T = jax.tree.leaves(queries)[0].shape[:2]
  mesh = sharding.get_current_mesh()
  if mesh is None or not is_split(T):
    return f(queries, keys)
  plain = sharding.make_spec(('batch', 'time'), (B, T), mesh)
  where = plain
  if not T % (sharding.count_parts('time') * sharding.count_parts('heads')):
    where = PartitionSpec(
      plain[0],
      sharding.find_mesh_axes('time') + sharding.find_mesh_axes('heads'),
    )

  def local(queries, keys):
    whole = lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
    return f(queries, jax.tree.map(whole, keys))

  return jax.shard_map(
    local, in_specs=(where, plain), out_specs=where, check_vma=False
  )(queries, keys)


def _balanced_ring(q, keys, weights, ids, make, scale):
  L = q.shape[1]
  n = -(-L // (2 * attention.BLOCK))  # blocks of a half
  half = n * -(-L // (2 * n))
  fill = lambda x, **mode: jnp.pad(
    x, ((0, 0), (0, 2 * half - L)) + ((0, 0),) * (x.ndim - 2), **mode
  )
  q, keys = jax.tree.map(lambda x: _exchange(fill(x)), (q, keys))
  if ids is not None:
    ids = _exchange(fill(ids, mode='edge'))
  o = _Ring(make, scale, L, n)(q, keys, weights, ids)
  return _exchange(o, back=True)[:, :L]


def _is_early(i):
  """True where half 2 i is the earlier of device i's two halves."""
  return 2 * i < jax.lax.axis_size(AXIS)


def _exchange(x, back=False):
  """Maps a device's span [B,2 half,...] to its two balanced halves, the earlier
  first; `back`: the inverse."""
  P = jax.lax.axis_size(AXIS)
  early = _is_early(jax.lax.axis_index(AXIS))
  turned = lambda x: jnp.where(early, x, jnp.roll(x, x.shape[1] // 2, axis=1))
  if back:
    x = turned(x)
  own, other = jnp.split(x, 2, axis=1)
  other = jax.lax.ppermute(other, AXIS, [(i, P - 1 - i) for i in range(P)])
  x = jnp.concatenate([own, other], axis=1)
  return x if back else turned(x)


def _positions(i, L, half):
  """Of device i's balanced halves: positions [2 half], of padding that of the
  span's last token; and [2 half] bool, false for padding."""
  P = jax.lax.axis_size(AXIS)
  own, other = jnp.arange(half), jnp.arange(half, 2 * half)
  early = _is_early(i)
  first, second = (jnp.where(early, *x) for x in ((own, other), (other, own)))
  of = jnp.where(early, jnp.array([i, P - 1 - i]), jnp.array([P - 1 - i, i]))
  within = jnp.concatenate([first, second])
  return L * jnp.repeat(of, half) + jnp.minimum(within, L - 1), within < L


def _block_pairs(n):
  """Pairs of query and key blocks, blocks 0 to n-1 in the earlier half: those
  for a device's own keys, and a function of those for another device's keys,
  whose earlier half comes after (or before) this device's."""
  both = range(2 * n)
  own = [(i, j) for i in both for j in both if j <= i]
  square = [(i, j) for i in range(n) for j in range(n)]
  always = [(n + i, j) for i, j in square]
  column = lambda pairs, c: jnp.array([pair[c] for pair in pairs])

  def other(after):
    shift = jnp.where(after, n, 0)
    return tuple(
      jnp.concatenate([column(always, c), column(square, c) + shift])
      for c in (0, 1)
    )

  return tuple(zip(*own, strict=True)), other


class _Ring(NamedTuple):
  """Ring attention of a device's balanced halves: (q, keys, weights, ids) ->
  o [B,2 half,H,V]."""

  make: Make  # (*keys, *weights) -> k, v
  scale: float
  L: int  # tokens of a span
  n: int  # blocks of a half

  def __call__(self, *args):
    call = jax.custom_vjp(lambda *args: self._forward(*args)[0])
    call.defvjp(self._forward, self._backward)
    return call(*args)

  def _forward(self, q, keys, weights, ids):
    me, ids = hoisting_barrier(
      (jax.lax.axis_index(AXIS), ids), q[:1, :1, :1, :1]
    )
    k, v = jax.eval_shape(self.make, *keys, *weights)
    queries = self._queries(q, ids, me, k.shape[2])

    def visit(result, keys, device, pairs):
      keys, ids = keys
      blocks = self._keys(*self.make(*keys, *weights), ids, device)
      return attention.accumulate(
        result[0], queries, blocks, pairs, scale=self.scale
      ), None

    result = attention.empty_sums(queries, v), None
    sums, _ = self._round_trip(visit, me, result, (keys, ids))
    o = attention.join(attention.normalize(sums), q.shape[1]).astype(v.dtype)
    return o, (q, keys, weights, ids, me, o, sums.row_max, sums.row_sum)

  def _backward(self, residuals, d_o):
    q, keys, weights, ids, me, o, row_max, row_sum = residuals
    k, v = jax.eval_shape(self.make, *keys, *weights)
    J, T = k.shape[2], q.shape[1]
    queries = self._queries(q, ids, me, J)
    cut = functools.partial(attention.cut, J=J, N=2 * self.n)
    rows = attention.RowGradients.of(cut(d_o), cut(o), row_max, row_sum)
    zeros = functools.partial(jax.tree.map, attention.zeros)
    add = functools.partial(jax.tree.map, jnp.add)
    back = lambda d, x: attention.join(d, T).astype(x.dtype)

    def visit(result, keys, device, pairs):
      d_q, d_weights, d_keys = result
      keys, ids = keys
      made, pull = jax.vjp(
        lambda keys, weights: self.make(*keys, *weights), keys, weights
      )
      blocks = self._keys(*made, ids, device)
      d_q, d_made = attention.accumulate_gradients(
        (d_q, zeros((blocks.k, blocks.v))),
        queries,
        blocks,
        rows,
        pairs,
        scale=self.scale,
      )
      to_keys, to_weights = pull(tuple(map(back, d_made, made)))
      return d_q, add(d_weights, to_weights), add(d_keys, to_keys)

    result = zeros((queries.q, weights, keys))
    d_q, d_weights, d_keys = self._round_trip(visit, me, result, (keys, ids))
    like = lambda d, x: d.astype(x.dtype)
    return (
      back(d_q, q),
      jax.tree.map(like, d_keys, keys),
      jax.tree.map(like, d_weights, weights),
      None,
    )

  def _round_trip(self, visit, me, result, keys):
    """visit(result, keys, device, pairs) with the keys of every device in turn.
    The last part of `result` is passed on with the keys, and returns."""
    P = jax.lax.axis_size(AXIS)
    own, other = _block_pairs(self.n)
    first = lambda i: jnp.minimum(2 * i, 2 * P - 1 - 2 * i)
    travel = lambda result: (*result[:-1], _pass_on(result[-1]))

    def body(carry, r):
      result, keys = carry
      following = _pass_on(keys)  # overlaps with the computation below
      of = (me - r) % P
      result = visit(result, keys, of, other(first(of) > first(me)))
      return (travel(result), following), None

    result = travel(visit(result, keys, me, own))
    carry = result, _pass_on(keys)
    return jax.lax.scan(body, carry, jnp.arange(1, P))[0][0]

  def _queries(self, q, ids, me, J):
    positions, _ = _positions(me, self.L, q.shape[1] // 2)
    return attention.cut_queries(q, Place(positions, ids), J, 2 * self.n)

  def _keys(self, k, v, ids, device):
    positions, token = _positions(device, self.L, k.shape[1] // 2)
    positions = jnp.where(token, positions, attention.NO_KEY)
    return attention.cut_keys(k, v, Place(positions, ids), 2 * self.n)


def _pass_on(x):
  P = jax.lax.axis_size(AXIS)
  return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % P) for i in range(P)])
