"""Released weights: folders of safetensors with a config.json.

model, params = hf.load(folder)
hf.save(folder, model, params)
"""


def load(folder, **kwargs):
  """See `hf.store.load`; a folder made by `launch.convert` will do too."""
  from deltanet_jax.hf import convert, store

  module = convert if convert.is_converted(folder) else store
  return module.load(folder, **kwargs)


def save(folder, model, params, **kwargs):
  """See `hf.store.save`."""
  from deltanet_jax.hf import store

  store.save(folder, model, params, **kwargs)
