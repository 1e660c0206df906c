"""Sizes and work against counts by hand and against the model's own program."""

import collections
import dataclasses
import random

import jax
import jax.numpy as jnp
import pytest

from deltanet_jax import flops
from deltanet_jax.config import pattern
from deltanet_jax.config.experiment import (
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import (
  AttentionConfig,
  GatedDeltaNetConfig,
  KDAConfig,
  MLAConfig,
)
from deltanet_jax.lab.cost import calc
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import sharding

FFN = MLPConfig(20)
DELTA = GatedDeltaNetConfig(key_heads=2, value_heads=4, key_dim=8, value_dim=16)
FULL = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
WINDOW = dataclasses.replace(FULL, window=32)
KDA = KDAConfig(heads=2, key_dim=8, value_dim=16, gate_rank=4)
MOE = MoEConfig(experts=6, top=2, hidden=5, shared=7)


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
    assert calc.count_parameters(cfg) == layers + tables * 50 * D + D


def test_cache_bytes_by_layer_kind():
  sizes = {
    context: calc.count_cache_bytes(
      _model(DELTA, FULL), context, 3, jnp.bfloat16
    )
    for context in (64, 1024)
  }
  state = 4 * 4 * 8 * 16
  conv = 2 * 3 * (2 * 2 * 8 + 4 * 16)
  for context, size in sizes.items():
    assert size['GatedDeltaNet'] == 2 * 3 * (state + conv)
    keys = 2 * 2 * 2 * 8 * context * 3
    # beside the keys and values: each slot's position, and each row's length
    assert size['Attention'] == 2 * (keys + 3 * (4 * context + 4))


def test_cache_of_a_window_stops_growing():
  size = lambda n: calc.count_cache_bytes(_model(WINDOW), n, 1, jnp.float32)
  assert size(16)['Attention'] < size(32)['Attention']
  assert size(32) == size(1 << 20)


def test_twin_has_the_models_own_attention_everywhere():
  cfg = dataclasses.replace(
    _model(DELTA, DELTA, WINDOW),
    prefix=(Layer(DELTA, FFN),),
    suffix=(Layer(FULL, FFN),),
  )
  twin = calc.make_attention_twin(cfg)
  assert [layer.mixer for layer in twin.layers] == [WINDOW] * 7 + [FULL]
  assert [layer.ffn for layer in twin.layers] == [FFN] * 8


def test_twin_of_latent_attention_is_latent_and_its_cache_is_counted():
  latent = MLAConfig.tiny()
  cfg = _model(DELTA, latent)
  twin = calc.make_attention_twin(cfg)
  assert [layer.mixer for layer in twin.layers] == [latent] * 4
  size = calc.count_cache_bytes(twin, 100, 3, jnp.bfloat16)
  token = 2 * (latent.latent + latent.shared_dim)
  # beside the latents and shared keys: each slot's position, each row's length
  assert size == {'MLA': 4 * 3 * (100 * token + 4 * 100 + 4)}


def test_no_twin_without_attention():
  with pytest.raises(ValueError, match='has no attention layer'):
    calc.make_attention_twin(_model(DELTA))


def _irregular():
  """A model of every section, with scanned layers and experts."""
  return ModelConfig(
    vocab=50,
    d_model=12,
    prefix=(Layer(DELTA, FFN),),
    period=(Layer(DELTA, MOE), Layer(FULL, MOE)),
    repeats=3,
    suffix=(Layer(KDA, MOE), Layer(MLAConfig.tiny(), FFN)),
  )


def test_cache_is_that_of_the_model():
  cfg, sizes = _irregular(), calc.count_cache_parts
  for context, batch in ((64, 1), (100, 3)):
    cache = init_cache(cfg, batch, context, jnp.bfloat16)
    held = sum(x.nbytes for x in jax.tree.leaves(cache))
    # beside the layers' caches: how many tokens the model has seen of a row
    held -= 4 * batch
    assert calc.count_total_bytes(cfg, context, batch, jnp.bfloat16) == held
    by_type = {
      dtype: sum(x.nbytes for x in jax.tree.leaves(cache) if x.dtype == dtype)
      for dtype in (jnp.bfloat16, jnp.float32, jnp.int32)
    }
    parts = collections.Counter()
    for part in sizes(cfg, context, batch, jnp.bfloat16).values():
      parts.update(part)
    assert parts['state'] == by_type[jnp.float32]
    assert parts['positions'] == by_type[jnp.int32] - 4 * batch
    assert parts['tokens'] + parts['convolution'] == by_type[jnp.bfloat16]


def test_cache_by_what_it_holds_and_in_other_types():
  parts = calc.count_cache_parts(_model(DELTA, FULL), 64, 3, jnp.bfloat16)
  assert parts['GatedDeltaNet'] == {
    'state': 2 * 3 * 4 * 4 * 8 * 16,
    'convolution': 2 * 3 * 2 * 3 * (2 * 2 * 8 + 4 * 16),
  }
  assert parts['Attention'] == {
    'tokens': 2 * 3 * 2 * 2 * 2 * 8 * 64, 'positions': 2 * 3 * 4 * (64 + 1)
  }  # fmt: skip
  other = calc.count_cache_parts(
    _model(DELTA, FULL), 64, 3, 'float8_e4m3fn', 'bfloat16'
  )
  for name, part, factor in (
    ('GatedDeltaNet', 'state', 2),
    ('GatedDeltaNet', 'convolution', 2),
    ('Attention', 'tokens', 2),
    ('Attention', 'positions', 1),
  ):
    assert parts[name][part] == factor * other[name][part]


def test_active_parameters_leave_out_the_experts_not_chosen():
  cfg = _irregular()
  idle = (2 * 3 + 1) * (6 - 2) * 3 * 12 * 5
  assert calc.count_parameters(cfg) - calc.count_active_parameters(cfg) == idle
  dense = _model(DELTA, FULL)
  assert calc.count_active_parameters(dense) == calc.count_parameters(dense)


def test_recurrent_twin_has_the_models_own_mixer_everywhere():
  cfg = _irregular()
  twin = calc.make_recurrent_twin(cfg)
  assert [x.mixer for x in twin.layers] == [DELTA] * 7 + [KDA, DELTA]
  assert [x.ffn for x in twin.layers] == [x.ffn for x in cfg.layers]
  with pytest.raises(ValueError, match='has no recurrent layer'):
    calc.make_recurrent_twin(_model(FULL))


@pytest.mark.parametrize('batch', [1, 5])
def test_break_even_is_the_first_context_with_a_smaller_cache(batch):
  cfg = _model(DELTA, DELTA, DELTA, FULL)
  size = lambda n, which: calc.count_total_bytes(which, n, batch, jnp.bfloat16)
  twin = calc.make_attention_twin(cfg)
  found = calc.find_break_even(cfg, batch, jnp.bfloat16)
  assert found > 2
  assert size(found, cfg) < size(found, twin)
  assert size(found - 1, cfg) >= size(found - 1, twin)


def test_no_break_even_where_a_window_ends_the_growth():
  assert calc.find_break_even(_model(FULL), 1, jnp.bfloat16) is None
  narrow = dataclasses.replace(FULL, window=4)
  assert calc.find_break_even(_model(DELTA, narrow), 1, jnp.bfloat16) is None


def test_saved_tends_to_the_share_of_recurrent_layers():
  cfg = _model(DELTA, DELTA, DELTA, FULL)
  assert calc.compute_saving(cfg, None, 1, jnp.bfloat16) == 0.75
  assert calc.compute_saving(cfg, 16, 1, jnp.bfloat16) < 0
  assert 0.74 < calc.compute_saving(cfg, 1 << 20, 1, jnp.bfloat16) < 0.75


def test_flops_are_those_of_the_whole_models_program():
  cfg, tokens = _irregular(), 300  # no whole number of chunks
  whole = HybridLM(cfg, jnp.bfloat16)
  params = sharding.make_abstract_params(whole)
  ids = lambda n: jax.ShapeDtypeStruct((1, n), jnp.int32)
  forward = lambda params, x: whole.apply({'params': params}, x)[0]
  total = flops.count_operations(forward, params, ids(tokens))
  assert calc.count_flops(cfg, tokens) == pytest.approx(total / tokens)
  cache = jax.eval_shape(lambda: init_cache(cfg, 1, tokens, jnp.bfloat16))
  step = lambda params, x, cache: whole.apply(
    {'params': params}, x, cache=cache
  )
  found = calc.count_decoding_flops(cfg, tokens)
  assert found == flops.count_operations(step, params, ids(1), cache)


def test_flops_by_hand():
  cfg, D, T = _model(FULL), 12, 40
  layer = D * (4 + 2 + 2 + 4) * 8 + 2 * 4 * T * 8 + 3 * D * 20
  expected = 2 * (2 * layer + D * 50)
  assert calc.count_flops(cfg, T) == expected
  assert calc.count_decoding_flops(cfg, T) == expected


def test_a_training_step_takes_three_forward_passes_and_the_scores_again():
  cfg, T = _model(FULL), 40
  whole = HybridLM(cfg, jnp.float32)
  loss = lambda params, x: whole.apply({'params': params}, x)[0].sum()
  args = (
    sharding.make_abstract_params(whole),
    jax.ShapeDtypeStruct((1, T), jnp.int32),
  )
  scores = 2 * 2 * 4 * T * T * 8  # of both layers' heads, made again backward
  expected = 3 * T * calc.count_flops(cfg, T) + scores
  assert flops.count_operations(jax.grad(loss), *args) == expected


@pytest.mark.parametrize(
  'L, R, A, attends',
  [
    (8, 3, 1, [3, 7]),
    (27, 20, 7, [3, 7, 11, 15, 19, 23, 26]),
    (5, 0, 1, [0, 1, 2, 3, 4]),
    (3, 7, 1, [2]),
    (7, 3, 1, [3, 6]),
    (4, 1, 0, []),
  ],
)
def test_layers_are_laid_out_at_a_ratio(L, R, A, attends):
  base = _irregular()
  cfg = calc.resize_model(base, layers=L, ratio=(R, A))
  mixers = [FULL if i in attends else DELTA for i in range(L)]
  assert [x.mixer for x in cfg.layers] == mixers
  ffns = [x.ffn for x in base.layers]
  assert [x.ffn for x in cfg.layers] == (ffns + ffns[-1:] * L)[:L]
  assert calc.count_attention_layers(L, R, A) == len(attends)


def test_a_long_pattern_is_scanned():
  cfg = calc.resize_model(_model(DELTA, FULL), layers=48, ratio=(3, 1))
  assert (len(cfg.period), cfg.repeats) == (4, 12)


def test_resized_models_fold_as_checkpoints_do():
  draw = random.Random(0)
  choices = [Layer(m, f) for m in (DELTA, FULL) for f in (FFN, MOE)]
  for _ in range(1000):
    layers = tuple(draw.choices(choices, k=draw.randint(1, 12)))
    mixed = dataclasses.replace(_model(DELTA), period=layers, repeats=1)
    L, R, A = draw.randint(1, 16), draw.randint(0, 3), draw.randint(1, 3)
    cfg = calc.resize_model(
      mixed, layers=L, ratio=(R, A), attention=FULL, recurrent=DELTA
    )
    N = calc.count_attention_layers(L, R, A)
    attends = [(i + 1) * N // L > i * N // L for i in range(L)]
    assert cfg.layers == tuple(
      Layer(FULL if attends[i] else DELTA, layers[min(i, len(layers) - 1)].ffn)
      for i in range(L)
    )
    folded = cfg.prefix, cfg.period, cfg.repeats, cfg.suffix
    assert folded == pattern.fold_layers(cfg.layers)


def test_resized_with_other_mixers():
  cfg = calc.resize_model(_model(DELTA, FULL), attention=WINDOW, recurrent=KDA)
  assert [x.mixer for x in cfg.layers] == [KDA, WINDOW] * 2
  assert calc.resize_model(_model(DELTA, FULL)) == _model(DELTA, FULL)
  with pytest.raises(ValueError, match='no recurrent layer; name its mixer'):
    calc.resize_model(_model(FULL), ratio=(3, 1))
