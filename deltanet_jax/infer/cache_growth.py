"""Grows the KV cache in powers of two, and splits long prompts into pieces.

Attention reads every slot of its cache, written or not. With a cache for the
longest possible text every token would cost as much as the last one; with
powers of two a text of n tokens reads fewer than 2 n slots.
"""

import functools

import jax
from jax.typing import DTypeLike

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.model import ModelCache, init_cache

LEAST = 1024  # slots of the smallest cache; a smaller one saves nothing
PIECE = 4096  # tokens of a prompt that go through the model at once


def count_slots(length: int, most: int) -> int:
  """Slots for `length` tokens of a text of at most `most`."""
  return min(most, max(LEAST, 1 << (length - 1).bit_length()))


def split_prompt(tokens: jax.Array) -> list[jax.Array]:
  """A prompt [B,T] in pieces along T, which bound the memory of activations.
  Results equal those of the whole prompt up to the order of sums."""
  return [tokens[:, i : i + PIECE] for i in range(0, tokens.shape[1], PIECE)]


@functools.partial(jax.jit, static_argnames=('cfg', 'batch', 'slots', 'dtype'))
def grow_cache(
  cache: ModelCache, cfg: ModelConfig, batch: int, slots: int, dtype: DTypeLike
) -> ModelCache:
  """A copy of the cache with `slots` slots, at least as many as it has.

  The other arguments are those it was made with. Unwritten slots are masked.
  """
  return jax.tree.map(
    lambda old, new: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim),
    cache,
    init_cache(cfg, batch, slots, dtype),
  )


@functools.partial(jax.jit, donate_argnums=0)
def insert_row(
  cache: ModelCache, row: ModelCache, index: int | jax.Array
) -> ModelCache:
  """`cache` (donated) with its row `index` replaced by the cache `row` of batch
  1.

  Raises:
    ValueError: the two differ in slots.
  """

  def insert(axis, old, new):
    if new.shape != (*old.shape[:axis], 1, *old.shape[axis + 1 :]):
      raise ValueError(
        f'{new.shape} is no row of {old.shape}; make both with as many slots'
      )
    return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis)

  axes = {'length': 0, 'prefix': 0, 'period': 1, 'suffix': 0}  # of the batch
  return ModelCache(
    **{
      name: jax.tree.map(
        functools.partial(insert, axis),
        getattr(cache, name),
        getattr(row, name),
      )
      for name, axis in axes.items()
    }
  )
