"""The configuration of a run: classes, files, command line overrides, JSON.

Standard library only: a configuration is read, changed and checked before jax
is imported.
"""

from deltanet_jax.config.error import ConfigError
from deltanet_jax.config.load import (
  find_classes,
  load,
  parse_argv,
  read_experiment,
  split_argv,
)
from deltanet_jax.config.overrides import override_field, override_fields
from deltanet_jax.config.stored import (
  find_own_classes,
  from_json,
  list_differences,
  to_json,
)

__all__ = (
  'ConfigError',
  'find_classes',
  'list_differences',
  'parse_argv',
  'from_json',
  'load',
  'override_field',
  'override_fields',
  'find_own_classes',
  'read_experiment',
  'split_argv',
  'to_json',
)
