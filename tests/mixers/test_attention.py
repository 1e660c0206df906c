"""Softmax attention against numpy, with norms per head or over all heads;
attention in blocks against float64."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import flops
from deltanet_jax.config.mixers import AttentionConfig
from deltanet_jax.mixers.base import Context
from deltanet_jax.ops.attention import (
  NO_KEY,
  Place,
  attend,
  attention,
  causal_mask,
)
from tests import float64

B, T, D, H, J, K = 2, 5, 12, 4, 2, 6
CFG = AttentionConfig(heads=H, kv_heads=J, head_dim=K, qk_norm=True)


def _rms(x, axes, scale):
  mean = np.mean(np.square(x), axes, keepdims=True)
  return x / np.sqrt(mean + 1e-6) * scale


@pytest.mark.parametrize('joint', [False, True])
def test_queries_and_keys_are_normed_per_head_or_over_all_heads(joint):
  cfg = dataclasses.replace(CFG, joint_norm=joint)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((B, T, D)).astype(np.float32)
  module, ctx = (
    cfg.make(d_model=D),
    Context(jnp.broadcast_to(jnp.arange(T), (B, T)), None, jnp.float32(0)),
  )
  params = nn.unbox(module.init(jax.random.key(0), x, ctx))['params']
  params = jax.tree.map(
    lambda p: p + 0.3 * rng.standard_normal(p.shape, np.float32), params
  )
  q, k, v = (
    np.einsum('BTD,DHK->BTHK', x, params[n]['w']) for n in ('q', 'k', 'v')
  )
  axes, shape = ((2, 3), (-1, K)) if joint else (3, (K,))
  q = _rms(q, axes, np.reshape(params['q_norm']['scale'], shape))
  k = _rms(k, axes, np.reshape(params['k_norm']['scale'], shape))
  k, v = (np.repeat(y, H // J, axis=2) for y in (k, v))
  scores = np.einsum('BTHK,BSHK->BHTS', q, k) * K**-0.5
  scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  o = np.einsum('BHTS,BSHK->BTHK', p, v)
  want = np.einsum('BTHK,HKD->BTD', o, params['o']['w'])
  got, _ = module.apply({'params': params}, x, ctx)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('V', [3, 9])
def test_values_may_be_narrower_or_wider_than_keys(V):
  rng = np.random.default_rng(0)
  q, k, v = (
    rng.standard_normal((B, T, 1, n)).astype(np.float32) for n in (K, K, V)
  )
  mask = np.tri(T, dtype=bool)[None]
  got = attention(q, k, v, mask, scale=0.4)
  parts = [
    attention(q, k, np.repeat(v[..., i : i + 1], K, -1), mask, scale=0.4)[
      ..., :1
    ]
    for i in range(V)
  ]
  np.testing.assert_allclose(got, np.concatenate(parts, -1), atol=1e-5)


def test_a_joint_norm_without_norm_is_refused():
  with pytest.raises(ValueError, match='joint_norm without qk_norm'):
    dataclasses.replace(CFG, qk_norm=False, joint_norm=True)


BLOCK, SCALE = 8, 0.4


def row(T, kind='plain'):
  """q, k, v, d_o of one kind of input."""
  shapes = (B, T, H, K), (B, T, J, K), (B, T, J, 3), (B, T, H, 3)
  rng = np.random.default_rng(T)
  q, k, v, d_o = (rng.standard_normal(s).astype(np.float32) for s in shapes)
  if kind == 'scores of thousands':
    q, k = 60 * q, 60 * k
  elif kind == 'one key for all':
    k[:] = k[:, :1]
  elif kind == 'one large score':
    k[:, T // 2] *= 300
  elif kind == 'falling scores':  # the first block has the largest
    q, k = abs(q), abs(k) * np.linspace(40, -40, T)[:, None, None]
  elif kind == 'rising scores':
    q, k = abs(q), abs(k) * np.linspace(-40, 40, T)[:, None, None]
  return q, k, v, d_o


def documents(T, ends):
  """[B,T] segments: every `ends`-th token of a row begins a document."""
  if ends is None:
    return None
  t = np.arange(T, dtype=np.int32)
  return jnp.asarray([t // ends, (t + 3) // ends])


def _in_blocks(q, k, v, d_o, ids, window, dtype=jnp.float32):
  place = Place(jnp.arange(q.shape[1]), ids)
  f = lambda *x: attend(
    *x, place, place, scale=SCALE, window=window, ahead=0, block=BLOCK
  )
  return pull(f, q, k, v, d_o, dtype)


def _at_once(q, k, v, d_o, ids, window, dtype=jnp.float32):
  place = Place(jnp.arange(q.shape[1]), ids)
  mask = causal_mask(place, place, window)
  return pull(lambda *x: attention(*x, mask, scale=SCALE), q, k, v, d_o, dtype)


def pull(f, q, k, v, d_o, dtype):
  def run(*args):
    *inputs, d_o = (x.astype(dtype) for x in args)
    o, pull = jax.vjp(f, *inputs)
    return dict(zip('oqkv', (o, *pull(d_o)), strict=True))

  return jax.jit(run)(q, k, v, d_o)


def errors_of(got, inputs, ids, window):
  """Distance to float64 by name, relative to the largest value that inputs of
  this size can give: where one score exceeds all others the gradients of q and
  k vanish, as differences of such values."""
  q, k, v, d_o = inputs
  T = d_o.shape[1]
  place = Place(np.arange(T), ids)
  mask = np.broadcast_to(causal_mask(place, place, window), (B, T, T))
  want = float64.softmax_attention(q, k, v, mask, scale=SCALE, d_o=d_o)
  q, k, v, d_o = (abs(x).max() for x in inputs)
  slope = SCALE * d_o * v
  size = {'o': v, 'q': slope * k, 'k': slope * q, 'v': d_o}
  return {
    name: abs(np.float64(got[name]) - x).max() / size[name]
    for name, x in want.items()
  }


@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize(
  'T, ends, window',
  [
    (1, None, None),
    (BLOCK - 1, 1, None),  # every token sees only itself
    (BLOCK, None, 1),
    (BLOCK + 1, None, None),
    (3 * BLOCK + 3, None, None),
    (3 * BLOCK + 3, 1, None),
    (3 * BLOCK + 3, 5, None),
    (5 * BLOCK, None, BLOCK),
    (5 * BLOCK, 11, BLOCK + 1),
    (5 * BLOCK, None, BLOCK + 2),
  ],
)
def test_in_blocks_it_is_the_softmax_gradients_too(T, ends, window):
  inputs, ids = row(T), documents(T, ends)
  got = _in_blocks(*inputs, ids, window)
  errors = errors_of(got, inputs, ids, window)
  assert max(errors.values()) < 2e-6, errors


@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize(
  'kind',
  [
    'scores of thousands',
    'one key for all',
    'one large score',
    'falling scores',
    'rising scores',
  ],
)
def test_hostile_scores_cost_what_rounding_them_to_float32_does(kind):
  T = 3 * BLOCK + 3
  inputs, ids = row(T, kind), documents(T, 17)
  errors = errors_of(_in_blocks(*inputs, ids, None), inputs, ids, None)
  q, k, *_ = inputs
  largest = SCALE * abs(np.einsum('bthk,bsjk->bhtsj', q, k)).max()
  assert max(errors.values()) < 2e-6 + 2**-24 * largest, errors


@pytest.mark.usefixtures('quick_compile')
def test_half_precision_is_summed_in_float32():
  T = 5 * BLOCK
  exact = row(T)
  inputs = [np.float32(jnp.bfloat16(x)) for x in exact]
  blocks, once = (
    errors_of(f(*inputs, None, None, jnp.bfloat16), inputs, None, None)
    for f in (_in_blocks, _at_once)
  )
  for name, error in blocks.items():
    assert error < 1.5 * once[name] < 2e-2, (name, error, once[name])


@pytest.mark.usefixtures('quick_compile')
def test_documents_of_a_row_move_nothing_in_each_other():
  T = 3 * BLOCK + 3
  q, k, v, d_o = row(T, 'scores of thousands')
  ids = documents(T, 10)
  second = np.asarray(ids) == 1
  got = _in_blocks(q, k, v, d_o * second[:, :, None, None], ids, None)
  for name in 'qkv':
    assert not np.any(np.asarray(got[name])[~second]), name
    assert np.any(np.asarray(got[name])[second]), name


@pytest.mark.usefixtures('quick_compile')
def test_keys_of_a_cache_lie_in_any_order():
  T, S = 2 * BLOCK + 3, 5 * BLOCK + 1
  _, k, v, _ = row(S)
  q = row(T)[0]
  order = np.random.default_rng(0).permutation(S)
  # the last four slots are unwritten
  written = np.where(order < S - 4, order, NO_KEY)
  at, seen = Place(jnp.arange(T) + 15, None), Place(jnp.asarray(written), None)
  for window in (None, 9):
    mask = causal_mask(at, seen, window)
    got = attend(q, k, v, at, seen, scale=SCALE, window=window, block=BLOCK)
    want = attention(q, k, v, mask, scale=SCALE)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.usefixtures('quick_compile')
def test_blocks_of_a_cache_that_no_query_sees_are_not_computed():
  T, S = BLOCK + 3, 5 * BLOCK
  q, (_, k, v, _) = row(T)[0], row(S)
  written = 3 * BLOCK + 1
  t = jnp.arange(S)
  at = Place(written - T + jnp.arange(T), None)
  seen = Place(jnp.where(t < written, t, NO_KEY), None)
  want = attention(q, k, v, causal_mask(at, seen), scale=SCALE)
  k[:, 4 * BLOCK :] = v[:, 4 * BLOCK :] = np.nan
  got = attend(q, k, v, at, seen, scale=SCALE, block=BLOCK)
  np.testing.assert_allclose(got, want, atol=2e-6)


def _shapes(T, heads=2):
  return [jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32)] * 3


def _gradient(window, block=BLOCK):
  def run(q, k, v):
    place = Place(jnp.arange(q.shape[1]), None)
    f = lambda *x: attend(
      *x, place, place, scale=1.0, window=window, ahead=0, block=block
    ).sum()
    return jax.grad(f, (0, 1, 2))(q, k, v)

  return run


def test_blocks_of_which_nothing_is_visible_are_not_computed():
  # 2 products forward, 5 backward, over the visible pairs of blocks alone
  one = 7 * 2 * 2 * BLOCK * BLOCK * 16
  count = lambda N, window: (
    flops.count_operations(_gradient(window), *_shapes(N * BLOCK)) / one
  )
  assert count(6, None) == 6 * 7 / 2
  # a block's first query sees the last key of the block before
  assert count(6, 2) == count(6, BLOCK + 1) == 6 + 5
  assert count(6, 1) == 6
  assert count(6, BLOCK + 2) == 6 + 5 + 4


def test_memory_grows_with_the_row_and_not_with_its_square():
  def temporary(T):
    program = jax.jit(_gradient(None, 64)).lower(*_shapes(T)).compile()
    return program.memory_analysis().temp_size_in_bytes

  assert temporary(2048) < 2.1 * temporary(1024)
