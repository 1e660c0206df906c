"""Latent attention: its two forms, its scale and its cache."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.mixers import MLAConfig, YarnConfig
from deltanet_jax.mixers.base import Context
from deltanet_jax.ops import latent_attention
from deltanet_jax.ops.attention import attention

pytestmark = pytest.mark.slow

B, T, S, H, K, P, V, R, D = 2, 3, 7, 4, 5, 2, 6, 8, 16


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _arguments():
  return (
    _draw(B, T, H, K + P),
    _draw(B, S, R, seed=1),
    _draw(B, S, P, seed=2),
    _draw(R, H, K, seed=3),
    _draw(R, H, V, seed=4),
  )


MASK = np.arange(S) <= np.arange(T)[:, None] + S - T


def _expanded(q, latent, key, k_b, v_b, mask, *, scale):
  k, v = latent_attention.expand(latent, key, k_b, v_b)
  return attention(q, k, v, mask, scale=scale)


def test_absorbed_form_equals_the_expanded_one_gradients_too():
  v = _draw(B, T, H, V, seed=5)

  def run(form):
    def loss(*arguments):
      return jnp.sum(v * form(*arguments, MASK[None], scale=0.3))

    return jax.jit(jax.value_and_grad(loss, tuple(range(5))))(*_arguments())

  got, want = run(latent_attention.absorbed), run(_expanded)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_expanded_form_is_softmax_attention_head_by_head():
  q, latent, key, k_b, v_b = _arguments()
  got = _expanded(q, latent, key, k_b, v_b, MASK[None], scale=0.3)
  for b, h in ((0, 0), (1, 3)):
    k = np.concatenate([latent[b] @ k_b[:, h], key[b]], 1)
    scores = np.where(MASK, 0.3 * q[b, :, h] @ k.T, -np.inf)
    p = np.exp(scores - scores.max(1, keepdims=True))
    want = p / p.sum(1, keepdims=True) @ (latent[b] @ v_b[:, h])
    np.testing.assert_allclose(got[b, :, h], want, rtol=1e-4, atol=1e-4)


def test_scale_has_yarns_square():
  yarn = YarnConfig(factor=40.0, original=4096, mscale=1.0, mscale_all_dim=1.0)
  cfg = dataclasses.replace(
    MLAConfig.tiny(), key_dim=128, shared_dim=64, yarn=yarn
  )
  np.testing.assert_allclose(cfg.scale, 192**-0.5 * 1.3689**2, rtol=1e-4)


def test_cache_is_the_latent_and_one_shared_key_a_token():
  cfg = MLAConfig.tiny()
  cache = cfg.init_cache(3, 10, jnp.bfloat16)
  chex.assert_shape(cache.latent, (3, 10, cfg.latent))
  chex.assert_shape(cache.key, (3, 10, cfg.shared_dim))
  assert cache.latent.dtype == cache.key.dtype == jnp.bfloat16


@pytest.mark.usefixtures('quick_compile')
def test_without_positions_order_does_not_matter():
  def last(cfg, x, params=None):
    module = cfg.make(d_model=D)
    ctx = Context(jnp.arange(T)[None], None, jnp.float32(0))
    if params is None:
      params = nn.unbox(module.init(jax.random.key(0), x, ctx))
    return module.apply(params, x, ctx)[0][:, -1], params

  x = _draw(1, T, D)
  swapped = x[:, [1, 0, 2]]
  for rotary in (False, True):
    cfg = dataclasses.replace(MLAConfig.tiny(), rotary=rotary)
    y, params = last(cfg, x)
    difference = np.abs(y - last(cfg, swapped, params)[0]).max()
    assert (difference > 1e-4) == rotary


def test_a_prompt_longer_than_the_cache_is_refused():
  cfg = MLAConfig.tiny()
  module, x = cfg.make(d_model=D), jnp.zeros((1, T, D))
  ctx = Context(jnp.arange(T)[None], None, jnp.float32(0))
  with pytest.raises(ValueError, match='3 tokens for a cache of max_len 2'):
    module.init(jax.random.key(0), x, ctx, cfg.init_cache(1, 2, jnp.float32))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'gate': 'heads'}, "gate is 'heads'; give one of none, head, channel"),
    ({'shared_dim': 3}, 'shared_dim is 3; rotary pairs need an even one'),
    ({'query_latent': 0}, 'query_latent is 0; give 1 or more, or None'),
    ({'latent': 0}, 'latent is 0; give 1 or more'),
  ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(MLAConfig.tiny(), **changes)
