"""Rotary position embedding (arXiv:2104.09864) and YaRN (arXiv:2309.00071)."""

import math
from typing import Protocol

import jax
import jax.numpy as jnp

from deltanet_jax.ops.shapes import check_shapes


class Yarn(Protocol):
  """YaRN's settings, as `config.mixers.YarnConfig` holds them."""

  @property
  def factor(self) -> float: ...
  @property
  def original(self) -> int: ...
  @property
  def fast(self) -> float: ...
  @property
  def slow(self) -> float: ...
  @property
  def truncate(self) -> bool: ...


def frequencies(
  rotary_dim: int, theta: float, yarn: Yarn | None = None
) -> jax.Array:
  """Radians per position of each pair, [P/2] float32: theta^(-2i/P).

  With `yarn` (sec. 3.2) frequencies that turn fewer than `slow` times over
  `original` positions are divided by `factor`, those that turn more than `fast`
  times are kept, and between them is a linear ramp over i; `truncate` rounds
  its ends to whole pairs.
  """
  half = rotary_dim // 2
  plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if yarn is None:
    return plain

  def pair(turns):  # the i, a real number, of the pair that turns so often
    return (
      half * math.log(yarn.original / (turns * 2 * math.pi)) / (math.log(theta))
    )

  low, high = pair(yarn.fast), pair(yarn.slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotary_dim - 1)
  width = high - low or 1e-3  # may be negative, as in released implementations
  ramp = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / width, 0, 1)
  return plain / yarn.factor * ramp + plain * (1 - ramp)


def rotate(
  x: jax.Array,
  positions: jax.Array,
  *,
  rotary_dim: int,
  theta: float,
  yarn: Yarn | None = None,
  interleaved: bool = False,
  length: float = 1.0,
) -> jax.Array:
  """Rotates the first `rotary_dim` channels of x by their positions.

    (x_i, x_j) -> length (x_i cos a - x_j sin a, x_j cos a + x_i sin a)
    a = position * frequency_i,  i = 0 .. P/2 - 1,  P = rotary_dim

  The i-th pair is (i, i + P/2), or (2i, 2i + 1) when `interleaved`. Channels
  from P on are unchanged.

  x [B,T,H,K], positions [B,T] or [1,T] int32. Computed in float32, returned in
  x's type.
  """
  # positions may be one row for all
  check_shapes(x=(x, 'BTHK'), positions=(positions, 'PT'))
  turns = frequencies(rotary_dim, theta, yarn)[None, None, None]
  angle = positions[..., None, None].astype(jnp.float32) * turns
  cos, sin = length * jnp.cos(angle), length * jnp.sin(angle)
  y, rest = jnp.split(x.astype(jnp.float32), (rotary_dim,), axis=-1)
  if interleaved:
    a, b = y[..., ::2], y[..., 1::2]
  else:
    a, b = jnp.split(y, 2, axis=-1)
  pair = a * cos - b * sin, b * cos + a * sin
  if interleaved:
    turned = jnp.stack(pair, -1).reshape(y.shape)
  else:
    turned = jnp.concatenate(pair, -1)
  return jnp.concatenate([turned, rest], -1).astype(x.dtype)
