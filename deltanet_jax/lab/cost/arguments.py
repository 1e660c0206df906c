"""Parses the ratios and mixers that `launch.calc` is given.

Standard library only, so that a mistake is refused before jax is imported.
Every failure is a ConfigError of one line.
"""

import dataclasses
import difflib

from deltanet_jax import config
from deltanet_jax.config import ConfigError, mixers

KINDS = {
  name.removesuffix('Config'): kind
  for name, kind in vars(mixers).items()
  if isinstance(kind, type)
  and issubclass(kind, mixers.MixerConfig)
  and kind is not mixers.MixerConfig
}


def parse_ratio(text):
  """(recurrent, attention) of '3' or '20:7'; None of None."""
  if text is None:
    return None
  first, _, second = text.partition(':')
  numbers = [int(x) if x.isdecimal() else -1 for x in (first, second or '1')]
  if min(numbers) < 0 or not any(numbers):
    raise ConfigError(
      f'--ratio={text}: give recurrent layers per attention layer, such as 3'
      ' or 20:7'
    )
  return tuple(numbers)


def change_mixer(cfg, items, flag):
  """The first attention or recurrent mixer of a model, changed; or a new one.

  flag: 'attention' or 'recurrent'   items: 'name=value' fields, and the name of
  a kind for a new mixer

  Returns None without items.
  """
  if not items:
    return None
  kinds = [x for x in items if '=' not in x]
  fields = dict(x.split('=', 1) for x in items if '=' in x)
  refusal = lambda why: ConfigError(f'--{flag}: {why}')
  attends = lambda kind: issubclass(kind, mixers.ATTENTION)
  is_attention = flag == 'attention'
  if kinds:
    names = [x for x, kind in KINDS.items() if attends(kind) == is_attention]
    if len(kinds) > 1 or kinds[0] not in names:
      near = _nearest(kinds[0], names)
      raise refusal(f'no kind {" ".join(kinds)!r}{near}')
    base, fields = _new(KINDS[kinds[0]], fields, flag)
  else:
    own = (layer.mixer for layer in cfg.layers)
    base = next((x for x in own if attends(type(x)) == is_attention), None)
    if base is None:
      raise refusal(
        'the model has no such layer to change; name a kind first, such as'
        ' --recurrent=KDA,heads=32,key_dim=128,value_dim=128'
      )
  try:
    return config.override_fields(base, fields.items())
  except ConfigError as error:
    text = str(error).replace('--config.', f'--{flag}: ')
    raise ConfigError(text) from error


def _new(kind, fields, flag):
  """(A mixer made of its required fields, the other fields)."""
  needed = [
    field.name
    for field in dataclasses.fields(kind)
    if field.default is dataclasses.MISSING
  ]
  if missing := [name for name in needed if name not in fields]:
    raise ConfigError(f'--{flag}: a new {kind.__name__} needs {missing[0]}=')
  try:
    base = kind(**{name: int(fields[name]) for name in needed})
  except ValueError as error:
    raise ConfigError(f'--{flag}: {error}') from error
  return base, {x: y for x, y in fields.items() if x not in needed}


def _nearest(name, names):
  # compares beginnings: 'Gated' finds GatedDeltaNet
  like = lambda x: difflib.SequenceMatcher(
    None, name, x[: len(name) + 1]
  ).ratio()
  best = max(names, key=like)
  if like(best) > 0.6:
    return f'; did you mean {best!r}?'
  return f'; there is {", ".join(names)}'
