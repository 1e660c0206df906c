"""Linear attention: without decay, with a constant or a gated decay per head.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

g None: arXiv:2006.16236 eq. 18-20 without the normalizer. g [H], the same for
every token: Lightning attention, arXiv:2501.08313. g [B,T,H]: a decay for every
token and head, as in Mamba-2, arXiv:2405.21060 sec. 3.

  q, k [B,T,J,K]   v [B,T,H,V]   g None, [H] or [B,T,H], g <= 0

`deltanet_jax.gated_delta_rule` documents the other arguments, the results and
the errors; here a chunk may have any number of tokens. Decay and state are
float32; matmul operands have q's type.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from deltanet_jax.ops import affine, scan
from deltanet_jax.ops.description import KEY, QUERY, VALUE, Description, Input
from deltanet_jax.ops.products import matmul
from deltanet_jax.ops.scan import F32, repeat_heads

State = TypeVar('State')  # what the rule returns as state: an array, or None


def step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None,
  state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One token: q, k [B,J,K], v [B,H,V], g None, [H] or [B,H], state f32."""
  DESCRIPTION.check_token(q=q, k=k, v=v, g=g, state=state)
  G = v.shape[1] // q.shape[1]
  q, k = (jnp.repeat(x.astype(F32), G, axis=1) for x in (q, k))
  if g is not None:
    state = jnp.exp(g.astype(F32))[..., None, None] * state
  state = state + k[..., :, None] * v.astype(F32)[..., None, :]
  return matmul('bhk,bhkv->bhv', q, state).astype(v.dtype), state


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None,
  *,
  form: str,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk: int = 64,
  group: int | None = None,
) -> scan.Result:
  """Computes the rule in one of its `FORMS`."""
  inputs = {'q': q, 'k': k, 'v': v, 'g': g}
  how = state, segment_ids, chunk, group
  return scan.run(RULE, DESCRIPTION, form, inputs, *how)


def normalized(
  rule: Callable[..., tuple[jax.Array, State]],
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  **settings: int,
) -> tuple[jax.Array, State]:
  """Normalized linear attention of features q, k > 0 (arXiv:2006.16236 eq. 5).

    o_t = S_t^T q_t / (z_t^T q_t),   z_t = z_{t-1} + k_t

  z is one more value channel: `rule` is any of `FORMS`, `settings` are its
  arguments, and the state is [B,H,K,V+1]. The divisor is positive, so no
  epsilon is added.
  """
  ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
  o, last = rule(
    q,
    k,
    jnp.concatenate([v, ones], -1).astype(F32),
    None,
    state=state,
    segment_ids=segment_ids,
    **settings,
  )
  return (o[..., :-1] / o[..., -1:]).astype(v.dtype), last


def _within(q, k, v, g, masks):
  """Of every chunk: e^G Q, e^{G_C}, scores V and (e^{G_C-G} K)^T V."""
  G = v.shape[2] // q.shape[2]
  cast = lambda x: x.astype(q.dtype)
  decay = scan.decay_of(g, masks, v.shape[:4])
  scores = repeat_heads(matmul('...tk,...sk->...ts', q, k), G) * decay.between
  read_q = cast(decay.read[..., None] * repeat_heads(q, G))
  write_k = cast(decay.write[..., None] * repeat_heads(k, G))
  within = matmul('...ts,...sv->...tv', cast(scores), cast(v))
  write = matmul('...tk,...tv->...kv', write_k, cast(v))
  return read_q, decay.carry[..., None, None], within, write


def _forward_associative(inputs, masks, state):
  read_q, carry, within, write = _within(*inputs, masks)
  entry, last = affine.affine_scan(affine.Carry(carry), write, state)
  o = matmul('...tk,...kv->...tv', read_q, entry.astype(read_q.dtype))
  return o + within, last


def _walk(carry, write, state):
  """Scans the chunks: their entry states and the last exit state."""

  def body(state, xs):
    carry, write = xs
    return carry * state + write, state

  last, entry = jax.lax.scan(body, state, (carry, write))
  return entry, last


def _forward(inputs, masks, state, walk=_walk):
  read_q, carry, within, write = _within(*inputs, masks)
  entry, last = walk(carry, write, state)
  o = matmul('...tk,...kv->...tv', read_q, entry.astype(read_q.dtype))
  return o + within, last


DESCRIPTION = Description(
  carry='scalar',
  inputs={
    'q': QUERY,
    'k': KEY,
    'v': VALUE,
    'g': Input('BTH|H', 'decay'),
  },
)
RULE = scan.Rule(
  step,
  _forward_associative,
  chunked=scan.Group(_forward),
  tree=scan.Group(functools.partial(_forward, walk=affine.scalar_walk)),
)
FORMS = scan.forms_of(run)
recurrent, associative, chunked, tree = FORMS.values()
