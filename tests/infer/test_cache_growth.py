"""Caches that grow and prompts in pieces change nothing but rounding."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.experiment import (
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
)
from deltanet_jax.config.mixers import (
  AttentionConfig,
  DSAConfig,
  GatedDeltaNetConfig,
  MLAConfig,
)
from deltanet_jax.infer import cache_growth
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import sharding

FULL = AttentionConfig(heads=2, kv_heads=1, head_dim=8, rotary_dim=4)
DELTA = GatedDeltaNetConfig(1, 2, 8, 8, chunk=16)


def _config(mixers):
  ffn = MLPConfig(16)
  return ModelConfig(50, 16, tuple(Layer(m, ffn) for m in mixers), repeats=1)


def test_pieces_into_a_growing_cache_give_the_logits_of_the_whole(
  quick_compile,
):
  # the window is passed while the cache grows
  window = dataclasses.replace(FULL, window=12)
  cfg = _config([FULL, window, MLAConfig.tiny(), DSAConfig.tiny(), DELTA])
  model, mesh = HybridLM(cfg), sharding.make_mesh(MeshConfig())
  params = sharding.init_params(model, jax.random.key(0), mesh)
  tokens = jax.random.randint(jax.random.key(1), (1, 40), 0, 50)
  call = jax.jit(
    lambda tokens, cache: model.apply({'params': params}, tokens, cache=cache)
  )
  cache, logits = init_cache(cfg, 1, 8, jnp.float32), []
  # tokens one by one after two pieces of eight
  ends, sizes = [8, *range(16, 40)], [8, 16, *[40] * 24]
  for part, slots in zip(jnp.split(tokens, ends, 1), sizes, strict=True):
    cache = cache_growth.grow_cache(cache, cfg, 1, slots, jnp.float32)
    some, cache = call(part, cache)
    logits.append(some)
  want, whole = call(tokens, init_cache(cfg, 1, 40, jnp.float32))
  got = jnp.concatenate(logits, 1)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
  chex.assert_trees_all_close(cache, whole, rtol=1e-7, atol=1e-5)


def test_rows_of_other_lengths_and_one_put_among_them(quick_compile):
  window = dataclasses.replace(FULL, window=12)
  cfg = _config([FULL, window, MLAConfig.tiny(), DSAConfig.tiny(), DELTA])
  ends = _config([FULL]).period, _config([DELTA]).period
  cfg = dataclasses.replace(cfg, prefix=ends[0], suffix=ends[1], repeats=2)
  model, mesh = HybridLM(cfg), sharding.make_mesh(MeshConfig())
  params = sharding.init_params(model, jax.random.key(0), mesh)
  call = jax.jit(
    lambda *args, **how: model.apply({'params': params}, *args, **how)
  )
  texts = np.random.default_rng(1).integers(0, 50, (4, 24), np.int32)
  want, none = call(texts)
  close = lambda got, want: np.testing.assert_allclose(
    got, want, atol=1e-5 * np.abs(want).max()
  )
  assert none is None

  lengths, padded = np.array([5, 17, 1]), texts[:3, :17].copy()
  padded[np.arange(17) >= lengths[:, None]] = 49
  cache = init_cache(cfg, 3, 24, jnp.float32)
  got, cache = call(padded, cache=cache, lengths=jnp.asarray(lengths))
  for row, n in enumerate(lengths):
    close(got[row, :n], want[row, :n])
  # the second text makes room for another, at another place
  _, row = call(texts[3:, :9], cache=init_cache(cfg, 1, 24, jnp.float32))
  cache = cache_growth.insert_row(cache, row, 1)
  order, lengths = np.array([0, 3, 2]), np.array([5, 9, 1])
  for _ in range(3):
    np.testing.assert_array_equal(cache.length, lengths)
    got, cache = call(texts[order, lengths][:, None], cache=cache)
    close(got[:, 0], want[order, lengths])
    lengths = lengths + 1


def test_a_row_of_fewer_slots_is_refused():
  cfg = _config([FULL])
  big, small = (init_cache(cfg, 1, n, jnp.float32) for n in (16, 8))
  with pytest.raises(ValueError, match='make both with as many slots'):
    cache_growth.insert_row(big, small, 0)


def test_slots_hold_the_text_and_are_fewer_than_twice_it(monkeypatch):
  monkeypatch.setattr(cache_growth, 'LEAST', 16)
  for length in range(1, 200):
    slots = cache_growth.count_slots(length, 150 + length)
    assert length <= slots < max(2 * length, 17)
  assert (
    cache_growth.count_slots(3, 5) == 5
    and cache_growth.count_slots(100, 110) == 110
  )


def test_pieces_are_the_prompt():
  tokens = jnp.arange(2 * 9000).reshape(2, 9000)
  cut = cache_growth.split_prompt(tokens)
  assert [x.shape for x in cut] == [(2, 4096), (2, 4096), (2, 808)]
  assert (jnp.concatenate(cut, 1) == tokens).all()
  assert [x.shape for x in cache_growth.split_prompt(tokens[:, :5])] == [(2, 5)]
