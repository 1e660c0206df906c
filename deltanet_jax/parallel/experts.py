"""Expert parallelism: tokens and experts on different devices.

Each of the P devices along the mesh's 'expert' axis holds E/P experts and
routes its own N tokens. No token is dropped; experts have no capacity, and the
buffers of `_in_buffers` do not grow with the imbalance. There are two ways,
equal but for the order of sums:

  exchanged   rows are sent to the devices of their experts and back, by
              `lax.ragged_all_to_all`: 2 N X D numbers per device
  gathered    every device gathers the tokens of all P and adds the outputs of
              its own experts: 2 P N D numbers per device

`platforms` chooses.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops import routing
from deltanet_jax.parallel import sharding
from deltanet_jax.platforms import choose

(AXIS,) = sharding.find_mesh_axes('experts')
(HIDDEN,) = sharding.find_mesh_axes('mlp')
SHARES = 2  # the usual buffer of a device, in multiples of an even share
Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down
Route = Callable[[jax.Array, jax.Array | None], routing.Routing]

FEW_TOKENS = 64  # of all devices, in decoding
FEW = 4096  # rows: the smallest buffer, enough for decoding


def mix_experts(
  x: jax.Array,
  logits: jax.Array,
  bias: jax.Array | None,
  weights: Weights,
  route: Route,
) -> tuple[jax.Array, routing.Load]:
  """The mixture of experts on the current mesh: (y [B,T,D], Load).

  x [B,T,D]   logits [B,T,E] of the router   bias [E] or None
  weights: gate, up [E,D,F], down [E,F,D]
  route: (logits [N,E], bias) -> Routing
  """
  mesh = sharding.get_current_mesh()
  if mesh is None:
    return _own(x, logits, bias, weights, route)
  rows = ('batch', 'time', None)
  inward, outward = ('experts', None, 'mlp'), ('experts', 'mlp', None)
  place = lambda axes, x: sharding.make_spec(axes, x.shape, mesh)
  specs = (
    place(rows, x),
    place(rows, logits),
    None if bias is None else place((None,), bias),
    tuple(map(place, (inward, inward, outward), weights)),
  )
  whole = jax.sharding.PartitionSpec()
  return jax.shard_map(
    functools.partial(_own, route=route, mesh=mesh),
    in_specs=specs,
    out_specs=(specs[0], whole),
    check_vma=False,
  )(x, logits, bias, weights)


def _own(x, logits, bias, weights, route, mesh=None):
  """`mix_experts` on one device, with its own tokens and weights."""
  (B, T, D), E = x.shape, logits.shape[-1]
  x = x.reshape(B * T, D)
  chosen = route(logits.reshape(B * T, E), bias)
  load = routing.load(chosen)
  devices = 1 if mesh is None else mesh.shape[AXIS]
  # a token a row and few rows: the time is that of reading weights, which
  # products by groups would first copy out of those of all layers
  few = T == 1 and B * devices <= FEW_TOKENS
  products = routing.dense if few else routing.grouped
  if mesh is None:
    return products(x, chosen, *weights).reshape(B, T, D), load
  if devices > 1 and few:
    products = _dense
  elif devices > 1:
    way = choose(mesh.abstract_device).exchange
    products = {'gathered': gathered, 'exchanged': exchanged}[way]
  y = products(x, chosen, *weights)
  if mesh.shape[HIDDEN] > 1:
    y = jax.lax.psum(y, HIDDEN)
  tokens = sharding.find_mesh_axes('batch') + sharding.find_mesh_axes('time')
  return y.reshape(B, T, D), jax.lax.pmean(load, tokens)


def gathered(
  x: jax.Array,
  chosen: routing.Routing,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
) -> jax.Array:
  """y [N,D] of this device's tokens x [N,D], by the experts of all devices."""
  (N, X), E = chosen.experts.shape, gate.shape[0]
  both = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
  own = both(chosen.experts) - E * jax.lax.axis_index(AXIS)
  # E: an expert of another device
  own = jnp.where((own >= 0) & (own < E), own, E).reshape(-1)
  plan = _Own(jnp.argsort(own), jnp.bincount(own, length=E).astype(jnp.int32))
  rows = _buffer_rows(N, X, E, jax.lax.axis_size(AXIS))
  weights = both(chosen.weights)
  y = _in_buffers(_sum_own, rows, plan, both(x), weights, gate, up, down)
  return jax.lax.psum_scatter(y, AXIS, tiled=True)


def exchanged(
  x: jax.Array,
  chosen: routing.Routing,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
) -> jax.Array:
  """`gathered`, but every row is sent to its expert's device."""
  (N, X), E = chosen.experts.shape, gate.shape[0]
  rows = _buffer_rows(N, X, E, jax.lax.axis_size(AXIS))
  plan = _plan(chosen.experts, E)
  return _in_buffers(_products, rows, plan, x, chosen.weights, gate, up, down)


def _dense(x, chosen, *weights):
  """`gathered`, by `routing.dense`."""
  both = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
  own = both(chosen.experts) - len(weights[0]) * jax.lax.axis_index(AXIS)
  chosen = chosen._replace(experts=own, weights=both(chosen.weights))
  y = routing.dense(both(x), chosen, *weights)
  return jax.lax.psum_scatter(y, AXIS, tiled=True)


def _in_buffers(products, rows, plan, *args):
  """products(length, plan, *args) for all rows of the plan.

  A device has P N min(X, E/P) rows at worst, N X on average. Its buffer has
  max(SHARES N X, FEW) rows; in steps in which some device has more, all fill
  theirs several times and add the results. The backward pass computes all rows
  again, so that no buffer is kept.

  rows: of `_buffer_rows`
  """
  usual, most = rows

  def with_buffer(f, plan, *args):
    f = functools.partial(f, usual)
    if usual == most:
      return f(plan, *args)
    # the maximum over all devices, not only those of this exchange: the
    # compiler may move collectives into a branch, and then all must take it
    everyone = jax.sharding.get_abstract_mesh().axis_names
    needed = jax.lax.pmax(plan.sizes.sum(), everyone)

    @jax.named_scope(routing.RARE)
    def rare(plan, *args):
      part = lambda i: f(plan.cut(i * usual, usual), *args)
      add = lambda i, sums: jax.tree.map(jnp.add, sums, part(i))
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0)
      )
      return jax.lax.fori_loop(0, -(-needed // usual), add, zeros)

    return jax.lax.cond(needed <= usual, f, rare, plan, *args)

  def pull(length, plan, args, d_y):
    return jax.vjp(functools.partial(products, length, plan), *args)[1](d_y)

  def forward(plan, *args):
    return with_buffer(products, plan, *args), (plan, args)

  def backward(residuals, d_y):
    return None, *with_buffer(pull, *residuals, d_y)

  call = jax.custom_vjp(lambda *args: forward(*args)[0])
  call.defvjp(forward, backward)
  return call(plan, *args)


def _buffer_rows(N, X, own, P):
  """The rows of a device's buffer: in most steps, and at worst."""
  most = P * N * min(X, own)
  return min(max(SHARES * N * X, FEW), most), most


def find_filled_share(N: int, experts: int, top: int, P: int) -> float:
  """The fraction of the usual buffer that even routing fills, with N tokens per
  device."""
  return N * top / _buffer_rows(N, top, experts // P, P)[0] if P > 1 else 1


class _Own(NamedTuple):
  """The rows of this device's experts among those of all devices, int32."""

  order: jax.Array  # [P N X], sorts by expert, those of others last
  sizes: jax.Array  # [E/P], rows of each of this device's experts

  def cut(self, start, length):
    """The part with the rows from `start` on, `length` of them."""
    # beyond the last row there is none that counts
    order = jnp.take(self.order, start + jnp.arange(length), mode='clip')
    _, sizes = _overlap(_before(self.sizes), self.sizes, start, length)
    return _Own(order, sizes)


def _sum_own(length, plan, x, weights, gate, up, down):
  """y [P N,D] by this device's experts, of the first `length` rows."""
  order = plan.order[:length]
  token = order // weights.shape[1]
  own = (jnp.arange(length) < plan.sizes.sum())[:, None]
  # not only zero weights: the gradients of other rows may be uninitialized
  rows = jnp.where(own, x[token], 0)
  rows = routing.products(rows, plan.sizes, gate, up, down)
  rows = rows.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
  y = jnp.zeros(x.shape, jnp.float32).at[token].add(rows)
  return y.astype(x.dtype)


class _Plan(NamedTuple):
  """Counts and offsets of the exchanged rows, int32."""

  order: jax.Array  # [N X], sorts a device's rows by expert
  send: jax.Array  # [E], rows sent to each expert
  send_from: jax.Array  # [E], where they start in this device's rows
  send_to: jax.Array  # [E], where they start in the receiver's buffer
  receive: jax.Array  # [P E/P], rows received from each device for each expert
  receive_at: jax.Array  # [P E/P], where they start in this device's buffer
  back_to: jax.Array  # [P E/P], where they start in the sender's rows
  sizes: jax.Array  # [E/P], rows of each of this device's experts

  def cut(self, start, length):
    """The part whose rows are `length` from `start` on in the receivers'
    buffers."""
    cut = functools.partial(_overlap, start=start, length=length)
    skip, send = cut(self.send_to, self.send)
    skipped, receive = cut(self.receive_at, self.receive)
    _, sizes = cut(_before(self.sizes), self.sizes)
    return self._replace(
      send=send,
      send_from=self.send_from + skip,
      send_to=jnp.clip(self.send_to + skip - start, 0, length),
      receive=receive,
      receive_at=jnp.clip(self.receive_at + skipped - start, 0, length),
      back_to=self.back_to + skipped,
      sizes=sizes,
    )


def _plan(experts, own):
  P, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  to = experts.reshape(-1)
  send = jnp.bincount(to, length=P * own).astype(jnp.int32)
  counts = jax.lax.all_gather(send, AXIS)  # [P,E], from device, to expert
  places = _places(counts, own)
  mine = lambda x: x.reshape(P, P, own)[:, me].reshape(P * own)
  receive = mine(counts)
  return _Plan(
    order=jnp.argsort(to),
    send=send,
    send_from=_before(send),
    send_to=places[me],
    receive=receive,
    receive_at=mine(places),
    back_to=mine(_before(counts)),
    sizes=receive.reshape(P, own).sum(0),
  )


def _products(length, plan, x, weights, gate, up, down):
  """y [N,D], computed on the experts' devices in buffers of `length` rows. Rows
  arrive sorted by expert, since each sender knows what the others send."""
  (N, D), X = x.shape, weights.shape[1]
  exchange = functools.partial(jax.lax.ragged_all_to_all, axis_name=AXIS)
  empty = lambda size: jnp.zeros((size, D), x.dtype)
  rows = exchange(
    jnp.repeat(x, X, axis=0)[plan.order],
    empty(length),
    plan.send_from,
    plan.send,
    plan.send_to,
    plan.receive,
  )
  y = routing.products(rows, plan.sizes, gate, up, down)
  back = plan.receive_at, plan.receive, plan.back_to, plan.send
  y = exchange(y, empty(N * X), *back)
  return routing.weighted(y[jnp.argsort(plan.order)], weights)


def _overlap(at, count, start, length):
  """Of the range of `count` from `at` on, what lies in that of `length` from
  `start` on: (how many are before it, how many are in it)."""
  end = lambda x: jnp.clip(x - at, 0, count)
  return end(start), end(start + length) - end(start)


def _before(counts):
  """Sums of the earlier entries of the last axis."""
  return jnp.cumsum(counts, -1) - counts


def _places(counts, own):
  """[P,E]: where a sender's rows for an expert start in the receiver's buffer,
  after those for its earlier experts and those of earlier senders."""
  totals = counts.sum(0).reshape(-1, own)
  earlier = jnp.cumsum(counts, 0) - counts
  return _before(totals).reshape(-1) + earlier
