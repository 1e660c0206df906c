"""What compilers must be kept from, though every value stays as it is."""

from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar('T')  # arrays in tuples and the like


def tied(x: T, to: jax.Array | tuple[()]) -> T:
  """x, arrays or None, as if it were made from `to`, arrays that the layer's
  input went into.

  What depends on positions and documents alone is the same in every layer, and
  where layers are scanned JAX makes it once, before them, and keeps it: out of
  a loop over a row, the masks of all its steps.
  """
  return jax.lax.optimization_barrier((x, to))[0]


def spread(x: jax.Array) -> jax.Array:
  """x [...,N], which no compiler takes for one number repeated, and neither
  the gradient that comes back to it.

  XLA's CPU compiler (jaxlib 0.10.2 to 0.12) makes one call of a product with a
  repeated number, such as a zero state or the gradient of a sum, and a sum
  over a row before it; that call reads memory nobody wrote, and the result is
  garbage (docs/xla_cpu_repeated_number.py; `optimization_barrier` does not
  help). So x times ones that are no constant to the compiler: x to the bit.
  """
  ones = (jax.lax.iota(jnp.int32, x.shape[-1]) | 1) != 0
  return x * jax.lax.expand_dims(ones.astype(x.dtype), range(x.ndim - 1))


def put(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
  """old [B,S,...] with new [B,T,...], in its type, at each row's slots [B,T]:
  no two of a row are one, and what is beyond S is left out.

  Done in place where `old` is donated. XLA's CPU compiler makes a scatter into
  bfloat16 in float32, from a copy of the whole: one token is put in place by a
  comparison there.
  """
  new = new.astype(old.dtype)

  @jax.vmap
  def scatter(old, new, slots):
    return old.at[slots].set(new, mode='drop', unique_indices=True)

  @jax.vmap
  def compare(old, new, slots):
    there = jnp.arange(old.shape[0]) == slots
    return jnp.where(jnp.expand_dims(there, range(1, old.ndim)), new, old)

  if slots.shape[1] > 1 or old.dtype.itemsize > 2:
    return scatter(old, new, slots)
  return jax.lax.platform_dependent(
    old, new, slots, cpu=compare, default=scatter
  )
