"""Names of weight files: they come from files, and become paths."""

import json
import os
import pathlib

from deltanet_jax.config import ConfigError

INDEX = 'model.safetensors.index.json'
SUFFIX = '.safetensors'
SHARD_BYTES = 5 * 10**9  # of a file, at most

AnyPath = str | pathlib.Path
Json = dict[str, object]  # the object in a file


def read_json(path: pathlib.Path) -> Json:
  """The object in a file.

  Raises:
    ConfigError: it cannot be read, or is no JSON, or no object.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{path}: no JSON: {format_error(error)}') from error
  if not isinstance(value, dict):
    raise ConfigError(f'{path}: no JSON object')
  return value


def format_error(error: Exception) -> str:
  """An error's text in one line: what cannot be printed is escaped."""
  text = ' '.join(str(error).split())
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def list_files(path: pathlib.Path) -> list[str]:
  """The files that a folder's index names, or that lie in it without one.

  Raises:
    ConfigError: no folder, no file, or an index that names no files in it.
  """
  if not path.is_dir():
    raise ConfigError(f'{path}: no such folder')
  files = list_indexed(path)
  if files is None:
    files = sorted(file.name for file in path.glob(f'*{SUFFIX}'))
  if not files:
    raise ConfigError(
      f'{path}: no *{SUFFIX}; give the folder of a released model'
    )
  return files


def list_indexed(path: pathlib.Path) -> list[str] | None:
  """The files that a folder's index names, None if it has no index."""
  index = path / INDEX
  if not index.is_file():
    return None
  weights = read_json(index).get('weight_map')
  if not isinstance(weights, dict):
    raise ConfigError(
      f'{index}: no index of safetensors files; expected a weight_map of'
      ' tensors and their files'
    )
  return sorted(
    {
      require_name(file, f'{index}: {tensor!r:.200}')
      for tensor, file in weights.items()
    }
  )


def require_name(file: object, where: str) -> str:
  """The name itself, of a weight file within a folder; refuses any other.

  Raises:
    ConfigError: with the name, and `where` it was found.
  """
  if (
    not isinstance(file, str)
    or {'', '.', '..'} & set(file.split('/'))
    or not file.endswith(SUFFIX)
    or not file.isprintable()
  ):
    raise ConfigError(
      f'{where}: file {file!r:.200}; expected a name in this folder, as'
      f' model-00001-of-00002{SUFFIX} or part/model{SUFFIX}'
    )
  return file


def locate_file(folder: pathlib.Path, file: str) -> pathlib.Path:
  """The path of a weight file, whose name is as `require_name` wants it.

  The file may be a link, as it is in a cache of the hub; a linked folder may
  lead to another place in `folder` alone.

  Raises:
    ConfigError: it leads out.
  """
  path, root = folder / file, os.path.realpath(folder)
  parent = os.path.realpath(path.parent)
  if os.path.commonpath([parent, root]) != root:
    raise ConfigError(f'{path}: its folder is a link to {parent}, outside')
  return path
