"""Kimi Delta Attention on TPUs: one kernel forward, one backward.

One chunk of C tokens and one value head, S its entry state (`ops/README.md`,
section 5, with beta on columns instead of rows):

    A_ij = sum_c k_ic k_jc e^{g_{j+1,c} + .. + g_{i,c}} beta_j, j < i
    P_ij = sum_c q_ic k_jc e^{g_{j+1,c} + .. + g_{i,c}} beta_j, j <= i
    X  = (I + A)^-1        k+, q+: k and q, decayed from the chunk's start
    w  = X (v - k+ S)      k-: k, decayed to the chunk's end
    o  = q+ S + P w
    S' = e^{G_C} S + k-^T (beta w)

For A and P a run of 2 s tokens, s = 1, 2, 4, .., is cut in the middle, where
its rows and keys meet. A token is a row or a key, never both, so that one array
F = e^{sum of gates to or from the middle} [C,K] serves both, and one product
[k F; q F] (k F)^T per size has all pairs that meet at it. Every exponent is the
plain sum of the gates it spans: one product of gates with zeros and ones gives
those of all sizes. A document begins with a gate of -1e5: exactly zero is left,
and sums without that gate never see it.

The state is kept as S^T [V,K], where a decay a channel is a row along lanes.
Backward, with E the gradient of S':

    Y  = P X    R = X^T diag(beta) k- E    dr = R + Y^T dO
    dA = -dr w^T    dP = dO w^T    dv = dr
    dS = e^{G_C} E + q+^T dO - k+^T dr

from where on it is products and sums: a span's gradient is the product of what
it multiplied with that one's gradient, a gate's the sum over all its spans.

What is kept for it, besides the inputs: entry states and inverses in float32,
4 K V + 512 C bytes a chunk and value head.

Operands with bfloat16 inputs, all sums in float32. In two bfloat16 parts, high
and low, go what cancels where keys repeat: X, P, Y, the errors w, right-hand
sides of X, k-, k- E, the gradient of P where dq is summed; and gates, whose
rounding is then 2^-17 of a sum. In one part: q, k, v and dO, as they were
given, k and q decayed to where they meet, k+ and q+, S, E, dr, the gradients of
A and P where dk is summed. With float32 inputs no operand is rounded.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from deltanet_jax.kernels import tpu, tpu_rule
from deltanet_jax.kernels.tpu import (
  C,
  cat,
  divide,
  dot,
  dot_parts,
  iota,
  split,
)
from deltanet_jax.kernels.tpu_inverse import inverses
from deltanet_jax.ops import scan
from deltanet_jax.ops.kda import DESCRIPTION
from deltanet_jax.ops.scan import F32

LEVELS = C.bit_length() - 1  # sizes of halves: 1, 2, .., C / 2


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array,
  *,
  erase: jax.Array | None = None,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk: int = C,
) -> scan.Result:
  """`ops.kda.run` by the kernel, for beta [B,T,H] and no erase gate.

  q, k, v in bfloat16 or all in float32, K to 256, V to 768; chunk is of the
  other forms, the kernel's is 128. First derivatives alone.
  """
  del chunk
  if erase is not None or beta.ndim > 3:
    raise ValueError(
      "form 'kernel' of kda has one beta for erasing and writing, [B,T,H];"
      " with gates apart take form='chunked'"
    )
  inputs = {'q': q, 'k': k, 'v': v, 'beta': beta, 'g': g}
  return tpu_rule.run(PASSES, DESCRIPTION, inputs, state, segment_ids)


def covers(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array,
  erase: jax.Array | None = None,
) -> bool:
  """As `tpu_rule.covers`."""
  return erase is None and beta.ndim == 3 and tpu_rule.covers(q, k, v, g)


def _spans():
  """Which gates row i sums, zeros and ones [LEVELS + 2, C, C]: from the middle
  of its run of 2 s tokens, itself included, in the second half, and after it to
  the middle in the first; then from the chunk's start; then to its end."""
  i, s = jnp.arange(C)[:, None], jnp.arange(C)[None]
  found = []
  for level in range(LEVELS):
    half = 1 << level
    run = i // half
    row = (s >= run * half) & (s <= i)
    key = (s > i) & (s < (run + 1) * half)
    found.append(jnp.where(run % 2 == 1, row, key))
  return jnp.stack([*found, s <= i, s > i]).astype(tpu.BF16)


def _meet(level, i, j):
  """i in the second half of a run of 2^(level+1) tokens, j in the first."""
  half = 1 << level
  return ((divide(i, half) & 1) == 1) & (divide(j, half) == divide(i, half) - 1)


class _Chunk(NamedTuple):
  """What the tokens of a chunk mean to each other, lists over heads.

  Of key heads: q, k [C,K] f32. Of value heads: beta [1,C]; sums [(LEVELS+2)C,K]
  of gates; link and score [C,C], A and P without beta; read, write [C,K],
  decay from the chunk's start and to its end.
  """

  q: list[jax.Array]
  k: list[jax.Array]
  beta: list[jax.Array]
  sums: list[jax.Array]
  link: list[jax.Array]
  score: list[jax.Array]
  read: list[jax.Array]
  write: list[jax.Array]

  def decayed(self, h, level, z):
    """F, and k and q times F as operands."""
    decay = jnp.exp(self.sums[h][level * C : (level + 1) * C])
    j = h // z.G
    low = lambda x: (x * decay).astype(z.low)
    return decay, low(self.k[j]), low(self.q[j])


def _paired(z):
  """Heads side by side: a product of K = 128 fills half a pass."""
  side = 2 if z.heads % 2 == 0 and z.K == C else 1
  return [range(h, h + side) for h in range(0, z.heads, side)]


def _wide(heads, K):
  """The channels of neighboring heads in a block of tokens."""
  return slice(heads[0] * K, (heads[-1] + 1) * K)


def _within(q_ref, k_ref, g_ref, beta_ref, spans, z):
  heads = range(z.heads)
  sums = []
  for pair in _paired(z):
    gates = split(g_ref[0, :, _wide(pair, z.K)], z.parts)
    both = dot(spans[...], cat(gates, 0))
    sums += [both[:, n * z.K : (n + 1) * z.K] for n in range(len(pair))]
  q, k = (
    [x[0, :, z.lanes(j, z.K)].astype(F32) for j in range(z.keys)]
    for x in (q_ref, k_ref)
  )
  row, column = iota((C, C), 0), iota((C, C), 1)
  zero = jnp.zeros((C, C), F32)
  same = [
    dot(q[j].astype(z.low), k[j].astype(z.low), (1, 1)) for j in range(z.keys)
  ]
  link = [zero for _ in heads]
  score = [jnp.where(row == column, same[h // z.G], 0.0) for h in heads]
  c = _Chunk(
    q,
    k,
    [beta_ref[0, 0, 0, h : h + 1, :] for h in heads],
    sums,
    link,
    score,
    [jnp.exp(sums[h][LEVELS * C : (LEVELS + 1) * C]) for h in heads],
    [jnp.exp(sums[h][(LEVELS + 1) * C :]) for h in heads],
  )
  for level in range(LEVELS):
    meet = _meet(level, row, column)
    for h in heads:
      _, keys, queries = c.decayed(h, level, z)
      pairs = dot(cat([keys, queries], 0), keys, (1, 1))
      link[h] = jnp.where(meet, pairs[:C], link[h])
      score[h] = jnp.where(meet, pairs[C:], score[h])
  return c


def _errors(c, inverse, v_ref, state, z):
  """w; and q+ S."""
  error, asked = [], []
  for h in range(z.heads):
    j = h // z.G
    rows = cat([c.k[j] * c.read[h], c.q[j] * c.read[h]], 0).astype(z.low)
    seen = dot(rows, state[h].astype(z.low), (1, 1))
    rest = v_ref[0, :, z.lanes(h, z.V)].astype(F32) - seen[:C]
    error.append(dot_parts(inverse[h], rest, z.low))
    asked.append(seen[C:])
  return error, asked


# ---------------------------------------------------------------- forward


def _forward_kernel(q, k, v, g, beta, spans, first, o, last, *rest, z):
  *kept, state = rest
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    state[...] = first[0]

  c = _within(q, k, g, beta, spans, z)
  heads = range(z.heads)
  inverse = inverses([c.link[h] * c.beta[h] for h in heads], z.parts)
  if kept:
    entries, inverted = kept
    entries[0, 0] = state[...]
    for h in heads:
      inverted[0, 0, h] = inverse[h]
  error, asked = _errors(c, inverse, v, state, z)
  for h in heads:
    out = asked[h] + dot_parts(c.score[h] * c.beta[h], error[h], z.low)
    o[0, :, z.lanes(h, z.V)] = out.astype(o.dtype)
  for h in heads:
    write = dot_parts(error[h].T * c.beta[h], c.k[h // z.G] * c.write[h], z.low)
    state[h] = state[h] * c.read[h][C - 1 :] + write

  @pl.when(n == z.N - 1)
  def _():
    last[0] = state[...]


@functools.partial(jax.jit, static_argnames=('z', 'keep'))
def _run_forward(z, q, k, v, beta, g, state, keep):
  blocks = tpu.Blocks(z)
  keys, values = (blocks.tokens(n) for n in (z.keys * z.K, z.heads * z.V))
  states = blocks.states(z.V, z.K)
  spans = jnp.tile(_spans().reshape(-1, C), (1, z.parts))
  state = jnp.swapaxes(state, 2, 3)
  shape = jax.ShapeDtypeStruct
  outputs = [(shape(tpu.flat(v).shape, v.dtype), values)]
  outputs.append((shape(state.shape, F32), states))
  if keep:
    of_chunks = z.B, z.N, z.J * z.G
    outputs.append(
      (shape((*of_chunks, z.V, z.K), F32), blocks.chunks(z.V, z.K))
    )
    outputs.append((shape((*of_chunks, C, C), F32), blocks.chunks(C, C)))
  o, last, *kept = tpu.call(
    functools.partial(_forward_kernel, z=z),
    'kda_forward',
    z,
    [
      (tpu.flat(q), keys),
      (tpu.flat(k), keys),
      (tpu.flat(v), values),
      (tpu.flat(g), blocks.tokens(z.heads * z.K)),
      (tpu.to_rows(beta, z), blocks.rows(z.heads)),
      (spans, blocks.constant(spans.shape)),
      (state, states),
    ],
    outputs,
    (z.V, z.K),
  )
  return o.reshape(v.shape), jnp.swapaxes(last, 2, 3), kept


# ---------------------------------------------------------------- backward


def _backward_kernel(*refs, z):
  """Chunks from last to first; d_state is E^T."""
  (q, k, v, g, beta, spans, spans_T, entries, inverted) = refs[:9]
  d_o_ref, d_last, d_q, d_k, d_v, d_g, d_beta, d_first, d_state = refs[9:]
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    d_state[...] = d_last[0]

  c = _within(q, k, g, beta, spans, z)
  heads = range(z.heads)
  inverse = [inverted[0, 0, h] for h in heads]
  entry = [entries[0, 0, h] for h in heads]
  d_o = [d_o_ref[0, :, z.lanes(h, z.V)] for h in heads]
  error, _ = _errors(c, inverse, v, entry, z)
  exits, d_rest = _rest_gradients(c, inverse, d_o, d_state, z)
  for h in heads:
    d_v[0, :, z.lanes(h, z.V)] = d_rest[h].astype(d_v.dtype)
  d_link, d_score = _score_gradients(c, error, exits, d_o, d_rest, d_beta, z)
  column = beta[0, 0, 0].T
  written = [column[:, h : h + 1] * error[h] for h in heads]
  d_spans = _level_gradients(c, d_link, d_score, written, d_o, d_rest, z)
  _state_key_gradients(c, d_spans, entry, written, d_o, d_rest, d_state, z)
  for j in range(z.keys):
    for ref, parts in ((d_q, d_spans.q), (d_k, d_spans.k)):
      total = sum(parts[h] for h in z.group(j))
      ref[0, :, z.lanes(j, z.K)] = total.astype(ref.dtype)
  for pair in _paired(z):
    sums = cat([cat(d_spans.sums[h], 0) for h in pair], 1)
    d_g[0, :, _wide(pair, z.K)] = sum(
      dot(spans_T[...], part) for part in split(sums, z.parts)
    )
  low = lambda x: x.astype(z.low)
  for h in heads:
    j = h // z.G
    left = low(cat([d_o[h].astype(F32).T, -d_rest[h].T], 1))
    rows = low(cat([c.q[j] * c.read[h], c.k[j] * c.read[h]], 0))
    d_state[h] = d_state[h] * c.read[h][C - 1 :] + dot(left, rows)

  @pl.when(n == z.N - 1)
  def _():
    d_first[0] = d_state[...]


def _rest_gradients(c, inverse, d_o, d_state, z):
  """k- E and dr."""
  heads = range(z.heads)
  low = lambda x: x.astype(z.low)
  reach = [dot_parts(c.score[h] * c.beta[h], inverse[h], z.low) for h in heads]
  reach_T = [low(y.T) for y in reach]
  onto = [inverse[h].T * c.beta[h] for h in heads]
  exits = [
    dot_parts(c.k[h // z.G] * c.write[h], low(d_state[h]), z.low, (1, 1))
    for h in heads
  ]
  from_exit = [dot_parts(onto[h], exits[h], z.low) for h in heads]
  return exits, [from_exit[h] + dot(reach_T[h], d_o[h]) for h in heads]


def _score_gradients(c, error, exits, d_o, d_rest, d_beta, z):
  """Of link and score; writes that of beta."""
  ones = jnp.ones((8, z.V), tpu.BF16)
  d_link, d_score = [], []
  for h in range(z.heads):
    both = cat([d_rest[h].astype(z.low), d_o[h]], 0)
    both = dot_parts(both, error[h], z.low, (1, 1))
    onto_link, onto_score = -both[:C], both[C:]
    # sums over lanes that stand as a row
    own = sum(dot(ones, x, (1, 1)) for x in split(error[h] * exits[h], z.parts))
    d_beta[0, 0, 0, h : h + 1, :] = own[:1] + jnp.sum(
      onto_link * c.link[h] + onto_score * c.score[h], 0, keepdims=True
    )
    d_link.append(onto_link * c.beta[h])
    d_score.append(onto_score * c.beta[h])
  return d_link, d_score


class _Gradients(NamedTuple):
  """Lists over value heads: of q and k [C,K]; of the sums of gates, a list of
  LEVELS + 2 times [C,K] each."""

  q: list[jax.Array]
  k: list[jax.Array]
  sums: list[list[jax.Array]]


def _level_gradients(c, d_link, d_score, written, d_o, d_rest, z):
  """What scores and links give, size by size of halves."""
  heads = range(z.heads)
  row, column = iota((C, C), 0), iota((C, C), 1)
  low = lambda x: x.astype(z.low)
  out = _Gradients([], [], [[] for _ in heads])
  # by rows for rows: [dA; dP], of dP two parts, which dq is a sum of
  by_row, by_key = [], []
  for h in heads:
    j = h // z.G
    own = jnp.where(row == column, d_score[h], 0.0)
    both = dot_parts(own, low(cat([c.k[j], c.q[j]], 1)), z.low)
    out.q.append(both[:, : z.K])
    out.k.append(both[:, z.K :])
    high = low(d_score[h]).astype(F32)
    by_row.append([d_link[h], high, d_score[h] - high])
    # and transposed for keys: [dA^T, dP^T]
    both = cat([low(-d_rest[h]), d_o[h]], 0)
    turned = dot(low(written[h]), both, (1, 1))
    by_key.append([turned[:, :C], turned[:, C:]])
  for level in range(LEVELS):
    meet, back = _meet(level, row, column), _meet(level, column, row)
    for h in heads:
      j = h // z.G
      decay, keys, queries = c.decayed(h, level, z)
      onto = [low(jnp.where(meet, x, 0.0)) for x in by_row[h]]
      rows = dot(cat(onto, 0), keys)
      onto = [low(jnp.where(back, x, 0.0)) for x in by_key[h]]
      from_rows = dot(cat(onto, 1), cat([keys, queries], 0))
      d_k = (rows[:C] + from_rows) * decay
      d_q = (rows[C : 2 * C] + rows[2 * C :]) * decay
      out.k[h] += d_k
      out.q[h] += d_q
      out.sums[h].append(d_k * c.k[j] + d_q * c.q[j])
  return out


def _state_key_gradients(c, out, entry, written, d_o, d_rest, d_state, z):
  """What the entry state and the write to the exit state give; in place."""
  low = lambda x: x.astype(z.low)
  is_last = iota((C, z.K), 0) == C - 1
  for h in range(z.heads):
    j = h // z.G
    read = c.read[h]
    onto = dot(cat([d_o[h], low(-d_rest[h])], 0), low(entry[h]))
    d_q, d_k = onto[:C] * read, onto[C:] * read
    carry = read[C - 1 :] * jnp.sum(d_state[h] * entry[h], 0, keepdims=True)
    out.sums[h].append(
      d_q * c.q[j] + d_k * c.k[j] + jnp.where(is_last, carry, 0.0)
    )
    d_write = dot(low(written[h]), low(d_state[h])) * c.write[h]
    out.sums[h].append(d_write * c.k[j])
    out.q[h] += d_q
    out.k[h] += d_k + d_write


@functools.partial(jax.jit, static_argnames='z')
def _run_backward(z, q, k, v, beta, g, kept, d_o, d_last):
  blocks = tpu.Blocks(z, reverse=True)
  keys, values = (blocks.tokens(n) for n in (z.keys * z.K, z.heads * z.V))
  states, rows = blocks.states(z.V, z.K), blocks.rows(z.heads)
  gate = blocks.tokens(z.heads * z.K)
  spans = _spans()
  turned = jnp.swapaxes(spans, 1, 2).transpose(1, 0, 2).reshape(C, -1)
  spans = jnp.tile(spans.reshape(-1, C), (1, z.parts))
  d_last = jnp.swapaxes(d_last, 2, 3)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  q_flat, k_flat, v_flat, g_flat = (tpu.flat(x) for x in (q, k, v, g))
  beta_rows = tpu.to_rows(beta, z)
  d_q, d_k, d_v, d_g, d_beta, d_first = tpu.call(
    functools.partial(_backward_kernel, z=z),
    'kda_backward',
    z,
    [
      (q_flat, keys),
      (k_flat, keys),
      (v_flat, values),
      (g_flat, gate),
      (beta_rows, rows),
      (spans, blocks.constant(spans.shape)),
      (turned, blocks.constant(turned.shape)),
      (kept[0], blocks.chunks(z.V, z.K)),
      (kept[1], blocks.chunks(C, C)),
      (tpu.flat(d_o.astype(z.low)), values),
      (d_last, states),
    ],
    [
      (like(q_flat), keys),
      (like(k_flat), keys),
      (like(v_flat), values),
      (like(g_flat), gate),
      (like(beta_rows), rows),
      (like(d_last), states),
    ],
    (z.V, z.K),
  )
  shaped = (
    d.reshape(x.shape) for d, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)
  )
  d_beta = tpu.from_rows(d_beta, z).astype(beta.dtype)
  return *shaped, d_beta, d_g.reshape(g.shape), jnp.swapaxes(d_first, 2, 3)


PASSES = tpu_rule.Passes(_run_forward, _run_backward)
FORMS = {'kernel': run}
