"""Where a released model lies: a local folder, or an id of the Hugging Face
hub, whose files are fetched once and kept by `huggingface_hub`."""

import pathlib
import re

from deltanet_jax.config import ConfigError
from deltanet_jax.hf import names as weights

PREFIX = 'hub:'
FILES = ('*.safetensors', '*.json', '*.jinja', 'merges.txt')
_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?')


def names(given):
  """The names under which `find` may take it, the likelier one first."""
  path = str(pathlib.Path(given).expanduser().resolve())
  if given.startswith(PREFIX):
    return [given]
  if pathlib.Path(path).is_dir() or not _ID.fullmatch(given):
    return [path]
  return [PREFIX + given, path]


def find(given):
  """The local folder of `given`: a folder, 'hub:ORG/NAME', 'ORG/NAME' that is
  no folder here, either with '@REVISION' behind.

  Raises:
    ConfigError: there is no such folder, or it cannot be fetched.
  """
  name = names(given)[0]
  if name.startswith(PREFIX):
    return _fetch(name.removeprefix(PREFIX), given)
  if not pathlib.Path(name).is_dir():
    raise ConfigError(
      f'{given}: no such folder; give the folder of a released model, or'
      f' {PREFIX}ORG/NAME'
    )
  return pathlib.Path(name)


def _fetch(name, given):
  if not _ID.fullmatch(name):
    raise ConfigError(
      f'{given} is no id of a model; write {PREFIX}ORG/NAME or'
      f' {PREFIX}ORG/NAME@REVISION'
    )
  here = f'{given}: ' if given.startswith(PREFIX) else f'{given}: no folder; '
  try:
    import huggingface_hub
  except ImportError as error:
    raise ConfigError(
      f'{here}fetching it needs huggingface_hub; pip install huggingface_hub,'
      ' or give a folder'
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
    # in folders there are other formats of the same weights
    path = fetch(list(FILES), ['*/*'])
    more = [file for file in weights.listed(path) or () if '/' in file]
    return fetch(more, None) if more else path
  except ConfigError:
    raise
  except Exception as error:  # the network, the hub, the disk: many kinds
    text = ' '.join(str(error).split()) or type(error).__name__
    raise ConfigError(
      f'{here}the hub does not give it: {text[:300]}'
    ) from error
