"""Released weights: folders of safetensors with a config.json.

model, params = hf.load_model(folder)
hf.save_model(folder, model, params)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from deltanet_jax.hf.converted import load_model as load_model
  from deltanet_jax.hf.store import save_model as save_model

_MODULES = {'load_model': 'converted', 'save_model': 'store'}


def __getattr__(name: str) -> object:
  """Imports the two functions, and with them jax, when they are used."""
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_MODULES[name]}')
  return getattr(module, name)
