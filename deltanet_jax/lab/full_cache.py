"""A cache as a long text leaves it, made without the text."""

import jax
import jax.numpy as jnp

from deltanet_jax.mixers.base import UNWRITTEN
from deltanet_jax.model import init_cache


def make_cache(cfg, batch, slots, length, dtype):
  """A cache of `slots` slots that holds `length` tokens. Its values are noise,
  so that the top-k choice of sparse attention does not find them sorted."""
  shapes = lambda batch: jax.eval_shape(
    lambda: init_cache(cfg, batch, slots, dtype)
  )

  def fill(path, row, rows):
    name = getattr(path[-1], 'name', None)
    if name == 'length':
      return jnp.full(rows.shape, length, rows.dtype)
    index = jax.lax.broadcasted_iota(jnp.int32, row.shape, max(0, row.ndim - 1))
    if name == 'positions':
      size = row.shape[-1]
      # the newest position written to this slot, if any
      newest = index + size * ((length - 1 - index) // size)
      newest = jnp.where(newest < 0, UNWRITTEN, newest)
      return jnp.broadcast_to(newest, rows.shape)
    bits = jax.lax.iota(jnp.uint32, row.size) * jnp.uint32(2654435769)
    noise = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1
    noise = noise.reshape(row.shape).astype(row.dtype)
    return jnp.broadcast_to(noise, rows.shape)

  return jax.tree_util.tree_map_with_path(fill, shapes(1), shapes(batch))
