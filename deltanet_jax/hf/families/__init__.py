"""Finds the family of a folder or a model.

Every module here is a family with a tuple `FAMILIES` of model kinds; a model is
written as the first kind that fits.
"""

import dataclasses
import importlib
import pkgutil
import re
import reprlib
import warnings
from collections.abc import Collection

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.config.mixers import MixerConfig
from deltanet_jax.hf import common
from deltanet_jax.hf.common import Family
from deltanet_jax.hf.keys import ConfigKeys, read_keys, show_key
from deltanet_jax.hf.names import AnyPath
from deltanet_jax.hf.spelling import Spelling

FAMILIES: tuple[Family, ...] = tuple(
  family
  for module in pkgutil.iter_modules(__path__, f'{__name__}.')
  for family in importlib.import_module(module.name).FAMILIES
)


def find_family(model_type: object, where: str) -> Family:
  """The family of a model_type in config.json.

  Raises:
    ConfigError: it is not supported.
  """
  for family in FAMILIES:
    if model_type in family.model_types:
      return family
  known = ', '.join(t for family in FAMILIES for t in family.model_types)
  raise ConfigError(
    f'{where}: model_type {model_type!r:.80} is not supported; supported:'
    f' {known}'
  )


def read_config(folder: AnyPath) -> tuple[Family, ModelConfig]:
  """(family, ModelConfig) of the config.json in a folder.

  A warning names the keys that are not read. Errors of our configuration
  classes get the name of the file.

  Raises:
    ConfigError: the file is missing or not supported.
  """
  keys = read_keys(folder)
  if 'optim' in keys and 'train' in keys:
    raise ConfigError(
      f'{keys.where} is that of a training run; open_model(folder) reads it'
    )
  try:
    model_type = keys.get('model_type', default=None)
    family = find_family(model_type or keys.top.get('model_type'), keys.where)
    cfg = family.read_config(keys)
    _report_unread(family, keys)
  except ConfigError:
    raise
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{keys.where}: {error}') from error
  return family, cfg


def _report_unread(family: Family, keys: ConfigKeys) -> None:
  """Warns of keys that were not read; refuses those of rotary positions."""
  harmless, unknown = common.collect_harmless_keys(family), []
  for place, name, value in keys.unread():
    key = (place.at + name).removeprefix('text_config.')
    if key in harmless:
      continue
    around = keys.top is not keys and place is keys.top
    if value is not None and not around and re.search('rope|rotary|yarn', key):
      place.refuse(name, value, f'null; {family.name} has no such positions')
    unknown.append(show_key(key))
  if unknown:
    warnings.warn(
      f'{keys.where}: ignored, as {family.name} has no such settings:'
      f' {", ".join(unknown)}',
      stacklevel=2,  # one location, so that it is shown once
    )


def add_mtp(
  family: Family, cfg: ModelConfig, names: Collection[str]
) -> ModelConfig:
  """cfg with multi-token prediction if the tensors have it."""
  if family.mtp is None:
    return cfg
  if Spelling(family, names).find(family.mtp.marker(cfg)) is None:
    return cfg
  return dataclasses.replace(cfg, mtp=family.mtp.layer(cfg))


def get_family(name: object) -> Family:
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


def match_family(cfg: ModelConfig) -> Family:
  """The first family whose config.json can describe a ModelConfig.

  Raises:
    ConfigError: none can.
  """
  for family in FAMILIES:
    try:
      if is_same_model(
        family.read_config(ConfigKeys(family.write_config(cfg))), cfg
      ):
        return family
    except (StopIteration, AttributeError, ValueError, TypeError):
      continue  # mixers of another family
  raise ConfigError(
    'no released family describes this model; give family= or like= (supported:'
    f' {", ".join(family.name for family in FAMILIES)})'
  )


def is_same_model(a: ModelConfig, b: ModelConfig) -> bool:
  """Whether two models are the same function of the same weights, apart from
  multi-token prediction, which config.json does not describe."""
  return _essence(a) == _essence(b)


def _essence(cfg: ModelConfig) -> tuple[object, ...]:
  layers = [
    (_without_form(layer.mixer), layer.ffn, layer.residual)
    for layer in cfg.layers
  ]
  sizes = cfg.vocab, cfg.d_model, cfg.tied
  return layers, sizes, cfg.norm_eps, cfg.zero_centered


def _without_form(mixer: MixerConfig) -> tuple[object, ...]:
  skip = ('form', 'chunk')
  fields = {k: v for k, v in vars(mixer).items() if k not in skip}
  return type(mixer), sorted(fields.items(), key=lambda item: item[0])
