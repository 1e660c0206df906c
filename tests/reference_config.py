"""What transformers' configuration classes read, and the rotary frequencies
that they compute: fixtures/keys.json and fixtures/rope.json.

  python -m tests.reference_config

writes both again. Needs requirements-oracle.txt.
"""

import copy
import dataclasses
import importlib
import inspect
import json
import pathlib
import re

from tests.fixtures.systems import SYSTEMS
from tests.parity import config_files

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
KEYS = json.loads((FIXTURES / 'keys.json').read_text())
ROPE = json.loads((FIXTURES / 'rope.json').read_text())
NESTED = ('rope_parameters', 'rope_scaling', 'linear_attn_config')
NONE = '(none)'  # default of a key that the class has no field for

YARN = {'rope_type': 'yarn', 'factor': 4.0}
LONG = YARN | {'original_max_position_embeddings': 4096}
# name -> changes of a config.json; null takes a key away
FORMS = {
  'nothing': {},
  'an empty rope_parameters': {'rope_parameters': {}},
  'a theta alone': {'rope_theta': 5e5},
  'a type alone': {'rope_parameters': {'rope_type': 'default'}},
  'theta at the top, a type in rope_parameters': {
    'rope_theta': 5e5,
    'rope_parameters': {'rope_type': 'default'},
  },
  'as released': {'rope_theta': 1e6, 'rope_scaling': LONG},
  'as released, by the old name': {
    'rope_theta': 1e6,
    'rope_scaling': {'type': 'yarn'}
    | {k: v for k, v in LONG.items() if k != 'rope_type'},
  },
  'both names': {'rope_parameters': LONG | {'type': 'yarn'}},
  'rope_scaling beside rope_parameters': {
    'rope_scaling': LONG | {'rope_theta': 1e6},
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6},
  },
  'yarn without theta': {'rope_parameters': LONG},
  'yarn without original': {'rope_parameters': YARN | {'rope_theta': 1e6}},
  'yarn with original at the top': {
    'rope_parameters': YARN | {'rope_theta': 1e6},
    'original_max_position_embeddings': 512,
  },
  'yarn without factor': {
    'rope_parameters': {k: v for k, v in LONG.items() if k != 'factor'}
  },
  'yarn whose factor is null': {'rope_parameters': LONG | {'factor': None}},
  'attention_factor': {'rope_parameters': LONG | {'attention_factor': 1.7}},
  'attention_factor null': {
    'rope_parameters': LONG | {'attention_factor': None}
  },
  'whole pairs': {'rope_parameters': LONG | {'truncate': True}},
  'parts of pairs': {'rope_parameters': LONG | {'truncate': False}},
  'truncate null': {'rope_parameters': LONG | {'truncate': None}},
  'one mscale': {'rope_parameters': LONG | {'mscale': 0.7}},
  'the other mscale': {'rope_parameters': LONG | {'mscale_all_dim': 0.7}},
  'two mscales': {
    'rope_parameters': LONG | {'mscale': 0.7, 'mscale_all_dim': 1.2}
  },
  'mscales null': {
    'rope_parameters': LONG | {'mscale': None, 'mscale_all_dim': None}
  },
  'betas': {'rope_parameters': LONG | {'beta_fast': 16, 'beta_slow': 0.5}},
  'betas null': {'rope_parameters': LONG | {'beta_fast': None}},
  'an original of a few tokens': {
    'rope_parameters': LONG | {'original_max_position_embeddings': 4}
  },
  'an original beyond the table': {
    'rope_parameters': LONG | {'original_max_position_embeddings': 10**9}
  },
  'half': {'rope_parameters': {'partial_rotary_factor': 0.5}},
  'half at the top': {'rope_theta': 1e6, 'partial_rotary_factor': 0.5},
  'half with yarn': {'rope_parameters': LONG | {'partial_rotary_factor': 0.5}},
  'half at the top, yarn': {
    'partial_rotary_factor': 0.5,
    'rope_scaling': LONG,
  },
  'rotary_dim': {'rotary_dim': 16},
  'linear': {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
  'theta null': {'rope_parameters': {'rope_theta': None}},
  'theta null at the top': {'rope_theta': None},
}
# classes whose default rotary embedding has no such part: there ours differs
WHOLE = ('qwen3', 'qwen3_moe', 'deepseek_v3', 'deepseek_v32', 'olmo_hybrid')
ROTARY = [x for x in SYSTEMS if x not in ('kimi_linear', 'minimax_m1')]


def configs(name):
  return [json.loads(file.read_text()) for file in config_files(name)]


def released(name):
  return configs(name)[-1]


def with_key(found, path, value):
  found = copy.deepcopy(found)
  at = found
  for key in path[:-1]:
    at = at[key]
  at[path[-1]] = value
  return found


def without_key(found, path):
  found = copy.deepcopy(found)
  at = found
  for key in path[:-1]:
    at = at[key]
  del at[path[-1]]
  return found


def paths(found, before=()):
  for key, value in found.items():
    yield (*before, key), value
    if isinstance(value, dict):
      yield from paths(value, (*before, key))


def bare(name):
  """A fixture's config.json without its rotary keys, and with heads that have
  32 channels to turn."""
  found = json.loads((FIXTURES / name / 'config.json').read_text())
  for key in ('rope_parameters', 'rope_scaling', 'rope_theta', 'rotary_dim'):
    found.pop(key, None)
  width = 'head_dim'
  if name.startswith('deepseek'):
    width = 'qk_rope_head_dim'
    if 'index_head_dim' in found:
      found['index_head_dim'] = 32
    del found['head_dim']
  return found | {width: 32, 'max_position_embeddings': 16384}


def classes(name):
  """(configuration class, the module of the model's classes)"""
  module, prefix, _ = SYSTEMS[name]
  text = 'Text' if name.startswith('qwen3_5') else ''
  at = f'transformers.models.{module}'
  config = importlib.import_module(f'{at}.configuration_{module}')
  model = importlib.import_module(f'{at}.modeling_{module}')
  return getattr(config, f'{prefix}{text}Config'), model


def keys(name):
  """{key: default} of what a configuration class takes by name, by another
  name, or out of the rest of a config.json."""
  cls, model = classes(name)
  found = {}
  for field in dataclasses.fields(cls):
    found[field.name] = (
      None if field.default is dataclasses.MISSING else field.default
    )
  named = set(cls.attribute_map) | set(cls.attribute_map.values())
  for base in cls.__mro__:
    for method in ('__post_init__', 'convert_rope_params_to_dict'):
      if method in vars(base) and base.__module__.startswith('transformers'):
        text = inspect.getsource(vars(base)[method])
        named.update(
          re.findall(r'kwargs\.(?:get|pop|setdefault)\(\s*"(\w+)"', text)
        )
  text = inspect.getsource(model)
  named.update(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', text))
  named |= {'quantization_config', 'original_max_position_embeddings'}
  return found | {key: NONE for key in sorted(named - found.keys())}


def frequencies(name, changes):
  """(inv_freq, length) of a class, None without positions, or its error."""
  cls, model = classes(name)
  # not by field: the released files come this way too
  try:
    config = cls.from_dict(copy.deepcopy(bare(name) | changes))
    if name == 'olmo_hybrid' and config.rope_parameters['rope_theta'] is None:
      return None
    rotary = next(
      value
      for key, value in vars(model).items()
      if re.fullmatch(r'\w+(?<!Vision)RotaryEmbedding', key)
    )(config)
  except Exception as error:
    return type(error).__name__
  number = lambda x: float(f'{float(x):.9g}')
  return [[*map(number, rotary.inv_freq)], number(rotary.attention_scaling)]


def tables():
  """{family: {form: what `frequencies` gives}}"""
  return {
    name: {form: frequencies(name, change) for form, change in FORMS.items()}
    for name in ROTARY
  }


def main():
  found = {name: keys(name) for name in SYSTEMS}
  (FIXTURES / 'keys.json').write_text(json.dumps(found, indent=1) + '\n')
  lines = [
    f' {json.dumps(name)}: {{\n'
    + ',\n'.join(
      f'  {json.dumps(form)}: {json.dumps(value)}'
      for form, value in table.items()
    )
    + '\n }'
    for name, table in tables().items()
  ]
  (FIXTURES / 'rope.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
  main()
