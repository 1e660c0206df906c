"""Mutated configurations: a model or one line, never another exception."""

import copy
import json
import warnings

import hypothesis
import pytest
from hypothesis import strategies as st

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.hf import families
from tests.parity import SYSTEMS, config_files

BASES = [
  json.loads(file.read_text())
  for name in SYSTEMS
  for file in config_files(name)
]
NUMBERS = [0, 1, -1, 2, 3, 64, 2**31, 10**400, 1e-300, 1e300, -0.0, 0.5]
TEXTS = [
  '',
  'yarn',
  'default',
  'silu',
  'full_attention',
  '1e-6',
  'a\nb',
  '\u2028',
]
odd = st.recursive(
  st.none()
  | st.booleans()
  | st.sampled_from(NUMBERS)
  | st.integers()
  | st.floats()
  | st.sampled_from(TEXTS)
  | st.text(max_size=4),
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(
      st.sampled_from(['rope_theta', 'rope_type', 'factor', 'x', '0', 'a\nb']),
      inner,
      max_size=3,
    )
  ),
  max_leaves=6,
)
change = st.tuples(
  st.sampled_from(['replace', 'delete', 'copy', 'nest', 'add', 'repeat']),
  st.integers(0, 10**6),
  st.integers(0, 10**6),
  odd,
)
NEW = (
  'rope_scaling rope_theta rope_parameters rotary_dim partial_rotary_factor'
  ' text_config layer_types mlp_layer_types first_k_dense_replace'
  ' per_layer_config linear_attn_config head_dim quantization_config a\nb'
).split(' ')


def places(node):
  """(object or list, key) of everything in a configuration."""
  found = list(node.items()) if isinstance(node, dict) else enumerate(node)
  for key, value in found:
    yield node, key
    if isinstance(value, dict | list):
      yield from places(value)


def mutate(found, kind, first, second, value):
  every = list(places(found))
  if not every:
    return
  node, key = every[first % len(every)]
  other, its = every[second % len(every)]
  if kind == 'replace':
    node[key] = value
  elif kind == 'delete':
    del node[key]
  elif kind == 'copy':
    node[key] = copy.deepcopy(other[its])
  elif kind == 'nest':
    node[key] = [node[key]] if second % 2 else {str(its): node[key]}
  elif kind == 'add':
    found[NEW[first % len(NEW)]] = value
  elif isinstance(node[key], list):
    node[key] = node[key] * (second % 3)


@hypothesis.settings(
  derandomize=True, max_examples=150, deadline=None, database=None
)
@hypothesis.given(st.sampled_from(BASES), st.lists(change, max_size=4))
def test_a_mutated_configuration_is_a_model_or_one_line(
  tmp_path_factory, base, changes
):
  found = copy.deepcopy(base)
  for each in changes:
    mutate(found, *each)
  said = read(tmp_path_factory.getbasetemp(), found)
  hypothesis.target(float(not said))


ODD = [None, True, -1, 0, 1.5, 2**31, 10**400, float('nan'), float('inf')]
ODD += ['x', '', 'a\nb', [], [None], [[1]], {}, {'x': 1}]


@pytest.mark.slow
@pytest.mark.parametrize('base', BASES, ids=lambda base: base['model_type'])
def test_an_odd_value_at_any_key_is_a_model_or_one_line(base, tmp_path):
  for first in range(len(list(places(base)))):
    for value in ODD:
      found = copy.deepcopy(base)
      mutate(found, 'replace', first, 0, value)
      read(tmp_path, found)


def read(folder, found):
  """Reads a configuration; returns the line that refuses it, or nothing."""
  (folder / 'config.json').write_text(json.dumps(found))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    try:
      family, cfg = families.read_config(folder)
    except ConfigError as error:
      said = str(error)
      assert said.startswith(str(folder / 'config.json: ')), said
    else:
      assert family in families.FAMILIES and isinstance(cfg, ModelConfig)
      said = ''
  lines = [said, *(str(warning.message) for warning in caught)]
  assert len(lines) < 3 and all(len(x.splitlines()) < 2 for x in lines), lines
  return said
