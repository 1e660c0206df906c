"""Libraries that only some commands need: the extras of pyproject.toml."""

import importlib.util

from deltanet_jax.config.error import ConfigError

EXTRAS = {
  'matplotlib': 'plots',
  'tensorboardX': 'plots',
  'pyarrow': 'parquet',
}


def is_installed(library: str) -> bool:
  """True where a library can be imported; imports nothing."""
  return importlib.util.find_spec(library) is not None


def require_extra(library: str, purpose: str) -> None:
  """Raises ConfigError if `library`, one of EXTRAS, is not installed.

  purpose: what needs it, the subject of the message
  """
  if not is_installed(library):
    raise ConfigError(f'{purpose} needs {library}; {describe_extra(library)}')


def describe_extra(library: str) -> str:
  """Says how to install `library`, one of EXTRAS."""
  return f'pip install {library} (extra: deltanet_jax[{EXTRAS[library]}])'
