"""Matmul weights, and the logical axes of all weights."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deltanet_jax.parallel.sharding import gather_weight

Init = Callable[..., jax.Array]  # (key, shape, dtype)

# the logical axes of weights; `parallel.sharding` maps each to the mesh
AXES = (
  'layers',
  'embed',
  'heads',
  'kv_heads',
  'head_k',
  'head_v',
  'latent',
  'mlp',
  'experts',
  'vocab',
  'conv',
  'norm',
)


def name_axes(init: Init, axes: tuple[str, ...]) -> Init:
  """Returns `init` for a weight with logical `axes`, one for each dimension.
  ValueError for an axis that is not in AXES."""
  for axis in axes:
    if axis not in AXES:
      raise ValueError(f'axis {axis!r} is unknown; give one of {AXES}')
  # Flax unboxes the array inside a module
  return nn.with_logical_partitioning(init, axes)  # type: ignore[return-value]


def scaled_normal(std: float) -> Init:
  """Returns an initializer: normal values truncated at three deviations."""

  def init(key, shape, dtype=jnp.float32):
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype)

  return init


class Proj(nn.Module):
  """y = einsum(x, w), for example 'BTD,DHK->BTHK'.

  w is float32 of `shape`, initialized with standard deviation scale /
  sqrt(fan-in), fan-in the product of the sizes summed over. x and w enter the
  product in `dtype`; the result has `out_dtype`, or `dtype` where that is None.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  einsum: str
  dtype: DTypeLike = jnp.float32
  out_dtype: DTypeLike | None = None
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    letters, out = self.einsum.split(',')[1].split('->')
    fan_in = math.prod(
      n
      for n, letter in zip(self.shape, letters, strict=True)
      if letter not in out
    )
    init = scaled_normal(self.scale / math.sqrt(fan_in))
    w = self.param('w', name_axes(init, self.axes), self.shape, jnp.float32)
    return jnp.einsum(
      self.einsum,
      x.astype(self.dtype),
      gather_weight(w.astype(self.dtype), self.axes),
      preferred_element_type=self.out_dtype or self.dtype,
    )
