"""Kimi Delta Attention: the delta rule with a decay for every key channel.

    S'  = diag(e^{g_t}) S_{t-1}
    S_t = S' + k_t (w_t * v_t - S'^T (b_t * k_t))^T
    o_t = S_t^T q_t

arXiv:2510.26692 eq. 1 with erase and write gates b = w = beta; apart, they
make Gated DeltaNet-2 (arXiv:2605.22791). All forms take

  q, k [B,T,J,K]   v [B,T,H,V]   beta [B,T,H] or [B,T,H,V]: w above
  g [B,T,H,K], g <= 0, any size

with H a multiple of J (value head h reads key head h // (H/J)), and
keyword-only

  erase [B,T,H,K]: b above; None: beta, which then is [B,T,H]
  state [B,H,K,V]: before the first token, zeros if None
  segment_ids [B,T] int: the state is zero again wherever they change
  chunk: tokens of a chunk, 16 * 2^n (associative and chunked)

and return o [B,T,H,V] in v's type and the last state in float32. Nothing is
scaled or normalised here. ValueError where heads, chunk, gates or state do
not fit. Decay, inverse and state are float32; matmul operands have q's type.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops import scan
from deltanet_jax.ops.scan import BLOCK, F32, matmul, repeat_heads


def step(q, k, v, beta, g, erase, state):
  """One token: the arguments above without T, `erase` may be None."""
  G = v.shape[1] // q.shape[1]
  q, k = (jnp.repeat(x.astype(F32), G, axis=1) for x in (q, k))
  write, erased = _gates(k, v, beta, erase)
  state = jnp.exp(g.astype(F32))[..., None] * state
  write = write - matmul('bhk,bhkv->bhv', erased, state)
  state = state + k[..., :, None] * write[..., None, :]
  return matmul('bhk,bhkv->bhv', q, state).astype(v.dtype), state


def recurrent(q, k, v, beta, g, *, erase=None, state=None, segment_ids=None):
  """Token by token: the definition."""
  state = _start(q, k, v, beta, g, erase, state, segment_ids)
  return scan.token_scan(step, (q, k, v, beta, g, erase), state, segment_ids)


def associative(
  q, k, v, beta, g, *, erase=None, state=None, segment_ids=None, chunk=64
):
  """Chunks as affine maps of the state, composed by lax.associative_scan."""
  state = _start(q, k, v, beta, g, erase, state, segment_ids)
  o, state = scan.all_chunks(
    _forward_associative, (q, k, v, beta, g, erase), state, segment_ids, chunk
  )
  return o.astype(v.dtype), state


def chunked(
  q,
  k,
  v,
  beta,
  g,
  *,
  erase=None,
  state=None,
  segment_ids=None,
  chunk=64,
  group=4,
):
  """lax.scan over chunks, all else in parallel over `group` chunks at once."""
  state = _start(q, k, v, beta, g, erase, state, segment_ids)
  o, state = scan.chunked(
    scan.Rule(_forward),
    (q, k, v, beta, g, erase),
    state,
    segment_ids,
    chunk,
    group,
  )
  return o.astype(v.dtype), state


def _start(q, k, v, beta, g, erase, state, segment_ids):
  """The entry state; ValueError where the arguments do not fit."""
  state = scan.initial_state(q, k, v, state, segment_ids)
  keys = (*v.shape[:3], q.shape[3])
  scan.fits('g', g, keys)
  scan.fits('erase', erase, keys)
  if erase is None:
    scan.fits('beta without erase', beta, v.shape[:3])
  else:
    scan.fits('beta', beta, v.shape[:3], v.shape)
  return state


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
  between; inverse: (I + lower (b k)_i'k_j, decayed)^-1; raw: w * v.
  """

  read_q: jax.Array
  read_a: jax.Array
  write_k: jax.Array
  carry: jax.Array
  scores: jax.Array
  inverse: jax.Array
  raw: jax.Array


def _within(q, k, v, beta, g, erase, masks):
  G = v.shape[2] // q.shape[2]
  dtype = q.dtype
  q, k = (repeat_heads(x, G).astype(F32) for x in (q, k))
  raw, a = _gates(k, v, beta, erase)
  C = g.shape[-2]
  blocks = (*g.shape[:-2], C // BLOCK, BLOCK, g.shape[-1])
  g = g.astype(F32).reshape(blocks)  # [M,B,H,N,16,K]
  lower, strict = _triangles(BLOCK)
  from_start = matmul('is,...nsk->...nik', lower, g)
  to_end = matmul('js,...nsk->...njk', strict.T, g)
  total = from_start[..., -1, :]
  before = matmul('nm,...mk->...nk', _triangles(C // BLOCK)[1], total)
  after = matmul('nm,...mk->...nk', _triangles(C // BLOCK)[1].T, total)
  flat = lambda x: x.reshape(*x.shape[:-3], C, x.shape[-1])
  read = flat(jnp.exp(before[..., None, :] + from_start))
  write = flat(jnp.exp(to_end + after[..., None, :]))
  carry = read[..., -1, :]
  scores, links = _scores(q, a, k, g, from_start, to_end, total, dtype)
  if masks.pair is not None:
    scores = jnp.where(masks.pair, scores, 0)
    links = jnp.where(masks.pair, links, 0)
    read = jnp.where(masks.enters[..., None], read, 0)
    write = jnp.where(masks.leaves[..., None], write, 0)
    carry = jnp.where(masks.enters[..., -1:], carry, 0)
  return _Chunk(
    read_q=(read * q).astype(dtype),
    read_a=(read * a).astype(dtype),
    write_k=(write * k).astype(dtype),
    carry=carry,
    scores=scores.astype(dtype),
    inverse=scan.unit_lower_inverse(links).astype(dtype),
    raw=raw,
  )


def _triangles(size):
  """Lower triangle of ones, with and without its diagonal."""
  lower = scan.triangle(size)
  return lower, lower - jnp.eye(size)


def _scores(q, a, k, g, from_start, to_end, total, dtype):
  """sum_c x_ic k_jc e^{g_{j+1,c} + .. + g_{i,c}} for x = q (j <= i) and a
  (j < i): two arrays [...,C,C].

  The decay differs by channel, so it cannot multiply a finished product. Rows
  go in blocks of 16. Keys of earlier blocks are decayed to the start of the
  row block and rows from there on: no exponent is ever above 0, whatever g,
  where exp(g_i) exp(-g_j) would overflow. Inside a block the decay of every
  pair is formed, each exponent the plain sum of the g it spans.
  """
  N = g.shape[-3]
  split = lambda x: x.reshape(g.shape)
  rows = jnp.stack([split(q), split(a)], -3)  # [M,B,H,N,2,16,K]
  k = split(k)
  lower, strict = _triangles(BLOCK)
  span = matmul('is,...sjk->...ijk', lower, strict[..., None] * g[..., None, :])
  seen = jnp.where(lower[..., None] > 0, jnp.exp(span), 0) * k[..., None, :, :]
  diagonal = jnp.einsum(
    '...xik,...ijk->...xij', rows, seen, precision='highest'
  )
  low = lambda x: x.astype(dtype)
  bands = []
  for n in range(N):
    band = [diagonal[..., n, :, :, :]]
    if n:
      gap = matmul('jm,...mk->...jk', _triangles(n)[1].T, total[..., :n, :])
      keys = jnp.exp(to_end[..., :n, :, :] + gap[..., None, :])
      keys = low(keys * k[..., :n, :, :])
      keys = keys.reshape(*keys.shape[:-3], n * BLOCK, keys.shape[-1])
      read = jnp.exp(from_start[..., n, None, :, :]) * rows[..., n, :, :, :]
      band.insert(0, matmul('...xik,...jk->...xij', low(read), keys))
    if n < N - 1:
      band.append(jnp.zeros((*band[0].shape[:-1], (N - n - 1) * BLOCK)))
    bands.append(jnp.concatenate(band, -1))
  both = jnp.concatenate(bands, -2)  # [M,B,H,2,C,C]
  return both[..., 0, :, :], jnp.tril(both[..., 1, :, :], -1)


def _forward_associative(inputs, masks, state):
  c = _within(*inputs, masks)
  low = lambda x: x.astype(c.read_q.dtype)
  erase = matmul('...ts,...sk->...tk', c.inverse, c.read_a)
  fresh = matmul('...ts,...sv->...tv', c.inverse, low(c.raw))
  onto_exit = lambda x: matmul('...tk,...tx->...kx', c.write_k, low(x))
  entry, last = scan.affine_scan(
    jnp.eye(c.carry.shape[-1]) * c.carry[..., None] - onto_exit(erase),
    onto_exit(fresh),
    state,
    lambda a, x: matmul('...kl,...lx->...kx', a, x),
  )
  write = fresh - matmul('...tk,...kv->...tv', low(erase), low(entry))
  return _read(c, write, entry), last


def _forward(inputs, masks, state):
  c = _within(*inputs, masks)
  low = lambda x: x.astype(c.read_q.dtype)

  def body(state, c):
    known = matmul('bhtk,bhkv->bhtv', c.read_a, low(state))
    write = matmul('bhts,bhsv->bhtv', c.inverse, low(c.raw - known))
    exit_state = c.carry[..., None] * state + matmul(
      'bhtk,bhtv->bhkv', c.write_k, low(write)
    )
    return exit_state, (state, write)

  last, (entry, write) = jax.lax.scan(body, state, c)
  return _read(c, write, entry), last


def _read(c, write, entry):
  low = lambda x: x.astype(c.read_q.dtype)
  o = matmul('...tk,...kv->...tv', c.read_q, low(entry))
  return o + matmul('...ts,...sv->...tv', c.scores, low(write))


FORMS = {
  'recurrent': recurrent,
  'associative': associative,
  'chunked': chunked,
}
