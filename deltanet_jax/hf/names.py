"""Names of weight files, which are read from files and become paths."""

import json
import os
import pathlib

from deltanet_jax.config import ConfigError

INDEX = 'model.safetensors.index.json'
SUFFIX = '.safetensors'
SHARD_BYTES = 5 * 10**9  # most bytes of a file

AnyPath = str | pathlib.Path
Json = dict[str, object]  # an object in a file


def read_json(path: pathlib.Path) -> Json:
  """The JSON object in a file.

  Raises:
    ConfigError: it cannot be read, or is not a JSON object.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{path}: not JSON: {format_error(error)}') from error
  if not isinstance(value, dict):
    raise ConfigError(f'{path}: not a JSON object')
  return value


def format_error(error: Exception) -> str:
  """The text of an error in one line, escaped."""
  text = ' '.join(str(error).split())
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def list_files(path: pathlib.Path) -> list[str]:
  """The weight files of a folder, by its index if it has one.

  Raises:
    ConfigError: no folder, no file, or an index without valid names.
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
  """The files that the index of a folder names; None without an index."""
  index = path / INDEX
  if not index.is_file():
    return None
  weights = read_json(index).get('weight_map')
  if not isinstance(weights, dict):
    raise ConfigError(
      f'{index}: not an index of safetensors files; expected a weight_map of'
      ' tensors and their files'
    )
  return sorted(
    {
      require_name(file, f'{index}: {tensor!r:.200}')
      for tensor, file in weights.items()
    }
  )


def require_name(file: object, where: str) -> str:
  """Returns the name of a weight file in a folder; refuses any other.

  Raises:
    ConfigError: names the file and `where` it was found.
  """
  if (
    not isinstance(file, str)
    or {'', '.', '..'} & set(file.split('/'))
    or not file.endswith(SUFFIX)
    or not file.isprintable()
  ):
    raise ConfigError(
      f'{where}: file {file!r:.200}; expected a name in this folder, such as'
      f' model-00001-of-00002{SUFFIX} or part/model{SUFFIX}'
    )
  return file


def locate_file(folder: pathlib.Path, file: str) -> pathlib.Path:
  """The path of a weight file whose name passed `require_name`.

  The file may be a link, as in the cache of the hub; a linked folder must stay
  within `folder`.

  Raises:
    ConfigError: it leads outside.
  """
  path, root = folder / file, os.path.realpath(folder)
  parent = os.path.realpath(path.parent)
  if os.path.commonpath([parent, root]) != root:
    raise ConfigError(f'{path}: its folder is a link to {parent}, outside')
  return path
