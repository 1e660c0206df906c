"""Time split over devices: each holds a span of T/P tokens of every row.

A recurrence is affine in its state: a span takes the entry state S to
A S + U. Every device finds A and U of its own span, the maps of the spans
before it are composed in log2 P exchanges between neighbours at distance 1, 2,
4, ..., and the rule runs from the entry state that follows. Backward, the
gradient E of a span's exit state becomes A^T E + D, D what the span's outputs
add: the same composition from the other end. What travels is A and U, the
state's size, however long the row. A convolution takes its first inputs from
the device before. Softmax attention is in `parallel/softmax.py`.

A row that P does not divide stays whole on every device, as does everything
without a mesh.
"""

import functools

import jax
import jax.numpy as jnp

from deltanet_jax.ops import linear_attention
from deltanet_jax.ops.documents import starts
from deltanet_jax.ops.scan import matmul
from deltanet_jax.parallel import sharding

(AXIS,) = sharding.over('time')


def split(T, least=1):
  """Are rows of T tokens split, every span `least` tokens or longer?"""
  P = sharding.parts('time')
  return P > 1 and T % P == 0 and T // P >= least


def _on_spans(f, axes, out_axes, *args):
  """f on every device's own share: `axes`, a tuple of logical axes for each
  array of args (None for a None) and for f's output."""
  mesh = sharding.current_mesh()

  def place(axes, x):
    return None if x is None else sharding.spec(axes, x.shape, mesh)

  specs = tuple(place(a, x) for a, x in zip(axes, args, strict=True))
  like = next(x for a, x in zip(axes, args, strict=True) if a == out_axes)
  return jax.shard_map(
    f,
    in_specs=specs,
    out_specs=sharding.spec(out_axes, like.shape, mesh),
    check_vma=False,
  )(*args)


def from_before(x, distance=1, reverse=False):
  """x of the device `distance` spans earlier (later, reversed); zeros where
  there is none. Inside `_on_spans`."""
  P = sharding.parts('time')
  pairs = [(i, i + distance) for i in range(P - distance)]
  if reverse:
    pairs = [(b, a) for a, b in pairs]
  return jax.lax.ppermute(x, AXIS, pairs)


# ---------------------------------------------------------------- recurrences


def run(rule, form, inputs, segment_ids, gates):
  """o [B,T,H,V] of a rule over split time, from zero states.

  rule: module of `ops`   form: one of its FORMS, with all else it takes
  inputs: its arrays [B,T,...] or None in its order, q, k and v first
  gates: those it takes by name
  """
  q, k, v, *rest = inputs
  q, k = (divisible(x, v.shape[2]) for x in (q, k))
  names, extra = tuple(gates), tuple(gates.values())
  keys, values = (
    ('batch', 'time', heads, None) for heads in ('kv_heads', 'heads')
  )
  axes = lambda x: None if x is None else values[: x.ndim]
  call = _with_prefix(form, rule is linear_attention, names, len(inputs))
  return _on_spans(
    call,
    (keys, keys, values, *map(axes, (*rest, *extra)), values[:2]),
    values,
    q,
    k,
    v,
    *rest,
    *extra,
    segment_ids,
  )


def divisible(x, H):
  """Key heads [B,T,J,K] repeated until the mesh divides them; each still
  serves neighbouring value heads."""
  J, parts = x.shape[2], sharding.parts('kv_heads')
  if H % parts:
    raise ValueError(f'{H} heads do not divide over {parts} devices')
  times = next(
    n for n in range(1, H // J + 1) if not J * n % parts and not H % (J * n)
  )
  return jnp.repeat(x, times, axis=2)


def _with_prefix(form, scalar, names, count):
  """The rule on one span, as part of a row: arrays -> o.

  scalar: A is a number for each head, not a matrix.
  """

  def unpack(args):
    *arrays, segment_ids = args
    gates = dict(zip(names, arrays[count:], strict=True))
    return arrays[:count], {'segment_ids': segment_ids, **gates}

  def forward(*args):
    inputs, how = unpack(args)
    maps = _fold(form, scalar, inputs, how)
    goes_on, through = _joined(how['segment_ids'])
    entry = _only(goes_on, _prefix(*maps, through, scalar))

    def span(arrays, state):
      inputs, how = unpack((*arrays, args[-1]))
      return form(*inputs, state=state, **how)

    (o, last), pull = jax.vjp(span, args[:-1], entry)
    return o, (pull, maps[0], goes_on, through, jnp.zeros_like(last))

  def backward(residuals, d_o):
    pull, carry, goes_on, through, zero = residuals
    _, d_entry = pull((d_o, zero))
    d_last = _prefix(
      carry if scalar else jnp.swapaxes(carry, -1, -2),
      _only(goes_on, d_entry),
      through,
      scalar,
      reverse=True,
    )
    d_arrays, _ = pull((d_o, d_last))
    return *d_arrays, None

  call = jax.custom_vjp(lambda *args: forward(*args)[0])
  call.defvjp(forward, backward)
  return call


def _fold(form, scalar, inputs, how):
  """A [B,H,K,K], or [B,H,1,1], and U [B,H,K,V] of a span.

  A is the exit state of the identity when all values are zero. A scalar one
  is that of a 1 x 1 state.
  """
  q, k, v, *rest = inputs
  (B, _, H, V), K = v.shape, k.shape[-1]
  if scalar:
    none = (jnp.zeros_like(x[..., :1]) for x in (q, k, v))
    one = jnp.ones((B, H, 1, 1))
    return form(*none, *rest, state=one, **how)[1], form(*inputs, **how)[1]
  # one run finds both: K more value channels, without values
  wide = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, K),))
  beta, g = rest
  eye = jnp.broadcast_to(
    jnp.pad(jnp.eye(K), ((0, 0), (V, 0))), (B, H, K, V + K)
  )
  beta = wide(beta) if beta.ndim == 4 else beta
  _, last = form(q, k, wide(v), beta, g, state=eye, **how)
  return last[..., V:], last[..., :V]


def _joined(segment_ids):
  """For every span and row [P,B]: does it go on with the document of the span
  before it, and is there one document from that span's end to its own?
  None, None: there is one in every row."""
  if segment_ids is None:
    return None, None
  one = ~starts(segment_ids).any(1)
  edges = jnp.stack([segment_ids[:, 0], segment_ids[:, -1], one])
  first, last, one = jnp.moveaxis(jax.lax.all_gather(edges, AXIS), 1, 0)
  # the first span goes on with nothing
  goes_on = (first == jnp.roll(last, 1, 0)).at[0].set(False)
  return goes_on, goes_on & (one > 0)


def _only(where, x):
  """x [B,...] of this span in rows that `where` [P,B] names, else zero, even
  for what is not finite."""
  if where is None:
    return x
  return jnp.where(where[jax.lax.axis_index(AXIS)][:, None, None, None], x, 0)


def _prefix(carry, write, through, scalar, reverse=False):
  """What the spans before this one (after it, reversed) make of a zero state.

  through [P,B]: whether the state passes a span at all, None: it does. A
  device without a sender receives zeros: from the first span on a map is
  complete, and applied to the zero state its A does not matter.
  """
  apply = jnp.multiply if scalar else _onto
  P, distance = sharding.parts('time'), 1
  while distance < P:
    before = functools.partial(from_before, distance=distance, reverse=reverse)
    write = write + _only(through, apply(carry, before(write)))
    if 2 * distance < P:
      carry = apply(carry, before(carry))
      if through is not None:
        through &= jnp.roll(through, -distance if reverse else distance, 0)
    distance *= 2
  return from_before(write, 1, reverse)


def _onto(carry, x):
  return matmul('bhkl,bhlx->bhkx', carry, x)


# ---------------------------------------------------------------- convolution


def with_past(f, w, w_axes, x, x_axes, segment_ids, count):
  """f(w, x, past, segment_ids, past_ids) over split time: `past` [B,count,...]
  are the inputs just before those in x, zero before the first; every span
  has `count` tokens."""

  def local(x, w, segment_ids):
    before = lambda x: None if x is None else from_before(x[:, -count:])
    return f(w, x, before(x), segment_ids, before(segment_ids))

  x_axes = ('batch', 'time', *x_axes)
  axes = x_axes, w_axes, None if segment_ids is None else x_axes[:2]
  return _on_spans(local, axes, x_axes, x, w, segment_ids)
