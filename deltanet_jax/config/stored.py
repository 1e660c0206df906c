"""Configurations as JSON, and the differences of two configurations.

A class is stored by its name, a user's own class as 'module:Class'.
"""

import dataclasses
import json
import typing
from collections.abc import Iterable

from deltanet_jax.config import experiment, mixers, objectives
from deltanet_jax.config.error import ConfigError
from deltanet_jax.config.overrides import check_types
from deltanet_jax.config.ranges import Configuration

PACKAGE = 'deltanet_jax'
C = typing.TypeVar('C', bound=Configuration)

# former names of classes and fields in stored files, to the present names
RENAMED = {
  'ObjectiveConfig': 'NextTokenConfig',
  'Settings': 'ProfileSettings',  # of a profile, in lab
}
RENAMED_FIELDS = {
  'ModelConfig': {'zero_centred': 'zero_centered'},
  'MoEConfig': {'renormalise': 'renormalize'},
}


def to_json(cfg: Configuration) -> str:
  """Returns `cfg` as JSON text; `from_json` returns an equal configuration."""
  return json.dumps(_encode(cfg), indent=2, allow_nan=False)


def from_json(
  text: str, kind: type[C] | None = None, classes: Iterable[type] = ()
) -> C:
  """Returns the configuration that `to_json` wrote.

  kind: its required class, None: any   classes: those it may hold besides this
  package's

  Raises:
    ConfigError: the text is no JSON, has an unknown class, or has fields that
      the class refuses.
  """
  known = {_type_name(c): c for c in (*_package_classes(), *classes)}
  try:
    cfg = _decode(json.loads(text), known)
  except (json.JSONDecodeError, RecursionError) as error:
    raise ConfigError(f'no JSON configuration: {error}') from error
  if kind is not None and not isinstance(cfg, kind):
    raise ConfigError(
      f'no JSON of an {kind.__name__}: it holds a {type(cfg).__name__}'
    )
  check_types(cfg)
  return cfg


def list_differences(a: object, b: object) -> list[str]:
  """Lines 'optim.lr: 0.001 != 0.002', one for each value that differs."""
  return list(_differences(a, b, ()))


def _differences(a, b, path):
  name = '.'.join(path) or 'config'
  if type(a) is type(b) and dataclasses.is_dataclass(a):
    for field in dataclasses.fields(a):
      pair = getattr(a, field.name), getattr(b, field.name)
      yield from _differences(*pair, (*path, field.name))
  elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
    for i, pair in enumerate(zip(a, b, strict=True)):
      yield from _differences(*pair, (*path, str(i)))
  elif a != b:
    yield f'{name}: {_brief(a)} != {_brief(b)}'


def find_own_classes(
  cfg: Configuration | tuple[Configuration, ...],
) -> set[type]:
  """The classes in a configuration that are not this package's."""
  if isinstance(cfg, tuple):
    return {kind for item in cfg for kind in find_own_classes(item)}
  if not dataclasses.is_dataclass(cfg):
    return set()
  values = [getattr(cfg, field.name) for field in dataclasses.fields(cfg)]
  own = find_own_classes(tuple(values))
  return own if ':' not in _type_name(type(cfg)) else own | {type(cfg)}


def _brief(value):
  if dataclasses.is_dataclass(value):
    return type(value).__name__
  if isinstance(value, tuple):
    return f'{len(value)} entries'
  return repr(value)


def _encode(value):
  if dataclasses.is_dataclass(value):
    fields = {
      f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)
    }
    return {'_type': _type_name(type(value)), **fields}
  if isinstance(value, tuple):
    return [_encode(item) for item in value]
  return value


def _type_name(kind):
  """'Class' for this package's, 'module:Class' for a user's."""
  module = kind.__module__
  if module.partition('.')[0] == PACKAGE:
    return kind.__name__
  return f'{module}:{kind.__name__}'


def _decode(tree, classes):
  if isinstance(tree, list):
    return tuple(_decode(item, classes) for item in tree)
  if not isinstance(tree, dict):
    return tree
  fields = {name: _decode(value, classes) for name, value in tree.items()}
  kind = _find_class(fields.pop('_type', None), classes)
  renamed = RENAMED_FIELDS.get(kind.__name__, {})
  fields = {renamed.get(name, name): value for name, value in fields.items()}
  try:
    return kind(**fields)
  except (AttributeError, TypeError, ValueError) as error:
    raise ConfigError(f'{kind.__name__}: {error}') from error


def _find_class(name, classes):
  module, colon, last = str(name).rpartition(':')
  if module.partition('.')[0] == PACKAGE:
    name = last  # older files have the module in the name
  name = RENAMED.get(name, name)
  if name in classes:
    return classes[name]
  if colon and module.partition('.')[0] != PACKAGE:
    raise ConfigError(
      f'{name!r:.80} is a class of a module of your own; give --config=FILE, a'
      f' configuration file that imports {last:.80} by its name'
    )
  raise ConfigError(f'{name!r:.80} is no configuration of {PACKAGE}')


def _package_classes():
  """The configuration classes of this package."""
  modules = experiment, mixers, objectives
  values = [value for module in modules for value in vars(module).values()]
  return [value for value in values if is_config(value)]


def is_config(value: object) -> bool:
  """True for a dataclass type."""
  return isinstance(value, type) and dataclasses.is_dataclass(value)
