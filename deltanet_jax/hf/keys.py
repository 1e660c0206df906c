"""Reading a config.json: every key by what it may be, and which are not read.

A family asks for its keys; a value that cannot be is refused with file, key and
value. What nobody asked for is in `unread`, and `families.read` decides it.
"""

import math
import pathlib
import sys

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import names

_REQUIRED = object()
_MOST = sys.float_info.max
_LAYERS = 512  # no model is deeper; a file that says more is damaged

# of transformers' layer_types, with the names before version 5
ATTENTION = {'full_attention': True, 'attention': True}
KINDS = ATTENTION | {'linear_attention': False, 'mamba': False}


class Keys:
  """The keys of a config.json, or of an object in it.

  The keys of a text model inside another one are those of `text_config`; `top`
  are then the keys around it, otherwise these.

  Every reader takes a `default` for an absent key, and `null` for null where
  that is something else; without them both are refused. The first of several
  names is ours; all that are there must say the same.
  """

  def __init__(self, found, where='config.json', at=''):
    self.where, self.at, self.top = where, at, self
    self._found, self._read, self._tables = found, set(), []
    if not at and (text := self.table('text_config')):
      around = {k: v for k, v in found.items() if k != 'text_config'}
      self.top = Keys(around, where)
      self.at, self._found, self._tables = text.at, text._found, []

  def __contains__(self, name):
    return name in self._found

  def __bool__(self):
    return bool(self._found)

  def get(self, *names, default=_REQUIRED):
    """A value as it is.

    Raises:
      ConfigError: it is absent and there is no default, or names disagree.
    """
    return self._get(lambda keys, name: keys._found[name], names, default)

  def _get(self, read, names, default):
    self._read.update(names)
    value = agreed(read, [(self, name) for name in names], default)
    if value is _REQUIRED:
      raise ConfigError(f'{self.where}: no key {self.at}{" or ".join(names)}')
    return value

  def require(self, name, *supported, default=_REQUIRED):
    """Refuses a value that the model would need and we do not have."""
    value = self.get(name, default=default)
    if value not in supported:
      raise ConfigError(
        f'{self.where}: {self.at}{name} is {_short(value)}; supported:'
        f' {", ".join(map(repr, supported))}'
      )

  def without(self, *names):
    """Refuses settings of other models, unless they are null, false or 0."""
    for name in names:
      if value := self.get(name, default=None):
        self.refuse(name, value, 'null; the model has no such thing here')

  def size(self, *names, default=_REQUIRED, null=_REQUIRED, least=1):
    """A count or a width."""
    ok = lambda x: type(x) is int and least <= x < 2**31
    return self._typed(names, default, null, ok, f'an integer from {least}')

  def number(
    self, *names, default=_REQUIRED, null=_REQUIRED, above=0, most=_MOST
  ):
    """A finite number."""
    ok = lambda x: type(x) in (int, float) and above < x <= most
    what = 'a number' if above == -math.inf else f'a number above {above}'
    what += '' if most == _MOST else f' and at most {most}'
    return self._typed(names, default, null, ok, what)

  def flag(self, *names, default=_REQUIRED, null=_REQUIRED):
    ok = lambda x: type(x) is bool
    return self._typed(names, default, null, ok, 'true or false')

  def _typed(self, names, default, null, ok, expected):
    null = default if default is None else null

    def read(keys, name):
      value = keys._found[name]
      if value is None and null is not _REQUIRED:
        return null
      if not ok(value):
        keys.refuse(name, value, expected)
      return value

    return self._get(read, names, default)

  def refuse(self, name, value, expected):
    """Raises:
    ConfigError: always.
    """
    raise ConfigError(
      f'{self.where}: {plain(self.at + name)} is {_short(value)}; give'
      f' {expected}'
    )

  def table(self, name):
    """The keys of an object; none of an absent one or null."""
    value = self.get(name, default=None)
    if value is not None and not isinstance(value, dict):
      self.refuse(name, value, 'an object')
    table = Keys(value or {}, self.where, f'{self.at}{name}.')
    self._tables.append(table)
    return table

  def layers(self):
    """How many there are."""
    count = self.size('num_hidden_layers')
    if count > _LAYERS:
      self.refuse('num_hidden_layers', count, f'at most {_LAYERS}')
    return count

  def kinds(self, name, known):
    """Of each layer, by `known` {entry: kind}; None where there is no list."""
    found, count = self.get(name, default=None), self.layers()
    if found is None:
      return None
    if not isinstance(found, list):
      self.refuse(name, found, f'a list of {count}')
    if len(found) != count:
      raise ConfigError(
        f'{self.where}: {len(found)} {self.at}{name} for num_hidden_layers'
        f' {count}'
      )
    for kind in found:
      if type(kind) not in (str, int) or kind not in known:
        raise ConfigError(
          f'{self.where}: layer type {_short(kind)} in {self.at}{name};'
          f' supported: {", ".join(map(str, known))}'
        )
    return [known[kind] for kind in found]

  def full_attention(self):
    """For each layer, whether it is softmax attention."""
    kinds = self.kinds('layer_types', KINDS)
    if kinds is None:
      every = self.size('full_attention_interval', default=4)
      kinds = [i % every == every - 1 for i in range(self.layers())]
    return kinds

  def unread(self):
    """(place, name, value) of every key that nobody has asked for."""
    for name, value in self._found.items():
      if name not in self._read:
        yield self, name, value
    for table in self._tables:
      yield from table.unread()
    if self.top is not self:
      yield from self.top.unread()


def agreed(read, places, default):
  """The value that (keys, name) places have, which must be the same in all;
  the default when none has it.

  read: (keys, name) -> value

  Raises:
    ConfigError: they differ.
  """
  found = [(*place, read(*place)) for place in places if place[1] in place[0]]
  for keys, name, value in found[1:]:
    first, its, wanted = found[0]
    if value != wanted:
      raise ConfigError(
        f'{keys.where}: {first.at}{its} is {_short(wanted)} and'
        f' {keys.at}{name} is {_short(value)}; make them the same'
      )
  return found[0][2] if found else default


def plain(name):
  """A key as a message shows it, whatever is in it."""
  return name if name.isprintable() and len(name) < 80 else _short(name)


def _short(value):
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'


def read(folder):
  """Keys of the config.json in a folder.

  Raises:
    ConfigError: no such file, or no JSON object in it.
  """
  path = pathlib.Path(folder) / 'config.json'
  if not path.exists():
    raise ConfigError(
      f'{path}: no such file; give the folder of a released model'
    )
  return Keys(names.read_json(path), str(path))
