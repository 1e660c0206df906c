"""Changes fields of a configuration by name and checks types of fields."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable

from deltanet_jax.config.error import ConfigError
from deltanet_jax.config.ranges import Configuration

C = typing.TypeVar('C', bound=Configuration)


def override_field(cfg: C, name: str, text: str) -> C:
  """Returns `cfg` with one field changed: override_field(cfg, 'optim.lr',
  '3e-4').

  A name joins fields, and indices of tuples, by dots:
  'model.period.0.mixer.chunk'. The text is parsed by the field's annotation:
  int, float, bool, str, or None where the field allows it.

  Raises:
    ConfigError: the name is unknown, the text has another type, or the
      configuration refuses the value.
  """
  return override_fields(cfg, [(name, text)])


def override_fields(cfg: C, changes: Iterable[tuple[str, str]]) -> C:
  """`override_field` for (name, text) pairs; of equal names the last counts.

  All are set at once, so that two fields that must fit can change together.
  """
  tree: dict = {}  # field names to new values, or to trees of the same kind
  for name, text in changes:
    parts = name.split('.')
    value = _read_leaf(cfg, parts, text)
    node = tree
    for part in parts[:-1]:
      node = node.setdefault(part, {})
    node[parts[-1]] = value
  return _rebuild(cfg, tree)


def suggest_field(cls: type, name: str) -> str | None:
  """Returns the field of a configuration class that is closest to `name`, as
  'train.steps' for 'steps' or 'step', or None.

  Fields of tuple entries, as a mixer's, are not searched.
  """
  fields = _list_fields(cls)
  ends = {field.rpartition('.')[2]: field for field in reversed(fields)}
  options = {field: field for field in fields} | ends
  close = difflib.get_close_matches(name, options, n=1)
  return options[close[0]] if close else None


def _list_fields(cls):
  """Dotted names of all fields, those of nested configurations included."""
  names = []
  for name, hint in typing.get_type_hints(cls).items():
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
      names += [f'{name}.{below}' for below in _list_fields(hint)]
    else:
      names.append(name)
  return names


def check_types(cfg: Configuration, path: tuple[str, ...] = ()) -> None:
  """Raises ConfigError for a field whose value is not of its annotated type;
  `path`: the names before the field's own."""
  for name, hint in typing.get_type_hints(type(cfg)).items():
    if typing.get_origin(hint) is typing.ClassVar:
      continue
    child, where = getattr(cfg, name), '.'.join((*path, name))
    if typing.get_origin(hint) is tuple:
      entry = typing.get_args(hint)[0]
      _check_type(child, tuple, where)
      for i, item in enumerate(child):
        _check_type(item, entry, f'{where}.{i}')
        check_types(item, (*path, name, str(i)))
      continue
    _check_type(child, hint, where)
    if dataclasses.is_dataclass(child) and not isinstance(child, type):
      check_types(child, (*path, name))


def _read_leaf(cfg, parts, text):
  node, hint, flag = cfg, type(cfg), '--config.' + '.'.join(parts)
  for i, part in enumerate(parts):
    node, hint = _child(node, part, '.'.join(parts[:i]), flag)
  if dataclasses.is_dataclass(node):
    names = ', '.join(f.name for f in dataclasses.fields(node))
    raise ConfigError(f'{flag} is a group; set one of its fields: {names}')
  if isinstance(node, tuple):
    raise ConfigError(
      f'{flag} is a tuple of {len(node)}; set a field of one entry, as in'
      f' {flag}.0.NAME=VALUE'
    )
  return _parse(hint, text, flag)


def _child(node, part, parent, flag):
  """Returns value and annotation of the field or entry `part` of `node`."""
  inside = f' in {parent}' if parent else ''
  if dataclasses.is_dataclass(node):
    names = [f.name for f in dataclasses.fields(node)]
    if part not in names:
      raise ConfigError(f'{flag}: no {part!r}{inside}{_suggest(part, names)}')
    return getattr(node, part), typing.get_type_hints(type(node))[part]
  if isinstance(node, tuple):
    if not node:
      raise ConfigError(f'{flag}: {parent} is empty, and has no field to set')
    if not part.isdecimal() or int(part) >= len(node):
      raise ConfigError(
        f'{flag}: no entry {part!r}{inside}; give 0 to {len(node) - 1}'
      )
    return node[int(part)], type(node[int(part)])
  raise ConfigError(f'{flag}: {parent} is a value and has no {part!r}')


def _suggest(word, names):
  close = difflib.get_close_matches(word, names, n=1)
  if close:
    return f'; did you mean {close[0]!r}?'
  return f'; there is {", ".join(names)}'


def _parse(hint, text, flag):
  options = _options(hint)
  if text == 'None' and types.NoneType in options:
    return None
  for option in options:
    if option is str:
      return text
    if option is bool and text.lower() in ('true', 'false'):
      return text.lower() == 'true'
    if option in (int, float):
      try:
        value = option(text)
      except ValueError:
        continue
      if value == value:  # nan is refused: it equals no value, not even itself
        return value
  raise ConfigError(f'{flag}={text}: give {_wanted(options)}')


def _rebuild(node, tree):
  """Returns `node` with the values of `tree`, nested fields first."""
  if isinstance(node, tuple):
    entries = list(node)
    for index, below in tree.items():
      entries[int(index)] = _rebuild(entries[int(index)], below)
    return tuple(entries)
  if not isinstance(tree, dict):
    return tree
  changes = {
    name: _rebuild(getattr(node, name), below) for name, below in tree.items()
  }
  try:
    return dataclasses.replace(node, **changes)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def _check_type(value, hint, where):
  options = _options(hint)
  accepted = (*options, int) if float in options else options
  if isinstance(value, bool) and bool not in options:
    accepted = ()
  if not isinstance(value, accepted):
    raise ConfigError(f'{where} is {value!r}; give {_wanted(options)}')


def _options(hint):
  """The plain types that an annotation allows, as in int | None."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return typing.get_args(hint)
  return (hint,)


_WORDS = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
  types.NoneType: 'None',
}


def _wanted(options):
  return ' or '.join(_WORDS.get(o, o.__name__) for o in options)
