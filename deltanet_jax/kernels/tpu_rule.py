"""A rule by its kernels for TPUs: what they do not cover, arrays filled up to
whole chunks and widths, where documents begin, the custom gradient."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.kernels.tpu import C, count_heads, make_layout
from deltanet_jax.ops import documents, scan
from deltanet_jax.ops.compiler import opaque
from deltanet_jax.ops.description import Description
from deltanet_jax.ops.scan import F32

# key and value channels, filled up to 128, 256, ..; values of 512 and, for time
# split over devices, 256 of keys beside them
WIDEST = {'key': 256, 'value': 768}
# the gate of a document's first token: e^RESET is zero in float32, and sums of
# gates that do not contain it are as they were
RESET = -1e5

Arrays = tuple[jax.Array, ...]  # q, k, v and gates, g the last


class Passes(NamedTuple):
  """The kernels of a rule, for arrays of whole chunks and widths.

  forward(layout, *arrays, state, keep) -> (o, last state, what backward needs,
    nothing unless keep)
  backward(layout, *arrays, kept, d_o, d_last) -> (*d_arrays, d_state)
  """

  forward: Callable[..., tuple[jax.Array, jax.Array, Sequence[jax.Array]]]
  backward: Callable[..., tuple[jax.Array, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_passes(passes, z, arrays, state):
  o, last, _ = passes.forward(z, *arrays, state, keep=False)
  return o, last


def _forward(passes, z, arrays, state):
  o, last, kept = passes.forward(z, *arrays, state, keep=True)
  return (o, last), (arrays, kept)


def _backward(passes, z, residuals, cotangents):
  arrays, kept = residuals
  *d_arrays, d_state = passes.backward(z, *arrays, kept, *cotangents)
  return tuple(d_arrays), d_state


_run_passes.defvjp(_forward, _backward)


def run(
  passes: Passes,
  description: Description,
  inputs: Mapping[str, jax.Array | None],
  state: jax.Array | None,
  segment_ids: jax.Array | None,
) -> scan.Result:
  """A rule by its kernel, as `ops.scan.run` does by its other forms.

  `g`, the last of the inputs, holds where documents begin.
  """
  state = scan.initial_state(description, state, segment_ids, **inputs)
  q, k, v, *gates, g = inputs.values()
  assert q is not None and k is not None and v is not None
  check(q, k, v)
  if not v.size:
    return jnp.zeros_like(v), state

  def call_rule(arrays, state, segment_ids):
    *rest, g = arrays
    if segment_ids is not None:
      first = documents.segment_starts(segment_ids)
      g = jnp.where(first.reshape(first.shape + (1,) * (g.ndim - 2)), RESET, g)
    (q, k, v, *gates), padded = fill((*rest, g), state)
    q, k = repeat_keys(q, v), repeat_keys(k, v)
    z, wide = make_layout(q, v), (q, k, v, *gates)
    o, last = _run_passes(passes, z, wide, padded)
    (T, _, V), K = arrays[2].shape[1:], arrays[0].shape[3]
    return o[:, :T, :, :V], last[:, :, :K, :V]

  of_heads = v.shape[:3]
  g = jnp.zeros(of_heads, F32) if g is None else g.astype(F32)
  if g.ndim == 1:
    g = jnp.broadcast_to(g, of_heads)
  arrays: Any = (q, k, v, *gates, scan.log_decay(g))
  o, state = documents.isolate_nonfinite(call_rule, arrays, state, segment_ids)
  return o, opaque(state)


def check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
  """ValueError for q, k or v that kernels do not cover."""
  types = _find_types(q, k, v)
  if not types <= {'bfloat16', 'float32'} or len(types) > 1:
    raise ValueError(
      f"form 'kernel' with q, k, v of {', '.join(sorted(types))}; give all"
      " three in bfloat16 or in float32, or take form='chunked'"
    )
  for name, x in (('key', k), ('value', v)):
    if x.shape[3] > WIDEST[name]:
      raise ValueError(
        f"form 'kernel' with {x.shape[3]} {name} channels; give {WIDEST[name]}"
        " at most, or take form='chunked'"
      )


def covers(
  q: jax.Array, k: jax.Array, v: jax.Array, *gates: jax.Array | None
) -> bool:
  """Whether the form 'auto' is the kernel: narrow heads would be filled up to
  more than twice their width."""
  del gates
  widths = (k.shape[-1], WIDEST['key']), (v.shape[-1], WIDEST['value'] - 256)
  return _find_types(q, k, v) in ({'bfloat16'}, {'float32'}) and all(
    C // 2 <= width <= most for width, most in widths
  )


def _find_types(*arrays):
  return {str(x.dtype) for x in arrays}


def repeat_keys(x: jax.Array, v: jax.Array) -> jax.Array:
  """Key heads [B,T,J,K], repeated where more value heads read one than a
  program takes."""
  G = v.shape[2] // x.shape[2]
  most = count_heads(x.shape[3], v.shape[3], x.dtype)
  times = next(n for n in range(1, G + 1) if G % n == 0 and G // n <= most)
  return x if times == 1 else jnp.repeat(x, times, 2)


def fill(arrays: Arrays, state: jax.Array) -> tuple[Arrays, jax.Array]:
  """Zeros up to whole chunks of tokens and registers of channels: a token with
  key and beta 0 changes no state, a channel of zeros no product."""
  q, k, v, *gates = arrays
  tokens = -q.shape[1] % C
  keys, values = -q.shape[3] % C, -v.shape[3] % C

  def pad(x, channels=keys):
    widths = [(0, 0), (0, tokens), *[(0, 0)] * (x.ndim - 2)]
    if x.ndim == 4:
      widths[3] = (0, channels)
    return jnp.pad(x, widths)

  state = jnp.pad(state, [(0, 0), (0, 0), (0, keys), (0, values)])
  return (pad(q), pad(k), pad(v, values), *map(pad, gates)), state
