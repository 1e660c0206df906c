"""Finds the files of `data.path` and reads their documents."""

import fnmatch
import glob
import json
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deltanet_jax.config import ConfigError
from deltanet_jax.config.extras import require_extra

COMPRESSED = ('.gz', '.bz2', '.xz', '.zst', '.zip')


class Document(NamedTuple):
  """`content` is never empty; `source` names file and line for errors."""

  source: str
  content: bytes


def find_files(patterns: str) -> list[str]:
  """The sorted files that match globs separated by commas.

  `**` matches any number of folders. A glob that begins with '!' excludes its
  matches, '!**/...' in any folder: 'lib/**/*.py,!**/tests/**'. Symbolic links
  are followed. A file with several names is read once, under the name with the
  fewest links; a glob excludes it by this name or by its real path.

  Raises:
    ConfigError: a glob matches no file, no file is left, or a link is broken.
  """
  globs = [part.strip() for part in patterns.split(',') if part.strip()]
  unwanted = [_parts(p.removeprefix('!')) for p in globs if p.startswith('!')]
  wanted: set[str] = set()
  for pattern in globs:
    if pattern.startswith('!'):
      continue
    matches = map(os.path.abspath, _matches(os.path.expanduser(pattern)))
    paths = {path for path in matches if not os.path.isdir(path)}
    if not paths:
      raise ConfigError(
        f'data.path={patterns!r}: no file matches {pattern!r}; give globs of'
        " existing files, separated by commas, such as 'texts/**/*.txt'"
      )
    wanted |= paths
  names = [
    name
    for real, name in _named_once(wanted, unwanted)
    if real == name or not _excluded(real, unwanted)
  ]
  for path in names:
    if not os.path.exists(path):
      raise ConfigError(
        f'data.path={patterns!r}: {path} is a link to {os.readlink(path)},'
        f" which does not exist; fix it, or exclude it by adding '!{path}'"
      )
  files = sorted(filter(os.path.isfile, names))
  if not files:
    raise ConfigError(
      f'data.path={patterns!r}: no file matches ({len(wanted)} excluded); give'
      ' a glob that also matches files that are not excluded'
    )
  return files


def _matches(pattern):
  """Paths that a glob matches. `**` enters every folder once, so that cycles of
  links end."""
  parts = pattern.split('/')
  if '**' not in parts:
    yield from glob.iglob(pattern)
    return
  i = parts.index('**')
  rest = '/'.join(parts[i + 1 :]) or '*'
  for top in glob.iglob('/'.join(parts[:i]) + '/') if i else ['.']:
    for folder in _folders(top):
      yield from _matches(os.path.join(glob.escape(folder), rest))


def _folders(top):
  """`top` and all folders below it but hidden ones, each once, if possible by a
  name without links."""
  seen, links = set(), [top]
  while links:
    plain = [links.pop(0)]
    while plain:
      folder = plain.pop()
      real = os.path.realpath(folder)
      if real in seen:
        continue
      seen.add(real)
      yield folder
      try:
        inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
      except OSError:  # as glob does
        continue
      for entry in inside:
        if entry.is_dir() and not entry.name.startswith('.'):
          (links if entry.is_symlink() else plain).append(entry.path)


def _named_once(paths, unwanted):
  """(real path, name) of the files of `paths`, without names that match
  `unwanted`."""
  folders, names = {}, {}
  for path in paths:
    if _excluded(path, unwanted):
      continue
    folder, name = os.path.split(path)
    if folder not in folders:
      folders[folder] = os.path.realpath(folder)
    real = os.path.join(folders[folder], name)
    if os.path.islink(path):
      real = os.path.realpath(path)
    names.setdefault(real, []).append(path)
  return [(real, min(paths, key=_links)) for real, paths in names.items()]


def _links(path):
  """(number of links in a path, the path)."""
  parts = path.split('/')
  above = ('/'.join(parts[:i]) for i in range(2, len(parts) + 1))
  return sum(map(os.path.islink, above)), path


def _excluded(path, unwanted):
  return any(_match(_parts(path), pattern) for pattern in unwanted)


def _parts(path):
  path = os.path.expanduser(path)
  if not path.startswith('**'):
    path = os.path.abspath(path)
  return path.split('/')


def _match(parts, pattern):
  if not pattern:
    return not parts
  if pattern[0] == '**':
    rest = pattern[1:]
    return any(_match(parts[i:], rest) for i in range(len(parts) + 1))
  return (
    bool(parts)
    and fnmatch.fnmatchcase(parts[0], pattern[0])
    and _match(parts[1:], pattern[1:])
  )


def read_documents(files: Iterable[str], field: str) -> Iterator[Document]:
  """Yields the `Document`s of `files`, without empty ones.

  A .jsonl file has a document per line, a .parquet file one per row, both in
  `field`; any other file is one document of its bytes.

  Raises:
    ConfigError: a file cannot be read, or lacks `field`.
  """
  for path in files:
    try:
      yield from _reader(path)(path, field)
    except OSError as error:
      raise ConfigError(f'{path}: {error.strerror or error}') from error


def _reader(path):
  suffix = os.path.splitext(path)[1].lower()
  if suffix in COMPRESSED:
    raise ConfigError(
      f'{path}: {suffix} files are not supported; unpack it, or exclude it by'
      f" adding '!{path}' to data.path"
    )
  readers = {'.jsonl': _read_jsonl, '.parquet': _read_parquet}
  return readers.get(suffix, _read_whole)


def _read_whole(path, field):
  del field
  with open(path, 'rb') as file:
    content = file.read()
  if content:
    yield Document(path, content)


def _read_jsonl(path, field):
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      source = f'{path}:{number}'
      try:
        row = json.loads(line)
      # not JSON, not UTF-8, or nested too deep
      except (ValueError, RecursionError) as error:
        raise ConfigError(f'{source}: not JSON: {error}') from error
      if not isinstance(row, dict) or field not in row:
        names = ', '.join(row) if isinstance(row, dict) else 'no fields'
        raise ConfigError(_no_field(source, field, names))
      yield from _text_document(source, field, row[field])


def _read_parquet(path, field):
  require_extra('pyarrow', path)
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    with pq.ParquetFile(path) as file:
      if field not in file.schema_arrow.names:
        names = ', '.join(file.schema_arrow.names)
        raise ConfigError(_no_field(path, field, names))
      number = 0
      for batch in file.iter_batches(columns=[field]):
        for text in batch.column(0).to_pylist():
          number += 1
          yield from _text_document(f'{path} row {number}', field, text)
  except pa.ArrowException as error:
    message = ' '.join(str(error).split())
    raise ConfigError(f'{path}: not a parquet file: {message}') from error


def _text_document(source, field, text):
  if text is None or text == '':
    return
  if not isinstance(text, str):
    raise ConfigError(
      f'{source}: field {field!r} holds {type(text).__name__}, not text; give'
      ' the field of the text as data.field'
    )
  try:
    yield Document(source, text.encode())
  except UnicodeEncodeError as error:
    raise ConfigError(f'{source}: not valid text: {error}') from error


def _no_field(source, field, names):
  return (
    f'{source}: no field {field!r}; it has {names}; give the field of the text'
    ' as data.field'
  )
