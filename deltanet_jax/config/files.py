"""Files of text and JSON, written whole or not at all.

Standard library only.
"""

import json
import math
import os

from deltanet_jax.config.error import ConfigError


def write_text(path, text):
  """Puts `text` in the file at once: a reader sees all of it or the old."""
  temporary = path.with_name(path.name + '.tmp')
  try:
    with open(temporary, 'w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)  # a full disk has no room for it
    raise


def format_json(tree):
  """A tree as JSON that every reader takes, see `replace_nonfinite`."""
  return json.dumps(replace_nonfinite(tree), indent=2, allow_nan=False) + '\n'


def replace_nonfinite(tree):
  """A tree for JSON, which has no inf and no nan: they become None."""
  if isinstance(tree, dict):
    return {name: replace_nonfinite(value) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [replace_nonfinite(value) for value in tree]
  if isinstance(tree, float) and not math.isfinite(tree):
    return None
  return tree


def read_json(path):
  """The dict in a file.

  Raises:
    ConfigError: there is something else in it.
  """
  try:
    found = json.loads(read_text(path))
  except (ValueError, RecursionError) as error:
    raise ConfigError(
      f'{path}: no JSON: {" ".join(str(error).split())}; remove it'
    ) from error
  if not isinstance(found, dict):
    raise ConfigError(f'{path}: no JSON object; remove it')
  return found


def read_text(path):
  """The text in a file; ConfigError where it cannot be read."""
  try:
    return path.read_bytes().decode()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{path}: cannot be read: {error}') from error
