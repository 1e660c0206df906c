"""Presets of released models have the published sizes, and their families
write them as a config.json that says the same."""

import math

import jax
import jax.numpy as jnp
import pytest

from deltanet_jax import config, flops
from deltanet_jax.hf import families, keys, plan
from deltanet_jax.lab.cost import calc
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import sharding

pytestmark = pytest.mark.slow

# preset -> family, parameters as published (the biases that choose experts
# apart), those biases
PUBLISHED = {
  'qwen3:0p6b': ('qwen3', 596_049_920, 0),
  'qwen3:1p7b': ('qwen3', 1_720_574_976, 0),
  'qwen3:4b': ('qwen3', 4_022_468_096, 0),
  'qwen3:8b': ('qwen3', 8_190_735_360, 0),
  'qwen3:14b': ('qwen3', 14_768_307_200, 0),
  'qwen3:32b': ('qwen3', 32_762_123_264, 0),
  'qwen3:30b_a3b': ('qwen3_moe', 30_532_122_624, 0),
  'qwen3:235b_a22b': ('qwen3_moe', 235_093_634_560, 0),
  'qwen3_next:80b_a3b': ('qwen3_next', 79_674_391_296, 0),
  'qwen3_5:0p8b': ('qwen3_5', 752_393_024, 0),
  'qwen3_5:2b': ('qwen3_5', 1_881_825_088, 0),
  'qwen3_5:4b': ('qwen3_5', 4_205_751_296, 0),
  'qwen3_5:9b': ('qwen3_5', 8_953_803_264, 0),
  'qwen3_5:27b': ('qwen3_5', 26_895_998_464, 0),
  'qwen3_5:35b_a3b': ('qwen3_5_moe', 34_660_610_688, 0),
  'qwen3_5:122b_a10b': ('qwen3_5_moe', 122_111_526_912, 0),
  'qwen3_5:397b_a17b': ('qwen3_5_moe', 396_346_350_336, 0),
  'kimi_linear:48b_a3b': ('kimi_linear', 49_122_675_072, 6_656),
  'minimax:text_01': ('minimax_m1', 456_089_655_296, 0),
  'minimax:m1': ('minimax_m1', 456_089_655_296, 0),
  'minimax:m2': ('minimax_m2', 228_689_748_992, 15_872),
  'deepseek:v3': ('deepseek_v3', 671_026_404_352, 14_848),
  'deepseek:v32': ('deepseek_v32', 671_877_929_216, 14_848),
  'olmo_hybrid:7b': ('olmo_hybrid', 7_430_870_688, 0),
}

# tensors in the files of the released folders
TENSORS = {
  'qwen3_next:80b_a3b': 75_944,  # 1,553 of them multi-token prediction
  'kimi_linear:48b_a3b': 20_493,
  'minimax:text_01': 8_243,
  'minimax:m1': 8_243,
}

# bytes of a token's bfloat16 keys and values, MiB of the float32 states, MiB
# of the bfloat16 inputs that the convolutions keep
MEMORY = {
  'qwen3_next:80b_a3b': (24_576, 72.0, 1.7),
  'qwen3_5:397b_a17b': (30_720, 180.0, 3.2),
  'qwen3_5:35b_a3b': (20_480, 60.0, 1.4),
  'qwen3_5:27b': (65_536, 144.0, 2.8),
  'kimi_linear:48b_a3b': (8_064, 40.0, 1.4),
  'minimax:m1': (40_960, 280.0, 0.0),
  'minimax:m2': (253_952, 0.0, 0.0),
  'deepseek:v3': (70_272, 0.0, 0.0),
  'deepseek:v32': (85_888, 0.0, 0.0),
  'qwen3:235b_a22b': (192_512, 0.0, 0.0),
  'qwen3:30b_a3b': (98_304, 0.0, 0.0),
  'qwen3:8b': (147_456, 0.0, 0.0),
  'olmo_hybrid:7b': (122_880, 50.6, 1.6),
}


# parameters that work on a token, embedding and head among them, the biases
# that choose experts apart
ACTIVE = {
  'qwen3_next:80b_a3b': 3_874_929_408,
  'kimi_linear:48b_a3b': 3_484_453_248,
  'minimax:m1': 48_403_306_496,
  'minimax:m2': 11_030_537_216,
  'deepseek:v32': 38_403_807_488,
  'deepseek:v3': 37_552_282_624,
  'qwen3:30b_a3b': 3_353_032_704,
  'qwen3:235b_a22b': 22_190_763_520,
  'qwen3_5:35b_a3b': 3_454_988_928,
  'qwen3_5:122b_a10b': 9_771_288_576,
  'qwen3_5:397b_a17b': 17_349_040_896,
}

# tokens at which the cache without the 4 bytes of a slot's position is that of
# all attention, and the percentage saved at 1M
BREAK_EVEN = {
  'qwen3_next:80b_a3b': (1_048, 74.9),
  'kimi_linear:48b_a3b': (1_884, 73.9),
  'minimax:m1': (1_024, 87.4),
}


def read(name):
  return config.load(name).model


@pytest.mark.parametrize('name', PUBLISHED)
def test_preset_has_the_published_parameters(name):
  _, published, biases = PUBLISHED[name]
  assert calc.count_parameters(read(name)) == published + biases


@pytest.mark.parametrize('name', PUBLISHED)
def test_preset_and_its_config_json_say_the_same(name):
  family = families.get_family(PUBLISHED[name][0])
  cfg = read(name)
  again = family.read_config(keys.ConfigKeys(family.write_config(cfg)))
  assert families.is_same_model(again, cfg)
  parts = lambda c: (len(c.prefix), len(c.period), c.repeats, len(c.suffix))
  assert parts(again) == parts(cfg)


def test_multi_token_prediction_adds_the_published_parameters():
  cfg = families.add_mtp(
    families.get_family('qwen3_next'),
    read('qwen3_next:80b_a3b'),
    {'mtp.fc.weight'},
  )
  assert calc.count_parameters(cfg) == 81_324_862_720
  cfg = families.add_mtp(
    families.get_family('deepseek_v3'),
    read('deepseek:v3'),
    {'model.layers.61.eh_proj.weight'},
  )
  more = calc.count_parameters(cfg) - calc.count_parameters(read('deepseek:v3'))
  assert more == 11_610_068_224


def released(name):
  """Every Entry of a preset, with its multi-token prediction."""
  cfg, family = read(name), families.get_family(PUBLISHED[name][0])
  if family.mtp is not None:
    cfg = families.add_mtp(family, cfg, {family.mtp.marker(cfg)})
  return plan.build_plan(
    family, cfg, sharding.make_abstract_params(HybridLM(cfg))
  )


@pytest.mark.parametrize('name', TENSORS)
def test_preset_is_stored_in_the_released_number_of_tensors(name):
  names = [entry.name for entry in released(name)]
  assert len(set(names)) == len(names) == TENSORS[name]
  predicted = sum(entry.startswith('mtp.') for entry in names)
  assert predicted == (1_553 if name == 'qwen3_next:80b_a3b' else 0)


def test_minimax_m1_is_stored_in_the_released_number_of_bytes():
  # bfloat16 but for the routers, which are released in float32
  total = 0
  for entry in released('minimax:m1'):
    size = 4 if entry.name.endswith('moe.gate.weight') else 2
    total += size * math.prod(entry.shape)
  assert total == 912_210_767_872


def of_type(cfg, slots, dtype):
  cache = jax.eval_shape(lambda: init_cache(cfg, 1, slots, jnp.bfloat16))
  return sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves(cache)
    if x.dtype == dtype
  )


@pytest.mark.parametrize('name', MEMORY)
def test_preset_has_the_published_cache_and_state(name):
  cfg, mebibytes = read(name), lambda n: round(n / 2**20, 1)
  one, two = (of_type(cfg, slots, jnp.bfloat16) for slots in (1, 2))
  state = of_type(cfg, 1, jnp.float32)
  found = two - one, mebibytes(state), mebibytes(2 * one - two)
  assert found == MEMORY[name]


@pytest.mark.parametrize('name', ACTIVE)
def test_preset_has_the_published_active_parameters(name):
  assert (
    calc.count_active_parameters(read(name))
    == ACTIVE[name] + PUBLISHED[name][2]
  )


@pytest.mark.parametrize('name', MEMORY)
def test_calculator_has_the_published_cache_to_the_byte(name):
  token, state, convolution = MEMORY[name]
  at = lambda n, b: calc.count_cache_parts(read(name), n, b, 'bfloat16')
  sums = [
    {
      part: sum(parts.get(part, 0) for parts in at(n, 3).values())
      for part in ('tokens', 'state', 'convolution')
    }
    for n in (4096, 4097)
  ]
  assert sums[0]['tokens'] == 3 * 4096 * token
  assert sums[1]['tokens'] - sums[0]['tokens'] == 3 * token
  for part, published in (('state', state), ('convolution', convolution)):
    assert sums[0][part] == sums[1][part]
    assert round(sums[0][part] / 3 / 2**20, 1) == published


@pytest.mark.parametrize('name', BREAK_EVEN)
def test_preset_breaks_even_where_published(name):
  def size(cfg, n):
    parts = calc.count_cache_parts(cfg, n, 1, 'bfloat16').values()
    return sum(sum(x.values()) - x.get('positions', 0) for x in parts)

  cfg, (tokens, percent) = read(name), BREAK_EVEN[name]
  twin = calc.make_attention_twin(cfg)
  assert size(cfg, tokens - 1) > size(twin, tokens - 1)
  assert size(cfg, tokens + 1) < size(twin, tokens + 1)
  # attention is given a few bytes more by its positions
  assert 0 <= tokens + 1 - calc.find_break_even(cfg, 1, 'bfloat16') <= 7
  assert (
    round(100 * calc.compute_saving(cfg, 2**20, 1, 'bfloat16'), 1) == percent
  )


@pytest.mark.parametrize('name', ['qwen3_next:80b_a3b', 'kimi_linear:48b_a3b'])
def test_operations_are_those_of_the_whole_models_program(name):
  cfg, tokens = read(name), 2**17
  whole = HybridLM(cfg, jnp.bfloat16)
  params = sharding.make_abstract_params(whole)
  forward = lambda params, x: whole.apply({'params': params}, x)[0]
  ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
  found = calc.count_flops(cfg, tokens)
  assert found == flops.count_operations(forward, params, ids) / tokens
