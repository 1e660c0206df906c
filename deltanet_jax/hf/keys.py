"""Reads a config.json with checks, and knows which keys were not read.

A family reads its keys; a wrong value is refused with file, key and value. Keys
that nobody read are in `unread`, which `families.read_config` judges.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Never, TypeVar, cast

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import names
from deltanet_jax.hf.names import AnyPath, Json

K = TypeVar('K', str, int)
V = TypeVar('V')
D = TypeVar('D')  # type of a default
N = TypeVar('N')  # type that null stands for

# untyped: a reader without a default returns only values
_REQUIRED: Never = cast(Never, object())
_MOST = sys.float_info.max
_LAYERS = 512  # no model is deeper: the file is damaged

# layer_types of transformers, with the names before version 5
ATTENTION = {'full_attention': True, 'attention': True}
KINDS = ATTENTION | {'linear_attention': False, 'mamba': False}


class ConfigKeys:
  """The keys of a config.json, or of an object in it.

  Of a multimodal model these are the keys of `text_config`, and `top` are the
  outer ones; otherwise `top` are the same keys.

  Readers take a `default` for a missing key and `null` for the meaning of null;
  without them both are refused. A key may have several names, which must agree.
  """

  def __init__(self, values: Json, where: str = 'config.json', at: str = ''):
    self.where, self.at, self.top = where, at, self
    self._values, self._read = values, set[str]()
    self._tables: list[ConfigKeys] = []
    if not at and (text := self.table('text_config')):
      around = {k: v for k, v in values.items() if k != 'text_config'}
      self.top = ConfigKeys(around, where)
      self.at, self._values, self._tables = text.at, text._values, []

  def __contains__(self, name: str) -> bool:
    return name in self._values

  def __bool__(self) -> bool:
    return bool(self._values)

  def get(self, *names: str, default: D = _REQUIRED) -> object | D:
    """A value, unchecked.

    Raises:
      ConfigError: it is missing without a default, or names disagree.
    """
    return self._get(lambda keys, name: keys._values[name], names, default)

  def _get(
    self,
    read: 'Callable[[ConfigKeys, str], V]',
    names: tuple[str, ...],
    default: D,
  ) -> V | D:
    self._read.update(names)
    value = get_agreed(read, [(self, name) for name in names], default)
    if value is _REQUIRED:
      raise ConfigError(f'{self.where}: no key {self.at}{" or ".join(names)}')
    return value

  def require(
    self, name: str, *supported: object, default: object = _REQUIRED
  ) -> None:
    """Refuses a value that is not supported."""
    value = self.get(name, default=default)
    if value not in supported:
      raise ConfigError(
        f'{self.where}: {self.at}{name} is {_short(value)}; supported:'
        f' {", ".join(map(repr, supported))}'
      )

  def without(self, *names: str) -> None:
    """Refuses settings of other models unless they are null, false or 0."""
    for name in names:
      if value := self.get(name, default=None):
        self.refuse(name, value, 'null; this model does not support it')

  def size(
    self,
    *names: str,
    default: D = _REQUIRED,
    null: N = _REQUIRED,
    least: int = 1,
  ) -> int | D | N:
    """A count or a width."""
    ok = lambda x: type(x) is int and least <= x < 2**31
    return self._typed(names, default, null, ok, f'an integer from {least}')

  def number(
    self,
    *names: str,
    default: D = _REQUIRED,
    null: N = _REQUIRED,
    above: float = 0,
    most: float = _MOST,
  ) -> float | D | N:
    """A finite number."""
    ok = lambda x: type(x) in (int, float) and above < x <= most
    what = 'a number' if above == -math.inf else f'a number above {above}'
    what += '' if most == _MOST else f' and at most {most}'
    return self._typed(names, default, null, ok, what)

  def flag(
    self, *names: str, default: D = _REQUIRED, null: N = _REQUIRED
  ) -> bool | D | N:
    """A boolean."""
    ok = lambda x: type(x) is bool
    return self._typed(names, default, null, ok, 'true or false')

  def _typed(self, names, default, null, ok, expected):
    null = default if default is None else null

    def read(keys, name):
      value = keys._values[name]
      if value is None and null is not _REQUIRED:
        return null
      if not ok(value):
        keys.refuse(name, value, expected)
      return value

    return self._get(read, names, default)

  def refuse(self, name: str, value: object, expected: str) -> Never:
    """Raises a ConfigError."""
    raise ConfigError(
      f'{self.where}: {show_key(self.at + name)} is {_short(value)}; give'
      f' {expected}'
    )

  def table(self, name: str) -> 'ConfigKeys':
    """The keys of an object; no keys if it is missing or null."""
    value = self.get(name, default=None)
    if value is not None and not isinstance(value, dict):
      self.refuse(name, value, 'an object')
    table = ConfigKeys(value or {}, self.where, f'{self.at}{name}.')
    self._tables.append(table)
    return table

  def layers(self) -> int:
    """The number of layers."""
    count = self.size('num_hidden_layers')
    if count > _LAYERS:
      self.refuse('num_hidden_layers', count, f'at most {_LAYERS}')
    return count

  def kinds(self, name: str, known: Mapping[K, V]) -> list[V] | None:
    """The kind of every layer by `known` {entry: kind}; None without a list."""
    kinds, count = self.get(name, default=None), self.layers()
    if kinds is None:
      return None
    if not isinstance(kinds, list):
      self.refuse(name, kinds, f'a list of {count}')
    if len(kinds) != count:
      raise ConfigError(
        f'{self.where}: {len(kinds)} {self.at}{name} for num_hidden_layers'
        f' {count}'
      )
    for kind in kinds:
      if type(kind) not in (str, int) or kind not in known:
        raise ConfigError(
          f'{self.where}: layer type {_short(kind)} in {self.at}{name};'
          f' supported: {", ".join(map(str, known))}'
        )
    return [known[kind] for kind in kinds]

  def full_attention(self) -> list[bool]:
    """Whether each layer is softmax attention."""
    kinds = self.kinds('layer_types', KINDS)
    if kinds is None:
      every = self.size('full_attention_interval', default=4)
      kinds = [i % every == every - 1 for i in range(self.layers())]
    return kinds

  def unread(self) -> 'Iterator[tuple[ConfigKeys, str, object]]':
    """(keys, name, value) of every key that was not read."""
    for name, value in self._values.items():
      if name not in self._read:
        yield self, name, value
    for table in self._tables:
      yield from table.unread()
    if self.top is not self:
      yield from self.top.unread()


def get_agreed(
  read: Callable[[ConfigKeys, str], V],
  places: Iterable[tuple[ConfigKeys, str]],
  default: D,
) -> V | D:
  """The value at several (keys, name) places, which must agree; the default if
  no place has it.

  read: (keys, name) -> value

  Raises:
    ConfigError: they differ.
  """
  values = [
    (keys, name, read(keys, name)) for keys, name in places if name in keys
  ]
  for keys, name, value in values[1:]:
    first, its, wanted = values[0]
    if value != wanted:
      raise ConfigError(
        f'{keys.where}: {first.at}{its} is {_short(wanted)} and'
        f' {keys.at}{name} is {_short(value)}; make them the same'
      )
  return values[0][2] if values else default


def show_key(name: str) -> str:
  """A key, escaped for messages."""
  return name if name.isprintable() and len(name) < 80 else _short(name)


def _short(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'


def read_keys(folder: AnyPath) -> ConfigKeys:
  """The keys of the config.json in a folder.

  Raises:
    ConfigError: no such file, or not a JSON object.
  """
  path = pathlib.Path(folder) / 'config.json'
  if not path.exists():
    raise ConfigError(
      f'{path}: no such file; give the folder of a released model'
    )
  return ConfigKeys(names.read_json(path), str(path))
