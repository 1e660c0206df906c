"""A mixture of experts whose tokens and experts lie on different devices.

Every device holds E/P of the experts, P along the mesh's 'expert', and routes
its own tokens. No token is dropped and no expert has a capacity. Two ways to
bring rows and experts together, equal but for the order of sums:

  exchanged   a row travels to the device of its expert and back, by
              `lax.ragged_all_to_all`: 2 N X D numbers a device
  gathered    every device sees the tokens of all P and computes what its
              experts add to them: 2 P N D numbers a device

`parallel.choice` says which.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops import routing
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.choice import choose

(AXIS,) = sharding.find_mesh_axes('experts')
(HIDDEN,) = sharding.find_mesh_axes('mlp')
SHARES = 2  # even ones, that a device has room for in most steps
Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down
Route = Callable[[jax.Array, jax.Array | None], routing.Routing]

FEW = 4096  # rows, too few to choose a room for: those of decoding


def mix_experts(
  x: jax.Array,
  logits: jax.Array,
  bias: jax.Array | None,
  weights: Weights,
  route: Route,
) -> tuple[jax.Array, routing.Load]:
  """(y [B,T,D], Load) of x [B,T,D] and the router's logits [B,T,E].

  weights: gate, up [E,D,F], down [E,F,D]   bias: [E] or None
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
  """`mix_experts` of a device's own tokens [B/.., T/.., D] with its weights."""
  (B, T, D), E = x.shape, logits.shape[-1]
  x = x.reshape(B * T, D)
  chosen = route(logits.reshape(B * T, E), bias)
  load = routing.load(chosen)
  if mesh is None:
    return routing.grouped(x, chosen, *weights).reshape(B, T, D), load
  products = routing.grouped
  if mesh.shape[AXIS] > 1:
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
  """Products of this device's tokens x [N,D] by all devices' experts."""
  E = gate.shape[0]
  both = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
  own = both(chosen.experts) - E * jax.lax.axis_index(AXIS)
  mine = (own >= 0) & (own < E)
  # E: no expert of this device
  own = routing.Routing(
    jnp.where(mine, own, E),
    jnp.where(mine, both(chosen.weights), 0),
    None,  # type: ignore[arg-type]
  )
  y = routing.grouped(both(x), own, gate, up, down)
  return jax.lax.psum_scatter(y, AXIS, tiled=True)


def exchanged(
  x: jax.Array,
  chosen: routing.Routing,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
) -> jax.Array:
  """`gathered` by sending every row to its expert; for `jax.grad` too.

  At worst a device gets P N min(X, E/P) rows. It has room for so many only in
  a step in which some device gets more than SHARES times N X, its even share,
  and more than FEW. The backward pass sends and computes all again: no room's
  contents are kept.
  """
  N, X = chosen.experts.shape
  own, P = gate.shape[0], jax.lax.axis_size(AXIS)
  usual, most = _rooms(N, X, own, P)

  def in_room(f, plan, *args):
    small = functools.partial(f, usual)
    if usual == most:
      return small(plan, *args)
    rare = jax.named_scope(routing.RARE)(functools.partial(f, most))
    # of all devices, not of this exchange's: whatever collective the compiler
    # moves to a side of the condition, all take the same
    everyone = jax.sharding.get_abstract_mesh().axis_names
    needed = jax.lax.pmax(plan.sizes.sum(), everyone)
    return jax.lax.cond(needed <= usual, small, rare, plan, *args)

  def pull(room, plan, args, d_y):
    return jax.vjp(functools.partial(_products, room, plan), *args)[1](d_y)

  def forward(plan, *args):
    return in_room(_products, plan, *args), (plan, args)

  def backward(residuals, d_y):
    return None, *in_room(pull, *residuals, d_y)

  call = jax.custom_vjp(lambda *args: forward(*args)[0])
  call.defvjp(forward, backward)
  return call(_plan(chosen.experts, own), x, chosen.weights, gate, up, down)


def _rooms(N, X, own, P):
  """Rows of a device that suffice in most steps, and in all."""
  most = P * N * min(X, own)
  return min(max(SHARES * N * X, FEW), most), most


def find_filled_share(N: int, experts: int, top: int, P: int) -> float:
  """The share of the usual room that even routing fills, N tokens a device."""
  return N * top / _rooms(N, top, experts // P, P)[0] if P > 1 else 1


class _Plan(NamedTuple):
  """Who sends what where; int32."""

  order: jax.Array  # [N X], of the rows of a device by expert
  send: jax.Array  # [E], to which expert
  there: jax.Array  # where they start, here
  places: jax.Array  # and at the expert's device
  receive: jax.Array  # [E], P x E/P: from whom and to which expert
  here: jax.Array  # where they start, here
  back: jax.Array  # and at the sender
  sizes: jax.Array  # [E/P], that this device's experts get


def _plan(experts, own):
  P, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  to = experts.reshape(-1)
  send = jnp.bincount(to, length=P * own).astype(jnp.int32)
  counts = jax.lax.all_gather(send, AXIS)  # [P,E]: from whom, to which expert
  places = _places(counts, own)
  mine = lambda x: x.reshape(P, P, own)[:, me].reshape(P * own)
  receive = mine(counts)
  return _Plan(
    order=jnp.argsort(to),
    send=send,
    there=_before(send),
    places=places[me],
    receive=receive,
    here=mine(places),
    back=mine(_before(counts)),
    sizes=receive.reshape(P, own).sum(0),
  )


def _products(room, plan, x, weights, gate, up, down):
  """[N,D] by way of the experts' devices, `room` rows on each. What comes lies
  sorted by expert, since each sender knows what the others send."""
  (N, D), X = x.shape, weights.shape[1]
  exchange = functools.partial(jax.lax.ragged_all_to_all, axis_name=AXIS)
  empty = lambda size: jnp.zeros((size, D), x.dtype)
  rows = exchange(
    jnp.repeat(x, X, axis=0)[plan.order],
    empty(room),
    plan.there,
    plan.send,
    plan.places,
    plan.receive,
  )
  y = routing.products(rows, plan.sizes, gate, up, down)
  y = exchange(y, empty(N * X), plan.here, plan.receive, plan.back, plan.send)
  return routing.weighted(y[jnp.argsort(plan.order)], weights)


def _before(counts):
  """Sums of the earlier entries of the last axis."""
  return jnp.cumsum(counts, -1) - counts


def _places(counts, own):
  """[P,E]: where a sender's rows for an expert start at that expert's device,
  after all rows of the device's earlier experts and of earlier senders."""
  totals = counts.sum(0).reshape(-1, own)
  earlier = jnp.cumsum(counts, 0) - counts
  return _before(totals).reshape(-1) + earlier
