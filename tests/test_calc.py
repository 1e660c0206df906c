"""Sizes against counts by hand."""

import dataclasses

import jax.numpy as jnp
import pytest

from deltanet_jax import calc
from deltanet_jax.experiment import Layer, MLPConfig, ModelConfig
from deltanet_jax.mixers.config import (
  AttentionConfig,
  GatedDeltaNetConfig,
  MLAConfig,
)

FFN = MLPConfig(20)
DELTA = GatedDeltaNetConfig(key_heads=2, value_heads=4, key_dim=8, value_dim=16)
FULL = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
WINDOW = dataclasses.replace(FULL, window=32)


def _model(*mixers, repeats=2, tied=False):
  return ModelConfig(
    vocab=50,
    d_model=12,
    repeats=repeats,
    tied=tied,
    period=tuple(Layer(mixer, FFN) for mixer in mixers),
  )


def test_parameters_are_those_counted_by_hand():
  D, block = 12, 3 * 12 * 20 + 2 * 12
  keys, values = 2 * 8, 4 * 16
  delta = D * (2 * keys + 3 * values + 2 * 4) + 4 * (2 * keys + values) + 2 * 4
  attention = D * (2 * 4 * 8 + 2 * 2 * 8)
  layers = 2 * (delta + 16 + attention + 2 * block)
  for tied, tables in ((False, 2), (True, 1)):
    cfg = _model(DELTA, FULL, tied=tied)
    assert calc.parameters(cfg) == layers + tables * 50 * D + D


def test_cache_bytes_by_layer_kind():
  sizes = {
    context: calc.cache_bytes(_model(DELTA, FULL), context, 3, jnp.bfloat16)
    for context in (64, 1024)
  }
  state = 4 * 4 * 8 * 16
  conv = 2 * 3 * (2 * 2 * 8 + 4 * 16)
  for context, size in sizes.items():
    assert size['GatedDeltaNet'] == 2 * 3 * (state + conv)
    keys = 2 * 2 * 2 * 8 * context * 3
    # beside the keys and values: each slot's position, and the length
    assert size['Attention'] == 2 * (keys + 4 * context + 4)


def test_cache_of_a_window_stops_growing():
  size = lambda n: calc.cache_bytes(_model(WINDOW), n, 1, jnp.float32)
  assert size(16)['Attention'] < size(32)['Attention']
  assert size(32) == size(1 << 20)


def test_twin_has_the_models_own_attention_everywhere():
  cfg = dataclasses.replace(
    _model(DELTA, DELTA, WINDOW),
    prefix=(Layer(DELTA, FFN),),
    suffix=(Layer(FULL, FFN),),
  )
  twin = calc.all_attention_twin(cfg)
  assert [layer.mixer for layer in twin.layers] == [WINDOW] * 7 + [FULL]
  assert [layer.ffn for layer in twin.layers] == [FFN] * 8


def test_twin_of_latent_attention_is_latent_and_its_cache_is_counted():
  latent = MLAConfig.tiny()
  cfg = _model(DELTA, latent)
  twin = calc.all_attention_twin(cfg)
  assert [layer.mixer for layer in twin.layers] == [latent] * 4
  size = calc.cache_bytes(twin, 100, 3, jnp.bfloat16)
  token = 2 * (latent.latent + latent.shared_dim)
  # beside the latents and shared keys: each slot's position, and the length
  assert size == {'MLA': 4 * (3 * 100 * token + 4 * 100 + 4)}


def test_no_twin_without_attention():
  with pytest.raises(ValueError, match='has no attention layer'):
    calc.all_attention_twin(_model(DELTA))
