"""Guards against compiler transformations; none of them changes a value."""

from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar('T')  # a tree of arrays


def hoisting_barrier(x: T, to: jax.Array | tuple[()]) -> T:
  """Returns x, a tree of arrays, as if it were computed from `to`, arrays that
  depend on the layer's input.

  JAX hoists what depends on positions and documents alone out of scanned
  layers. For masks made in a loop over a row it would then keep those of all
  iterations at once.
  """
  return jax.lax.optimization_barrier((x, to))[0]


def opaque(x: jax.Array) -> jax.Array:
  """Returns x [...,N], bit for bit, such that the compiler sees neither x nor
  its gradient as a broadcast constant.

  XLA's CPU compiler (jaxlib 0.10.2 to 0.12) miscompiles a product with a
  broadcast constant, such as a zero state or the gradient of a sum, where a
  sum over rows comes before it: the fused call reads uninitialized memory
  (docs/xla_cpu_repeated_number.py; `optimization_barrier` does not help).
  Multiplying by ones that are not a constant to the compiler avoids it.
  """
  ones = (jax.lax.iota(jnp.int32, x.shape[-1]) | 1) != 0
  return x * jax.lax.expand_dims(ones.astype(x.dtype), range(x.ndim - 1))


def write_slots(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
  """Returns old [B,S,...] with new [B,T,...], cast to its type, at slots [B,T].

  The slots of a row differ; those from S on are ignored. This is in place where
  `old` is donated. XLA's CPU compiler scatters into bfloat16 by way of a
  float32 copy of the whole array, so there one token is written by a
  comparison.
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


def write_slot(
  whole: jax.Array, i: jax.Array, new: jax.Array, slots: jax.Array
) -> jax.Array:
  """Returns whole [R,B,S,...] with new [B,S,...] in place of whole[i], of which
  it differs in one slot of each row, slots [B].

  Only these are written where `whole` is donated, except on CPUs into types
  shorter than float32, as in `write_slots`.
  """
  index = jnp.stack([jnp.broadcast_to(i, slots.shape), slots], axis=1)
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=tuple(range(1, new.ndim - 1)),
    inserted_window_dims=(0, 2),
    scatter_dims_to_operand_dims=(0, 2),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
  )

  def scatter(whole, new):
    return jax.lax.scatter(
      whole,
      index,
      jax.vmap(lambda row, slot: row[slot])(new, slots),
      numbers,
      unique_indices=True,
      mode='promise_in_bounds',
    )

  if whole.dtype.itemsize > 2:
    return scatter(whole, new)
  return jax.lax.platform_dependent(
    whole, new, cpu=lambda whole, new: whole.at[i].set(new), default=scatter
  )
