"""Released weights: folders of safetensors with a config.json.

model, params = hf.load_model(folder)
hf.save_model(folder, model, params)
"""

import pathlib
from typing import TYPE_CHECKING

from deltanet_jax.hf.names import SHARD_BYTES

if TYPE_CHECKING:
  from jax.sharding import Mesh
  from jax.typing import DTypeLike

  from deltanet_jax.hf.store import ReleasedLM
  from deltanet_jax.model import HybridLM
  from deltanet_jax.parallel.sharding import Params


def load_model(
  folder: str | pathlib.Path,
  *,
  dtype: 'DTypeLike' = 'float32',
  mesh: 'Mesh | None' = None,
) -> 'tuple[ReleasedLM, Params]':
  """See `hf.store.load_model`; a converted folder will do too."""
  from deltanet_jax.hf import converted, store

  module = converted if converted.is_converted(folder) else store
  return module.load_model(folder, dtype=dtype, mesh=mesh)


def save_model(
  folder: str | pathlib.Path,
  model: 'HybridLM',
  params: 'Params',
  *,
  family: str | None = None,
  like: str | pathlib.Path | None = None,
  end: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """See `hf.store.save_model`."""
  from deltanet_jax.hf import store

  store.save_model(
    folder,
    model,
    params,
    family=family,
    like=like,
    end=end,
    shard_bytes=shard_bytes,
  )
