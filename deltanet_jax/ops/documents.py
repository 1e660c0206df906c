"""Documents packed in one row: their segments, NaN that stays in its document,
and a state for every document."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Arrays = TypeVar('Arrays')  # a tree of arrays
# of a rule: the first is q, an array; the others may be None
Inputs = tuple[jax.Array, *tuple[jax.Array | None, ...]]


def number_segments(segment_ids: jax.Array | None) -> jax.Array | None:
  """Numbers the segments of each row of segment_ids [B,T]: 0, 1, 2, ...

  A segment is a run of equal ids, so an id that comes back later is a new one.
  Returns [B,T] int32, None for None.
  """
  if segment_ids is None:
    return None
  return jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)


def segment_starts(segment_ids: jax.Array) -> jax.Array:
  """[B,T] bool: true where a segment begins that is not the row's first."""
  before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
  return segment_ids != before


def isolate_nonfinite(
  rule: Callable[
    [Inputs, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]
  ],
  inputs: Inputs,
  state: jax.Array,
  segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Calls `rule(inputs, state, segment_ids) -> (o, state)` such that NaN and
  infinity stay in their document.

  A mask multiplies by zero, and zero times NaN is NaN, so a document would
  spoil another one in its chunk. Non-finite tokens are therefore replaced by
  zeros before the rule, and afterwards o, the last state and the gradients of
  that document are set to NaN from the token on, in all heads. The other
  documents have the values and gradients that they have alone.

  inputs: arrays [B,T,...] or None; state [B,H,K,V] belongs to the first
  document; segment_ids [B,T], or None: the rule is called as it is.
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
    # the same, from the end of the row backwards
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


def run_per_document(
  rule: Callable[[Arrays, jax.Array], tuple[jax.Array, jax.Array]],
  inputs: Arrays,
  states: jax.Array,
  cu_seqlens: jax.Array,
  block: int,
) -> tuple[jax.Array, jax.Array]:
  """Calls `rule(inputs, state) -> (o, state)` on every document of a row, each
  with its own state.

  inputs: arrays [1,T,...]; states [N,H,K,V]; document n is the tokens from
  cu_seqlens[n] up to cu_seqlens[n+1], perhaps none. Returns o [1,T,H,V], zero
  for tokens in no document, and the last states; that of an empty document is
  unchanged.

  Each document is cut into blocks of `block` tokens, the last padded with
  zeros, which change no state: `rule` sees one document at a time, unmasked.
  At most T / block + N blocks run one after the other.
  """
  T, N = jax.tree.leaves(inputs)[0].shape[1], states.shape[0]
  lengths = jnp.diff(cu_seqlens)
  counts = -(-lengths // block)
  ends = jnp.cumsum(counts)
  index = jnp.arange((T + N * (block - 1)) // block)
  # unused blocks are empty ones of the last document
  document = jnp.minimum(jnp.searchsorted(ends, index, side='right'), N - 1)
  start = block * (index - (ends - counts)[document])
  place = start[:, None] + jnp.arange(block)[None]
  token = jnp.where(
    place < lengths[document][:, None],
    cu_seqlens[document][:, None] + place,
    T,  # out of range: filled with zeros
  )
  cut = lambda x: x[0].at[token].get(mode='fill', fill_value=0)[:, None]
  o, states = _walk(rule, jax.tree.map(cut, inputs), states, document)
  out = jnp.zeros((T, *o.shape[3:]), o.dtype)
  return out.at[token].set(o[:, 0], mode='drop')[None], states


def _walk(rule, blocks, states, document):
  """Scans `rule` over blocks; block i reads and writes states[document[i]]."""

  def forward(blocks, states, document):
    def body(states, xs):
      block, n = xs
      entry = states[n][None]
      o, last = rule(block, entry)
      return states.at[n].set(last[0]), (o, entry)

    states, (o, entries) = jax.lax.scan(body, states, (blocks, document))
    return (o, states), (blocks, entries, document)

  def backward(residuals, cotangents):
    blocks, entries, document = residuals
    d_o, d_states = cotangents

    def body(d_states, xs):
      block, entry, n, d_o = xs
      _, pull = jax.vjp(rule, block, entry)
      d_block, d_entry = pull((d_o, d_states[n][None]))
      # automatic differentiation would touch all N states in every block
      return d_states.at[n].set(d_entry[0]), d_block

    d_states, d_blocks = jax.lax.scan(
      body, d_states, (blocks, entries, document, d_o), reverse=True
    )
    return d_blocks, d_states, None

  call = jax.custom_vjp(lambda *args: forward(*args)[0])
  call.defvjp(forward, backward)
  return call(blocks, states, document)


def _bad(arrays, lead):
  """Bool, of the first `lead` axes: true where any array is not finite."""
  finite = [
    jnp.isfinite(x).all(tuple(range(lead, x.ndim)))
    for x in jax.tree.leaves(arrays)
  ]
  return ~jnp.stack(finite).all(0)


def _first(bad, also):
  """bad [B,T] with `also` [B] or-ed to the first token."""
  return jnp.concatenate([bad[:, :1] | also[:, None], bad[:, 1:]], 1)


def _filled(arrays, where, value):
  """Sets arrays to `value` where `where` is true; it has their first axes."""

  def fill(x):
    at = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
    return jnp.where(at, jnp.asarray(value, x.dtype), x)

  return jax.tree.map(fill, arrays)


def _since_start(bad, segment_ids):
  """[B,T] bool: true where this or an earlier token of its segment is bad."""
  index = jnp.broadcast_to(jnp.arange(bad.shape[1]), bad.shape)
  latest = lambda x: jax.lax.cummax(jnp.where(x, index, -1), axis=1)
  return latest(bad) >= jnp.maximum(latest(segment_starts(segment_ids)), 0)
