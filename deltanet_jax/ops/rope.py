"""Rotary position embedding (arXiv:2104.09864), half-split pairs."""

import jax.numpy as jnp


def rotate(x, positions, *, rotary_dim, theta):
  """Rotates the first `rotary_dim` channels of x by their positions.

    (x_i, x_{i+P/2}) -> (x_i cos a - x_{i+P/2} sin a, x_{i+P/2} cos a + x_i sin a)
    a = position * theta^(-2i/P),  i = 0 .. P/2 - 1,  P = rotary_dim

  x [B,T,H,K], positions [B,T] int32; computed in float32, returned in x's
  type. The channels from P on pass unchanged.
  """
  half = rotary_dim // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b, rest = jnp.split(
    x.astype(jnp.float32), (half, rotary_dim), axis=-1
  )
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
  return turned.astype(x.dtype)
