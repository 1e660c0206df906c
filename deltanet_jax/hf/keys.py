"""Reading a config.json, in the released keys or those of transformers 5."""

import json
import pathlib

from deltanet_jax.config import ConfigError

_REQUIRED = object()


class Keys:
  """The keys of a config.json.

  transformers 5 keeps what concerns rotary positions in `rope_parameters`,
  released files at the top and in `rope_scaling`; text models inside others
  are under `text_config`.
  """

  def __init__(self, found, where='config.json'):
    self.found = found | found.get('text_config', {})
    self.where = where
    self._rope = self.found.get('rope_parameters') or {}

  def get(self, *names, default=_REQUIRED):
    """The value of the first of `names` that is there.

    Raises:
      ConfigError: none is, and there is no default.
    """
    for name in names:
      if name in self.found:
        return self.found[name]
    if default is _REQUIRED:
      raise ConfigError(f'{self.where}: no key {" or ".join(names)}')
    return default

  def require(self, name, *supported, default=_REQUIRED):
    """Refuses a value that the model would need and we do not have."""
    value = self.get(name, default=default)
    if value not in supported:
      raise ConfigError(
        f'{self.where}: {name} is {value!r}; supported:'
        f' {", ".join(map(repr, supported))}'
      )

  def theta(self):
    """The base of the rotary frequencies."""
    if 'rope_theta' in self._rope:
      return self._rope['rope_theta']
    return self.get('rope_theta')

  def rotary_dim(self, head_dim):
    """How many channels of a head turn."""
    if self.found.get('rotary_dim') is not None:
      return self.found['rotary_dim']
    share = self._rope.get(
      'partial_rotary_factor', self.get('partial_rotary_factor', default=1.0)
    )
    return int(head_dim * share)

  def scaling(self):
    """The scaling of rotary positions as a dict with 'rope_type', or None."""
    found = self._rope or self.get('rope_scaling', default=None) or {}
    kind = found.get('rope_type', found.get('type', 'default'))
    return None if kind == 'default' else {**found, 'rope_type': kind}

  def no_scaling(self):
    """Refuses scaled rotary positions.

    Raises:
      ConfigError: they are scaled.
    """
    if self.scaling():
      raise ConfigError(
        f'{self.where}: rope scaling {self.scaling()["rope_type"]!r} is not'
        ' supported for this model; remove it'
      )

  def full_attention(self):
    """For each layer, whether it is softmax attention."""
    count = self.get('num_hidden_layers')
    kinds = self.get('layer_types', default=None)
    if kinds is None:
      every = self.get('full_attention_interval')
      return [i % every == every - 1 for i in range(count)]
    if len(kinds) != count:
      raise ConfigError(
        f'{self.where}: {len(kinds)} layer_types for num_hidden_layers {count}'
      )
    known = {'full_attention': True, 'linear_attention': False}
    for kind in kinds:
      if kind not in known:
        raise ConfigError(
          f'{self.where}: layer type {kind!r}; supported: {", ".join(known)}'
        )
    return [known[kind] for kind in kinds]


def read(folder):
  """Keys of the config.json in a folder.

  Raises:
    ConfigError: no such file, or no JSON object in it.
  """
  path = pathlib.Path(folder) / 'config.json'
  try:
    found = json.loads(path.read_text())
  except FileNotFoundError:
    raise ConfigError(
      f'{path}: no such file; give the folder of a released model'
    ) from None
  except (OSError, ValueError) as error:
    raise ConfigError(f'{path}: {error}') from error
  if not isinstance(found, dict):
    raise ConfigError(f'{path}: no JSON object')
  return Keys(found, str(path))
