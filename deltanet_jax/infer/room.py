"""How much of the cache is allocated, and how much of a prompt goes in at once.

Attention reads every slot of its cache, written or not, so a cache as long as
the longest text would make the first token cost what the last one does. Slots
come in powers of two instead: a text of n tokens reads fewer than 2 n.
"""

import functools

import jax

from deltanet_jax.mixers.config import ATTENTION
from deltanet_jax.model import init_cache

LEAST = 1024  # slots of the smallest cache: a shorter one saves nothing
# A prompt's scores are kept for a piece of it at a time: at most so many of one
# head (1 GiB in float32 with 8 heads), at most LONGEST tokens
SCORES = 2**25
LONGEST = 4096


def slots(length, most):
  """Slots for `length` tokens where there will never be more than `most`."""
  return min(most, max(LEAST, 1 << (length - 1).bit_length()))


def piece(cfg, slots):
  """Tokens of a prompt that go through the model at once, a power of two.

  Memory then grows with the prompt, not with its square; the results are those
  of the whole prompt up to the order of sums. Without attention it is LONGEST.
  """
  if not any(isinstance(layer.mixer, ATTENTION) for layer in cfg.layers):
    return LONGEST
  # of one chunk of the recurrent layers at least
  most = max(64, SCORES // slots)
  return min(LONGEST, 1 << (most.bit_length() - 1))


def pieces(cfg, tokens, slots):
  """tokens [B,T], cut along T."""
  size = piece(cfg, slots)
  if tokens.shape[1] <= size:
    return [tokens]
  return [tokens[:, i : i + size] for i in range(0, tokens.shape[1], size)]


@functools.partial(jax.jit, static_argnames=('cfg', 'batch', 'slots', 'dtype'))
def grow(cache, cfg, batch, slots, dtype):
  """The same cache with room for `slots` tokens, no fewer than it has.

  The other arguments are those it was made with. What it holds stays where it
  is, and an unwritten slot is never seen.
  """
  return jax.tree.map(
    lambda old, new: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim),
    cache,
    init_cache(cfg, batch, slots, dtype),
  )
