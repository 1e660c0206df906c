"""Libraries that only some commands need: extras of pyproject.toml."""

import importlib.util

from deltanet_jax.config.error import ConfigError

EXTRAS = {
  'matplotlib': 'plots',
  'tensorboardX': 'plots',
  'pyarrow': 'parquet',
}


def is_installed(library: str) -> bool:
  """Whether a library can be imported; imports nothing."""
  return importlib.util.find_spec(library) is not None


def require_extra(library: str, purpose: str) -> None:
  """Asked before a library of EXTRAS is imported.

  purpose: what needs it, the subject of the error's sentence

  Raises:
    ConfigError: it is not installed.
  """
  if not is_installed(library):
    raise ConfigError(f'{purpose} needs {library}; {describe_extra(library)}')


def describe_extra(library: str) -> str:
  """How a library of EXTRAS is installed."""
  return f'pip install {library} (extra: deltanet_jax[{EXTRAS[library]}])'
