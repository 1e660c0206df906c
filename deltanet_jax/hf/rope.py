"""Reads and writes the rotary positions of a config.json.

transformers 5 has everything in `rope_parameters`. Released files have
`rope_theta` and `partial_rotary_factor` at the top and the rest in
`rope_scaling`, which in transformers replaces `rope_parameters`. Programs
differ in what they read, so contradictions are refused.
"""

import math
from typing import TypedDict

from deltanet_jax.config import ConfigError
from deltanet_jax.config.mixers import AttentionConfig, MLAConfig, YarnConfig
from deltanet_jax.hf.keys import ConfigKeys, get_agreed
from deltanet_jax.hf.names import Json


class Positions(TypedDict):
  """Fields of an AttentionConfig."""

  rotary_dim: int
  rope_theta: float
  yarn: YarnConfig | None


def read_positions(
  keys: ConfigKeys,
  width: int,
  *,
  theta: float = 1e4,
  share: float | None = None,
  rotary_dim: bool = False,
  nope: bool = False,
) -> Positions:
  """rotary_dim, rope_theta and yarn of attention over `width` channels.

  theta, share: defaults of the family; share None: its class rotates all
    channels whatever the file says, so the file must agree
  rotary_dim: whether the family has such a key
  nope: whether a theta of null means no positions
  """
  scaling, parameters = (
    keys.table(name) for name in ('rope_scaling', 'rope_parameters')
  )

  def read(table: ConfigKeys) -> Positions:
    dim = _rotary_dim(keys, table, width, share, rotary_dim)
    base = _theta(keys, table, theta, nope)
    yarn = _yarn(keys, table)
    if base is None:
      return {'rotary_dim': 0, 'rope_theta': theta, 'yarn': None}
    return {'rotary_dim': dim, 'rope_theta': base, 'yarn': yarn}

  positions = read(scaling or parameters)
  if scaling and parameters:
    for name, value in read(parameters).items():
      first = dict(positions)[name]
      if value not in (first, None):
        raise ConfigError(
          f'{keys.where}: {scaling.at[:-1]} replaces rope_parameters, which'
          f' makes {name} {first} instead of {value}; make both equal or'
          ' remove one'
        )
  return positions


def _theta(
  keys: ConfigKeys, table: ConfigKeys, default: float, nope: bool
) -> float | None:
  def number(place: ConfigKeys, name: str) -> float | None:
    if nope:
      return place.number(name, above=1, null=None)
    return place.number(name, above=1)

  return get_agreed(number, [(p, 'rope_theta') for p in (table, keys)], default)


def _rotary_dim(
  keys: ConfigKeys,
  table: ConfigKeys,
  width: int,
  share: float | None,
  rotary_dim: bool,
) -> int:
  places = [(place, 'partial_rotary_factor') for place in (table, keys)]
  stated = get_agreed(
    lambda place, name: place.number(name, most=1), places, None
  )
  dim = int(width * (stated or share or 1))
  released = keys.size('rotary_dim', default=None) if rotary_dim else None
  wanted = released or (width if share is None else dim)
  if stated and dim != wanted:
    other = (
      f'rotary_dim is {released}' if released else 'this model rotates all'
    )
    raise ConfigError(
      f'{keys.where}: partial_rotary_factor is {stated}, which is {dim} of'
      f' {width} channels, and {other}; make it equal or remove it'
    )
  return wanted


def _yarn(keys: ConfigKeys, table: ConfigKeys) -> YarnConfig | None:
  kind = table.get('rope_type', 'type', default='default')
  if kind == 'default':
    return None
  if kind != 'yarn':
    name = 'rope_type' if 'rope_type' in table else 'type'
    raise ConfigError(
      f'{keys.where}: {table.at}{name}: rope scaling {kind!r:.80} is not'
      " supported; supported: 'default', 'yarn'"
    )

  def real(key: str, default: float | None) -> float | None:
    return table.number(key, default=default, null=None, above=-math.inf)

  name = 'original_max_position_embeddings'
  places = [(table, name), (keys, name)]
  context = lambda: keys.size('max_position_embeddings')
  original = get_agreed(ConfigKeys.size, places, None) or context()
  factor = table.number('factor', null=None)
  return YarnConfig(
    factor=float(factor or context() / original),
    original=original,
    fast=float(table.number('beta_fast', default=32, null=32)),
    slow=float(table.number('beta_slow', default=1, null=1)),
    mscale=float(real('mscale', 0) or 0),
    mscale_all_dim=float(real('mscale_all_dim', 0) or 0),
    attention_factor=real('attention_factor', None),
    # as in transformers, null is false
    truncate=table.flag('truncate', default=True, null=False),
  )


def write_positions(mixer: AttentionConfig | MLAConfig) -> Json:
  """The released keys of theta and YaRN of a mixer."""
  return {
    'rope_theta': mixer.rope_theta,
    'rope_scaling': mixer.yarn and {'type': 'yarn', **_write_yarn(mixer.yarn)},
  }


def write_parameters(
  mixer: AttentionConfig | MLAConfig, **more: object
) -> Json:
  """rope_parameters of theta and YaRN of a mixer, as in transformers."""
  return {
    'rope_type': 'yarn' if mixer.yarn else 'default',
    'rope_theta': mixer.rope_theta,
    **(_write_yarn(mixer.yarn) if mixer.yarn else {}),
    **more,
  }


def _write_yarn(yarn: YarnConfig) -> Json:
  settings: Json = {
    'factor': yarn.factor,
    'original_max_position_embeddings': yarn.original,
    'beta_fast': yarn.fast,
    'beta_slow': yarn.slow,
    'mscale': yarn.mscale,
    'mscale_all_dim': yarn.mscale_all_dim,
  }
  if yarn.attention_factor is not None:
    settings['attention_factor'] = yarn.attention_factor
  if not yarn.truncate:
    settings['truncate'] = False
  return settings
