"""Sequence parallelism: each device holds a span of T/P tokens of every row.

A recurrence is affine in its state: a span maps its entry state S to A S + U.
Every device computes A and U of its span; the maps of the spans before it are
composed in log2 P exchanges, with devices at distance 1, 2, 4, ...; then the
rule runs from the resulting entry state. In the backward pass the gradient E of
a span's exit state becomes A^T E + D, with D from the span's outputs: the same
composition from the other end (ops/README.md, section 6). A and U are sent,
whose size does not depend on T. A convolution receives its first inputs from
the device before. Softmax attention is in `parallel/softmax.py`.

A row that P does not divide stays whole on every device, as do all rows without
a mesh.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from deltanet_jax.ops.description import STATE, VALUE
from deltanet_jax.ops.documents import Inputs, segment_starts
from deltanet_jax.ops.products import matmul
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sharding import Axes

(AXIS,) = sharding.find_mesh_axes('time')


def is_split(T: int, least: int = 1) -> bool:
  """True where rows of T tokens are split, into spans of `least` or more."""
  P = sharding.count_parts('time')
  return P > 1 and T % P == 0 and T // P >= least


def _on_spans(f, axes, out_axes, *args):
  """f on every device's part of args.

  axes: for each array of args its logical axes, None for a None; out_axes:
  those of f's output, or a list of those of several outputs
  """
  mesh = sharding.get_current_mesh()

  def place(axes, x):
    return None if x is None else sharding.make_spec(axes, x.shape, mesh)

  specs = tuple(place(a, x) for a, x in zip(axes, args, strict=True))
  placed = dict(zip(axes, specs, strict=True))
  if isinstance(out_axes, list):
    out = tuple(placed[a] for a in out_axes)
  else:
    out = placed[out_axes]
  return jax.shard_map(f, in_specs=specs, out_specs=out, check_vma=False)(*args)


def receive_from_before(
  x: jax.Array, distance: int = 1, reverse: bool = False
) -> jax.Array:
  """x of the device `distance` spans earlier (with `reverse`, later), zeros
  where there is none. For use inside `_on_spans`."""
  P = sharding.count_parts('time')
  pairs = [(i, i + distance) for i in range(P - distance)]
  if reverse:
    pairs = [(b, a) for a, b in pairs]
  return jax.lax.ppermute(x, AXIS, pairs)


def run_rule(
  rule: ModuleType,
  form: Callable[..., tuple[jax.Array, jax.Array]],
  inputs: Inputs,
  segment_ids: jax.Array | None,
  gates: dict[str, jax.Array | None],
) -> jax.Array:
  """o [B,T,H,V] of a rule whose rows are split, from zero states.

  rule: a module of `ops`   form: one of its forms, with its settings
  inputs: the rule's arrays [B,T,...] or None, in its order
  gates: its keyword arrays
  """
  letters, arrays, _ = _divided(rule, inputs, gates, segment_ids=segment_ids)
  scalar = rule.DESCRIPTION.carry == 'scalar'
  call = _with_prefix(form, scalar, letters, tuple(gates))
  axes = [letter and _logical(letter) for letter in letters]
  return _on_spans(
    call,
    (*axes, _logical('BT')),
    _logical(VALUE.axes),
    *arrays,
    segment_ids,
  )


def run_on_shares(
  rule: ModuleType,
  form: Callable[..., tuple[jax.Array, jax.Array]],
  inputs: Inputs,
  state: jax.Array | None,
  segment_ids: jax.Array | None,
  gates: dict[str, jax.Array | None],
) -> tuple[jax.Array, jax.Array]:
  """(o, last state) of a rule over whole rows: every device runs `form` on its
  own rows and heads, as a kernel needs it, which no compiler can split.

  state: [B,H,K,V] or None   all else as in `run_rule`
  """
  letters, arrays, sizes = _divided(
    rule, inputs, gates, state=state, segment_ids=segment_ids
  )
  if state is None:
    state = rule.DESCRIPTION.zero_state(sizes)

  def call(*args):
    *arrays, state, segment_ids = args
    own = dict(zip(gates, arrays[len(inputs) :], strict=True))
    how = {'state': state, 'segment_ids': segment_ids} | own
    return form(*arrays[: len(inputs)], **how)

  whole = lambda letters: _logical(letters.replace('T', '.'))
  axes = [letter and whole(letter) for letter in letters]
  return _on_spans(
    call,
    (*axes, whole(STATE), whole('BT')),
    [whole(VALUE.axes), whole(STATE)],
    *arrays,
    state,
    segment_ids,
  )


def _divided(rule, inputs, gates, **more):
  """The letters of a rule's arrays, None for a None; the arrays, key heads
  repeated where the mesh asks for it; sizes by letter."""
  described = rule.DESCRIPTION.inputs | rule.DESCRIPTION.gates
  arrays = dict(zip(rule.DESCRIPTION.inputs, inputs, strict=True)) | gates
  sizes = rule.DESCRIPTION.check(**arrays, **more)
  letters = [
    None if x is None else described[name].axes_of(x)
    for name, x in arrays.items()
  ]
  repeated = [
    repeat_to_divide(x, sizes['H']) if letter and 'J' in letter else x
    for letter, x in zip(letters, arrays.values(), strict=True)
  ]
  return letters, repeated, sizes


def repeat_to_divide(x: jax.Array, H: int) -> jax.Array:
  """Repeats key heads [B,T,J,K] until the mesh divides them; each still serves
  neighboring value heads."""
  J, parts = x.shape[2], sharding.count_parts('kv_heads')
  if H % parts:
    raise ValueError(
      f'{H} heads do not divide over {parts} devices; change mesh.tensor'
    )
  times = next(
    n for n in range(1, H // J + 1) if not J * n % parts and not H % (J * n)
  )
  return jnp.repeat(x, times, axis=2)


def _logical(letters):
  """Logical axes of a rule's array."""
  names = {'B': 'batch', 'T': 'time', 'J': 'kv_heads', 'H': 'heads'}
  return tuple(names.get(letter) for letter in letters)


def _with_prefix(form, scalar, letters, names):
  """The rule on one span of a row: (*arrays, segment_ids) -> o.

  scalar: A is a number for each head, not a matrix
  letters: the axes of the arrays, None for a None
  names: of the last arrays, the keyword arguments of `form`
  """
  count = len(letters) - len(names)

  def call(arrays, segment_ids, state=None):
    gates = dict(zip(names, arrays[count:], strict=True))
    return form(*arrays[:count], state=state, segment_ids=segment_ids, **gates)

  def forward(*args):
    *arrays, segment_ids = args
    exit_state = lambda arrays, state=None: call(arrays, segment_ids, state)[1]
    carry, write = _find_map(exit_state, scalar, letters, arrays)
    continued, through = _find_continued(segment_ids)
    entry = _keep_rows(continued, _prefix(carry, write, through, scalar))
    (o, last), pull = jax.vjp(
      lambda arrays, state: call(arrays, segment_ids, state), arrays, entry
    )
    return o, (pull, carry, continued, through, jnp.zeros_like(last))

  def backward(residuals, d_o):
    pull, carry, continued, through, zero = residuals
    _, d_entry = pull((d_o, zero))
    d_last = _prefix(
      carry if scalar else jnp.swapaxes(carry, -1, -2),
      _keep_rows(continued, d_entry),
      through,
      scalar,
      reverse=True,
    )
    d_arrays, _ = pull((d_o, d_last))
    return *d_arrays, None

  call_on_span = jax.custom_vjp(lambda *args: forward(*args)[0])
  call_on_span.defvjp(forward, backward)
  return call_on_span


def _find_map(exit_state, scalar, letters, arrays):
  """A [B,H,K,K], or [B,H,1,1] for a scalar, and U [B,H,K,V] of a span.

  exit_state: (arrays, state=None) -> the rule's last state. A is the exit state
  from the identity with all values zero, a scalar A that from a 1 x 1 state.
  """
  pairs = [(x or '', array) for x, array in zip(letters, arrays, strict=True)]
  sizes = {
    letter: size
    for axes, x in pairs
    if axes
    for letter, size in zip(axes, x.shape, strict=True)
  }
  B, H, K, V = (sizes[letter] for letter in STATE)
  if scalar:
    one = jnp.ones((B, H, 1, 1))
    none = [
      jnp.zeros_like(x[..., :1]) if axes[-1:] in ('K', 'V') else x
      for axes, x in pairs
    ]
    return exit_state(none, one), exit_state(arrays)
  # one call computes both: A in K more value channels, whose values are zero
  more = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, K),))
  eye = jnp.broadcast_to(
    jnp.pad(jnp.eye(K), ((0, 0), (V, 0))), (B, H, K, V + K)
  )
  last = exit_state([more(x) if 'V' in axes else x for axes, x in pairs], eye)
  return last[..., V:], last[..., :V]


def _find_continued(segment_ids):
  """Two [P,B] bool, for every span and row: does the span begin inside the
  document that the span before ends with; and does that document reach the
  span's end? None, None: every row is one document."""
  if segment_ids is None:
    return None, None
  one = ~segment_starts(segment_ids).any(1)
  edges = jnp.stack([segment_ids[:, 0], segment_ids[:, -1], one])
  first, last, one = jnp.moveaxis(jax.lax.all_gather(edges, AXIS), 1, 0)
  # nothing is before the first span
  continued = (first == jnp.roll(last, 1, 0)).at[0].set(False)
  return continued, continued & (one > 0)


def _keep_rows(where, x):
  """x [B,...] in rows where `where` [P,B] is true for this span, else zero,
  also in place of NaN."""
  if where is None:
    return x
  return jnp.where(where[jax.lax.axis_index(AXIS)][:, None, None, None], x, 0)


def _prefix(carry, write, through, scalar, reverse=False):
  """The state that a zero state becomes by the spans before this one (with
  `reverse`, after it).

  through [P,B]: false where A of a span is zero; None: nowhere. A device
  without a sender receives zeros: its map then covers all spans from the first
  on, where the state is zero and A does not matter.
  """
  apply = jnp.multiply if scalar else _onto
  P, distance = sharding.count_parts('time'), 1
  while distance < P:
    before = functools.partial(
      receive_from_before, distance=distance, reverse=reverse
    )
    write = write + _keep_rows(through, apply(carry, before(write)))
    if 2 * distance < P:
      carry = apply(carry, before(carry))
      if through is not None:
        through &= jnp.roll(through, -distance if reverse else distance, 0)
    distance *= 2
  return receive_from_before(write, 1, reverse)


def _onto(carry, x):
  return matmul('bhkl,bhlx->bhkx', carry, x)


def run_with_past(
  f: Callable[..., jax.Array],
  w: jax.Array,
  w_axes: Axes,
  x: jax.Array,
  x_axes: Axes,
  segment_ids: jax.Array | None,
  count: int,
) -> jax.Array:
  """f(w, x, past, segment_ids, past_ids) on every span; past [B,count,...] are
  the inputs before those of x, zero before the first. Spans have `count` tokens
  or more."""

  def local(x, w, segment_ids):
    before = lambda x: None if x is None else receive_from_before(x[:, -count:])
    return f(w, x, before(x), segment_ids, before(segment_ids))

  x_axes = ('batch', 'time', *x_axes)
  axes = x_axes, w_axes, None if segment_ids is None else x_axes[:2]
  return _on_spans(local, axes, x_axes, x, w, segment_ids)
