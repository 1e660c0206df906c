"""What a run is, and how it is said: classes, files, overrides, JSON.

Standard library only: a configuration is read, changed and checked before jax
is imported.
"""

from deltanet_jax.config.error import ConfigError
from deltanet_jax.config.load import classes, from_argv, load, read, split_argv
from deltanet_jax.config.overrides import override, override_all
from deltanet_jax.config.stored import (
  difference,
  from_json,
  own_classes,
  to_json,
)

__all__ = (
  'ConfigError',
  'classes',
  'difference',
  'from_argv',
  'from_json',
  'load',
  'override',
  'override_all',
  'own_classes',
  'read',
  'split_argv',
  'to_json',
)
