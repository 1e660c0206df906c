"""The delta rule: plain DeltaNet and, with a decay, Gated DeltaNet.

    S'  = e^{g_t} S_{t-1}
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    o_t = S_t^T q_t

arXiv:2406.06484 eq. 2 (g = 0), arXiv:2412.06464 eq. 10.

  q, k [B,T,J,K]   v [B,T,H,V]   beta [B,T,H]   g [B,T,H] or None (no decay)

`deltanet_jax.gated_delta_rule` documents the other arguments, the results and
the errors. Decay, inverse and state are float32; matmul operands have q's type.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops import affine, scan
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
  # S' is read once for both: S^T q = S'^T q + (k^T q) write
  both = matmul('bhnk,bhkv->bhnv', jnp.stack([k, q], 2), state)
  write = beta.astype(F32)[..., None] * (v.astype(F32) - both[:, :, 0])
  o = both[:, :, 1] + (k * q).sum(-1, keepdims=True) * write
  return o.astype(v.dtype), state + k[..., :, None] * write[..., None, :]


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
  group: int | None = None,
) -> scan.Result:
  """Computes the rule in one of its `FORMS`."""
  inputs = {'q': q, 'k': k, 'v': v, 'beta': beta, 'g': g}
  how = state, segment_ids, chunk, group
  return scan.run(RULE, DESCRIPTION, form, inputs, *how)


class _Chunk(NamedTuple):
  """M chunks; all but q, k and v float32; G_i = g_1 + .. + g_i.

  q, k [M,B,H,C,K], repeated to the value heads   v [M,B,H,C,V]
  beta [M,B,H,C]
  gram [M,B,H,C,C]: e^{G_i-G_j} k_i^T k_j below the diagonal
  scores [M,B,H,C,C]: e^{G_i-G_j} q_i^T k_j, diagonal included
  inverse [M,B,H,C,C]: T = (I + beta gram)^-1
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  beta: jax.Array
  decay: scan.Decay
  gram: jax.Array
  scores: jax.Array
  inverse: jax.Array

  def cast(self, x: jax.Array) -> jax.Array:
    """Returns x in the type of matmul operands."""
    return x.astype(self.q.dtype)

  def precise(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum(spec, x, y); float32 operands enter as two parts of q's type."""
    return matmul_parts(spec, x, y, self.q.dtype)

  @property
  def erase(self) -> jax.Array:
    """beta_t e^{G_t} [M,B,H,C]: the share of the entry state that token t
    erases along its key."""
    return self.beta * self.decay.read


def _within(q, k, v, beta, g, masks, tree=False):
  """Computes what needs no state; `masks` keeps documents apart."""
  G = v.shape[2] // q.shape[2]
  beta = beta.astype(F32)
  decay = scan.decay_of(g, masks, beta.shape)
  dot = lambda a, b: repeat_heads(matmul('...tk,...sk->...ts', a, b), G)
  gram = jnp.tril(dot(k, k) * decay.between, -1)
  return _Chunk(
    q=repeat_heads(q, G),
    k=repeat_heads(k, G),
    v=v,
    beta=beta,
    decay=decay,
    gram=gram,
    scores=dot(q, k) * decay.between,
    inverse=unit_lower_inverse(beta[..., None] * gram, not tree),
  )


def _read(c, write, entry):
  """O = e^G Q S + scores U for writes U and entry states S."""
  o = matmul('...tk,...kv->...tv', c.q, c.cast(entry))
  o = c.decay.read[..., None] * o
  return o + c.precise('...ts,...sv->...tv', c.scores, write)


def _forward_associative(inputs, masks, state):
  # all in float32: automatic differentiation rounds terms that cancel
  c = _within(*(x.astype(F32) for x in inputs[:3]), *inputs[3:], masks)
  solve = lambda x: matmul('...ts,...sx->...tx', c.inverse, x)
  # README.md, section 2: T (beta e^G K) and T (beta V)
  solved_k = solve(c.erase[..., None] * c.k)
  solved_v = solve(c.beta[..., None] * c.v)
  write_k = c.decay.write[..., None] * c.k
  onto_exit = lambda x: matmul('...tk,...tx->...kx', write_k, x)
  carry = affine.Carry(c.decay.carry[..., None, None], -onto_exit(solved_k))
  entry, last = affine.affine_scan(carry, onto_exit(solved_v), state)
  write = solved_v - matmul('...tk,...kv->...tv', solved_k, entry)
  return _read(c, write, entry), last


def _walk(c, tree):
  """Returns two functions, states and exit_gradients.

  states(state): the last exit state and, of every chunk, the entry state S
    [M,B,H,K,V], the errors V - e^G K S and the writes U [M,B,H,C,V]
  exit_gradients(from_reads, d_state): dS, the gradient of the group's entry
    state; of every chunk E, the gradient of its exit state, and R, what E
    contributes to dZ. from_reads: that of its entry state through its reads
  """
  return (_composed if tree else _scanned)(c)


def _scanned(c):
  """The chunks one after the other."""

  def states(state):
    def body(state, c):
      error, write = _written(c, state)
      exit_state = c.decay.carry[..., None, None] * state + c.precise(
        '...tk,...tv->...kv', c.k, c.decay.write[..., None] * write
      )
      return exit_state, (state, error, write)

    return jax.lax.scan(body, state, c)

  def exit_gradients(from_reads, d_state):
    def body(d_state, xs):
      c, from_reads = xs
      d_exit = c.decay.write[..., None] * c.precise(
        '...tk,...kv->...tv', c.k, d_state
      )
      from_exit = c.precise('...ts,...tv->...sv', c.inverse, d_exit)
      d_entry = (
        c.decay.carry[..., None, None] * d_state
        + from_reads
        - c.precise('...tk,...tv->...kv', c.k, c.erase[..., None] * from_exit)
      )
      return d_entry, (d_state, from_exit)

    return jax.lax.scan(body, d_state, (c, from_reads), reverse=True)

  return states, exit_gradients


def _composed(c):
  """`_scanned` in parallel, with the carries A and writes Z^T (beta V) of whole
  chunks, Z = T^T (e^{G_C-G} K):  A = e^{G_C} I - (beta e^G Z)^T K."""
  solved = c.precise(
    '...ts,...tk->...sk', c.decay.write[..., None] * c.inverse, c.k
  )
  erased = c.precise('...tk,...tl->...kl', c.erase[..., None] * solved, c.k)
  carry = affine.Carry(c.decay.carry[..., None, None], -erased)
  tree = affine.multiply_pairs(carry)

  def states(state):
    own = c.precise('...tk,...tv->...kv', c.beta[..., None] * solved, c.v)
    entry, last = affine.tree_walk(tree, own, state)
    return last, (entry, *_written(c, entry))

  def exit_gradients(from_reads, d_state):
    walked = affine.tree_walk(tree, from_reads, d_state, reverse=True)
    d_exit, d_state = walked
    return d_state, (d_exit, c.precise('...tk,...kv->...tv', solved, d_exit))

  return states, exit_gradients


def _written(c, entry):
  """The errors V - e^G K S and the writes U of entry states S."""
  v_old = c.precise('...tk,...kv->...tv', c.k, entry)
  error = c.v - c.decay.read[..., None] * v_old
  write = c.precise('...ts,...sv->...tv', c.inverse, c.beta[..., None] * error)
  return error, write


def _forward(inputs, masks, state, tree=False):
  c = _within(*inputs, masks, tree)
  states, _ = _walk(c, tree)
  exit_state, (entry, _, write) = states(state)
  return _read(c, write, entry), exit_state


def _backward(inputs, masks, state, d_o, d_state, tree=False):
  """Gradients of one group of chunks. README.md, section 4, derives them; the
  capital letters in comments are its letters."""
  *_, g = inputs
  c = _within(*inputs, masks, tree)
  states, exit_gradients = _walk(c, tree)
  _, (entry, error, write) = states(state)
  # what follows is made after the states: fewer large arrays at a time
  d_o, _ = jax.lax.optimization_barrier((c.cast(d_o), entry))
  reach_v, reach_q = _reach(c)
  # dS, the gradient of the group's entry state, and of every chunk E, the
  # gradient of its exit state, and R, what E contributes to dZ
  from_reads = matmul('...tk,...tv->...kv', c.cast(reach_q), d_o)
  d_state, (d_exit, from_exit) = exit_gradients(from_reads, d_state)
  # dZ: gradient of beta (V - e^G K S), the right-hand side of (solve)
  d_rhs = from_exit + matmul('...ts,...tv->...sv', c.cast(reach_v), d_o)
  with_writes = lambda a: c.precise('...tv,...sv->...ts', c.cast(a), write)
  d_gram = -with_writes(d_rhs)
  d_error = c.beta[..., None] * d_rhs
  seen = c.precise('...tv,...kv->...tk', d_o, entry)  # dO S^T
  d_g = None
  if g is not None:
    d_g = _decay_gradient(
      c, d_o, reach_v, reach_q, seen, from_exit, entry, d_exit
    )
  d_q, d_k = _key_gradients(
    inputs, c, seen, d_gram, with_writes(d_o), write, d_exit, d_error, entry
  )
  d_beta = jnp.sum(d_rhs * error, -1) + jnp.sum(d_gram * c.gram, -1)
  return (d_q, d_k, d_error, d_beta, d_g), d_state


def _reach(c):
  """Y [..,C,C] and Q~ [..,C,K] of O = Y (beta V) + Q~ S: the outputs as a
  function of the values and the entry state, with the solve multiplied out."""
  reach_v = c.precise('...ts,...sr->...tr', c.scores, c.inverse)
  reach_q = c.decay.read[..., None] * c.q - c.precise(
    '...ts,...sk->...tk', reach_v * c.erase[..., None, :], c.k
  )
  return reach_v, reach_q


def _key_gradients(
  inputs, c, seen, d_gram, d_scores, write, d_exit, d_error, entry
):
  """dQ and dK, summed over the value heads of a key head."""
  q, k, v = inputs[:3]
  G = v.shape[2] // q.shape[2]
  onto_k = lambda a, s: matmul('...tv,...kv->...tk', c.cast(a), c.cast(s))
  between = c.decay.between
  d_kk = scan.sum_heads(jnp.tril(c.beta[..., None] * d_gram * between, -1), G)
  d_qk = scan.sum_heads(d_scores * between, G)
  read = c.decay.read[..., None]
  times = lambda a, b: c.precise('...ts,...sk->...tk', a, b)
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
  """dg_t, by the pairs that g_t lies between (README.md, section 4).

  These are values before t and outputs at or after t, weighted by Y, with the
  entry state among the values and the exit state among the outputs. The usual
  formula, row sums minus column sums of the scores' gradient, cancels where
  keys repeat: its error is 10 to 100 times this one's, which is the token
  scan's.
  """
  C = reach_v.shape[-1]
  beta_v = c.beta[..., None] * c.v
  seen_v = c.beta[..., None, :] * matmul('...tv,...sv->...ts', d_o, c.v)
  pairs = jnp.tril(reach_v * seen_v, -1)
  after = scan.triangle(C).T  # [t, i]: 1 where i >= t
  within = matmul('ti,...ij->...tj', after, pairs)
  from_entry = matmul('ti,...i->...t', after, jnp.sum(reach_q * seen, -1))
  to_exit = matmul(
    'tj,...j->...t',
    jnp.tril(scan.triangle(C), -1),
    jnp.sum(beta_v * from_exit, -1),
  )
  erased = matmul('...tv,...kv->...tk', c.cast(from_exit), c.cast(entry))
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
RULE = scan.Rule(
  step,
  _forward_associative,
  chunked=scan.Group(_forward, _backward),
  tree=scan.Group(
    *(functools.partial(f, tree=True) for f in (_forward, _backward))
  ),
)
FORMS = scan.forms_of(run)
recurrent, associative, chunked, tree = FORMS.values()
