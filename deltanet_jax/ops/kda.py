"""Kimi Delta Attention: the delta rule with a decay for every key channel.

    S'  = diag(e^{g_t}) S_{t-1}
    S_t = S' + k_t (w_t * v_t - S'^T (b_t * k_t))^T
    o_t = S_t^T q_t

arXiv:2510.26692 eq. 1 has one gate, b = w = beta. With separate erase and write
gates b and w this is Gated DeltaNet-2 (arXiv:2605.22791).

  q, k [B,T,J,K]   v [B,T,H,V]   beta [B,T,H] or [B,T,H,V]: w
  g [B,T,H,K], g <= 0
  erase [B,T,H,K]: b; None: b is beta, which then is [B,T,H]

`deltanet_jax.gated_delta_rule` documents the other arguments, the results and
the errors. Decay, inverse and state are float32; matmul operands have q's type.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops import affine, scan
from deltanet_jax.ops.description import KEY, QUERY, VALUE, Description, Input
from deltanet_jax.ops.inverse import check_chunk, unit_lower_inverse
from deltanet_jax.ops.products import matmul, matmul_parts
from deltanet_jax.ops.scan import F32, repeat_heads
from deltanet_jax.ops.shapes import check_shapes


def step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array,
  erase: jax.Array | None,
  state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One token: the arguments above without T, state [B,H,K,V] f32."""
  DESCRIPTION.check_token(
    q=q, k=k, v=v, beta=beta, g=g, erase=erase, state=state
  )
  G = v.shape[1] // q.shape[1]
  q, k = (jnp.repeat(x.astype(F32), G, axis=1) for x in (q, k))
  wv, bk = _gates(k, v, beta, erase)
  state = jnp.exp(g.astype(F32))[..., None] * state
  # S' is read once for both: S^T q = S'^T q + (k^T q) write
  both = matmul('bhnk,bhkv->bhnv', jnp.stack([bk, q], 2), state)
  write = wv - both[:, :, 0]
  o = both[:, :, 1] + (k * q).sum(-1, keepdims=True) * write
  return o.astype(v.dtype), state + k[..., :, None] * write[..., None, :]


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array,
  *,
  erase: jax.Array | None = None,
  form: str,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk: int = 64,
  group: int | None = None,
) -> scan.Result:
  """Computes the rule in one of its `FORMS`."""
  if erase is None:
    check_shapes(v=(v, 'BTHV'), **{'beta without erase': (beta, 'BTH')})
  inputs = {'q': q, 'k': k, 'v': v, 'beta': beta, 'g': g, 'erase': erase}
  how = state, segment_ids, chunk, group
  return scan.run(RULE, DESCRIPTION, form, inputs, *how)


def _gates(k, v, beta, erase):
  """Returns w * v and b * k in float32."""
  beta = beta.astype(F32)
  beta = beta if beta.ndim == v.ndim else beta[..., None]
  erase = beta if erase is None else erase.astype(F32)
  return beta * v.astype(F32), erase * k.astype(F32)


class _Chunk(NamedTuple):
  """M chunks; read_q and erase_k in q's type, the rest float32.

  read_q, erase_k [M,B,H,C,K]: e^G q and e^G (b * k)
  write_k [M,B,H,C,K]: e^{G_C-G} k   carry [M,B,H,K]: e^{G_C}
  scores [M,B,H,C,C]: sum_c e^{G_ic-G_jc} q_ic k_jc, diagonal included
  lower [M,B,H,C,C]: the same with b * k for q, below the diagonal
  wv [M,B,H,C,V]: w * v
  """

  read_q: jax.Array
  erase_k: jax.Array
  write_k: jax.Array
  carry: jax.Array
  scores: jax.Array
  lower: jax.Array
  wv: jax.Array

  def cast(self, x: jax.Array) -> jax.Array:
    """Returns x in the type of matmul operands."""
    return x.astype(self.read_q.dtype)

  def precise(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum(spec, x, y); float32 operands enter as two parts of q's type."""
    return matmul_parts(spec, x, y, self.read_q.dtype)


def _within(q, k, v, beta, g, erase, masks):
  """Computes what needs no state; `masks` keeps documents apart."""
  G = v.shape[2] // q.shape[2]
  dtype = q.dtype
  check_chunk(g.shape[3])
  q, k = (repeat_heads(x.astype(F32), G) for x in (q, k))
  wv, bk = _gates(k, v, beta, erase)
  levels, from_entry, to_exit = _spans(g.astype(F32))
  read, write = jnp.exp(from_entry), jnp.exp(to_exit)
  carry = read[..., -1, :]
  scores, lower = _scores(q, bk, k, levels, dtype)
  if masks is not None:
    scores = jnp.where(masks.pair, scores, 0)
    lower = jnp.where(masks.pair, lower, 0)
    read = jnp.where(masks.enters[..., None], read, 0)
    write = jnp.where(masks.leaves[..., None], write, 0)
    carry = jnp.where(masks.enters[..., -1:], carry, 0)
  return _Chunk(
    read_q=(read * q).astype(dtype),
    erase_k=(read * bk).astype(dtype),
    write_k=write * k,
    carry=carry,
    scores=scores,
    lower=lower,
    wv=wv,
  )


def _halves(x, size):
  """Cuts [M,B,H,C,...] into blocks of 2 * size tokens: their two halves."""
  x = x.reshape(*x.shape[:3], -1, 2, size, *x.shape[4:])
  return x[:, :, :, :, 0], x[:, :, :, :, 1]


def _spans(g):
  """Sums of g [M,B,H,C,K], each made by additions alone.

  levels: for blocks of 2 size tokens, size = 1, 2, 4, .., C/2, two arrays
  [M,B,H,C/(2 size),size,K]: of the second half the sums from its start to each
  token, that token included; of the first half those after each token to its
  end. from_start, to_end [M,B,H,C,K]: both sums for the whole chunk.
  """
  C = g.shape[3]
  join = lambda *x: jnp.stack(x, 4).reshape(g.shape)
  from_start, to_end = g, jnp.zeros_like(g)
  levels = []
  size = 1
  while size < C:
    (start_1, start_2), (end_1, end_2) = (
      _halves(x, size) for x in (from_start, to_end)
    )
    levels.append((start_2, end_1))
    total_1, total_2 = (x[..., -1:, :] for x in (start_1, start_2))
    from_start = join(start_1, total_1 + start_2)
    to_end = join(end_1 + total_2, end_2)
    size *= 2
  return levels, from_start, to_end


def _scores(q, bk, k, levels, dtype):
  """sum_c x_ic k_jc e^{g_{j+1,c} + .. + g_{i,c}} for x = q (j <= i) and
  x = b * k (j < i): two arrays [M,B,H,C,C] float32.

  The decay differs by channel, so it cannot multiply a finished product, and
  e^{G_i} e^{-G_j} overflows. So each block is halved: rows of the second half
  are decayed from its start, keys of the first half to its end, and one matmul
  gives all pairs of the two. No exponent is positive. Blocks double until they
  fill the chunk.
  """
  C = q.shape[3]
  cast = lambda x: x.astype(dtype)
  same = jnp.sum(q * k, -1)
  # [M,B,H,blocks,size,2,size]: row, q or b * k, key
  both = jnp.stack([same, jnp.zeros_like(same)], -1)[..., None, :, None]
  for n, (start, end) in enumerate(levels):
    size = 2**n
    row = jnp.stack([_halves(x, size)[1] * jnp.exp(start) for x in (q, bk)], 5)
    key = _halves(k, size)[0] * jnp.exp(end)
    row = row.reshape(*key.shape[:4], 2 * size, -1)
    corner = matmul('...rk,...jk->...rj', cast(row), cast(key))
    corner = corner.reshape(*key.shape[:5], 2, size)
    first, second = both[:, :, :, ::2], both[:, :, :, 1::2]
    top = jnp.concatenate([first, jnp.zeros_like(corner)], -1)
    both = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], 4)
  both = both.reshape(*q.shape[:4], 2, C)
  return both[..., 0, :], both[..., 1, :]


def _forward_associative(inputs, masks, state):
  # all in float32: automatic differentiation rounds terms that cancel
  c = _within(*(x.astype(F32) for x in inputs[:3]), *inputs[3:], masks)
  inverse = unit_lower_inverse(c.lower)
  solve = lambda x: matmul('...ts,...sx->...tx', inverse, x)
  solved_k, solved_v = solve(c.erase_k), solve(c.wv)
  onto_exit = lambda x: matmul('...tk,...tx->...kx', c.write_k, x)
  carry = affine.Carry(c.carry[..., None], -onto_exit(solved_k))
  entry, last = affine.affine_scan(carry, onto_exit(solved_v), state)
  write = solved_v - matmul('...tk,...kv->...tv', solved_k, entry)
  return _read(c, write, entry), last


def _walk(c, inverse, tree):
  """Returns two functions, states and exit_gradients.

  states(state): the last exit state and, of every chunk, the entry state S
    [M,B,H,K,V] and the writes U [M,B,H,C,V]
  exit_gradients(from_reads, d_state): dS, the gradient of the group's entry
    state; of every chunk E, the gradient of its exit state, and R, what E
    contributes to dZ. from_reads: that of its entry state through its reads
  """
  return (_composed if tree else _scanned)(c, inverse)


def _scanned(c, inverse):
  """The chunks one after the other."""

  def states(state):
    def body(state, xs):
      c, inverse = xs
      write = _written(c, inverse, state)
      exit_state = c.carry[..., None] * state + c.precise(
        '...tk,...tv->...kv', c.write_k, write
      )
      return exit_state, (state, write)

    return jax.lax.scan(body, state, (c, inverse))

  def exit_gradients(from_reads, d_state):
    def body(d_state, xs):
      c, inverse, from_reads = xs
      d_exit = c.precise('...tk,...kv->...tv', c.write_k, c.cast(d_state))
      from_exit = c.precise('...ts,...tv->...sv', inverse, d_exit)
      d_entry = (
        c.carry[..., None] * d_state
        + from_reads
        - matmul('...tk,...tv->...kv', c.erase_k, c.cast(from_exit))
      )
      return d_entry, (d_state, from_exit)

    xs = c, inverse, from_reads
    return jax.lax.scan(body, d_state, xs, reverse=True)

  return states, exit_gradients


def _composed(c, inverse):
  """`_scanned` in parallel, with the carries M and writes Z^T W of whole
  chunks, Z = T^T (e^{G_C-G} K):  M = e^{G_C} I - Z^T (e^G A)."""
  solved = c.precise('...ts,...tk->...sk', inverse, c.write_k)
  erased = c.precise('...tk,...tl->...kl', solved, c.erase_k)
  tree = affine.multiply_pairs(affine.Carry(c.carry[..., None], -erased))

  def states(state):
    own = c.precise('...tk,...tv->...kv', solved, c.wv)
    entry, last = affine.tree_walk(tree, own, state)
    return last, (entry, _written(c, inverse, entry))

  def exit_gradients(from_reads, d_state):
    walked = affine.tree_walk(tree, from_reads, d_state, reverse=True)
    d_exit, d_state = walked
    return d_state, (d_exit, c.precise('...tk,...kv->...tv', solved, d_exit))

  return states, exit_gradients


def _written(c, inverse, entry):
  """The writes U of entry states S."""
  v_old = matmul('...tk,...kv->...tv', c.erase_k, c.cast(entry))
  return c.precise('...ts,...sv->...tv', inverse, c.wv - v_old)


def _read(c, write, entry):
  o = matmul('...tk,...kv->...tv', c.read_q, c.cast(entry))
  return o + c.precise('...ts,...sv->...tv', c.scores, write)


def _forward(inputs, masks, state, tree=False):
  c = _within(*inputs, masks)
  states, _ = _walk(c, unit_lower_inverse(c.lower, not tree), tree)
  last, (entry, write) = states(state)
  return _read(c, write, entry), last


def _backward(inputs, masks, state, d_o, d_state, tree=False):
  """Gradients of one group of chunks. README.md, sections 4 and 5, derives
  them; the capital letters in comments are its letters."""
  within = lambda inputs: _within(*inputs, masks)
  # a group of the tree is large: what the gradient needs is computed again
  c, pull = jax.vjp(jax.checkpoint(within) if tree else within, inputs)
  cast, inverse = c.cast, unit_lower_inverse(c.lower, not tree)
  states, exit_gradients = _walk(c, inverse, tree)
  _, (entry, write) = states(state)
  # what follows is made after the states: fewer large arrays at a time
  d_o, _ = jax.lax.optimization_barrier((cast(d_o), entry))
  # Y and Q~ of O = Y (w * V) + Q~ S: the solve multiplied out
  reach_v = cast(c.precise('...ts,...sr->...tr', c.scores, inverse))
  reach_q = c.read_q - matmul('...ts,...sk->...tk', reach_v, c.erase_k)
  # E, the gradient of every exit state, and R, what it contributes to dZ
  from_reads = matmul('...tk,...tv->...kv', cast(reach_q), d_o)
  d_state, (d_exit, from_exit) = exit_gradients(from_reads, d_state)
  # dZ: gradient of w * V - e^G A S, the right-hand side of (solve)
  d_rhs = from_exit + matmul('...ts,...tv->...sv', reach_v, d_o)
  with_writes = lambda a: c.precise('...tv,...sv->...ts', cast(a), write)
  onto_k = lambda a, s: matmul('...tv,...kv->...tk', cast(a), cast(s))
  d_c = _Chunk(
    read_q=cast(onto_k(d_o, entry)),
    erase_k=cast(-onto_k(d_rhs, entry)),
    write_k=onto_k(write, d_exit),
    carry=jnp.sum(d_exit * entry, -1),
    scores=with_writes(d_o),
    lower=-with_writes(d_rhs),
    wv=d_rhs,
  )
  return pull(d_c)[0], d_state


DESCRIPTION = Description(
  carry='matrix',
  inputs={
    'q': QUERY,
    'k': KEY,
    'v': VALUE,
    'beta': Input('BTH|BTHV', 'gate'),
    'g': Input('BTHK', 'decay'),
  },
  gates={'erase': Input('BTHK', 'gate')},
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
