"""Every key of a released configuration is read, harmless, refused by name, or
named as one that its class does not know.

fixtures/keys.json lists what transformers' classes read (reference_config.py).
"""

import pathlib

import pytest

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import common, families
from tests.parity import SYSTEMS
from tests.reference_config import (
  KEYS,
  NESTED,
  configs,
  paths,
  released,
  with_key,
  without_key,
)

every_system = pytest.mark.parametrize('name', SYSTEMS)


def others(value):
  """Other values that such a key could have, null among them."""
  return [*_others(value), None]


def _others(value):
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int):
    return [value + 1, 2 * value + 2]
  if isinstance(value, float):
    return [2 * value + 0.5, 7]
  if isinstance(value, str):
    return [value + 'x', 'gelu']
  if isinstance(value, list):
    return [value[1:] + value[:1], value[:-1], value + (value[:1] or [1])]
  if isinstance(value, dict):
    return [{}]
  return [7, 0.5, 'x', {'x': 1}]


# a value of one key may be refused for another that it does not fit any more,
# by the name of our own field
OURS = {
  'num_attention_heads': 'heads',
  'num_key_value_heads': 'heads',
  'linear_num_key_heads': 'heads',
  'linear_num_value_heads': 'heads',
  'num_experts_per_tok': 'MoEConfig.top',
  'num_experts_per_token': 'MoEConfig.top',
  'n_routed_experts': 'experts',
  'num_experts': 'experts',
  'num_local_experts': 'experts',
  'n_group': 'groups',
  'num_expert_group': 'groups',
  'topk_group': 'groups',
  'head_dim': 'partial_rotary_factor',
  'qk_rope_head_dim': 'shared_dim',
  'index_head_dim': 'index_dim',
  'q_lora_rank': 'query_latent',
}
# changes that say the same again: an order that means nothing, and what other
# keys of this fixture say too
SAME = (
  ('kimi_linear', 'linear_attn_config.full_attn_layers', [4, 3]),
  ('kimi_linear', 'linear_attn_config.kda_layers', [2, 1]),
  ('kimi_linear', 'linear_attn_config', {}),
  ('kimi_linear', 'norm_topk_prob', True),
  ('minimax_m1', 'partial_rotary_factor', 0.5),
  ('minimax_m2', 'partial_rotary_factor', 0.5),
  ('minimax_m2', 'rope_parameters', {}),
)


def says_the_same(name, path, value, base):
  at = base
  for key in path:
    at = at.get(key)
  return value == at or (name, '.'.join(path), value) in SAME


def verdict(read_config, family, wanted, changed, path):
  """How a change of one key is taken; fails where it is not decided."""
  result, warned = read_config(changed)
  key, full = path[-1], '.'.join(path)
  if isinstance(result, ConfigError):
    # a layer more or less is named by the list that counts them
    named = (*path, OURS.get(key, key), OURS.get(path[0], key))
    assert any(name in str(result) for name in named), (full, str(result))
    return 'refused'
  if full in warned:
    assert result == wanted
    assert key not in KEYS[family.name] and path[0] not in NESTED, full
    return 'unknown'
  if result != wanted:
    return 'read'
  harmless = common.collect_harmless_keys(family)
  assert {full, path[0]} & harmless, (full, changed)
  return 'harmless'


def test_every_file_of_the_folder_is_found_as_a_family():
  folder = pathlib.Path(families.__file__).parent
  files = {path.stem for path in folder.glob('*.py')} - {'__init__'}
  homes = [family.read_config.__module__ for family in families.FAMILIES]
  assert {home.rpartition('.')[2] for home in homes} == files
  types = sum((family.model_types for family in families.FAMILIES), ())
  assert len(set(types)) == len(types)


@every_system
def test_a_changed_key_is_read_harmless_refused_or_named(name, read_config):
  family = families.get_family(name)
  for base in configs(name):
    model, warned = read_config(base)
    assert not isinstance(model, ConfigError) and not warned, (model, warned)
    for path, value in list(paths(base)):
      for other in others(value):
        if other is None and read_config(without_key(base, path)) == (
          model,
          '',
        ):
          continue  # so that null, as nothing, may say the same
        if not says_the_same(name, path, other, base):
          changed = with_key(base, path, other)
          verdict(read_config, family, model, changed, path)


@every_system
def test_an_added_key_of_the_class_is_read_harmless_or_refused(
  name, read_config
):
  family = families.get_family(name)
  for base in configs(name):
    model, _ = read_config(base)
    for key, default in KEYS[name].items():
      if key in base:
        continue
      for value in [*others(None), *others(default), -1]:
        if not says_the_same(name, (key,), value, base):
          verdict(read_config, family, model, base | {key: value}, (key,))


@every_system
def test_an_unknown_key_is_named_in_one_warning(name, read_config):
  base = released(name)
  wanted, _ = read_config(base)
  result, warned = read_config(base | {'a': None, 'b\n': {'c': 1}})
  assert result == wanted
  assert warned.endswith(f"as {name} has no such settings: a, 'b\\n'")


def test_an_unknown_key_of_an_object_is_named(read_config):
  base = released('kimi_linear')
  linear = base['linear_attn_config'] | {'other': 1}
  _, warned = read_config(base | {'linear_attn_config': linear})
  assert warned.endswith('settings: linear_attn_config.other')


@pytest.mark.parametrize('act', ['gelu', 'relu', 'gelu_pytorch_tanh', None, 3])
@every_system
def test_another_activation_is_refused(name, act, read_config):
  result, _ = read_config(released(name) | {'hidden_act': act})
  assert f'hidden_act is {act!r}' in str(result)


@every_system
def test_the_other_name_of_silu_is_silu(name, read_config):
  base = released(name)
  assert read_config(base | {'hidden_act': 'swish'}) == read_config(base)


@every_system
def test_settings_of_single_layers_are_refused(name, read_config):
  result, _ = read_config(released(name) | {'per_layer_config': {'0': {}}})
  assert 'per_layer_config is' in str(result)


# what published files say beyond the keys of the fixtures
PUBLISHED = {
  'qwen3_5': {
    'attn_output_gate': True,
    'full_attention_interval': 4,
    'mamba_ssm_dtype': 'float32',
    'mlp_only_layers': [],
    'mtp_num_hidden_layers': 1,
    'mtp_use_dedicated_embeddings': False,
    'output_gate_type': 'swish',
    'partial_rotary_factor': 0.25,
  },
  'kimi_linear': {
    'auto_map': {},
    'head_dim': 72,
    'model_max_length': 1048576,
    'num_nextn_predict_layers': 0,
  },
  'minimax_m1': {'auto_map': {}, 'shared_moe_mode': 'sigmoid'},
  'minimax_m2': {
    'attn_type_list': [1, 1],
    'layernorm_full_attention_beta': 1.0,
    'layernorm_linear_attention_beta': 1.0,
    'layernorm_mlp_beta': 1.0,
    'mlp_intermediate_size': 8192,
    'mtp_transformer_layers': 1,
    'num_mtp_modules': 3,
    'shared_moe_mode': 'sigmoid',
    'sliding_window': None,
    'use_mtp': True,
  },
  'deepseek_v3': {
    'aux_loss_alpha': 0.001,
    'ep_size': 1,
    'pretraining_tp': 1,
    'quantization_config': {'quant_method': 'fp8'},
    'seq_aux': True,
    'torch_dtype': 'bfloat16',
  },
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_what_published_files_say_more_is_known(name, read_config):
  base = released(name)
  base.pop('max_position_embeddings' if name == 'kimi_linear' else '', None)
  wanted, _ = read_config(base)
  assert read_config(base | PUBLISHED[name]) == (wanted, '')


class TestTextConfig:
  """The text model inside a larger one."""

  def test_its_keys_are_those_of_the_text_alone(self, read_config):
    text = released('qwen3_5')
    wanted, _ = read_config(text)
    around = {
      'model_type': 'qwen3_5',
      'vision_config': {'depth': 3},
      'image_token_id': 5,
      'text_config': text,
    }
    assert read_config(around) == (wanted, '')
    result, warned = read_config(around | {'rope_theta': 3.0, 'hidden_size': 7})
    assert result == wanted
    assert warned.endswith('settings: rope_theta, hidden_size')

  def test_its_rotary_positions_are_decided_like_others(self, read_config):
    text = released('qwen3_5')
    for change in ({'rope_theta': 5e5}, {'rope_scaling': {'type': 'linear'}}):
      around = {'model_type': 'qwen3_5', 'text_config': text | change}
      result, _ = read_config(around)
      assert 'text_config.rope' in str(result)

  def test_its_type_may_stand_around_it(self, read_config):
    text = released('qwen3_5')
    wanted, _ = read_config(text)
    del text['model_type']
    found = read_config({'model_type': 'qwen3_5', 'text_config': text})
    assert found == (wanted, '')

  def test_it_is_tied_where_either_says_so(self, read_config):
    text = released('qwen3_5')
    del text['tie_word_embeddings']
    around = {'model_type': 'qwen3_5', 'tie_word_embeddings': True}
    result, _ = read_config(around | {'text_config': text})
    assert result.tied
    text['tie_word_embeddings'] = False
    result, _ = read_config(around | {'text_config': text})
    assert 'tie_word_embeddings' in str(result)

  def test_null_is_none(self, read_config):
    base = released('qwen3')
    assert read_config(base | {'text_config': None}) == read_config(base)
    result, _ = read_config({'model_type': 'qwen3_5', 'text_config': None})
    assert 'no key' in str(result)


class TestKimiLinear:
  """linear_attn_config of the release, or transformers' own keys."""

  def test_the_layers_are_in_either(self, read_config):
    saved = configs('kimi_linear')[0]
    wanted = read_config(saved)
    linear = saved['linear_attn_config']
    for dropped in ('full_attn_layers kda_layers', 'head_dim', 'num_heads'):
      rest = {k: v for k, v in linear.items() if k not in dropped.split()}
      assert read_config(saved | {'linear_attn_config': rest}) == wanted
    del saved['linear_attn_config']
    assert read_config(saved) == wanted

  def test_without_lists_every_fourth_but_the_first_is_attention(
    self, read_config
  ):
    base = released('kimi_linear')
    linear = {
      k: v for k, v in base['linear_attn_config'].items() if 'layers' not in k
    }
    base |= {'linear_attn_config': linear, 'num_hidden_layers': 9}
    result, _ = read_config(base)
    found = [type(layer.mixer).__name__ for layer in result.layers]
    assert [i for i, kind in enumerate(found) if kind == 'MLAConfig'] == [4, 8]

  def test_one_of_two_lists_is_refused(self, read_config):
    base = released('kimi_linear')
    del base['linear_attn_config']['kda_layers']
    result, _ = read_config(base)
    assert 'no key linear_attn_config.kda_layers' in str(result)

  def test_what_a_later_model_of_that_type_adds_is_refused(self, read_config):
    base = released('kimi_linear')
    linear = base['linear_attn_config'] | {'gate_lower_bound': -5.0}
    result, _ = read_config(base | {'linear_attn_config': linear})
    assert 'linear_attn_config.gate_lower_bound is -5.0' in str(result)
    result, _ = read_config(base | {'mla_use_output_gate': True})
    assert 'mla_use_output_gate is True' in str(result)


# wrong in every family: key, value, what the message says is expected
MALFORMED = [
  ('hidden_size', '32', 'an integer from 1'),
  ('hidden_size', 32.0, 'an integer from 1'),
  ('hidden_size', None, 'an integer from 1'),
  ('hidden_size', 0, 'an integer from 1'),
  ('hidden_size', -32, 'an integer from 1'),
  ('hidden_size', True, 'an integer from 1'),
  ('hidden_size', [32], 'an integer from 1'),
  ('hidden_size', 10**400, 'an integer from 1'),
  ('vocab_size', {}, 'an integer from 1'),
  ('num_hidden_layers', 10**9, 'at most 512'),
  ('num_hidden_layers', 'two', 'an integer from 1'),
  ('num_attention_heads', 0, 'an integer from 1'),
  ('rms_norm_eps', '1e-6', 'a number above 0'),
  ('rms_norm_eps', None, 'a number above 0'),
  ('rms_norm_eps', False, 'a number above 0'),
  ('rms_norm_eps', float('nan'), 'a number above 0'),
  ('rms_norm_eps', float('inf'), 'a number above 0'),
  ('tie_word_embeddings', 'false', 'true or false'),
  ('tie_word_embeddings', 0, 'true or false'),
  ('hidden_act', ['silu'], 'silu'),
  ('text_config', [], 'an object'),
  ('model_type', [1], 'supported'),
]


@every_system
def test_a_malformed_value_is_named_with_what_is_expected(name, read_config):
  for key, value, expected in MALFORMED:
    result, _ = read_config(released(name) | {key: value})
    assert isinstance(result, ConfigError), (key, value)
    assert key in str(result) and expected in str(result), str(result)
    assert repr(value)[:70] in str(result), str(result)


@pytest.mark.parametrize(
  'name, key, value, pieces',
  [
    ('qwen3', 'rope_scaling', 'yarn', 'an object'),
    ('qwen3', 'rope_parameters', [1], 'an object'),
    ('qwen3', 'rope_parameters', {'rope_theta': '1e6'}, 'a number above 1'),
    ('qwen3', 'rope_parameters', {'rope_theta': None}, 'a number above 1'),
    ('qwen3', 'rope_parameters', {'rope_type': None}, 'rope scaling None'),
    ('qwen3', 'layer_types', 3, 'a list of 3'),
    ('qwen3', 'layer_types', ['full_attention'], '1 layer_types'),
    ('qwen3', 'layer_types', [None, {}, []], 'layer type None'),
    ('qwen3_next', 'full_attention_interval', 0, 'an integer from 1'),
    ('qwen3_next', 'partial_rotary_factor', 2, 'at most 1'),
    ('qwen3_moe', 'norm_topk_prob', 'yes', 'true or false'),
    ('kimi_linear', 'linear_attn_config', 3, 'an object'),
    ('kimi_linear', 'moe_renormalize', 1, 'true or false'),
    ('deepseek_v3', 'n_shared_experts', None, 'an integer from 0'),
    ('deepseek_v3', 'num_key_value_heads', 2, 'supported: 4'),
    ('minimax_m1', 'attn_type_list', [0, 1, 0, 2], 'layer type 2'),
    ('minimax_m1', 'layernorm_mlp_beta', 'x', 'a number'),
    ('minimax_m2', 'attn_type_list', [0, 1], 'layer type 0'),
    ('minimax_m2', 'sliding_window', 128, 'null'),
  ],
)
def test_a_malformed_value_of_one_family_is_named(
  name, key, value, pieces, read_config
):
  result, _ = read_config(released(name) | {key: value})
  assert key in str(result) and pieces in str(result), result


@pytest.mark.parametrize(
  'text', ['[]', '3', 'null', '{', '', '[' * 100_000, '\ufeff{}', '{"a": \x00}']
)
def test_a_file_that_is_no_object_is_refused_in_a_line(text, tmp_path):
  (tmp_path / 'config.json').write_text(text, encoding='utf-8')
  with pytest.raises(ConfigError) as error:
    families.read_config(tmp_path)
  assert str(tmp_path / 'config.json') in str(error.value)
  assert '\n' not in str(error.value)


def test_a_training_run_is_named_as_such(read_config):
  found = {'model': {}, 'data': {}, 'optim': {}, 'train': {}}
  error, _ = read_config(found)
  assert 'that of a training run; open_model(folder) reads it' in str(error)
