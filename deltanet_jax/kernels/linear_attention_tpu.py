"""Linear attention on TPUs, without decay or with one per head: one kernel
forward, one backward. Lightning attention and Mamba-2's recurrence are this.

One chunk of C tokens and one value head, S its entry state (`ops/README.md`,
section 2, the case U = V):

    D_ij = e^{g_{j+1} + .. + g_i}, j <= i        G_i = g_1 + .. + g_i
    P   = lower (q k^T * D)
    o   = e^G q S + P v
    S_C = e^{G_C} S + (D_C k)^T v                D_C: the last row of D

Backward, with E the gradient of S_C:

    R  = D_C k E        dv = P^T dO + R        dP = lower (dO v^T * D)
    dq = dP k + e^G dO S^T                     dk = dP^T q + D_C v E^T
    dS = e^{G_C} E + (e^G q)^T dO

and that of g is the sum over pairs of README.md, section 4, with P for Y.

What is kept for it, besides the inputs: entry states in float32, 4 K V bytes a
chunk and value head, at K = V = 128 twice v's bytes in bfloat16.

Nothing is inverted and nothing cancels by construction: with bfloat16 inputs
every operand is rounded once, the state among them, but for the gates and what
their gradient sums. All sums are float32, and with float32 inputs no operand is
rounded.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from deltanet_jax.kernels import tpu, tpu_decay, tpu_rule
from deltanet_jax.kernels.tpu import C, cat, dot
from deltanet_jax.kernels.tpu_decay import side_by_side
from deltanet_jax.ops import scan
from deltanet_jax.ops.linear_attention import DESCRIPTION
from deltanet_jax.ops.scan import F32


def run(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None,
  *,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk: int = C,
) -> scan.Result:
  """`ops.linear_attention.run` by the kernel.

  q, k, v in bfloat16 or all in float32, K to 256, V to 768; chunk is of the
  other forms, the kernel's is 128. First derivatives alone.
  """
  del chunk
  inputs = {'q': q, 'k': k, 'v': v, 'g': g}
  return tpu_rule.run(PASSES, DESCRIPTION, inputs, state, segment_ids)


class _Chunk(NamedTuple):
  """Lists over heads. Of key heads: q, k [C,K], qT, kT [K,C] f32. Of value
  heads: decay D [C,C], read [C,V], e^G in all lanes; score P [C,C]."""

  q: list[jax.Array]
  k: list[jax.Array]
  qT: list[jax.Array]
  kT: list[jax.Array]
  decay: list[jax.Array]
  read: list[jax.Array]
  score: list[jax.Array]

  def write(self, h, z):
    """(D_C k)^T [K,C] of a value head, f32."""
    return self.kT[h // z.G] * self.decay[h][C - 1 :]


def _within(q_ref, k_ref, gate_ref, z):
  of_keys = range(z.keys)
  q, k = ([x[0, :, z.lanes(j, z.K)] for j in of_keys] for x in (q_ref, k_ref))
  qT, kT = ([x.astype(F32).T for x in xs] for xs in (q, k))
  qk = [dot(q[j], k[j], (1, 1)) for j in of_keys]
  decay, read = tpu_decay.decays(gate_ref[0, 0, 0], z)
  score = [
    jnp.where(tpu_decay.lower(), qk[h // z.G] * decay[h], 0.0)
    for h in range(z.heads)
  ]
  return _Chunk(q, k, qT, kT, decay, read, score)


def _asked(c, state, z):
  """e^G q S [C,V] of every value head."""
  seen = [
    dot(c.q[j], s.astype(z.low)) for j, s in enumerate(side_by_side(state, z))
  ]
  return [
    c.read[h] * seen[h // z.G][:, z.lanes(h % z.G, z.V)] for h in range(z.heads)
  ]


# ---------------------------------------------------------------- forward


def _forward_kernel(q, k, v, gates, first, o, last, *rest, z):
  *kept, state = rest
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    state[...] = first[0]

  if kept:
    kept[0][0, 0] = state[...]
  c = _within(q, k, gates, z)
  asked = _asked(c, state, z)
  for h in range(z.heads):
    onto = cat([c.score[h], c.write(h, z)], 0).astype(z.low)
    out = dot(onto, v[0, :, z.lanes(h, z.V)])
    o[0, :, z.lanes(h, z.V)] = (asked[h] + out[:C]).astype(o.dtype)
    state[h] = c.read[h][C - 1 :] * state[h] + out[C:]

  @pl.when(n == z.N - 1)
  def _():
    last[0] = state[...]


def _specs(z, blocks):
  """Of q and k; v; gates; a state."""
  keys, values = (blocks.tokens(n) for n in (z.keys * z.K, z.heads * z.V))
  return keys, values, blocks.rows(z.heads), blocks.states(z.K, z.V)


@functools.partial(jax.jit, static_argnames=('z', 'keep'))
def _run_forward(z, q, k, v, g, state, keep):
  blocks = tpu.Blocks(z)
  keys, values, rows, states = _specs(z, blocks)
  shape = jax.ShapeDtypeStruct
  outputs = [
    (shape(tpu.flat(v).shape, v.dtype), values),
    (shape(state.shape, F32), states),
  ]
  if keep:
    entries = shape((z.B, z.N, z.J * z.G, z.K, z.V), F32)
    outputs.append((entries, blocks.chunks(z.K, z.V)))
  o, last, *kept = tpu.call(
    functools.partial(_forward_kernel, z=z),
    'linear_attention_forward',
    z,
    [
      (tpu.flat(q), keys),
      (tpu.flat(k), keys),
      (tpu.flat(v), values),
      (tpu.to_rows(g, z), rows),
      (state, states),
    ],
    outputs,
    (z.K, z.V),
  )
  return o.reshape(v.shape), last, kept


# ---------------------------------------------------------------- backward


def _backward_kernel(*refs, z):
  """Chunks from last to first; d_state is E."""
  (q, k, v_ref, gates, entries, d_o_ref, d_last) = refs[:7]
  d_q, d_k, d_v, d_gates, d_first, d_state = refs[7:]
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    d_state[...] = d_last[0]

  c = _within(q, k, gates, z)
  heads = range(z.heads)
  low = lambda x: x.astype(z.low)
  entry = [entries[0, 0, h] for h in heads]
  v, d_o = ([x[0, :, z.lanes(h, z.V)] for h in heads] for x in (v_ref, d_o_ref))
  meet = [dot(d_o[h], v[h], (1, 1)) for h in heads]
  to_exit = [dot(low(c.write(h, z).T), low(d_state[h])) for h in heads]
  asked = _asked(c, entry, z)
  for h in heads:
    d_v[0, :, z.lanes(h, z.V)] = (
      dot(low(c.score[h].T), d_o[h]) + to_exit[h]
    ).astype(d_v.dtype)
    strict = tpu_decay.lower(strict=True)
    d_gates[0, 0, 0, h : h + 1, :] = tpu_decay.sum_spans(
      jnp.where(strict, c.score[h] * meet[h], 0.0),
      d_o[h].astype(F32) * asked[h],
      v[h].astype(F32) * to_exit[h],
      c.read[h][C - 1 :] * jnp.sum(d_state[h] * entry[h], 0, keepdims=True),
      z,
    )
  _key_gradients(c, entry, meet, v, d_o, d_state, d_q, d_k, z)
  row = tpu_decay.read_rows(gates[0, 0, 0], z)
  for h in heads:
    onto = dot(low(c.qT[h // z.G] * row[h : h + 1]), d_o[h])
    d_state[h] = c.read[h][C - 1 :] * d_state[h] + onto

  @pl.when(n == z.N - 1)
  def _():
    d_first[0] = d_state[...]


def _key_gradients(c, entry, meet, v, d_o, d_state, d_q, d_k, z):
  low = lambda x: x.astype(z.low)
  for j, state in enumerate(side_by_side(entry, z)):
    group = z.group(j)
    d_qk = sum(meet[h] * c.decay[h] for h in group)
    d_qk = jnp.where(tpu_decay.lower(), d_qk, 0.0)
    # [K,C]: of k as written to the exit state
    written = sum(
      dot(low(d_state[h]), v[h], (1, 1)) * c.decay[h][C - 1 :] for h in group
    )
    asked = cat([low(c.read[h] * d_o[h].astype(F32)) for h in group], 1)
    # the sum over the group is in the product
    of_q = dot(low(d_qk), c.k[j]) + dot(asked, low(state), (1, 1))
    of_k = dot(low(d_qk.T), c.q[j]) + written.T
    d_q[0, :, z.lanes(j, z.K)] = of_q.astype(d_q.dtype)
    d_k[0, :, z.lanes(j, z.K)] = of_k.astype(d_k.dtype)


@functools.partial(jax.jit, static_argnames='z')
def _run_backward(z, q, k, v, g, kept, d_o, d_last):
  blocks = tpu.Blocks(z, reverse=True)
  keys, values, rows, states = _specs(z, blocks)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  q_flat, k_flat, v_flat = (tpu.flat(x) for x in (q, k, v))
  gates = tpu.to_rows(g, z)
  d_q, d_k, d_v, d_gates, d_first = tpu.call(
    functools.partial(_backward_kernel, z=z),
    'linear_attention_backward',
    z,
    [
      (q_flat, keys),
      (k_flat, keys),
      (v_flat, values),
      (gates, rows),
      (kept[0], blocks.chunks(z.K, z.V)),
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
  shaped = (
    d.reshape(x.shape) for d, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)
  )
  return *shaped, tpu.from_rows(d_gates, z), d_first


PASSES = tpu_rule.Passes(_run_forward, _run_backward)
FORMS = {'kernel': run}
covers = tpu_rule.covers
