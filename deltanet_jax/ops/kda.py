"""Kimi Delta Attention: the delta rule with a decay for every key channel.

    S'  = diag(e^{g_t}) S_{t-1}
    S_t = S' + k_t (w_t * v_t - S'^T (b_t * k_t))^T
    o_t = S_t^T q_t

arXiv:2510.26692 eq. 1 with erase and write gates b = w = beta; apart, they
make Gated DeltaNet-2 (arXiv:2605.22791).

  q, k [B,T,J,K]   v [B,T,H,V]   beta [B,T,H] or [B,T,H,V]: w above
  g [B,T,H,K], g <= 0, any size
  erase [B,T,H,K]: b above; None: beta, which then is [B,T,H]

All else is said of `deltanet_jax.gated_delta_rule`. Decay, inverse and state
are float32; matmul operands have q's type.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops import scan
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
  """One token: the arguments above without T, `erase` may be None."""
  DESCRIPTION.check_token(
    q=q, k=k, v=v, beta=beta, g=g, erase=erase, state=state
  )
  G = v.shape[1] // q.shape[1]
  q, k = (jnp.repeat(x.astype(F32), G, axis=1) for x in (q, k))
  write, erased = _gates(k, v, beta, erase)
  state = jnp.exp(g.astype(F32))[..., None] * state
  write = write - matmul('bhk,bhkv->bhv', erased, state)
  state = state + k[..., :, None] * write[..., None, :]
  return matmul('bhk,bhkv->bhv', q, state).astype(v.dtype), state


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
  group: int = 4,
) -> scan.Result:
  """The rule by one of its `FORMS`."""
  if erase is None:
    check_shapes(v=(v, 'BTHV'), **{'beta without erase': (beta, 'BTH')})
  inputs = {'q': q, 'k': k, 'v': v, 'beta': beta, 'g': g, 'erase': erase}
  how = state, segment_ids, chunk, group
  return scan.run(RULE, DESCRIPTION, form, inputs, *how)


def _gates(k, v, beta, erase):
  """w * v and b * k in float32."""
  beta = beta.astype(F32)
  beta = beta if beta.ndim == v.ndim else beta[..., None]
  erase = beta if erase is None else erase.astype(F32)
  return beta * v.astype(F32), erase * k.astype(F32)


class _Chunk(NamedTuple):
  """What the tokens of one chunk mean to each other, [M,B,H,C,...].

  read_q, read_a: q and b * k, decayed from the entry state; write_k: k,
  decayed to the exit state; carry [M,B,H,K]; scores [..,C,C]: q_i'k_j, decayed
  between; links: (b k)_i'k_j, decayed, below the diagonal; raw: w * v.
  """

  read_q: jax.Array
  read_a: jax.Array
  write_k: jax.Array
  carry: jax.Array
  scores: jax.Array
  links: jax.Array
  raw: jax.Array

  def low(self, x: jax.Array) -> jax.Array:
    """x as a matmul operand."""
    return x.astype(self.read_q.dtype)

  def whole(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum of x and y, what is float32 of them not rounded to an operand."""
    return matmul_parts(spec, x, y, self.read_q.dtype)


def _within(q, k, v, beta, g, erase, masks):
  G = v.shape[2] // q.shape[2]
  dtype = q.dtype
  check_chunk(g.shape[3])
  q, k = (repeat_heads(x.astype(F32), G) for x in (q, k))
  raw, a = _gates(k, v, beta, erase)
  levels, from_entry, to_exit = _spans(g.astype(F32))
  read, write = jnp.exp(from_entry), jnp.exp(to_exit)
  carry = read[..., -1, :]
  scores, links = _scores(q, a, k, levels, dtype)
  if masks is not None:
    scores = jnp.where(masks.pair, scores, 0)
    links = jnp.where(masks.pair, links, 0)
    read = jnp.where(masks.enters[..., None], read, 0)
    write = jnp.where(masks.leaves[..., None], write, 0)
    carry = jnp.where(masks.enters[..., -1:], carry, 0)
  return _Chunk(
    read_q=(read * q).astype(dtype),
    read_a=(read * a).astype(dtype),
    write_k=write * k,
    carry=carry,
    scores=scores,
    links=links,
    raw=raw,
  )


def _halves(x, size):
  """[M,B,H,C,...] as runs of 2 * size tokens: first and second halves."""
  x = x.reshape(*x.shape[:3], -1, 2, size, *x.shape[4:])
  return x[:, :, :, :, 0], x[:, :, :, :, 1]


def _spans(g):
  """Sums of g [M,B,H,C,K], only by addition of what each spans.

  For runs of size 1, 2, 4, .., C/2: (start of its run to token, the token
  included) in the second of two neighbors and (after token to end of its run)
  in the first, [M,B,H,C/(2 size),size,K]. Then both for the chunk.
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


def _scores(q, a, k, levels, dtype):
  """sum_c x_ic k_jc e^{g_{j+1,c} + .. + g_{i,c}} for x = q (j <= i) and a
  (j < i): two arrays [...,C,C].

  The decay differs by channel, so it cannot multiply a finished product. But
  two neighboring runs of tokens have a place between them: rows of the second
  are decayed from there on, keys of the first up to there, and one product
  gives all pairs across. No exponent is ever above 0, whatever g, where
  exp(g_i) exp(-g_j) would overflow. Runs double until they fill the chunk.
  """
  C = q.shape[3]
  low = lambda x: x.astype(dtype)
  same = jnp.sum(q * k, -1)
  # [M,B,H,runs,size,2,size]
  both = jnp.stack([same, jnp.zeros_like(same)], -1)[..., None, :, None]
  for n, (start, end) in enumerate(levels):
    size = 2**n
    row = jnp.stack([_halves(x, size)[1] * jnp.exp(start) for x in (q, a)], 5)
    key = _halves(k, size)[0] * jnp.exp(end)
    row = row.reshape(*key.shape[:4], 2 * size, -1)
    corner = matmul('...rk,...jk->...rj', low(row), low(key))
    corner = corner.reshape(*key.shape[:5], 2, size)
    first, second = both[:, :, :, ::2], both[:, :, :, 1::2]
    top = jnp.concatenate([first, jnp.zeros_like(corner)], -1)
    both = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], 4)
  both = both.reshape(*q.shape[:4], 2, C)
  return both[..., 0, :], both[..., 1, :]


def _forward_associative(inputs, masks, state):
  # all in float32: JAX's own gradients would round what cancels
  c = _within(*(x.astype(F32) for x in inputs[:3]), *inputs[3:], masks)
  inverse = unit_lower_inverse(c.links)
  solve = lambda x: matmul('...ts,...sx->...tx', inverse, x)
  erase, fresh = solve(c.read_a), solve(c.raw)
  onto_exit = lambda x: matmul('...tk,...tx->...kx', c.write_k, x)
  eye = jnp.eye(c.carry.shape[-1], dtype=F32)[None, None, None]
  entry, last = scan.affine_scan(
    c.carry[..., None] * eye - onto_exit(erase),
    onto_exit(fresh),
    state,
    lambda a, x: matmul('...kl,...lx->...kx', a, x),
  )
  write = fresh - matmul('...tk,...kv->...tv', erase, entry)
  return _read(c, write, entry), last


def _states(c, inverse, state):
  """Entry states [M,...] and writes u of the chunks; the exit state."""

  def body(state, xs):
    c, inverse = xs
    known = matmul('bhtk,bhkv->bhtv', c.read_a, c.low(state))
    write = c.whole('bhts,bhsv->bhtv', inverse, c.raw - known)
    exit_state = c.carry[..., None] * state + c.whole(
      'bhtk,bhtv->bhkv', c.write_k, write
    )
    return exit_state, (state, write)

  last, (entry, write) = jax.lax.scan(body, state, (c, inverse))
  return entry, write, last


def _read(c, write, entry):
  o = matmul('...tk,...kv->...tv', c.read_q, c.low(entry))
  return o + c.whole('...ts,...sv->...tv', c.scores, write)


def _forward(inputs, masks, state):
  c = _within(*inputs, masks)
  inverse = unit_lower_inverse(c.links)
  entry, write, last = _states(c, inverse, state)
  return _read(c, write, entry), last


def _backward(inputs, masks, state, d_o, d_state):
  """Gradients of one group; derived in README.md, sections 4 and 5."""
  c, pull = jax.vjp(lambda inputs: _within(*inputs, masks), inputs)
  low, inverse = c.low, unit_lower_inverse(c.links)
  entry, write, _ = _states(c, inverse, state)
  d_o = low(d_o)
  # o = reach_v raw + reach_q S: what each output sees of the raw writes and
  # of the entry state once the erasures between are counted
  reach_v = low(c.whole('...ts,...sr->...tr', c.scores, inverse))
  reach_q = c.read_q - matmul('...ts,...sk->...tk', reach_v, c.read_a)

  def body(d_state, xs):
    c, inverse, from_reads = xs
    d_exit = c.whole('bhtk,bhkv->bhtv', c.write_k, low(d_state))
    from_exit = c.whole('bhts,bhtv->bhsv', inverse, d_exit)
    d_entry = (
      c.carry[..., None] * d_state
      + from_reads
      - matmul('bhtk,bhtv->bhkv', c.read_a, low(from_exit))
    )
    return d_entry, (d_state, from_exit)

  from_reads = matmul('...tk,...tv->...kv', low(reach_q), d_o)
  d_state, (d_exit, from_exit) = jax.lax.scan(
    body, d_state, (c, inverse, from_reads), reverse=True
  )
  # d_rhs: gradient of raw - read_a S, the right-hand side of the solve
  d_rhs = from_exit + matmul('...ts,...tv->...sv', reach_v, d_o)
  with_writes = lambda a: c.whole('...tv,...sv->...ts', low(a), write)
  onto_k = lambda a, s: matmul('...tv,...kv->...tk', low(a), low(s))
  d_c = _Chunk(
    read_q=low(onto_k(d_o, entry)),
    read_a=low(-onto_k(d_rhs, entry)),
    write_k=onto_k(write, d_exit),
    carry=jnp.sum(d_exit * entry, -1),
    scores=with_writes(d_o),
    links=-with_writes(d_rhs),
    raw=d_rhs,
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
RULE = scan.Rule(step, _forward_associative, _forward, _backward)
FORMS = scan.forms_of(run)
recurrent, associative, chunked = FORMS.values()
