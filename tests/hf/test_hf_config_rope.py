"""Defaults and rotary positions of released configurations are those of
transformers' classes.

fixtures/keys.json has their defaults, fixtures/rope.json the frequencies that
they compute of many spellings (reference_config.py made both).
"""

import numpy as np
import pytest

from deltanet_jax.config import ConfigError
from deltanet_jax.ops import rope
from tests import reference_config as reference
from tests.parity import SYSTEMS
from tests.reference_config import (
  KEYS,
  NESTED,
  ROPE,
  configs,
  released,
  without_key,
)


@pytest.mark.parametrize('name', SYSTEMS)
def test_an_absent_key_is_its_classes_default(name, read_config):
  """Of what a class takes for it; sizes may be asked for instead."""
  if name == 'minimax_m1':
    return  # its class is not the released one
  for base in configs(name):
    for key, default in KEYS[name].items():
      if key not in base or default == reference.NONE or key in NESTED:
        continue
      if key == 'num_key_value_heads' and 'kv_lora_rank' in base:
        continue  # latent attention has as many as heads, whatever the default
      absent, _ = read_config(without_key(base, (key,)))
      given, _ = read_config(base | {key: default})
      if isinstance(absent, ConfigError):
        asked = f'no key {key}' in str(absent) or str(absent) == str(given)
        assert asked or isinstance(given, ConfigError), (key, absent)
      elif isinstance(given, ConfigError):
        # null where it is refused, or what another key says otherwise here
        assert default is None or 'make them the same' in str(given), key
      else:
        assert given == absent, key


@pytest.mark.parametrize('name', ROPE)
def test_rotary_frequencies_are_those_of_the_class(name, read_config):
  for form, changes in reference.FORMS.items():
    wanted = ROPE[name][form]
    cfg, warned = read_config(reference.bare(name) | changes)
    assert not warned, form
    if not_ours(name, form) or isinstance(wanted, str):
      assert isinstance(cfg, ConfigError), form
      continue
    assert not isinstance(cfg, ConfigError), (form, cfg)
    mixer = next(
      layer.mixer for layer in cfg.layers if hasattr(layer.mixer, 'rope_theta')
    )
    if wanted is None:
      assert mixer.rotary_dim == 0, form
      continue
    turn = mixer.turn
    found = rope.frequencies(turn['rotary_dim'], turn['theta'], turn['yarn'])
    frequencies, length = wanted
    assert found.shape == (len(frequencies),), form
    np.testing.assert_allclose(found, frequencies, rtol=5e-6, err_msg=form)
    np.testing.assert_allclose(turn['length'], length, 1e-6, err_msg=form)


def not_ours(name, form):
  """Whether we refuse what the class computes, or what it leaves unread."""
  return (
    form == 'linear'
    or (form.startswith('half') and name in reference.WHOLE)
    or (form == 'rotary_dim' and name != 'minimax_m2')
  )


@pytest.mark.parametrize('key', ['rope_ratio', 'use_yarn', 'rotary_base'])
def test_an_unknown_key_of_rotary_positions_is_refused(key, read_config):
  result, _ = read_config(released('qwen3') | {key: 2})
  assert f'{key} is 2; give null; qwen3 has no such positions' in str(result)


@pytest.mark.parametrize('kind', ['default', 'yarn'])
def test_a_key_that_the_type_does_not_have_is_refused(kind, read_config):
  table = {'rope_type': kind, 'factor': 2.0, 'alpha': 3.0}
  result, _ = read_config(released('qwen3') | {'rope_scaling': table})
  other = 'factor' if kind == 'default' else 'alpha'
  assert f'rope_scaling.{other} is' in str(result)


def test_two_places_that_differ_are_refused(read_config):
  for name, changes in [
    ('qwen3', {'rope_theta': 5e5, 'rope_parameters': {'rope_theta': 1e6}}),
    ('qwen3', {'rope_scaling': reference.LONG, 'rope_theta': None}),
    ('qwen3_next', {'rope_parameters': {'partial_rotary_factor': 0.5}}),
    ('minimax_m2', {'rotary_dim': 4}),
    ('kimi_linear', {'n_group': 2}),
    ('kimi_linear', {'layer_types': ['full_attention'] * 4}),
    ('deepseek_v32', {'mlp_layer_types': ['sparse'] * 3}),
    ('minimax_m1', {'layer_types': ['full_attention'] * 4}),
  ]:
    result, _ = read_config(released(name) | changes)
    assert isinstance(result, ConfigError), changes


def test_what_rope_scaling_replaces_may_not_say_more(read_config):
  """transformers drops rope_parameters and its theta, without a word."""
  base = configs('qwen3')[0]
  result, _ = read_config(base | {'rope_scaling': reference.LONG})
  assert 'makes rope_theta 10000.0 instead of 1000000.0' in str(result)
  given = reference.LONG | {'rope_theta': 1e6}
  result, warned = read_config(base | {'rope_scaling': given})
  assert result.layers[0].mixer.yarn.factor == 4 and not warned
