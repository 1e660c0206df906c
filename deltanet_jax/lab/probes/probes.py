"""Tests what the state of each recurrence can store, without training.

Keys and values are random, weights are set by hand, recurrences are those of
`deltanet_jax.ops`. `lab/study` tests trained models.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.config import mixers
from deltanet_jax.data.tasks import tracking
from deltanet_jax.ops import attention, delta_rule, kda, linear_attention

D = 16  # key and value width
DRAWS = 128
WRITES = 64
BINDINGS = (1, 2, 4, 8)
PAIRS = (D // 2, D, 2 * D, 4 * D)
BETAS = (0.5, 1.0, 1.5, 2.0)
BITS = 4096
SWAPS = 2000
SHARP = 64.0  # scale of the softmax: a key with cosine 0.9 has weight e^-6


class ProbeResult(NamedTuple):
  """The value of quantity `what`, of a recurrence `rule` at size `at`."""

  probe: str
  rule: str
  at: float
  what: str
  value: float


def run_probes(form='recurrent', show=lambda name: None):
  """Results of all probes.   form: of `FORMS`   show: called with each name"""
  results = []
  memories = _memories(form)
  for name, probe, *given in (
    ('rebinding', probe_rebinding, memories),
    ('overload', probe_overload, memories),
    ('exact keys', probe_geometry, memories),
    ('parity', probe_parity, form),
    ('permutations', probe_permutations, form),
    ('special cases', probe_special_cases, form),
    ('cache', probe_cache),
  ):
    show(name)
    results += probe(*given)
  return results


def _memories(form):
  """{rule: jitted (k [B,S,D], v [B,S,D], writes [B,S], q [B,R,D]) -> [B,R,D]}

  Writes the pairs where `writes` is 1, then reads at q. Reads are further
  tokens with key, value, beta and decay 0.
  """
  linear = linear_attention.FORMS[form]
  delta, channels = delta_rule.FORMS[form], kda.FORMS[form]
  log = lambda x, like: jnp.log(jnp.float32(x)) * like
  # a decay per channel, none stronger than the 1% of Gated DeltaNet
  spread = jnp.log(jnp.linspace(0.99, 1, D))

  def softmax(q, k, v, w, slope=0.0):
    T = k.shape[1]
    seen = jnp.tril(jnp.ones((T, T), bool)) & (w[:, None, :, 0] > 0)
    # one more channel, whose score grows with the position of the key
    late = jnp.broadcast_to(jnp.arange(T)[:, None, None], (*k.shape[:3], 1))
    k = jnp.concatenate([k, slope / SHARP * late], -1)
    q = jnp.concatenate([q, jnp.ones_like(q[..., :1])], -1)
    return attention.attention(q, k, v, seen, scale=SHARP)

  rules = {
    'linear': lambda q, k, v, w: linear(q, k, v, None)[0],
    'lightning': lambda q, k, v, w: linear(q, k, v, log(0.95, w))[0],
    'delta': lambda q, k, v, w: delta(q, k, v, w, None)[0],
    'gdn': lambda q, k, v, w: delta(q, k, v, w, log(0.99, w))[0],
    'kda': lambda q, k, v, w: channels(q, k, v, w, w[..., None] * spread)[0],
    'softmax': softmax,
    'softmax, recent first': lambda *x: softmax(*x, slope=0.5),
  }

  def memory(rule):
    def recall(k, v, writes, q):
      S, R = k.shape[1], q.shape[1]
      w = jnp.pad(writes, [(0, 0), (0, R)])[..., None]  # [B,T,1]
      pad = lambda x, before, after: jnp.pad(
        x, [(0, 0), (before, after), (0, 0)]
      )
      k, v = (w * pad(x, 0, R) for x in (k, v))
      heads = lambda x: x[:, :, None]
      return rule(heads(pad(q, S, 0)), heads(k), heads(v), w)[:, S:, 0]

    return jax.jit(recall)

  return {name: memory(rule) for name, rule in rules.items()}


def probe_rebinding(memories):
  """Accuracy of the newest value of 4 keys that get m values in turn."""
  draw = np.random.default_rng(0)
  m = np.repeat(BINDINGS, DRAWS)
  B, keys, rounds = len(m), 4, max(BINDINGS)
  k = _units(draw, B, keys)
  pair = np.argsort(draw.random((B, rounds, keys)), -1)
  latest = np.argsort(pair, -1)[np.arange(B), m - 1] + keys * (m - 1)[:, None]
  pair = pair.reshape(B, -1)
  writes = np.arange(WRITES) < keys * m[:, None]
  v = _units(draw, B, WRITES)
  k_written = np.take_along_axis(k, pair[..., None], 1)
  results = []
  for name, memory in memories.items():
    o = memory(_fill(k_written), v, writes.astype('f'), _fill(k))
    right = _nearest(o, v, writes)[:, :keys] == latest
    results += [
      ProbeResult('rebinding', name, n, 'accuracy', right[m == n].mean())
      for n in BINDINGS
    ]
  return results


def probe_overload(memories):
  """Accuracy of n random pairs, and of their first and last quarter. A read is
  right if its value is the nearest of the n."""
  draw = np.random.default_rng(1)
  n = np.repeat(PAIRS, DRAWS)
  k, v = _units(draw, len(n), WRITES), _units(draw, len(n), WRITES)
  writes = np.arange(WRITES) < n[:, None]
  results = []
  for name, memory in memories.items():
    if name == 'softmax, recent first':
      continue  # only for keys that repeat
    o = memory(k, v, writes.astype('f'), k)
    right = _nearest(o, v, writes) == np.arange(WRITES)
    for size in PAIRS:
      rows = right[n == size][:, :size]
      for what, part in {
        'accuracy': rows,
        'first quarter': rows[:, : size // 4],
        'last quarter': rows[:, -(size // 4) :],
      }.items():
        results.append(ProbeResult('overload', name, size, what, part.mean()))
  return results


def probe_geometry(memories):
  """|read - written| / |written| of D orthonormal keys, and of D / 2 keys with
  pairwise cosine 1/2."""
  draw = np.random.default_rng(2)
  B = DRAWS * len(PAIRS)  # as above, so that nothing compiles again
  v = _units(draw, B, WRITES)
  square = np.linalg.qr(draw.standard_normal((B, D, D)))[0].astype('f')
  shared = (square[:, :1] + square[:, 1 : D // 2 + 1]) * np.float32(0.5**0.5)
  results = []
  for probe, k in (('orthonormal keys', square), ('cosine 1/2', shared)):
    n = k.shape[1]
    writes = np.broadcast_to(np.arange(WRITES) < n, (B, WRITES)).astype('f')
    for name in ('linear', 'delta'):
      o = np.asarray(memories[name](_fill(k), v, writes, _fill(k)))
      apart = np.linalg.norm(o[:, :n] - v[:, :n], axis=-1)
      value = apart.max() if probe == 'orthonormal keys' else apart.mean()
      results.append(ProbeResult(probe, name, n, 'relative error', value))
  return results


def _units(draw, *shape):
  x = draw.standard_normal((*shape, D))
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype('f')


def _fill(x):
  """x [B,N,D] padded with zeros to [B,WRITES,D]."""
  return np.pad(x, [(0, 0), (0, WRITES - x.shape[1]), (0, 0)])


def _nearest(o, v, writes):
  """[B,R]: index of the written value with the smallest angle to the read."""
  scores = np.einsum('brv,bsv->brs', o, v)
  return np.where(writes[:, None], scores, -np.inf).argmax(-1)


def _act(form):
  """Jitted (k [B,T,K], beta [B,1], q [K], state [K,V]) -> o [B,T,V]: the
  delta rule with v = 0: products of I - beta k k^T act on `state`.
  """

  def act(k, beta, q, state):
    B, T, K = k.shape
    o, _ = delta_rule.FORMS[form](
      jnp.broadcast_to(q, (B, T, 1, K)),
      k[:, :, None],
      jnp.zeros((B, T, 1, state.shape[1])),
      jnp.broadcast_to(beta[..., None], (B, T, 1)),
      None,
      state=jnp.broadcast_to(state, (B, 1, *state.shape)),
    )
    return o[:, :, 0]

  return jax.jit(act)


def probe_parity(form='recurrent'):
  """Accuracy of the parity so far, read from the sign of a 1 x 1 state.

  k is the bit and v = 0, so a 1 multiplies the state by 1 - beta.
  """
  rows = 8
  bits = np.random.default_rng(4).integers(0, 2, (rows, BITS))
  target = np.cumsum(bits, 1) % 2 == 1
  k = np.tile(bits, (len(BETAS), 1))[..., None].astype('f')
  beta = np.repeat(BETAS, rows)[:, None].astype('f')
  o = _act(form)(k, beta, np.ones(1, 'f'), np.ones((1, 1), 'f'))
  odd = (np.asarray(o)[..., 0] < 0).reshape(len(BETAS), rows, BITS)
  results = []
  for beta, guess in zip(BETAS, odd, strict=True):
    right, rule = guess == target, f'beta {beta:g}'
    for what, part in (
      ('first 64', right[:, :64]),
      ('last quarter', right[:, -BITS // 4 :]),
      ('accuracy', right),
    ):
      results.append(ProbeResult('parity', rule, BITS, what, part.mean()))
  return results


def probe_permutations(form='recurrent'):
  """Accuracy of the places of five objects after products of permutations.

  The state is the permutation matrix, [places, objects]. A swap of places i and
  j is one token with k = (e_i - e_j) / sqrt(2): at beta = 2 it is the
  reflection that exchanges two rows. A permutation of five is a product of at
  most four swaps, so it takes four tokens; one token cannot do it.
  """
  rows, act = 4, _act(form)
  results = []
  draw = np.random.default_rng(5)
  moved = (tracking.PERMUTATIONS != np.arange(5)).sum(-1)
  for probe, moves, steps in (('swaps', 2, 1), ('S5', 5, 4)):
    size = SWAPS // steps
    word = draw.choice(np.flatnonzero(moved <= moves), (rows, size))
    product = np.empty_like(word)
    for t in range(size):
      before = product[:, t - 1] if t else 0  # 0 is the identity
      product[:, t] = tracking.PRODUCTS[before, word[:, t]]
    places = tracking.PERMUTATIONS[product]
    k = _reflections(steps)[word].reshape(rows, SWAPS, 5)
    k = np.tile(k, (len(BETAS), 1, 1))
    beta = np.repeat(BETAS, rows)[:, None].astype('f')
    o = act(k, beta, np.arange(5, dtype='f'), np.eye(5, dtype='f'))
    o = np.asarray(o)[:, steps - 1 :: steps]
    o = o.reshape(len(BETAS), rows, size, 5)
    for beta, read in zip(BETAS, o, strict=True):
      right = (np.rint(read) == places).all(-1)
      late = right[:, -right.shape[1] // 4 :].mean()
      worst = np.abs(read - places).max()
      results += [
        ProbeResult(probe, f'beta {beta:g}', size, 'last quarter', late),
        ProbeResult(probe, f'beta {beta:g}', size, 'largest error', worst),
      ]
  return results


def _reflections(steps):
  """float32 [120,steps,5]: the keys of the swaps that make each permutation,
  padded with zeros; all zero if it takes more than `steps`."""
  table = np.zeros((120, steps, 5), 'f')
  for p, places in enumerate(tracking.PERMUTATIONS):
    order = np.argsort(places)  # the object at each place
    now, swaps = list(range(5)), []
    for place in range(5):
      if now[place] != order[place]:
        other = now.index(order[place])
        now[place], now[other] = now[other], now[place]
        swaps.append((place, other))
    if len(swaps) <= steps:
      for step, (i, j) in enumerate(swaps):
        table[p, step, i], table[p, step, j] = 0.5**0.5, -(0.5**0.5)
  return table


def probe_special_cases(form='recurrent'):
  """Largest relative difference of recurrences that are equal in theory."""
  draw = np.random.default_rng(3)
  B, T, H = 2, 100, 2
  q, k, v = (_units(draw, B, T, H) for _ in range(3))
  beta = 2 * draw.random((B, T, H)).astype('f')
  g = -draw.exponential(0.3, (B, T, H)).astype('f')
  # without and with decay in one batch
  twice = [np.concatenate([x, x]) for x in (q, k, v, beta)]
  both = np.concatenate([0 * g, g])
  wide = np.broadcast_to(both[..., None], (2 * B, T, H, D))
  plain = jax.jit(delta_rule.FORMS[form])(q, k, v, beta, None)
  gated = jax.jit(delta_rule.FORMS[form])(*twice, both)
  channels = jax.jit(kda.FORMS[form])(*twice, wide)
  without_decay, with_decay = (lambda x: x[:B]), (lambda x: x[B:])
  results = []
  for name, what, ours, like in (
    ('KDA, no decay', 'from delta', map(without_decay, channels), plain),
    ('KDA, one decay', 'from GDN', map(with_decay, channels),
     map(with_decay, gated)),
    ('GDN, no decay', 'from delta', map(without_decay, gated), plain),
  ):  # fmt: skip
    apart = max(
      float(jnp.abs(x - y).max() / jnp.abs(y).max())
      for x, y in zip(ours, like, strict=True)
    )
    results.append(
      ProbeResult('special cases', name, T, f'apart {what}', apart)
    )
  return results


def probe_cache():
  """Bytes of the cache of a small mixer of each kind, T tokens, float32."""
  results = []
  for cfg in mixers.MixerConfig.__subclasses__():
    tiny = cfg.tiny()
    for T in (64, 128, 256):
      shapes = jax.eval_shape(
        lambda tiny=tiny, T=T: tiny.init_cache(1, T, jnp.float32)
      )
      size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
      name = cfg.__name__.removesuffix('Config')
      results.append(ProbeResult('cache', name, T, 'bytes', size))
  return results
