"""The delta rule on TPUs, with and without decay: one kernel forward, one
backward.

One chunk of C tokens and one value head, S its entry state (`ops/README.md`,
sections 2 and 4, with beta on columns instead of rows):

    D_ij = e^{g_{j+1} + .. + g_i}, j <= i        G_i = g_1 + .. + g_i
    A  = strictly lower (k k^T * D) diag(beta)   X = (I + A)^-1
    P  = lower (q k^T * D) diag(beta)
    w  = X (v - e^G k S)                         token j writes beta_j w_j
    o  = e^G q S + P w
    S' = e^{G_C} S + (beta D_C k)^T w            D_C: the last row of D

A number a token multiplies columns here, a row vector along lanes, which costs
nothing; along rows it would have to be spread over lanes first. Every exponent
is the plain sum of the gates it spans, a product of the gates with zeros and
ones. A document begins with a gate of -1e5: exactly zero is left, and sums
without that gate never see it.

Backward, with E the gradient of S':

    Y  = P X    R = X^T (beta D_C k E)    dr = R + Y^T dO
    dA = -dr w^T    dP = dO w^T    dv = dr
    dS = e^{G_C} E + (e^G q)^T dO - (e^G k)^T dr

where dr is the gradient of v - e^G k S, and that of g is the sum over pairs of
README.md, section 4, with Y for the weights.

What is kept for it, besides the inputs: entry states and inverses in float32,
4 K V + 512 C bytes a chunk and value head, which is 4 times v's bytes at K = V
= 128 in bfloat16. Entry states in bfloat16 would lose the gradient of g where
keys repeat; inverses are the dearest part to make again.

Operands with bfloat16 inputs, all sums in float32. In two bfloat16 parts, high
and low, go what cancels where keys repeat: X, P, Y, the errors w, the keys that
are written, the states that keys and queries read, E and k E, dr where it meets
w, gradients of scores. Rounded to one, P or the written keys alone make dg
wrong by 0.7 of its largest value where one key repeats and each token leaves a
tenth of what was there. Gates go in as three parts, all of float32. In
one part: q, k, v and dO, as they were given; right-hand sides of X; Y^T and dr
where they meet dO and keys; the decayed rows of dS. With float32 inputs no
operand is rounded.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from deltanet_jax.kernels import tpu, tpu_decay, tpu_rule
from deltanet_jax.kernels.tpu import C, cat, dot, dot_parts
from deltanet_jax.kernels.tpu_decay import side_by_side
from deltanet_jax.kernels.tpu_inverse import inverses
from deltanet_jax.ops import scan
from deltanet_jax.ops.delta_rule import DESCRIPTION
from deltanet_jax.ops.scan import F32


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array | None,
  *,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk: int = C,
) -> scan.Result:
  """`ops.delta_rule.run` by the kernel.

  q, k, v in bfloat16 or all in float32, K to 256, V to 768; chunk is of the
  other forms, the kernel's is 128. First derivatives alone.
  """
  del chunk
  inputs = {'q': q, 'k': k, 'v': v, 'beta': beta, 'g': g}
  return tpu_rule.run(PASSES, DESCRIPTION, inputs, state, segment_ids)


class _Chunk(NamedTuple):
  """What the tokens of a chunk mean to each other, lists over heads.

  Of key heads: rows [2C,K], k above q; kT [K,C] f32; kk, qk [C,C]. Of value
  heads: beta [1,C]; read [C,V], e^G in all lanes; decay [C,C], above the
  diagonal without meaning; link A and score P [C,C].
  """

  rows: list[jax.Array]
  kT: list[jax.Array]
  kk: list[jax.Array]
  qk: list[jax.Array]
  beta: list[jax.Array]
  read: list[jax.Array]
  decay: list[jax.Array]
  link: list[jax.Array]
  score: list[jax.Array]


def _within(q_ref, k_ref, gate_ref, z):
  rows, kT, kk, qk = [], [], [], []
  for j in range(z.keys):
    k, q = (x[0, :, z.lanes(j, z.K)] for x in (k_ref, q_ref))
    rows.append(cat([k, q], 0))
    meet = dot(rows[j], k, (1, 1))
    kk.append(meet[:C])
    qk.append(meet[C:])
    kT.append(k.astype(F32).T)
  lower, strict = tpu_decay.lower(), tpu_decay.lower(strict=True)
  decay, read = tpu_decay.decays(gate_ref[0, 0, 0, : z.heads, :], z)
  beta, link, score = [], [], []
  for h in range(z.heads):
    beta.append(gate_ref[0, 0, 0, z.heads + h : z.heads + h + 1, :])
    weight = decay[h] * beta[h]
    link.append(jnp.where(strict, kk[h // z.G] * weight, 0.0))
    score.append(jnp.where(lower, qk[h // z.G] * weight, 0.0))
  return _Chunk(rows, kT, kk, qk, beta, read, decay, link, score)


def _errors(c, inverse, v_ref, state, z):
  """w; and what k and q read of the entry state, e^G k S and e^G q S."""
  seen = [
    dot_parts(c.rows[j], s, z.low) for j, s in enumerate(side_by_side(state, z))
  ]
  own = [seen[h // z.G][:, z.lanes(h % z.G, z.V)] for h in range(z.heads)]
  known = [c.read[h] * own[h][:C] for h in range(z.heads)]
  asked = [c.read[h] * own[h][C:] for h in range(z.heads)]
  error = []
  for h in range(z.heads):
    rest = v_ref[0, :, z.lanes(h, z.V)].astype(F32) - known[h]
    error.append(dot_parts(inverse[h], rest.astype(z.low), z.low))
  return error, known, asked


# ---------------------------------------------------------------- forward


def _forward_kernel(q, k, v, gates, first, o, last, *rest, z):
  *kept, state = rest
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    state[...] = first[0]

  c = _within(q, k, gates, z)
  inverse = inverses(c.link, z.parts)
  if kept:
    entries, inverted = kept
    entries[0, 0] = state[...]
    for h in range(z.heads):
      inverted[0, 0, h] = inverse[h]
  error, _, asked = _errors(c, inverse, v, state, z)
  for h in range(z.heads):
    weight = c.decay[h][C - 1 :] * c.beta[h]
    write = c.kT[h // z.G] * weight
    out = dot_parts(cat([c.score[h], write], 0), error[h], z.low)
    o[0, :, z.lanes(h, z.V)] = (asked[h] + out[:C]).astype(o.dtype)
    state[h] = c.read[h][C - 1 :] * state[h] + out[C:]

  @pl.when(n == z.N - 1)
  def _():
    last[0] = state[...]


@functools.partial(jax.jit, static_argnames=('z', 'keep'))
def _run_forward(z, q, k, v, beta, g, state, keep):
  blocks = tpu.Blocks(z)
  gates = cat([tpu.to_rows(g, z), tpu.to_rows(beta, z)], 3)
  keys, values = (blocks.tokens(n) for n in (z.keys * z.K, z.heads * z.V))
  states = blocks.states(z.K, z.V)
  shape = jax.ShapeDtypeStruct
  outputs = [(shape(tpu.flat(v).shape, v.dtype), values)]
  outputs.append((shape(state.shape, F32), states))
  if keep:
    of_chunks = z.B, z.N, z.J * z.G
    for matrix in ((z.K, z.V), (C, C)):
      outputs.append(
        (shape((*of_chunks, *matrix), F32), blocks.chunks(*matrix))
      )
  o, last, *kept = tpu.call(
    functools.partial(_forward_kernel, z=z),
    'delta_rule_forward',
    z,
    [
      (tpu.flat(q), keys),
      (tpu.flat(k), keys),
      (tpu.flat(v), values),
      (gates, blocks.rows(2 * z.heads)),
      (state, states),
    ],
    outputs,
    (z.K, z.V),
  )
  return o.reshape(v.shape), last, kept


# ---------------------------------------------------------------- backward


def _backward_kernel(*refs, z):
  """Chunks from last to first; d_state is E."""
  (q, k, v, gates, entries, inverted, d_o_ref, d_last) = refs[:8]
  d_q, d_k, d_v, d_gates, d_first, d_state = refs[8:]
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    d_state[...] = d_last[0]

  c = _within(q, k, gates, z)
  heads = range(z.heads)
  inverse = [inverted[0, 0, h] for h in heads]
  entry = [entries[0, 0, h] for h in heads]
  d_o = [d_o_ref[0, :, z.lanes(h, z.V)] for h in heads]
  error, known, asked = _errors(c, inverse, v, entry, z)
  reach, from_exit, d_rest = _rest_gradients(c, inverse, d_o, d_state, z)
  for h in heads:
    d_v[0, :, z.lanes(h, z.V)] = d_rest[h].astype(d_v.dtype)
  d_kk, d_qk, d_kT, d_beta = _score_gradients(c, error, d_o, d_rest, d_state, z)
  _key_gradients(c, entry, d_o, d_rest, d_kk, d_qk, d_kT, d_q, d_k, z)
  d_g = _gate_gradients(
    c, v, entry, known, asked, reach, from_exit, d_o, d_state, z
  )
  for h in heads:
    d_gates[0, 0, 0, h : h + 1, :] = d_g[h]
    d_gates[0, 0, 0, z.heads + h : z.heads + h + 1, :] = d_beta[h]
  _state_gradients(c, gates, d_o, d_rest, d_state, z)

  @pl.when(n == z.N - 1)
  def _():
    d_first[0] = d_state[...]


def _rest_gradients(c, inverse, d_o, d_state, z):
  """Y, R and dr."""
  heads = range(z.heads)
  reach = [dot_parts(c.score[h], inverse[h], z.low) for h in heads]
  reach_T = [y.T.astype(z.low) for y in reach]
  onto = [inverse[h].T * (c.decay[h][C - 1 :] * c.beta[h]) for h in heads]
  exits = [
    dot_parts(c.rows[j][:C], e, z.low)
    for j, e in enumerate(side_by_side(d_state, z))
  ]
  own = [exits[h // z.G][:, z.lanes(h % z.G, z.V)] for h in heads]
  from_exit = [dot_parts(onto[h], own[h], z.low) for h in heads]
  return (
    reach,
    from_exit,
    [from_exit[h] + dot(reach_T[h], d_o[h]) for h in heads],
  )


def _score_gradients(c, error, d_o, d_rest, d_state, z):
  """Of k k^T and q k^T, of k as written to the exit state [K,C], each summed
  over a group; and of beta."""
  lower, strict = tpu_decay.lower(), tpu_decay.lower(strict=True)
  d_kk, d_qk, d_kT = ([0.0] * z.keys for _ in range(3))
  d_beta = []
  # terms of d_beta that nearly cancel, of d_rest's and d_state's parts each
  pairs = lambda a, w: dot_parts(a, w, z.low, (1, 1))
  written = [pairs(d_state[h], error[h]) for h in range(z.heads)]
  for h in range(z.heads):
    j = h // z.G
    d_link = pairs(-d_rest[h], error[h]) * c.decay[h]
    d_link = jnp.where(strict, d_link, 0.0)
    d_score = jnp.where(lower, pairs(d_o[h], error[h]) * c.decay[h], 0.0)
    d_write = written[h] * c.decay[h][C - 1 :]
    d_beta.append(
      jnp.sum(d_link * c.kk[j] + d_score * c.qk[j], 0, keepdims=True)
      + jnp.sum(d_write * c.kT[j], 0, keepdims=True)
    )
    d_kk[j] += d_link * c.beta[h]
    d_qk[j] += d_score * c.beta[h]
    d_kT[j] += d_write * c.beta[h]
  return d_kk, d_qk, d_kT, d_beta


def _key_gradients(c, entry, d_o, d_rest, d_kk, d_qk, d_kT, d_q, d_k, z):
  low = lambda x: x.astype(z.low)
  for j, state in enumerate(side_by_side(entry, z)):
    k, q = c.rows[j][:C], c.rows[j][C:]
    group = z.group(j)
    asked = cat([low(c.read[h] * d_o[h].astype(F32)) for h in group], 1)
    known = cat([low(-c.read[h] * d_rest[h]) for h in group], 1)
    # the sum over the group is in the product
    onto = dot(cat([asked, known], 0), low(state), (1, 1))
    meet = cat([d_qk[j].T, d_kk[j] + d_kk[j].T], 1)
    of_q = onto[:C] + dot_parts(d_qk[j], k, z.low)
    of_k = onto[C:] + d_kT[j].T + dot_parts(meet, cat([q, k], 0), z.low)
    d_q[0, :, z.lanes(j, z.K)] = of_q.astype(d_q.dtype)
    d_k[0, :, z.lanes(j, z.K)] = of_k.astype(d_k.dtype)


def _gate_gradients(
  c, v_ref, entry, known, asked, reach, from_exit, d_o, d_state, z
):
  """dg_t, rows [1,C]."""
  strict = tpu_decay.lower(strict=True)
  out = []
  for h in range(z.heads):
    v = v_ref[0, :, z.lanes(h, z.V)]
    # raw writes and the entry state in outputs, what was erased taken off
    pairs = jnp.where(strict, reach[h] * dot(d_o[h], v, (1, 1)), 0.0)
    left = asked[h] - dot_parts(reach[h], known[h], z.low)
    through = c.read[h][C - 1 :] * jnp.sum(
      d_state[h] * entry[h], 0, keepdims=True
    ) - jnp.sum(from_exit[h] * known[h], 0, keepdims=True)
    from_entry, to_exit = (
      d_o[h].astype(F32) * left,
      v.astype(F32) * from_exit[h],
    )
    out.append(tpu_decay.sum_spans(pairs, from_entry, to_exit, through, z))
  return out


def _state_gradients(c, gate_ref, d_o, d_rest, d_state, z):
  """E of the chunk before."""
  read = tpu_decay.read_rows(gate_ref[0, 0, 0, : z.heads, :], z)
  qT = [rows[C:].astype(F32).T for rows in c.rows]
  for h in range(z.heads):
    row = read[h : h + 1]
    onto = cat([qT[h // z.G] * row, -c.kT[h // z.G] * row], 1).astype(z.low)
    both = cat([d_o[h], d_rest[h].astype(z.low)], 0)
    d_state[h] = c.read[h][C - 1 :] * d_state[h] + dot(onto, both)


@functools.partial(jax.jit, static_argnames='z')
def _run_backward(z, q, k, v, beta, g, kept, d_o, d_last):
  blocks = tpu.Blocks(z, reverse=True)
  gates = cat([tpu.to_rows(g, z), tpu.to_rows(beta, z)], 3)
  keys, values = (blocks.tokens(n) for n in (z.keys * z.K, z.heads * z.V))
  states, rows = blocks.states(z.K, z.V), blocks.rows(2 * z.heads)
  shape = jax.ShapeDtypeStruct
  like = lambda x: shape(x.shape, x.dtype)
  q_flat, k_flat, v_flat = (tpu.flat(x) for x in (q, k, v))
  d_q, d_k, d_v, d_gates, d_first = tpu.call(
    functools.partial(_backward_kernel, z=z),
    'delta_rule_backward',
    z,
    [
      (q_flat, keys),
      (k_flat, keys),
      (v_flat, values),
      (gates, rows),
      (kept[0], blocks.chunks(z.K, z.V)),
      (kept[1], blocks.chunks(C, C)),
      (tpu.flat(d_o.astype(z.low)), values),
      (d_last, states),
    ],
    [
      (like(q_flat), keys),
      (like(k_flat), keys),
      (like(v_flat), values),
      (like(gates), rows),
      (like(d_last), states),
    ],
    (z.K, z.V),
  )
  d_g, d_beta = (tpu.from_rows(x, z) for x in jnp.split(d_gates, 2, axis=3))
  shaped = (
    d.reshape(x.shape) for d, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)
  )
  return *shaped, d_beta.astype(beta.dtype), d_g, d_first


PASSES = tpu_rule.Passes(_run_forward, _run_backward)
FORMS = {'kernel': run}
covers = tpu_rule.covers
