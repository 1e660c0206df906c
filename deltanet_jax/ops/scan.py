"""What the recurrences share: the token scan, decay within a chunk, chunks and
groups of chunks.

Arrays of a group of chunks are [M,B,H,C,...]: M chunks, batch, heads, the C
tokens of a chunk. README.md in this folder has the derivations.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops import documents
from deltanet_jax.ops.compiler import hoisting_barrier, opaque
from deltanet_jax.ops.description import Description
from deltanet_jax.ops.documents import Inputs
from deltanet_jax.ops.products import matmul

F32 = jnp.float32
Result = tuple[jax.Array, jax.Array]  # o [B,T,H,V] and the last state
# numbers in the states of a group's chunks in the form 'tree': 64 MiB
TREE_STATES = 2**24


def initial_state(
  description: Description,
  state: jax.Array | None,
  segment_ids: jax.Array | None,
  **inputs: jax.Array | None,
) -> jax.Array:
  """Returns `state` in float32, the rule's zero state if None. ValueError where
  shapes of the arguments do not fit together."""
  sizes = description.check(**inputs, state=state, segment_ids=segment_ids)
  if state is None:
    state = description.zero_state(sizes)
  return opaque(state.astype(F32))


def token_scan(
  step: Callable[..., Result],
  inputs: Inputs,
  state: jax.Array,
  segment_ids: jax.Array | None,
) -> Result:
  """Scans `step(*token, state) -> (o, state)` over time.

  inputs: arrays [B,T,...] or None. state [B,H,K,V] float32 is that before the
  first token; it is reset to zero where segment_ids [B,T] change. Returns o
  [B,T,H,V] and the last state.
  """
  fresh = None if segment_ids is None else documents.segment_starts(segment_ids)

  def body(state, token):
    xs, fresh = token
    if fresh is not None:
      state = jnp.where(fresh[:, None, None, None], 0.0, state)
    o, state = step(*xs, state)
    return state, o

  time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, fresh))
  state, o = jax.lax.scan(body, state, time_first)
  return jnp.moveaxis(o, 0, 1), state


def log_decay(g: jax.Array | None) -> jax.Array | None:
  """Returns max(g, -1e4), so that g = -inf, a hard reset, stays finite.

  e^-1e4 is zero in float32. Sums of g are matmuls with masks of zeros and ones,
  where zero times -inf would be NaN.
  """
  return None if g is None else jnp.maximum(g, jnp.asarray(-1e4, g.dtype))


def repeat_heads(x: jax.Array, G: int) -> jax.Array:
  """Key heads to value heads: [M,B,J,...] -> [M,B,J*G,...]."""
  return x if G == 1 else jnp.repeat(x, G, axis=2)


def sum_heads(x: jax.Array, G: int) -> jax.Array:
  """The transpose of `repeat_heads`."""
  if G == 1:
    return x
  return x.reshape(*x.shape[:2], -1, G, *x.shape[3:]).sum(3)


class Masks(NamedTuple):
  """Which tokens of a chunk share a segment, bool.

  pair [M,B,1,C,C]: both tokens are in one segment
  enters [M,B,1,C]: the token is in the segment of the entry state
  leaves [M,B,1,C]: the token is in the segment of the exit state
  """

  pair: jax.Array
  enters: jax.Array
  leaves: jax.Array


class Decay(NamedTuple):
  """Decay factors of a chunk, in [0, 1], float32; G_i = g_1 + .. + g_i.

  between [...,C,C]: e^{G_i-G_j}, from token j to token i >= j, else zero
  read [...,C]: e^{G_i}, from the entry state to token i
  write [...,C]: e^{G_C-G_i}, from token i to the exit state
  carry [...]: e^{G_C}, from the entry state to the exit state
  """

  between: jax.Array
  read: jax.Array
  write: jax.Array
  carry: jax.Array


def triangle(C: int) -> jax.Array:
  """[C,C] float32: 1 where row >= column; no kernel computes a constant."""
  return jnp.asarray([[float(i >= j) for j in range(C)] for i in range(C)], F32)


def decay_of(
  g: jax.Array | None, masks: Masks | None, shape: tuple[int, ...]
) -> Decay:
  """The Decay of log-decays g [M,B,H,C], or of None, no decay; `shape` is g's.

  Every exponent is a sum of the g_s that it spans: a difference of cumulative
  sums would lose small ones beside a large one.
  """
  C = shape[-1]
  below = jnp.asarray([[i > j for j in range(C)] for i in range(C)])
  if g is None:
    between = jnp.broadcast_to(below, (*shape, C)).astype(F32)
    read = write = jnp.ones(shape, F32)
  else:
    g = g.astype(F32)
    # span [i, j]: the sum of g_s over j < s <= i
    span = matmul(
      'is,...sj->...ij', triangle(C), jnp.where(below, g[..., None], 0)
    )
    between = jnp.where(below, jnp.exp(span), 0)
    write = jnp.exp(span[..., -1, :])
    read = jnp.exp(matmul('is,...s->...i', triangle(C), g))
  if masks is not None:
    between = jnp.where(masks.pair, between, 0)
    read = jnp.where(masks.enters, read, 0)
    write = jnp.where(masks.leaves, write, 0)
  eye = jnp.eye(C, dtype=F32)[None, None, None]
  return Decay(between + eye, read, write, read[..., -1])


Forward = Callable[[Inputs, Masks | None, jax.Array], Result]
Backward = Callable[
  [Inputs, Masks | None, jax.Array, *Result],
  tuple[Inputs, jax.Array],
]


class Group(NamedTuple):
  """A group of M chunks.

  forward(inputs, masks, state) -> (o, state): inputs [M,B,heads,C,...] in the
    order of the op's arguments, o [M,B,H,C,V]
  backward(inputs, masks, state, d_o, d_state) -> (d_inputs, d_state): the
    gradient of `forward`; None: JAX differentiates `forward`
  """

  forward: Forward
  backward: Backward | None = None


class Rule(NamedTuple):
  """The functions of a recurrence that its forms are made of.

  step: of `token_scan`
  associative: a Group's `forward`, for all chunks
  chunked, tree: the groups of these forms
  """

  step: Callable[..., Result]
  associative: Forward
  chunked: Group
  tree: Group


def forms_of(run: Callable[..., Result]) -> dict[str, Callable[..., Result]]:
  """Returns the forms of a rule by name, each with the arguments of `run`."""
  names = 'recurrent', 'associative', 'chunked', 'tree'
  return {name: functools.partial(run, form=name) for name in names}


def run(
  rule: Rule,
  description: Description,
  form: str,
  inputs: dict[str, jax.Array | None],
  state: jax.Array | None,
  segment_ids: jax.Array | None,
  chunk: int,
  group: int | None,
) -> Result:
  """Computes `rule` in one of four forms, which agree:

  recurrent: token by token, the definition
  associative: chunks as affine maps of the state, composed by
    lax.associative_scan, all in float32
  chunked: lax.scan over chunks, all else in parallel over a group of chunks
  tree: groups of many chunks, whose affine maps are composed in a tree: few,
    large operations, in place of many small ones, for GPUs

  inputs: by name, arrays [B,T,...] or None, q first and v third; an array
  without B and T holds for all tokens. Returns o [B,T,H,V] in v's type and the
  last state in float32. ValueError where shapes do not fit together.
  """
  v: jax.Array = inputs['v']  # type: ignore[assignment]
  state = initial_state(description, state, segment_ids, **inputs)
  every = lambda x: jnp.broadcast_to(x, (*v.shape[:2], *x.shape))
  arrays: Inputs = tuple(  # type: ignore[assignment]
    x if x is None or x.ndim > 2 else every(x) for x in inputs.values()
  )
  if form == 'recurrent':
    return token_scan(rule.step, arrays, state, segment_ids)
  require_positive(chunk)
  described = description.inputs | description.gates
  arrays = tuple(  # type: ignore[assignment]
    log_decay(x) if described[name].kind == 'decay' else x
    for name, x in zip(inputs, arrays, strict=True)
  )
  if form == 'associative':
    o, state = _all_chunks(rule, arrays, state, segment_ids, chunk)
  else:
    how = segment_ids, chunk, group or _group_size(form, state)
    o, state = _chunked(getattr(rule, form), arrays, state, *how)
  return o.astype(v.dtype), state


def _group_size(form, state):
  """Chunks of a group."""
  return 4 if form == 'chunked' else max(4, TREE_STATES // max(1, state.size))


def _chunked(rule, inputs, state, segment_ids, chunk, group):
  """A form in groups, `rule`; o [B,T,H,V] in v's type and the last state.

  Tokens are padded with zeros to whole groups: a zero key changes no state. The
  backward pass keeps the inputs and every group's entry state, and recomputes
  one group at a time, so that its temporaries do not grow with T.
  """
  T = inputs[0].shape[1]
  group = min(group, -(-T // chunk))

  def run(inputs, state, segment_ids):
    inputs, ids = _pad(inputs, segment_ids, chunk * group)
    ids = hoisting_barrier(ids, inputs[0][..., :1])
    o, state = _grouped(rule, chunk, group, inputs, ids, state)
    return o[:, :T], state

  return _per_document(run, inputs, state, segment_ids)


def _all_chunks(rule, inputs, state, segment_ids, chunk):
  """The associative form: all chunks are one group."""

  def run(inputs, state, segment_ids):
    T = inputs[0].shape[1]
    inputs, ids = _pad(inputs, segment_ids, chunk)
    segments = None if ids is None else (ids, ids[:, 0])
    inputs = jax.tree.map(lambda x: _to_chunks(x, chunk), inputs)
    o, state = rule.associative(inputs, _masks(segments, chunk), state)
    return _from_chunks(o)[:, :T], state

  return _per_document(run, inputs, state, segment_ids)


def require_positive(chunk: int) -> None:
  """Raises ValueError for a chunk without tokens."""
  if chunk < 1:
    raise ValueError(f'chunk is {chunk}; give 1 token or more')


def _per_document(run, inputs, state, segment_ids):
  """run(inputs, state, segment_ids), where NaN stays in its document."""
  v = inputs[2]
  if not v.size:
    return jnp.zeros_like(v), state
  o, state = documents.isolate_nonfinite(run, tuple(inputs), state, segment_ids)
  return opaque(o), opaque(state)


def _pad(inputs, segment_ids, size):
  """Pads to a multiple of size tokens and numbers segments, the last padded."""
  padding = -inputs[0].shape[1] % size

  def pad(x, **mode):
    rest = ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, ((0, 0), (0, padding), *rest), **mode)

  ids = documents.number_segments(segment_ids)
  ids = None if ids is None else pad(ids, mode='edge')
  return jax.tree.map(pad, tuple(inputs)), ids


def _split(x, size):
  """[B,T,...] -> [T/size,B,size,...]."""
  B, T = x.shape[:2]
  return jnp.moveaxis(x.reshape(B, T // size, size, *x.shape[2:]), 1, 0)


def _join(x):
  """The inverse of `_split`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _to_chunks(x, chunk):
  """[B,M*C,H,...] -> [M,B,H,C,...]."""
  return jnp.swapaxes(_split(x, chunk), 2, 3)


def _from_chunks(x):
  """The inverse of `_to_chunks`."""
  return _join(jnp.swapaxes(x, 2, 3))


def _split_segments(ids, size):
  """Segment numbers [N,B,size] of N groups, and [N,B] of the token before."""
  if ids is None:
    return None
  ids = _split(ids, size)
  return ids, jnp.concatenate([ids[:1, :, 0], ids[:-1, :, -1]])


def _masks(segments, chunk):
  """The Masks of a group's chunks, `segments` from `_split_segments`."""
  if segments is None:
    return None
  ids, before = segments
  ids = _split(ids, chunk)  # [M,B,C]
  before = jnp.concatenate([before[None], ids[:-1, :, -1]])
  return Masks(
    pair=(ids[..., :, None] == ids[..., None, :])[:, :, None],
    enters=(ids == before[..., None])[:, :, None],
    leaves=(ids == ids[..., -1:])[:, :, None],
  )


def _grouped_scan(rule, chunk, group, inputs, ids, state):
  size = chunk * group
  split = jax.tree.map(lambda x: _split(x, size), inputs)

  def body(state, xs):
    inputs, segments = xs
    inputs = jax.tree.map(lambda x: _to_chunks(x, chunk), inputs)
    o, exit_state = rule.forward(inputs, _masks(segments, chunk), state)
    return exit_state, (_from_chunks(o).astype(inputs[2].dtype), state)

  xs = split, _split_segments(ids, size)
  state, (o, entries) = jax.lax.scan(body, state, xs)
  return _join(o), state, entries


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped(rule, chunk, group, inputs, ids, state):
  return _grouped_scan(rule, chunk, group, inputs, ids, state)[:2]


def _grouped_forward(rule, chunk, group, inputs, ids, state):
  o, state, entries = _grouped_scan(rule, chunk, group, inputs, ids, state)
  return (o, state), (inputs, ids, entries)


def _differentiated(rule, inputs, masks, state, d_o, d_state):
  _, vjp = jax.vjp(lambda i, s: rule.forward(i, masks, s), inputs, state)
  return vjp((d_o, d_state))


def _grouped_backward(rule, chunk, group, residuals, cotangents):
  inputs, ids, entries = residuals
  d_o, d_state = cotangents
  size = chunk * group
  split = jax.tree.map(lambda x: _split(x, size), (inputs, d_o))
  backward = rule.backward or functools.partial(_differentiated, rule)

  def body(d_state, xs):
    split, segments, state = xs
    inputs, d_o = jax.tree.map(lambda x: _to_chunks(x, chunk), split)
    masks = _masks(segments, chunk)
    d_inputs, d_state = backward(inputs, masks, state, d_o.astype(F32), d_state)
    like = lambda d, x: _from_chunks(d).astype(x.dtype)
    return d_state, jax.tree.map(like, d_inputs, inputs)

  xs = split, _split_segments(ids, size), entries
  d_state, d_inputs = jax.lax.scan(body, d_state, xs, reverse=True)
  return jax.tree.map(_join, d_inputs), None, d_state


_grouped.defvjp(_grouped_forward, _grouped_backward)
