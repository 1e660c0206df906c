"""Configurations from Python files and command lines.

Standard library only, so that a mistake on the command line is answered
before jax is imported. Every failure is a `ConfigError` of one line.
"""

import dataclasses
import difflib
import inspect
import pathlib
import traceback
import types

from deltanet_jax.config.error import ConfigError
from deltanet_jax.config.experiment import Experiment
from deltanet_jax.config.overrides import check_types, override_all


def load(path, released=None):
  """The `Experiment` that `get_config()` of the Python file `path` returns.

  released: what a run starts from, with a `model` and a `tokenizer`. A file
  for such runs has get_config(released); of any other one the tokenizer is
  replaced.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f'no configuration file {path}{_neighbours(path)}')
  # compiled by hand: an import would leave a cached copy beside the file
  module = types.ModuleType(path.stem)
  module.__file__ = str(path)
  try:
    exec(compile(path.read_bytes(), str(path), 'exec'), vars(module))
    if not callable(getattr(module, 'get_config', None)):
      raise ConfigError(
        f'{path} has no function get_config(); add one that returns an'
        ' Experiment'
      )
    takes = inspect.signature(module.get_config).parameters
    if takes and released is None:
      raise ConfigError(
        f'{path} trains a released model further; give its folder as'
        ' --released=DIR'
      )
    cfg = module.get_config(*([released] if takes else []))
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
    check_types(cfg, ())
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from error
  if released is not None and not takes:
    data = dataclasses.replace(cfg.data, tokenizer=released.tokenizer)
    cfg = dataclasses.replace(cfg, data=data)
  return cfg


def read(path, changes):
  """The `Experiment` of a configuration file and (name, text) pairs.

  Raises:
    ConfigError: no file is given, or it or a change is wrong.
  """
  if not path:
    example = pathlib.Path('configs', 'x.py')
    raise ConfigError(f'no --config=FILE given{_neighbours(example)}')
  return override_all(load(path), changes)


def from_argv(argv):
  """(Experiment, the other arguments) of a command line, see `split_argv`."""
  path, changes, rest = split_argv(argv)
  return read(path, changes), rest


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


def _neighbours(path):
  """What there is instead of the missing file `path`."""
  found = sorted(path.parent.glob('*.py'))
  close = difflib.get_close_matches(path.name, [p.name for p in found], n=1)
  if close:
    return f'; did you mean {path.parent / close[0]}?'
  if found:
    return f'; there is {", ".join(str(p) for p in found)}'
  return ''


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
