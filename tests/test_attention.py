"""Softmax attention against numpy: norms per head or over all, then scores."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.mixers.base import Context
from deltanet_jax.mixers.config import AttentionConfig
from deltanet_jax.ops.attention import attention

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
