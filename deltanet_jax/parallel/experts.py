"""A mixture of experts whose tokens and experts lie on different devices.

Every device holds E/P of the experts, P along the mesh's 'expert', and routes
its own tokens. No token is dropped and no expert has a capacity. Two ways to
bring rows and experts together, equal but for the order of sums:

  exchanged   a row travels to the device of its expert and back, by
              `lax.ragged_all_to_all`: 2 N X D numbers a device
  gathered    every device sees the tokens of all P and computes what its
              experts add to them: 2 P N D numbers a device

XLA's CPU backend lacks the ragged exchange, so it gathers.
"""

import functools

import jax
import jax.numpy as jnp

from deltanet_jax import sharding
from deltanet_jax.ops import routing

(AXIS,) = sharding.over('experts')
(HIDDEN,) = sharding.over('mlp')


def mixture(x, logits, bias, weights, route):
  """(y [B,T,D], Load) of x [B,T,D] and the router's logits [B,T,E].

  weights: gate, up [E,D,F], down [E,F,D]   bias: [E] or None
  route: (logits [N,E], bias) -> Routing
  """
  mesh = sharding.current_mesh()
  if mesh is None:
    return _own(x, logits, bias, weights, route)
  rows = ('batch', 'time', None)
  inward, outward = ('experts', None, 'mlp'), ('experts', 'mlp', None)
  place = lambda axes, x: sharding.spec(axes, x.shape, mesh)
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
    out_specs=(specs[0], routing.Load(whole, whole)),
    check_vma=False,
  )(x, logits, bias, weights)


def _own(x, logits, bias, weights, route, mesh=None):
  """`mixture` of a device's own tokens [B/.., T/.., D] with its own weights."""
  (B, T, D), E = x.shape, logits.shape[-1]
  x = x.reshape(B * T, D)
  chosen = route(logits.reshape(B * T, E), bias)
  load = routing.load(chosen)
  if mesh is None:
    return routing.grouped(x, chosen, *weights).reshape(B, T, D), load
  products = routing.grouped
  if mesh.shape[AXIS] > 1:
    products = gathered if _platform(mesh) == 'cpu' else exchanged
  y = products(x, chosen, *weights)
  if mesh.shape[HIDDEN] > 1:
    y = jax.lax.psum(y, HIDDEN)
  tokens = sharding.over('batch') + sharding.over('time')
  return y.reshape(B, T, D), jax.lax.pmean(load, tokens)


def _platform(mesh):
  device = mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def gathered(x, chosen, gate, up, down):
  """Products of this device's tokens x [N,D] by all devices' experts."""
  E = gate.shape[0]
  both = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
  own = both(chosen.experts) - E * jax.lax.axis_index(AXIS)
  mine = (own >= 0) & (own < E)
  # E: no expert of this device
  own = routing.Routing(
    jnp.where(mine, own, E), jnp.where(mine, both(chosen.weights), 0), None
  )
  y = routing.grouped(both(x), own, gate, up, down)
  return jax.lax.psum_scatter(y, AXIS, tiled=True)


def exchanged(x, chosen, gate, up, down):
  """`gathered` by sending every row to its expert; for `jax.grad` too.

  A device has room for the rows it might get, P N min(X, E/P); those that come
  lie sorted by expert, since each sender knows what the others send.
  """
  (N, D), X = x.shape, chosen.experts.shape[1]
  own, P = gate.shape[0], jax.lax.axis_size(AXIS)
  to = chosen.experts.reshape(N * X)
  order = jnp.argsort(to)
  send = jnp.bincount(to, length=P * own).astype(jnp.int32)
  counts = jax.lax.all_gather(send, AXIS)  # [P,E]: from whom, to which expert
  places = _places(counts, own)
  me = jax.lax.axis_index(AXIS)
  here = lambda x: x.reshape(P, P, own)[:, me].reshape(P * own)
  there = _before(send)
  rows = jnp.zeros((P * N * min(X, own), D), x.dtype)
  rows = jax.lax.ragged_all_to_all(
    jnp.repeat(x, X, axis=0)[order],
    rows,
    there,
    send,
    places[me],
    here(counts),
    axis_name=AXIS,
  )
  sizes = here(counts).reshape(P, own).sum(0)
  y = routing.products(rows, sizes, gate, up, down)
  y = jax.lax.ragged_all_to_all(
    y,
    jnp.zeros((N * X, D), x.dtype),
    here(places),
    here(counts),
    here(_before(counts)),
    send,
    axis_name=AXIS,
  )
  return routing.weighted(y[jnp.argsort(order)], chosen.weights)


def filled(experts, top, P):
  """The share of that room which even routing fills."""
  return top / (P * min(top, experts // P)) if P > 1 else 1


def _before(counts):
  """Sums of the earlier entries of the last axis."""
  return jnp.cumsum(counts, -1) - counts


def _places(counts, own):
  """[P,E]: where a sender's rows for an expert start at that expert's device,
  after all rows of the device's earlier experts and of earlier senders."""
  totals = counts.sum(0).reshape(-1, own)
  earlier = jnp.cumsum(counts, 0) - counts
  return _before(totals).reshape(-1) + earlier
