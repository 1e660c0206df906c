"""Rotary positions in a config.json: what is stated is computed or refused.

transformers 5 keeps everything in `rope_parameters`. Released files have
`rope_theta` and `partial_rotary_factor` at the top and the rest in
`rope_scaling`, which replaces a `rope_parameters` beside it, as in
transformers. Some readers look at the one place and some at the other, so two
places that say different things are refused.
"""

import math

from deltanet_jax.config import ConfigError
from deltanet_jax.config.mixers import YarnConfig
from deltanet_jax.hf.keys import Keys, agreed


def read(keys, width, *, theta=1e4, share=None, rotary_dim=False, nope=False):
  """rotary_dim, rope_theta and yarn of attention over `width` channels.

  theta, share: what the family's class takes where nothing is stated; a share
    of None turns all channels, whatever the file says, so that it must say so
  rotary_dim: whether the family has such a key
  nope: a theta of null says that there are no positions
  """
  scaling, parameters = (
    keys.table(name) for name in ('rope_scaling', 'rope_parameters')
  )

  def fields(table):
    dim = _rotary_dim(keys, table, width, share, rotary_dim)
    base = _theta(keys, table, theta, nope)
    found = {'rotary_dim': dim, 'rope_theta': base, 'yarn': _yarn(keys, table)}
    none = {'rotary_dim': 0, 'rope_theta': theta, 'yarn': None}
    return none if base is None else found

  found = fields(scaling or parameters)
  if scaling and parameters:
    for name, value in fields(parameters).items():
      if value not in (found[name], None):
        raise ConfigError(
          f'{keys.where}: {scaling.at[:-1]} replaces rope_parameters, and'
          f' {name} is then {found[name]} instead of {value}; say the same in'
          ' both, or remove one'
        )
  return found


def _theta(keys, table, default, nope):
  number = lambda place, name: place.number(name, above=1)
  if nope:
    number = lambda place, name: place.number(name, above=1, null=None)
  return agreed(number, [(p, 'rope_theta') for p in (table, keys)], default)


def _rotary_dim(keys, table, width, share, rotary_dim):
  places = [(place, 'partial_rotary_factor') for place in (table, keys)]
  number = lambda place, name: place.number(name, most=1)
  stated = agreed(number, places, None)
  dim = int(width * (stated or share or 1))
  released = keys.size('rotary_dim', default=None) if rotary_dim else None
  wanted = released or (width if share is None else dim)
  if stated and dim != wanted:
    other = f'rotary_dim is {released}' if released else 'all turn here'
    raise ConfigError(
      f'{keys.where}: partial_rotary_factor is {stated}, which is {dim} of'
      f' {width} channels, and {other}; say the same or remove it'
    )
  return wanted


def _yarn(keys, table):
  kind = table.get('rope_type', 'type', default='default')
  if kind == 'default':
    return None
  if kind != 'yarn':
    name = 'rope_type' if 'rope_type' in table else 'type'
    raise ConfigError(
      f'{keys.where}: {table.at}{name}: rope scaling {kind!r:.80} is not'
      " supported; supported: 'default', 'yarn'"
    )
  context = lambda: keys.size('max_position_embeddings')
  name = 'original_max_position_embeddings'
  original = agreed(Keys.size, [(table, name), (keys, name)], None) or context()
  real = {'above': -math.inf, 'null': None}
  return YarnConfig(
    factor=float(table.number('factor', null=None) or context() / original),
    original=original,
    fast=float(table.number('beta_fast', default=32, null=32)),
    slow=float(table.number('beta_slow', default=1, null=1)),
    mscale=float(table.number('mscale', default=0, **real) or 0),
    mscale_all_dim=float(
      table.number('mscale_all_dim', default=0, **real) or 0
    ),
    attention_factor=table.number('attention_factor', default=None, **real),
    # as in transformers, where null is false
    truncate=table.flag('truncate', default=True, null=False),
  )


def write(mixer):
  """The released keys of a mixer's theta and YaRN."""
  return {
    'rope_theta': mixer.rope_theta,
    'rope_scaling': mixer.yarn and {'type': 'yarn', **_write(mixer.yarn)},
  }


def write_parameters(mixer, **more):
  """transformers' rope_parameters of a mixer's theta and YaRN."""
  return {
    'rope_type': 'yarn' if mixer.yarn else 'default',
    'rope_theta': mixer.rope_theta,
    **(_write(mixer.yarn) if mixer.yarn else {}),
    **more,
  }


def _write(yarn):
  found = {
    'factor': yarn.factor,
    'original_max_position_embeddings': yarn.original,
    'beta_fast': yarn.fast,
    'beta_slow': yarn.slow,
    'mscale': yarn.mscale,
    'mscale_all_dim': yarn.mscale_all_dim,
  }
  if yarn.attention_factor is not None:
    found['attention_factor'] = yarn.attention_factor
  if not yarn.truncate:
    found['truncate'] = False
  return found
