"""Documents packed into a row: which token belongs to which, and that none
reaches another, whatever it holds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# of a rule: the first, q, is an array; others may be None
Inputs = tuple[jax.Array, *tuple[jax.Array | None, ...]]


def runs_of(segment_ids: jax.Array | None) -> jax.Array | None:
  """Numbers the runs of equal neighbors in segment_ids [B,T]: 0, 1, 2, ...

  A document is a run, so an id that comes back later starts a new one. None
  for None.
  """
  if segment_ids is None:
    return None
  return jnp.cumsum(starts(segment_ids), axis=1, dtype=jnp.int32)


def starts(segment_ids: jax.Array) -> jax.Array:
  """Where a document begins that is not the row's first: [B,T] bool."""
  before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
  return segment_ids != before


def apart(
  rule: Callable[
    [Inputs, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]
  ],
  inputs: Inputs,
  state: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """`rule(inputs, state, segment_ids) -> (o, state)`, no document seeing what
  is not finite in another.

  A mask multiplies by zero, and zero times NaN is NaN: in a chunk that two
  documents share, one would spoil the other. So what is not finite is taken
  out before the rule and put back after it: o, the last state and the
  gradients of a document are NaN from such a token on, in all its heads; all
  other documents have the values and gradients that they have alone.

  inputs: arrays [B,T,...] or None; state [B,H,K,V] belongs to the first
  document; segment_ids [B,T] or None: one document, nothing is done.
  """
  if segment_ids is None:
    return rule(inputs, state, None)

  def forward(inputs, state, segment_ids):
    lost = _bad(state, 1)
    bad = _first(_bad(inputs, 2), lost)
    spoiled = _since_start(bad, segment_ids)
    (o, last), pull = jax.vjp(
      lambda *args: rule(*args, segment_ids),
      _filled(inputs, bad, 0),
      _filled(state, lost, 0),
    )
    o = _filled(o, spoiled, jnp.nan)
    last = _filled(last, spoiled[:, -1], jnp.nan)
    return (o, last), (pull, spoiled, segment_ids)

  def backward(residuals, cotangents):
    pull, spoiled, segment_ids = residuals
    d_o, d_last = cotangents
    # the same from the end of the row
    flip = lambda x: jnp.flip(x, 1)
    lost = _bad(d_last, 1) | spoiled[:, -1]
    bad = _bad(d_o, 2) | spoiled
    d_inputs, d_state = pull((_filled(d_o, bad, 0), _filled(d_last, lost, 0)))
    bad = _first(flip(bad), lost)
    spoiled |= flip(_since_start(bad, flip(segment_ids)))
    d_inputs = _filled(d_inputs, spoiled, jnp.nan)
    return d_inputs, _filled(d_state, spoiled[:, 0], jnp.nan), None

  call = jax.custom_vjp(lambda *args: forward(*args)[0])
  call.defvjp(forward, backward)
  return call(inputs, state, segment_ids)


def _bad(arrays, lead):
  """Is anything not finite? Of arrays, for each index of their first `lead`
  axes."""
  finite = [
    jnp.isfinite(x).all(tuple(range(lead, x.ndim)))
    for x in jax.tree.leaves(arrays)
  ]
  return ~jnp.stack(finite).all(0)


def _first(bad, also):
  """bad [B,T], of the first token `also` [B] too."""
  return jnp.concatenate([bad[:, :1] | also[:, None], bad[:, 1:]], 1)


def _filled(arrays, where, value):
  """Arrays with `value` where `where`, of fewer axes, says so."""

  def fill(x):
    at = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
    return jnp.where(at, jnp.asarray(value, x.dtype), x)

  return jax.tree.map(fill, arrays)


def _since_start(bad, segment_ids):
  """Is this token or one before it in its document bad? [B,T] bool."""
  index = jnp.broadcast_to(jnp.arange(bad.shape[1]), bad.shape)
  latest = lambda x: jax.lax.cummax(jnp.where(x, index, -1), axis=1)
  return latest(bad) >= jnp.maximum(latest(starts(segment_ids)), 0)
