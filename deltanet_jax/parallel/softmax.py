"""Softmax attention on a mesh.

Batch and heads are split like everything else. Where time is split too, every
device attends with the queries of its own span, over the keys of the row.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deltanet_jax import sharding
from deltanet_jax.ops import attention
from deltanet_jax.ops.attention import Place
from deltanet_jax.parallel.sequence import AXIS, divisible, split


def attend(
  q, keys, at, seen=None, *, weights=(), make=None, scale, window=None
):
  """`attention.attend` on the current mesh: o [B,T,H,V] of q [B,T,H,K].

  keys: arrays [B,S,...]   weights: arrays [.,H,.]   make(*keys, *weights): k
  and v; by default the keys are k and v. at: the queries' Place   seen: the
  keys', or None where keys and queries are one row from its first token on.
  """
  how = {'scale': scale, 'window': window}
  make = make or (lambda k, v: (k, v))

  def whole(q, keys, weights, at, seen):
    ahead, seen = (0, at) if seen is None else (None, seen)
    return attention.attend(
      q, *make(*keys, *weights), at, seen, ahead=ahead, **how
    )

  def span(q, keys, weights, at, _):
    L = q.shape[1]
    gather = lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
    keys, ids = jax.tree.map(gather, (keys, at.segments))
    first = L * jax.lax.axis_index(AXIS)
    seen = Place(jnp.arange(keys[0].shape[1]), ids)
    at = Place(first + jnp.arange(L), at.segments)
    return attention.attend(q, *make(*keys, *weights), at, seen, **how)

  T, H = q.shape[1:3]
  mesh = sharding.current_mesh()
  if mesh is None or T == 1:
    return whole(q, keys, weights, at, seen)
  local, time = (span, 'time') if seen is None and split(T) else (whole, None)
  place = lambda x, *axes: sharding.spec(axes, x.shape, mesh)
  heads = lambda x: ('heads', None) if x.ndim == 4 else (None,) * (x.ndim - 2)
  row = lambda x: place(x, 'batch', time, *heads(x))
  keys = [divisible(x, H) if x.ndim == 4 else x for x in keys]
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


def over_keys(f, queries, keys):
  """f(queries, keys) with the keys of all spans, for an f that sums over heads.

  queries, keys: pytrees of arrays [B,T,...]; the result is one too, row by row
  as `queries`. Over the mesh's 'tensor' goes the time of the queries.
  """
  B, T = jax.tree.leaves(queries)[0].shape[:2]
  if not split(T):
    return f(queries, keys)
  mesh = sharding.current_mesh()
  plain = sharding.spec(('batch', 'time'), (B, T), mesh)
  where = plain
  if not T % (sharding.parts('time') * sharding.parts('heads')):
    where = PartitionSpec(
      plain[0], sharding.over('time') + sharding.over('heads')
    )

  def local(queries, keys):
    whole = lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
    return f(queries, jax.tree.map(whole, keys))

  return jax.shard_map(
    local, in_specs=(where, plain), out_specs=where, check_vma=False
  )(queries, keys)
