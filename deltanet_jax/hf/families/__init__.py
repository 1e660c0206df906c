"""Which family does a folder or a model belong to?"""

import dataclasses
import re
import reprlib
import warnings

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import common, keys
from deltanet_jax.hf.families import (
  deepseek,
  kimi_linear,
  minimax_m1,
  minimax_m2,
  olmo_hybrid,
  qwen3,
  qwen3_next,
)
from deltanet_jax.hf.spelling import Spelling

FAMILIES = (
  qwen3.DENSE,
  qwen3.MOE,
  qwen3_next.NEXT,
  qwen3_next.DENSE,
  qwen3_next.MOE,
  olmo_hybrid.FAMILY,
  kimi_linear.FAMILY,
  minimax_m1.FAMILY,
  minimax_m2.FAMILY,
  deepseek.V3,
  deepseek.V32,
)


def find(model_type, where):
  """The family of a config.json's model_type.

  Raises:
    ConfigError: none.
  """
  for family in FAMILIES:
    if model_type in family.model_types:
      return family
  known = ', '.join(t for family in FAMILIES for t in family.model_types)
  raise ConfigError(
    f'{where}: model_type {model_type!r:.80} is not supported; supported:'
    f' {known}'
  )


def read(folder):
  """(family, ModelConfig) of the config.json in a folder.

  One warning names the keys that are not read. Here fails all reading of a
  config.json: a value that a class of ours refuses gets its file.

  Raises:
    ConfigError: the file is missing, or asks for what we do not have.
  """
  found = keys.read(folder)
  try:
    model_type = found.get('model_type', default=None)
    family = find(model_type or found.top.get('model_type'), found.where)
    cfg = family.read(found)
    _decide(family, found)
  except ConfigError:
    raise
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{found.where}: {error}') from error
  return family, cfg


def _decide(family, found):
  """Says which keys were not read, and refuses those of rotary positions."""
  harmless, unknown = common.harmless(family), []
  for place, name, value in found.unread():
    key = (place.at + name).removeprefix('text_config.')
    if key in harmless:
      continue
    around = found.top is not found and place is found.top
    if value is not None and not around and re.search('rope|rotary|yarn', key):
      place.refuse(name, value, f'null; {family.name} has no such positions')
    unknown.append(keys.plain(key))
  if unknown:
    warnings.warn(
      f'{found.where}: not read, for a {family.name} has no such settings:'
      f' {", ".join(unknown)}',
      stacklevel=2,  # one place, so that it is shown once
    )


def with_mtp(family, cfg, names):
  """cfg with its multi-token prediction when the tensors' names have it."""
  if family.mtp is None:
    return cfg
  if Spelling(family, names).find(family.mtp.marker(cfg)) is None:
    return cfg
  return dataclasses.replace(cfg, mtp=family.mtp.layer(cfg))


def named(name):
  """The family of that name.

  Raises:
    ConfigError: there is none.
  """
  for family in FAMILIES:
    if family.name == name:
      return family
  raise ConfigError(
    f'family is {reprlib.repr(name)}; give one of'
    f' {", ".join(family.name for family in FAMILIES)}'
  )


def of(cfg):
  """The first family whose config.json says all that a ModelConfig says.

  Raises:
    ConfigError: none does.
  """
  for family in FAMILIES:
    try:
      if same(family.read(keys.Keys(family.write(cfg))), cfg):
        return family
    except (StopIteration, AttributeError, ValueError, TypeError):
      continue  # another family's mixers
  raise ConfigError(
    'no released family describes this model; give family= or like= (supported:'
    f' {", ".join(family.name for family in FAMILIES)})'
  )


def same(a, b):
  """Whether two models are the same function of the same weights, apart from
  multi-token prediction, which no config.json has."""
  return _essence(a) == _essence(b)


def _essence(cfg):
  layers = [
    (_without_form(layer.mixer), layer.ffn, layer.residual)
    for layer in cfg.layers
  ]
  return (
    layers,
    cfg.vocab,
    cfg.d_model,
    cfg.tied,
    cfg.norm_eps,
    (cfg.zero_centred),
  )


def _without_form(mixer):
  skip = ('form', 'chunk')
  fields = {k: v for k, v in vars(mixer).items() if k not in skip}
  return type(mixer), sorted(fields.items(), key=lambda item: item[0])
