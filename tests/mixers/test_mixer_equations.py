"""Each mixer against its equations, token by token in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config import mixers
from deltanet_jax.mixers.base import Context

pytestmark = pytest.mark.usefixtures('quick_compile')

T, D, DEPTH = 7, 12, 0.25
sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
softplus = lambda x: np.log1p(np.exp(x))


def _rms(x, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def _l2(x):
  return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6)


def _conv(x, taps):
  """x [T,H,K], the last tap on the current token."""
  W = len(taps)
  past = np.concatenate([np.zeros((W - 1, *x.shape[1:])), x])
  return sum(taps[i] * past[i : i + len(x)] for i in range(W))


def _map(p, name, x):
  """x times the weight, its first axis summed: [T, ...]."""
  return np.tensordot(x, p[name]['w'], 1)


def _qkv(p, x, act):
  for name in 'qkv':
    y = _map(p, name, x)
    if f'{name}_conv' in p:
      y = _conv(y, p[f'{name}_conv']['taps'])
    yield act(y)


def _delta(q, k, v, write, decay, erase):
  """S' = e^g S;  S = S' + k (write v - S'^T (erase k))^T;  o = S^T q, per head.

  q, k, erase [T,H,K]   v, write [T,H,V]   decay [T,H,K]: e^g
  """
  o = np.zeros_like(v)
  for h in range(v.shape[1]):
    S = np.zeros((q.shape[2], v.shape[2]))
    for t in range(len(q)):
      S = decay[t, h][:, None] * S
      u = write[t, h] * v[t, h] - S.T @ (erase[t, h] * k[t, h])
      S = S + np.outer(k[t, h], u)
      o[t, h] = S.T @ q[t, h]
  return o


def _out(p, o):
  return np.tensordot(o, p['o']['w'], 2)


def gated_deltanet(c, p, x):
  q, k, v = _qkv(p, x, silu)
  G = c.value_heads // c.key_heads
  q, k = (np.repeat(_l2(y), G, axis=1) for y in (q, k))
  beta = sigmoid(_map(p, 'b', x)) * (2 if c.negative_eigenvalues else 1)
  g = -np.exp(p['A_log']) * softplus(_map(p, 'a', x) + p['dt_bias'])
  ones = np.ones_like(q)
  o = _delta(
    q / np.sqrt(c.key_dim),
    k,
    v,
    beta[..., None] * np.ones_like(v),
    np.exp(g)[..., None] * ones,
    beta[..., None] * ones,
  )
  z = silu(_map(p, 'gate', x))
  return _out(p, _rms(o, c.norm_eps) * p['norm']['scale'] * z)


def delta_net(c, p, x):
  q, k, v = _qkv(p, x, silu)
  beta = sigmoid(_map(p, 'b', x))[..., None]
  beta = beta * (2 if c.negative_eigenvalues else 1)
  o = _delta(
    _l2(q) / np.sqrt(c.key_dim),
    _l2(k),
    v,
    beta * np.ones_like(v),
    np.ones_like(q),
    beta * np.ones_like(q),
  )
  return _out(p, _rms(o, c.norm_eps) * p['norm']['scale'])


def kda(c, p, x):
  q, k, v = _qkv(p, x, silu)
  f = _map(p, 'f_b', _map(p, 'f_a', x)) + p['dt_bias']
  A = np.exp(p['A_log'])[:, None]
  if c.lower_bound is None:
    g = -A * softplus(f)
  else:
    g = c.lower_bound * sigmoid(A * f)
  if c.separate_gates:
    write, erase = (sigmoid(_map(p, n, x)) for n in ('write', 'erase'))
  else:
    beta = sigmoid(_map(p, 'b', x))[..., None]
    write, erase = beta * np.ones_like(v), beta * np.ones_like(q)
  o = _delta(_l2(q) / np.sqrt(c.key_dim), _l2(k), v, write, np.exp(g), erase)
  z = sigmoid(_map(p, 'gate_b', _map(p, 'gate_a', x)))
  return _out(p, _rms(o, c.norm_eps) * p['norm']['scale'] * z)


def _linear(q, k, v, decay):
  o = np.zeros_like(v)
  for h in range(v.shape[1]):
    S = np.zeros((q.shape[2], v.shape[2]))
    for t in range(len(q)):
      S = decay[h] * S + np.outer(k[t, h], v[t, h])
      o[t, h] = S.T @ q[t, h]
  return o


def lightning(c, p, x):
  q, k, v = _qkv(p, x, silu)
  H = c.heads
  slope = 2.0 ** (-8 * np.arange(1, H + 1) / H) * (1 - DEPTH + 1e-5)
  o = _linear(q, k, v, np.exp(-slope)).reshape(T, -1)
  z = sigmoid(_map(p, 'gate', x)).reshape(T, -1)
  o = _rms(o, c.norm_eps) * p['norm']['scale'] * z
  return _out(p, o.reshape(v.shape))


def linear_attention(c, p, x):
  q, k, v = _qkv(p, x, lambda y: y)
  q, k = (np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))) for y in (q, k))
  keep = np.ones(c.heads)
  z = _linear(q, k, np.ones_like(v), keep)
  return _out(p, _linear(q, k, v, keep) / z)


def attention(c, p, x):
  q, k, v = _qkv(p, x, lambda y: y)
  if c.qk_norm:
    q, k = (
      _rms(y, c.norm_eps) * p[name]['scale']
      for y, name in ((q, 'q_norm'), (k, 'k_norm'))
    )
  half = c.rotary_dim // 2
  angle = np.outer(np.arange(T), c.rope_theta ** (-np.arange(half) / half))
  turn = np.exp(1j * angle)[:, None]
  for y in (q, k):
    turned = (y[..., :half] + 1j * y[..., half : 2 * half]) * turn
    y[..., : 2 * half] = np.concatenate([turned.real, turned.imag], -1)
  k, v = (np.repeat(y, c.heads // c.kv_heads, axis=1) for y in (k, v))
  o = np.zeros_like(q)
  for h in range(c.heads):
    for t in range(T):
      first = max(0, t + 1 - (c.window or T))
      score = k[first : t + 1, h] @ q[t, h] / np.sqrt(c.head_dim)
      weight = np.exp(score - score.max())
      o[t, h] = weight @ v[first : t + 1, h] / weight.sum()
  if c.gate:
    o = o * sigmoid(_map(p, 'gate', x))
  return _out(p, o)


@pytest.mark.parametrize(
  'cfg, equations',
  [
    (
      mixers.AttentionConfig(4, 2, 6, None, 4, qk_norm=True, gate=True),
      attention,
    ),
    (mixers.AttentionConfig(4, 1, 6, window=3, rotary_dim=6), attention),
    (mixers.LinearAttentionConfig(2, 4, 6), linear_attention),
    (mixers.LightningConfig(4, 6), lightning),
    (mixers.DeltaNetConfig(2, 4, 6), delta_net),
    (mixers.GatedDeltaNetConfig(2, 4, 4, 6, 4, True), gated_deltanet),
    (mixers.KDAConfig(2, 4, 6, gate_rank=3), kda),
    (mixers.KDAConfig(2, 4, 6, lower_bound=-5.0, separate_gates=True), kda),
  ],
  ids=lambda value: getattr(value, '__name__', ''),
)
def test_mixer_computes_its_equations(cfg, equations):
  rng = np.random.default_rng(0)
  module = cfg.make(d_model=D)
  x = rng.standard_normal((2, T, D))
  count = jnp.broadcast_to(jnp.arange(T), (2, T))
  ctx = Context(count, None, jnp.float32(DEPTH))
  shapes = nn.unbox(
    jax.eval_shape(
      lambda: module.init(jax.random.key(0), jnp.float32(x), ctx)['params']
    )
  )
  params = jax.tree.map(
    lambda leaf: 0.5 * rng.standard_normal(leaf.shape), shapes
  )
  low = jax.tree.map(jnp.float32, params)
  got, _ = jax.jit(module.apply)({'params': low}, jnp.float32(x), ctx)
  for row in range(2):
    want = equations(cfg, params, x[row])
    np.testing.assert_allclose(
      got[row], want, rtol=0, atol=2e-5 * max(1, np.abs(want).max())
    )
