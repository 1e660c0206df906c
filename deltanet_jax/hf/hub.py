"""Finds released models: a local folder, or an id on the Hugging Face hub,
which `huggingface_hub` downloads and caches."""

import pathlib
import re

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import names

PREFIX = 'hub:'
FILES = ('*.safetensors', '*.json', '*.jinja', 'merges.txt')
_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?')


def list_names(source: str) -> list[str]:
  """The names that `find_folder` may use, the likelier one first."""
  path = str(pathlib.Path(source).expanduser().resolve())
  if source.startswith(PREFIX):
    return [source]
  if pathlib.Path(path).is_dir() or not _ID.fullmatch(source):
    return [path]
  return [PREFIX + source, path]


def find_folder(source: str) -> pathlib.Path:
  """The local folder of `source`: a folder, 'hub:ORG/NAME', or 'ORG/NAME' if
  there is no such folder; ids may end in '@REVISION'.

  Raises:
    ConfigError: there is no such folder, or it cannot be downloaded.
  """
  name = list_names(source)[0]
  if name.startswith(PREFIX):
    return _fetch(name.removeprefix(PREFIX), source)
  if not pathlib.Path(name).is_dir():
    raise ConfigError(
      f'{source}: no such folder; give that of a run or of a released model,'
      f' or {PREFIX}ORG/NAME'
    )
  return pathlib.Path(name)


def _fetch(name: str, source: str) -> pathlib.Path:
  if not _ID.fullmatch(name):
    raise ConfigError(
      f'{source} is not the id of a model; give {PREFIX}ORG/NAME or'
      f' {PREFIX}ORG/NAME@REVISION'
    )
  here = f'{source}: ' + (
    '' if source.startswith(PREFIX) else 'no such folder; '
  )
  try:
    import huggingface_hub
  except ImportError as error:
    raise ConfigError(
      f'{here}downloading it needs huggingface_hub; pip install'
      ' huggingface_hub, or give a folder'
    ) from error
  repository, _, revision = name.partition('@')
  fetch = lambda patterns, others: pathlib.Path(
    huggingface_hub.snapshot_download(
      repository,
      revision=revision or None,
      allow_patterns=patterns,
      ignore_patterns=others,
    )
  )
  try:
    # subfolders have other formats of the same weights
    path = fetch(list(FILES), ['*/*'])
    more = [file for file in names.list_indexed(path) or () if '/' in file]
    return fetch(more, None) if more else path
  except ConfigError:
    raise
  except Exception as error:  # the network, the hub, the disk: many kinds
    text = ' '.join(str(error).split()) or type(error).__name__
    raise ConfigError(
      f'{here}it cannot be downloaded from the hub: {text[:300]}'
    ) from error
