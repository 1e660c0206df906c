"""The delta rule: plain DeltaNet and, with a decay, Gated DeltaNet.

    S'  = e^{g_t} S_{t-1}
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    o_t = S_t^T q_t

arXiv:2406.06484 eq. 2 (g = 0), arXiv:2412.06464 eq. 10.

  q, k [B,T,J,K]   v [B,T,H,V]   beta [B,T,H]   g [B,T,H] or None (no decay)

All else is said of `deltanet_jax.gated_delta_rule`. Decay, inverse and state
are float32; matmul operands have q's type.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops import scan
from deltanet_jax.ops.description import KEY, QUERY, VALUE, Description, Input
from deltanet_jax.ops.inverse import unit_lower_inverse
from deltanet_jax.ops.products import matmul, matmul_parts
from deltanet_jax.ops.scan import F32, repeat_heads


def step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array | None,
  state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One token: q, k [B,J,K], v [B,H,V], beta, g [B,H], state [B,H,K,V] f32."""
  DESCRIPTION.check_token(q=q, k=k, v=v, beta=beta, g=g, state=state)
  G = v.shape[1] // q.shape[1]
  q, k = (jnp.repeat(x.astype(F32), G, axis=1) for x in (q, k))
  if g is not None:
    state = jnp.exp(g.astype(F32))[..., None, None] * state
  known = matmul('bhk,bhkv->bhv', k, state)
  write = beta.astype(F32)[..., None] * (v.astype(F32) - known)
  state = state + k[..., :, None] * write[..., None, :]
  return matmul('bhk,bhkv->bhv', q, state).astype(v.dtype), state


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array | None,
  *,
  form: str,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk: int = 64,
  group: int = 4,
) -> scan.Result:
  """The rule by one of its `FORMS`."""
  inputs = {'q': q, 'k': k, 'v': v, 'beta': beta, 'g': g}
  how = state, segment_ids, chunk, group
  return scan.run(RULE, DESCRIPTION, form, inputs, *how)


class _Chunk(NamedTuple):
  """What tokens of one chunk mean to each other; K-wide arrays in q's type.

  q, k [M,B,H,C,K], repeated to the value heads; v, beta as given; known
  [M,B,H,C,C]: k_i'k_j, decayed, below the diagonal; scores: q_i'k_j, decayed,
  diagonal included; inverse: (I + beta known)^-1.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  beta: jax.Array
  decay: scan.Decay
  known: jax.Array
  scores: jax.Array
  inverse: jax.Array

  def low(self, x: jax.Array) -> jax.Array:
    """x as a matmul operand."""
    return x.astype(self.q.dtype)

  def whole(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum of x and y, what is float32 of them not rounded to an operand."""
    return matmul_parts(spec, x, y, self.q.dtype)

  @property
  def erase(self) -> jax.Array:
    """beta_t e^{g_1 + .. + g_t}: how much of the entry state token t erases
    along its key."""
    return self.beta * self.decay.read


def _within(q, k, v, beta, g, masks):
  G = v.shape[2] // q.shape[2]
  beta = beta.astype(F32)
  decay = scan.decay_of(g, masks, beta.shape)
  dot = lambda a, b: repeat_heads(matmul('...tk,...sk->...ts', a, b), G)
  known = jnp.tril(dot(k, k) * decay.between, -1)
  return _Chunk(
    q=repeat_heads(q, G),
    k=repeat_heads(k, G),
    v=v,
    beta=beta,
    decay=decay,
    known=known,
    scores=dot(q, k) * decay.between,
    inverse=unit_lower_inverse(beta[..., None] * known),
  )


def _read(c, write, entry):
  """o = (e^G q) S + scores u for writes u and entry states S."""
  o = matmul('...tk,...kv->...tv', c.q, c.low(entry))
  o = c.decay.read[..., None] * o
  return o + c.whole('...ts,...sv->...tv', c.scores, write)


def _forward_associative(inputs, masks, state):
  # all in float32: JAX's own gradients would round what cancels
  c = _within(*(x.astype(F32) for x in inputs[:3]), *inputs[3:], masks)
  solve = lambda x: matmul('...ts,...sx->...tx', c.inverse, x)
  erase = solve(c.erase[..., None] * c.k)
  fresh = solve(c.beta[..., None] * c.v)
  write_k = c.decay.write[..., None] * c.k
  onto_exit = lambda x: matmul('...tk,...tx->...kx', write_k, x)
  eye = jnp.eye(c.k.shape[-1], dtype=F32)[None, None, None]
  carry = c.decay.carry[..., None, None] * eye
  entry, last = scan.affine_scan(
    carry - onto_exit(erase),
    onto_exit(fresh),
    state,
    lambda a, x: matmul('...kl,...lx->...kx', a, x),
  )
  write = fresh - matmul('...tk,...kv->...tv', erase, entry)
  return _read(c, write, entry), last


def _states(c, state):
  """Entry states [M,...], raw errors v - e^G k S, writes u; the exit state."""

  def body(state, xs):
    k, v, beta, decay, inverse = xs
    known = c.whole('bhtk,bhkv->bhtv', k, state)
    error = v - decay.read[..., None] * known
    write = c.whole('bhts,bhsv->bhtv', inverse, beta[..., None] * error)
    exit_state = decay.carry[..., None, None] * state + c.whole(
      'bhtk,bhtv->bhkv', k, decay.write[..., None] * write
    )
    return exit_state, (state, error, write)

  xs = (c.k, c.v, c.beta, c.decay, c.inverse)
  return jax.lax.scan(body, state, xs)


def _forward(inputs, masks, state):
  c = _within(*inputs, masks)
  exit_state, (entry, _, write) = _states(c, state)
  return _read(c, write, entry), exit_state


def _backward(inputs, masks, state, d_o, d_state):
  """Gradients of one group; derived in README.md, section 4."""
  *_, g = inputs
  c = _within(*inputs, masks)
  _, (entry, error, write) = _states(c, state)
  d_o = c.low(d_o)
  reach_v, reach_q = _reach(c)
  d_state, (d_exit, from_exit) = _exit_gradients(c, reach_q, d_o, d_state)
  # d_rhs: gradient of beta (v - e^G k S), the right-hand side of the solve
  d_rhs = from_exit + matmul('...ts,...tv->...sv', c.low(reach_v), d_o)
  with_writes = lambda a: c.whole('...tv,...sv->...ts', c.low(a), write)
  d_known = -with_writes(d_rhs)
  d_error = c.beta[..., None] * d_rhs
  seen = c.whole('...tv,...kv->...tk', d_o, entry)
  d_g = None
  if g is not None:
    d_g = _decay_gradient(
      c, d_o, reach_v, reach_q, seen, from_exit, entry, d_exit
    )
  d_q, d_k = _key_gradients(
    inputs, c, seen, d_known, with_writes(d_o), write, d_exit, d_error, entry
  )
  d_beta = jnp.sum(d_rhs * error, -1) + jnp.sum(d_known * c.known, -1)
  return (d_q, d_k, d_error, d_beta, d_g), d_state


def _reach(c):
  """o = reach_v (beta v) + reach_q S: what each output sees of the raw writes
  and of the entry state once the erasures between are counted."""
  reach_v = c.whole('...ts,...sr->...tr', c.scores, c.inverse)
  reach_q = c.decay.read[..., None] * c.q - c.whole(
    '...ts,...sk->...tk', reach_v * c.erase[..., None, :], c.k
  )
  return reach_v, reach_q


def _exit_gradients(c, reach_q, d_o, d_state):
  """The gradient of the group's entry state; of every chunk's exit state, and
  what of it the right-hand side of the solve gets."""

  def body(d_state, xs):
    k, erase, inverse, write_decay, carry, from_reads = xs
    d_exit = write_decay[..., None] * c.whole('bhtk,bhkv->bhtv', k, d_state)
    from_exit = c.whole('bhts,bhtv->bhsv', inverse, d_exit)
    d_entry = (
      carry[..., None, None] * d_state
      + from_reads
      - c.whole('bhtk,bhtv->bhkv', k, erase[..., None] * from_exit)
    )
    return d_entry, (d_state, from_exit)

  from_reads = matmul('...tk,...tv->...kv', c.low(reach_q), d_o)
  return jax.lax.scan(
    body,
    d_state,
    (c.k, c.erase, c.inverse, c.decay.write, c.decay.carry, from_reads),
    reverse=True,
  )


def _key_gradients(
  inputs, c, seen, d_known, d_scores, write, d_exit, d_error, entry
):
  """dq and dk, summed over the value heads of a key head."""
  q, k, v = inputs[:3]
  G = v.shape[2] // q.shape[2]
  onto_k = lambda a, s: matmul('...tv,...kv->...tk', c.low(a), c.low(s))
  between = c.decay.between
  d_kk = scan.sum_heads(jnp.tril(c.beta[..., None] * d_known * between, -1), G)
  d_qk = scan.sum_heads(d_scores * between, G)
  read = c.decay.read[..., None]
  times = lambda a, b: c.whole('...ts,...sk->...tk', a, b)
  swap = lambda x: jnp.swapaxes(x, -1, -2)
  d_q = scan.sum_heads(read * seen, G) + times(d_qk, k)
  d_k = (
    scan.sum_heads(
      c.decay.write[..., None] * onto_k(write, d_exit)
      - read * onto_k(d_error, entry),
      G,
    )
    + times(swap(d_qk), q)
    + times(d_kk + swap(d_kk), k)
  )
  return d_q, d_k


def _decay_gradient(c, d_o, reach_v, reach_q, seen, from_exit, entry, d_exit):
  """dg_t: the share of the loss that passes from before t to t or after.

  Summed over pairs (raw write before t, output at or after t), whose weights
  `reach` already hold what was erased between. The usual row sums less column
  sums of the scores cancel where keys repeat: their error is 10 to 100 times
  this one's, which stays at the token scan's own.
  """
  C = reach_v.shape[-1]
  raw = c.beta[..., None] * c.v
  seen_v = c.beta[..., None, :] * matmul('...tv,...sv->...ts', d_o, c.v)
  pairs = jnp.tril(reach_v * seen_v, -1)
  after = scan.triangle(C).T  # [t, i]: i at or after t
  within = matmul('ti,...ij->...tj', after, pairs)
  from_entry = matmul('ti,...i->...t', after, jnp.sum(reach_q * seen, -1))
  to_exit = matmul(
    'tj,...j->...t',
    jnp.tril(scan.triangle(C), -1),
    jnp.sum(raw * from_exit, -1),
  )
  erased = matmul('...tv,...kv->...tk', c.low(from_exit), c.low(entry))
  through = c.decay.carry * jnp.sum(d_exit * entry, (-1, -2)) - jnp.sum(
    c.erase[..., None] * c.k * erased, (-1, -2)
  )
  return (
    jnp.sum(jnp.tril(within, -1), -1)
    + from_entry
    + to_exit
    + through[..., None]
  )


DESCRIPTION = Description(
  carry='matrix',
  inputs={
    'q': QUERY,
    'k': KEY,
    'v': VALUE,
    'beta': Input('BTH', 'gate'),
    'g': Input('BTH', 'decay'),
  },
)
RULE = scan.Rule(step, _forward_associative, _forward, _backward)
FORMS = scan.forms_of(run)
recurrent, associative, chunked = FORMS.values()
