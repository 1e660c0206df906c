"""Reads configurations from Python files and command lines.

Standard library only, so that a mistake on the command line is reported before
jax is imported. Every failure is a `ConfigError` of one line.
"""

import dataclasses
import inspect
import pathlib
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Protocol

from deltanet_jax.config import preset_names
from deltanet_jax.config.error import ConfigError
from deltanet_jax.config.experiment import Experiment, ModelConfig
from deltanet_jax.config.overrides import check_types, override_fields
from deltanet_jax.config.stored import is_config


class Released(Protocol):
  """A released model, as a run that starts from it needs it."""

  @property
  def model(self) -> ModelConfig: ...

  @property
  def tokenizer(self) -> str: ...


def load(
  name: str | pathlib.Path, released: Released | None = None
) -> Experiment:
  """Returns the `Experiment` of a preset, as 'qwen3:8b', or of a Python file.

  The file's get_config() returns it; its parameter `size` is what follows a
  colon in `name`.

  released: the model that a run starts from. It is the argument of a
  get_config(released); an Experiment of any other file gets its tokenizer.
  """
  preset = str(name)
  path, size = preset_names.locate_preset(preset)
  if (spelling := preset_names.respell_preset(preset)) is not None:
    warnings.warn(f'{preset} is now {spelling}', stacklevel=2)
    preset = spelling
  try:
    module = preset_names.run_file(path)
    preset = preset.removesuffix(f':{size}')
    cfg, trains_further = _call(preset, module, size, released)
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
    check_types(cfg)
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from error
  if released is not None and not trains_further:
    data = dataclasses.replace(cfg.data, tokenizer=released.tokenizer)
    cfg = dataclasses.replace(cfg, data=data)
  return cfg


def find_classes(name: str | pathlib.Path) -> tuple[type, ...]:
  """The configuration classes among a file's globals: `from_json` needs them
  where a run has mixers of a user's own.

  name: as for `load`
  """
  path, _ = preset_names.locate_preset(str(name))
  try:
    values = preset_names.run_file(path).values()
  except Exception as error:
    raise ConfigError(_blame(path, error)) from error
  return tuple(v for v in values if isinstance(v, type) and is_config(v))


def _call(name, module, size, released):
  """Calls get_config of a file: (its result, whether it takes `released`).

  name: the file as the user named it   module: its globals
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


def read_experiment(
  path: str | None, changes: Iterable[tuple[str, str]]
) -> Experiment:
  """Returns the `Experiment` of a preset or file, see `load`, with the fields
  of (name, text) pairs changed.

  Raises:
    ConfigError: there is no path, or the file or a change is wrong.
  """
  if not path:
    files = sorted(map(str, pathlib.Path('configs').glob('*.py')))
    names = files or preset_names.list_families()
    # the first trains as it is, the last one needs a released model
    rank = {'quickstart': 0, 'finetune': 2}
    names.sort(key=lambda name: rank.get(pathlib.Path(name).stem, 1))
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    raise ConfigError(
      f'no --config=FILE given; there is {", ".join(names[:5])}{more}'
    )
  return override_fields(load(path), changes)


def parse_argv(argv: Sequence[str]) -> tuple[Experiment, list[str]]:
  """Returns (Experiment, other arguments) of a command line (`split_argv`)."""
  path, changes, rest = split_argv(argv)
  return read_experiment(path, changes), rest


def split_argv(
  argv: Sequence[str],
) -> tuple[str | None, list[tuple[str, str]], list[str]]:
  """Splits a command line: (FILE or None, (name, text) changes, the other
  arguments).

  Takes `--config=FILE` and every `--config.NAME=VALUE` out of `argv`; a value
  may also be the next argument. Arguments after a bare `--` are not touched.
  """
  path: str | None = None
  changes: list[tuple[str, str]] = []
  rest, ahead = [], list(argv)
  while ahead:
    arg = ahead.pop(0)
    if arg == '--':
      rest += [arg, *ahead]
      break
    flag, equals, value = arg.partition('=')
    if flag != '--config' and not flag.startswith('--config.'):
      rest.append(arg)
      continue
    if not equals:
      if not ahead or ahead[0].startswith('--'):
        raise ConfigError(f'{flag} has no value; write {flag}=VALUE')
      value = ahead.pop(0)
    if flag == '--config':
      path = value
    else:
      changes.append((flag.removeprefix('--config.'), value))
  return path, changes, rest


def _blame(path, error):
  """'file:line: Kind: message', for the last line of the file that ran."""
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
