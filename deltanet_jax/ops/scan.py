"""What the recurrences share: the token scan, decay within a chunk, chunks and
groups of chunks.

Inside a chunk arrays are laid out [M,B,H,C,...]: M chunks of a group, then
batch, heads, the C tokens of the chunk. README.md in this folder derives all
that is used here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops.compiler import spread, tied
from deltanet_jax.ops.description import Description
from deltanet_jax.ops.documents import Inputs, apart, runs_of, starts
from deltanet_jax.ops.products import matmul

F32 = jnp.float32
Result = tuple[jax.Array, jax.Array]  # o [B,T,H,V] and the last state


def initial_state(
  description: Description,
  state: jax.Array | None,
  segment_ids: jax.Array | None,
  **inputs: jax.Array | None,
) -> jax.Array:
  """`state` in float32, the rule's zero state if None; ValueError where the
  arguments do not fit."""
  sizes = description.check(**inputs, state=state, segment_ids=segment_ids)
  if state is None:
    state = description.zero_state(sizes)
  return spread(state.astype(F32))


def token_scan(
  step: Callable[..., Result],
  inputs: Inputs,
  state: jax.Array,
  segment_ids: jax.Array | None,
) -> Result:
  """Runs `step(*token, state) -> (o, state)` over time.

  inputs: arrays [B,T,...] or None, one token of each goes to `step`.
  state [B,H,K,V] f32 belongs to the first token's segment; it is zero again
  wherever segment_ids [B,T] change. Returns o [B,T,H,V] and the last state.
  """
  fresh = None if segment_ids is None else starts(segment_ids)

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
  """g, or -1e4 where it is less, -inf included: a hard reset.

  e^-1e4 is zero in float32, and so is whatever it multiplies; but sums of g
  meet zeros in a mask, and zero times -inf is NaN.
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


# ---------------------------------------------------------------- decay


class Masks(NamedTuple):
  """Which tokens of a chunk share a segment.

  pair [M,B,1,C,C]: both tokens in one; enters [M,B,1,C]: the token belongs to
  the segment of the entry state; leaves [M,B,1,C]: to that of the exit state.
  """

  pair: jax.Array
  enters: jax.Array
  leaves: jax.Array


class Decay(NamedTuple):
  """Decay between the places of a chunk, every factor in [0, 1].

  between [...,C,C]: from token j to token i >= j, zero elsewhere; read
  [...,C]: entry state to token; write [...,C]: token to exit state; carry
  [...]: entry to exit state.
  """

  between: jax.Array
  read: jax.Array
  write: jax.Array
  carry: jax.Array


def triangle(C: int) -> jax.Array:
  """1 where row >= column."""
  return jnp.tril(jnp.ones((C, C), F32))


def decay_of(
  g: jax.Array | None, masks: Masks | None, shape: tuple[int, ...]
) -> Decay:
  """Decay for log-decays g [M,B,H,C] (None: none); `shape` is g's.

  Every exponent is the plain sum of the g it spans: a difference of
  cumulative sums would lose the small ones behind a large one.
  """
  C = shape[-1]
  low = jnp.tril(jnp.ones((C, C), bool), -1)
  if g is None:
    between = jnp.broadcast_to(low, (*shape, C)).astype(F32)
    read = write = jnp.ones(shape, F32)
  else:
    g = g.astype(F32)
    # [i, j] sums g over j < s <= i
    span = matmul(
      'is,...sj->...ij', triangle(C), jnp.where(low, g[..., None], 0)
    )
    between = jnp.where(low, jnp.exp(span), 0)
    write = jnp.exp(span[..., -1, :])
    read = jnp.exp(matmul('is,...s->...i', triangle(C), g))
  if masks is not None:
    between = jnp.where(masks.pair, between, 0)
    read = jnp.where(masks.enters, read, 0)
    write = jnp.where(masks.leaves, write, 0)
  eye = jnp.eye(C, dtype=F32)[None, None, None]
  return Decay(between + eye, read, write, read[..., -1])


# ---------------------------------------------------------------- chunks


Forward = Callable[[Inputs, Masks | None, jax.Array], Result]
Backward = Callable[
  [Inputs, Masks | None, jax.Array, *Result], tuple[Inputs, jax.Array]
]


class Rule(NamedTuple):
  """A recurrence, as its forms need it.

  step: as in `token_scan`. associative, forward(inputs, masks, state) ->
  (o, state), M chunks at once: inputs [M,B,heads,C,...] as the op's arguments,
  o [M,B,H,C,V]. backward(inputs, masks, state, d_o, d_state) -> (d_inputs,
  d_state) of `forward`; None: by differentiating it.
  """

  step: Callable[..., Result]
  associative: Forward
  forward: Forward
  backward: Backward | None = None


def forms_of(run: Callable[..., Result]) -> dict[str, Callable[..., Result]]:
  """The forms of a rule by name, all with the arguments of its `run`."""
  names = 'recurrent', 'associative', 'chunked'
  return {name: functools.partial(run, form=name) for name in names}


def run(
  rule: Rule,
  description: Description,
  form: str,
  inputs: dict[str, jax.Array | None],
  state: jax.Array | None,
  segment_ids: jax.Array | None,
  chunk: int,
  group: int,
) -> Result:
  """`rule` in one of three forms, which agree:

  recurrent: token by token, the definition
  associative: chunks as affine maps of the state, composed by
    lax.associative_scan, all in float32
  chunked: lax.scan over chunks, all else in parallel over a group of chunks

  inputs: arrays [B,T,...] or None by name, q first and v third; one without B
  and T is the same for all tokens. Returns o [B,T,H,V] in v's type and the
  last state in float32. ValueError where the arguments do not fit.
  """
  v: jax.Array = inputs['v']  # type: ignore[assignment]
  state = initial_state(description, state, segment_ids, **inputs)
  arrays: Inputs = tuple(  # type: ignore[assignment]
    x
    if x is None or x.ndim > 2
    else jnp.broadcast_to(x, (*v.shape[:2], *x.shape))
    for x in inputs.values()
  )
  if form == 'recurrent':
    return token_scan(rule.step, arrays, state, segment_ids)
  described = description.inputs | description.gates
  arrays = tuple(  # type: ignore[assignment]
    log_decay(x) if described[name].kind == 'decay' else x
    for name, x in zip(inputs, arrays, strict=True)
  )
  if form == 'associative':
    o, state = _all_chunks(rule, arrays, state, segment_ids, chunk)
  else:
    o, state = _chunked(rule, arrays, state, segment_ids, chunk, group)
  return o.astype(v.dtype), state


def _chunked(rule, inputs, state, segment_ids, chunk, group):
  """Runs `rule` over time; keeps the inputs and each group's entry state.

  The T tokens are padded with zeros to groups of chunks; a zero key changes no
  state. Backward recomputes one group at a time, so temporaries do not grow
  with T. Returns o [B,T,H,V] (float32) and the last state.
  """
  require_positive(chunk)
  T = inputs[0].shape[1]
  group = min(group, -(-T // chunk))

  def run(inputs, state, segment_ids):
    inputs, run = _pad(inputs, segment_ids, chunk * group)
    run = tied(run, inputs[0][..., :1])
    o, state = _grouped(rule, chunk, group, inputs, run, state)
    return o[:, :T], state

  return _over_documents(run, inputs, state, segment_ids)


def _all_chunks(rule, inputs, state, segment_ids, chunk):
  """All chunks as one group."""
  require_positive(chunk)

  def run(inputs, state, segment_ids):
    T = inputs[0].shape[1]
    inputs, run = _pad(inputs, segment_ids, chunk)
    runs = None if run is None else (run, run[:, 0])
    inputs = jax.tree.map(lambda x: _to_chunks(x, chunk), inputs)
    o, state = rule.associative(inputs, _masks(runs, chunk), state)
    return _from_chunks(o)[:, :T], state

  return _over_documents(run, inputs, state, segment_ids)


def require_positive(chunk: int) -> None:
  """ValueError for a chunk without tokens."""
  if chunk < 1:
    raise ValueError(f'chunk is {chunk}; give 1 token or more')


def _over_documents(run, inputs, state, segment_ids):
  """run(inputs, state, segment_ids) -> (o, state), documents kept apart."""
  v = inputs[2]
  if not v.size:
    return jnp.zeros(v.shape, F32), state
  o, state = apart(run, tuple(inputs), state, segment_ids)
  return spread(o), spread(state)


def _pad(inputs, segment_ids, size):
  """Zeros, in the last token's segment, up to a multiple of size; and runs."""
  padding = -inputs[0].shape[1] % size

  def pad(x, **mode):
    rest = ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, ((0, 0), (0, padding), *rest), **mode)

  run = None if segment_ids is None else pad(runs_of(segment_ids), mode='edge')
  return jax.tree.map(pad, tuple(inputs)), run


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


def _split_runs(run, size):
  """Runs [N,B,size] of each group and the run [N,B] just before it."""
  if run is None:
    return None
  run = _split(run, size)
  return run, jnp.concatenate([run[:1, :, 0], run[:-1, :, -1]])


def _masks(runs, chunk):
  """Masks of the chunks of one group from its runs and the one before;
  None: no segments are told apart."""
  if runs is None:
    return None
  run, before = runs
  run = _split(run, chunk)  # [M,B,C]
  before = jnp.concatenate([before[None], run[:-1, :, -1]])
  return Masks(
    pair=(run[..., :, None] == run[..., None, :])[:, :, None],
    enters=(run == before[..., None])[:, :, None],
    leaves=(run == run[..., -1:])[:, :, None],
  )


def _grouped_scan(rule, chunk, group, inputs, run, state):
  size = chunk * group
  split = jax.tree.map(lambda x: _split(x, size), inputs)

  def body(state, xs):
    inputs, runs = xs
    inputs = jax.tree.map(lambda x: _to_chunks(x, chunk), inputs)
    o, exit_state = rule.forward(inputs, _masks(runs, chunk), state)
    return exit_state, (_from_chunks(o), state)

  state, (o, entries) = jax.lax.scan(
    body, state, (split, _split_runs(run, size))
  )
  return _join(o), state, entries


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped(rule, chunk, group, inputs, run, state):
  o, state, _ = _grouped_scan(rule, chunk, group, inputs, run, state)
  return o, state


def _grouped_forward(rule, chunk, group, inputs, run, state):
  o, state, entries = _grouped_scan(rule, chunk, group, inputs, run, state)
  return (o, state), (inputs, run, entries)


def _differentiated(rule, inputs, masks, state, d_o, d_state):
  _, vjp = jax.vjp(lambda i, s: rule.forward(i, masks, s), inputs, state)
  return vjp((d_o, d_state))


def _grouped_backward(rule, chunk, group, residuals, cotangents):
  inputs, run, entries = residuals
  d_o, d_state = cotangents
  size = chunk * group
  split = jax.tree.map(lambda x: _split(x, size), (inputs, d_o))
  backward = rule.backward or functools.partial(_differentiated, rule)

  def body(d_state, xs):
    split, runs, state = xs
    inputs, d_o = jax.tree.map(lambda x: _to_chunks(x, chunk), split)
    d_inputs, d_state = backward(
      inputs, _masks(runs, chunk), state, d_o, d_state
    )
    return d_state, jax.tree.map(_from_chunks, d_inputs)

  d_state, d_inputs = jax.lax.scan(
    body, d_state, (split, _split_runs(run, size), entries), reverse=True
  )
  d_inputs = jax.tree.map(
    lambda d, x: _join(d).astype(x.dtype), d_inputs, inputs
  )
  return d_inputs, None, d_state


_grouped.defvjp(_grouped_forward, _grouped_backward)


# ---------------------------------------------------------------- associative


def affine_scan(
  carry: jax.Array,
  write: jax.Array,
  state: jax.Array,
  apply: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Entry states of chunks that map S to carry S + write, and the last exit.

  carry [M,...] and write [M,B,H,K,V] per chunk; apply(carry, x) multiplies a
  carry onto a state or onto another carry. By lax.associative_scan: log M
  steps, every prefix composition kept.
  """

  def compose(first, second):
    carry_1, write_1 = first
    carry_2, write_2 = second
    return apply(carry_2, carry_1), apply(carry_2, write_1) + write_2

  carries, writes = jax.lax.associative_scan(compose, (carry, write))
  exits = apply(carries, state[None]) + writes
  return jnp.concatenate([state[None], exits[:-1]]), exits[-1]
