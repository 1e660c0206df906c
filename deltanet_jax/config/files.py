"""Text and JSON files, written atomically. Standard library only."""

import json
import math
import os
import pathlib

from deltanet_jax.config.error import ConfigError

Json = None | bool | int | float | str | list['Json'] | dict[str, 'Json']
JsonObject = dict[str, Json]


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file atomically: a reader sees the old or the new text."""
  temporary = path.with_name(path.name + '.tmp')
  try:
    with open(temporary, 'w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)  # the disk may be full
    raise


def format_json(tree: object) -> str:
  """Returns a tree as standard JSON, see `replace_nonfinite`."""
  return json.dumps(replace_nonfinite(tree), indent=2, allow_nan=False) + '\n'


def replace_nonfinite(tree: object) -> object:
  """Replaces inf and nan in a tree, which JSON does not have, by None."""
  if isinstance(tree, dict):
    return {name: replace_nonfinite(value) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [replace_nonfinite(value) for value in tree]
  if isinstance(tree, float) and not math.isfinite(tree):
    return None
  return tree


def read_json(path: pathlib.Path) -> JsonObject:
  """Returns the JSON object in a file.

  Raises:
    ConfigError: the file holds anything else.
  """
  try:
    tree = json.loads(read_text(path))
  except (ValueError, RecursionError) as error:
    raise ConfigError(
      f'{path}: no JSON: {" ".join(str(error).split())}; remove the file'
    ) from error
  if not isinstance(tree, dict):
    raise ConfigError(f'{path}: no JSON object; remove the file')
  return tree


def read_text(path: pathlib.Path) -> str:
  """Returns the text of a file; ConfigError where it cannot be read."""
  try:
    return path.read_bytes().decode()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{path}: cannot be read: {error}') from error
