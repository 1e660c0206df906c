"""The names of presets, and the file and size that each stands for.

A preset is 'FAMILY:SIZE', a file of configs/ and a key of its table SIZES, or
'FAMILY' alone: its default size, or a file without sizes. A path takes a size
in the same way: 'configs/qwen3.py:8b'.
"""

import ast
import difflib
import glob
import inspect
import os
import pathlib
import runpy
import sys
import typing
from collections.abc import Callable, Mapping

from deltanet_jax.config.error import ConfigError


class PresetFile(typing.TypedDict, total=False):
  """The globals of a preset's file that are read."""

  SIZES: Mapping[str, object]
  get_config: Callable[..., object]  # returns an Experiment, or should


def find_folder() -> pathlib.Path:
  """The folder of the presets: inside the installed package, or configs/ of a
  clone."""
  package = pathlib.Path(__file__).parents[1]
  return (package if is_installed() else package.parent) / 'configs'


def is_installed() -> bool:
  """Whether the presets are those of an installed package, not of a clone."""
  return (pathlib.Path(__file__).parents[1] / 'configs').is_dir()


def list_families() -> list[str]:
  """The names of all preset files, sorted."""
  return sorted(path.stem for path in find_folder().glob('*.py'))


def run_file(path: pathlib.Path) -> PresetFile:
  """Runs a Python file and returns its globals.

  Adds the file's folder to sys.path, so that a user's own mixers beside it can
  be imported.
  """
  folder = str(path.parent.resolve())
  if folder not in sys.path:
    sys.path.append(folder)
  variables = runpy.run_path(str(path), run_name=path.stem)
  return typing.cast(PresetFile, variables)


def list_presets() -> list[str]:
  """Every preset that needs no released model, sizes in the tables' order."""
  names = []
  for family in list_families():
    module = run_file(find_folder() / f'{family}.py')
    if 'SIZES' in module:
      names += [f'{family}:{size}' for size in module['SIZES']]
    elif not inspect.signature(module['get_config']).parameters:
      names.append(family)
  return names


def list_former() -> dict[str, str]:
  """Maps a preset's former name, from when each was a file, to its name."""
  join = lambda name: name.replace(':', '_').replace('small_hybrid', 'hybrid')
  return {join(name): name for name in list_presets() if ':' in name}


def locate_preset(name: str) -> tuple[pathlib.Path, str | None]:
  """Returns (file, size or None) of a preset's name, present or former, or of
  a path; an existing path may hold a colon.

  Raises:
    ConfigError: there is none; the message names what there is.
  """
  place = _locate(name) or _locate(respell_preset(name) or name)
  if place is None:
    raise ConfigError(f'no preset or file {name}{_suggest(name)}')
  return place


def label_preset(name: str) -> str:
  """A short name of a preset or path: 'qwen3:8b' for configs/qwen3.py."""
  path, size = locate_preset(name)
  parameters = inspect.signature(run_file(path)['get_config']).parameters
  if size is None and 'size' in parameters:
    size = parameters['size'].default
  return path.stem if size is None else f'{path.stem}:{size}'


def describe_preset(name: str) -> str:
  """The first line of the docstring of a preset's file."""
  tree = ast.parse(locate_preset(name)[0].read_text())
  return (ast.get_docstring(tree) or '').split('\n')[0]


def respell_preset(name: str) -> str | None:
  """The present spelling of a former name or path, None for any other.

  Every preset was a file: configs/qwen3_8b.py is now configs/qwen3.py:8b.
  """
  if _locate(name):
    return None
  path, former = pathlib.Path(name), list_former()
  if path.suffix == '.py' and path.stem in former and _is_ours(path):
    return _spell_path(path, former[path.stem])
  return former.get(name)


def _locate(name: str) -> tuple[pathlib.Path, str | None] | None:
  if os.path.isfile(name):
    return pathlib.Path(name), None
  file, colon, size = name.rpartition(':')
  if colon and os.path.isfile(file):
    return pathlib.Path(file), size
  family, colon, size = name.partition(':')
  if family in list_families():
    return find_folder() / f'{family}.py', size if colon else None
  return None


def _is_ours(path):
  return path.parent.resolve() == find_folder().resolve()


def _spell_path(path, name):
  """The preset `name` as a path beside `path`."""
  family, _, size = name.partition(':')
  return f'{path.with_name(family)}.py:{size}'


def _suggest(name: str) -> str:
  """The end of a message: the nearest name, or all names."""
  path, former = pathlib.Path(name), list_former()
  if not os.path.isdir(path.parent):  # a path of the clone, given elsewhere
    name = path.name.replace('.py', '')
    path = pathlib.Path(name)
  if path.suffix == '.py' or path.name != name:
    names = sorted(glob.glob('*.py', root_dir=path.parent))
    files = {name: str(path.with_name(name)) for name in names}
    others = former if _is_ours(path) else {}
    others = {f'{x}.py': _spell_path(path, name) for x, name in others.items()}
  else:
    files = {family: family for family in list_families()}
    others = former | {name: name for name in former.values()}
  options = others | files
  if close := difflib.get_close_matches(path.name, options, n=1):
    return f'; did you mean {options[close[0]]}?'
  return f'; there is {", ".join(files.values())}' if files else ''
