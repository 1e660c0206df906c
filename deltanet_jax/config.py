"""Configurations: load from a Python file, override by name, keep as JSON.

Standard library only, so that a mistake on the command line is answered
before jax is imported. Every failure is a `ConfigError` of one line.
"""

import dataclasses
import difflib
import importlib
import inspect
import json
import pathlib
import traceback
import types
import typing
import warnings

from deltanet_jax import preset_names
from deltanet_jax.experiment import Experiment

PACKAGE = 'deltanet_jax'


class ConfigError(ValueError):
  """What the user gave cannot be run; the message says what to change."""


def load(name, released=None):
  """The `Experiment` of a preset, as 'qwen3:8b', or of a Python file.

  It is what the file's get_config() returns; a parameter `size` of that
  function takes what follows a colon in `name`.

  released: what a run starts from, with a `model` and a `tokenizer`. A file
  for such runs has get_config(released); of any other one the tokenizer is
  replaced.
  """
  name = str(name)
  try:
    path, size = preset_names.locate(name)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if (spelling := preset_names.respell(name)) is not None:
    warnings.warn(f'{name} is now {spelling}', stacklevel=2)
    name = spelling
  try:
    module = preset_names.run_file(path)
    name = name.removesuffix(f':{size}')
    cfg, trains_further = _call(name, module, size, released)
  except ConfigError:
    raise
  except SyntaxError as error:
    where = f'{error.filename or path}:{error.lineno or 1}'
    raise ConfigError(f'{where}: SyntaxError: {error.msg}') from error
  except Exception as error:
    raise ConfigError(_blame(path, error)) from error
  if not isinstance(cfg, Experiment):
    raise ConfigError(
      f'{path}: get_config() returned {_kind(cfg)}; return an Experiment'
    )
  try:
    _check_types(cfg, ())
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from error
  if released is not None and not trains_further:
    data = dataclasses.replace(cfg.data, tokenizer=released.tokenizer)
    cfg = dataclasses.replace(cfg, data=data)
  return cfg


def _call(name, module, size, released):
  """(what get_config of a file returns, whether it takes a released model).

  name: of the file, as it was given   module: its globals
  """
  get_config = module.get('get_config')
  if not callable(get_config):
    raise ConfigError(
      f'{name} has no function get_config(); add one that returns an Experiment'
    )
  takes = dict(inspect.signature(get_config).parameters)
  sized = takes.pop('size', None)
  sizes = module.get('SIZES', ())
  there = f'; there is {", ".join(sizes)}' if sizes else ''
  if size is not None and sized is None:
    raise ConfigError(f'{name} has no sizes; leave out :{size}')
  if size is not None and sizes and size not in sizes:
    raise ConfigError(f'{name} has no size {size!r}{there}')
  if sized and size is None and sized.default is sized.empty:
    raise ConfigError(f'no size given; write {name}:SIZE{there}')
  if takes and released is None:
    raise ConfigError(
      f'{name} trains a released model further; give its folder as'
      ' --released=DIR'
    )
  sizing = {} if size is None else {'size': size}
  return get_config(*([released] if takes else []), **sizing), bool(takes)


def override(cfg, name, text):
  """`cfg` with one field replaced: override(cfg, 'optim.lr', '3e-4').

  Names join fields by dots, and index tuples: 'model.period.0.mixer.chunk'.
  The text is read as the field's annotation says: int, float, bool, str, or
  None where the field allows it.

  Raises:
    ConfigError: an unknown name, a text of another type, or a value that the
      configuration itself refuses.
  """
  return override_all(cfg, [(name, text)])


def override_all(cfg, changes):
  """`override` for many (name, text) pairs; the last of a name counts.

  All are set at once, so that two fields that must fit each other can change
  together.
  """
  tree = {}
  for name, text in changes:
    parts = name.split('.')
    value = _read_leaf(cfg, parts, text)
    node = tree
    for part in parts[:-1]:
      node = node.setdefault(part, {})
    node[parts[-1]] = value
  return _rebuild(cfg, tree)


def from_argv(argv):
  """(Experiment, the other arguments) of a command line, see `split_argv`."""
  path, changes, rest = split_argv(argv)
  return read(path, changes), rest


def read(path, changes):
  """The `Experiment` of a preset or file, see `load`, and (name, text) pairs.

  Raises:
    ConfigError: none is given, or it or a change is wrong.
  """
  if not path:
    files = sorted(map(str, pathlib.Path('configs').glob('*.py')))
    there = ', '.join(files or preset_names.list_families())
    raise ConfigError(f'no --config=FILE given; there is {there}')
  return override_all(load(path), changes)


def split_argv(argv):
  """(FILE or None, the (name, text) changes, the other arguments) of a command
  line.

  Takes `--config=FILE` and every `--config.NAME=VALUE` out of `argv`; a value
  may also be the next argument. What follows a bare `--` is left alone.
  """
  path, changes, rest = None, [], []
  argv = list(argv)
  while argv:
    arg = argv.pop(0)
    if arg == '--':
      rest += [arg, *argv]
      break
    flag, equals, value = arg.partition('=')
    if flag != '--config' and not flag.startswith('--config.'):
      rest.append(arg)
      continue
    if not equals:
      if not argv or argv[0].startswith('--'):
        raise ConfigError(f'{flag} has no value; write {flag}=VALUE')
      value = argv.pop(0)
    if flag == '--config':
      path = value
    else:
      changes.append((flag.removeprefix('--config.'), value))
  return path, changes, rest


def to_json(cfg):
  """`cfg` as JSON text; `from_json` gives an equal configuration back."""
  return json.dumps(_encode(cfg), indent=2, allow_nan=False)


def from_json(text, kind=None):
  """The configuration that `to_json` wrote.

  kind: its class, if only one will do

  Raises:
    ConfigError: no JSON, a type that is no configuration of this package, or
      fields that this version of the type refuses.
  """
  try:
    found = _decode(json.loads(text))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ConfigError(f'no JSON configuration: {error}') from error
  if not isinstance(found, kind or object):
    raise ConfigError(f'no JSON of an {kind.__name__}')
  _check_types(found, ())
  return found


def difference(a, b):
  """Lines 'optim.lr: 0.001 != 0.002', one for each value not shared."""
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


def _brief(value):
  if dataclasses.is_dataclass(value):
    return type(value).__name__
  if isinstance(value, tuple):
    return f'{len(value)} entries'
  return repr(value)


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
  """The value and annotation of the field or entry `part` of `node`."""
  inside = f' in {parent}' if parent else ''
  if dataclasses.is_dataclass(node):
    names = [f.name for f in dataclasses.fields(node)]
    if part not in names:
      raise ConfigError(f'{flag}: no {part!r}{inside}{_suggest(part, names)}')
    return getattr(node, part), typing.get_type_hints(type(node))[part]
  if isinstance(node, tuple):
    if not node:
      raise ConfigError(f'{flag}: {parent} is empty')
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


def _options(hint):
  """The plain types that an annotation allows, as in int | None."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return typing.get_args(hint)
  return (hint,)


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
      if value == value:  # nan would be no setting, and equal no other
        return value
  raise ConfigError(f'{flag}={text}: give {_wanted(options)}')


_WORDS = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
  types.NoneType: 'None',
}


def _wanted(options):
  return ' or '.join(_WORDS.get(o, o.__name__) for o in options)


def _rebuild(node, tree):
  """`node` with the leaves of `tree`, inner fields first."""
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


def _blame(path, error):
  """'file:line: Kind: message' for the last line of the file that ran."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == str(path)
  ]
  line = f':{lines[-1]}' if lines else ''
  message = ' '.join(str(error).split())
  if type(error) is ValueError:
    return f'{path}{line}: {message}'
  return f'{path}{line}: {type(error).__name__}: {message}'


def _kind(value):
  return 'None' if value is None else f'a {type(value).__name__}'


def _check_types(value, path):
  """Every field holds what its annotation says."""
  for name, hint in typing.get_type_hints(type(value)).items():
    if typing.get_origin(hint) is typing.ClassVar:
      continue
    child, where = getattr(value, name), '.'.join((*path, name))
    if typing.get_origin(hint) is tuple:
      entry = typing.get_args(hint)[0]
      _check_type(child, tuple, where)
      for i, item in enumerate(child):
        _check_type(item, entry, f'{where}.{i}')
        _check_types(item, (*path, name, str(i)))
      continue
    _check_type(child, hint, where)
    if dataclasses.is_dataclass(child):
      _check_types(child, (*path, name))


def _check_type(value, hint, where):
  options = _options(hint)
  accepted = (*options, int) if float in options else options
  if isinstance(value, bool) and bool not in options:
    accepted = ()
  if not isinstance(value, accepted):
    raise ConfigError(f'{where} is {value!r}; give {_wanted(options)}')


def _encode(value):
  if dataclasses.is_dataclass(value):
    kind = type(value)
    fields = {
      f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)
    }
    return {'_type': f'{kind.__module__}:{kind.__qualname__}', **fields}
  if isinstance(value, tuple):
    return [_encode(item) for item in value]
  return value


def _decode(tree):
  if isinstance(tree, list):
    return tuple(_decode(item) for item in tree)
  if not isinstance(tree, dict):
    return tree
  fields = {name: _decode(value) for name, value in tree.items()}
  kind = _known_type(fields.pop('_type', None))
  try:
    return kind(**fields)
  except (AttributeError, TypeError, ValueError) as error:
    raise ConfigError(f'{kind.__name__}: {error}') from error


def _known_type(name):
  """The configuration class 'deltanet_jax.module:Class'."""
  path, _, kind = str(name).partition(':')
  if path.split('.')[0] != PACKAGE:
    raise ConfigError(f'{name!r} is no configuration of {PACKAGE}')
  try:
    found = getattr(importlib.import_module(path), kind, None)
  except ImportError as error:
    raise ConfigError(f'{name!r}: {error}') from error
  if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
    raise ConfigError(f'{name!r} is no configuration of {PACKAGE}')
  return found
