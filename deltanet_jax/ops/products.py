"""Products that lose no more than their operands do."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """einsum into float32, float32 operands not rounded to less."""
  return jnp.einsum(
    spec, a, b, precision='highest', preferred_element_type=jnp.float32
  )


def matmul_parts(
  spec: str, x: jax.Array, y: jax.Array, dtype: DTypeLike
) -> jax.Array:
  """einsum of x and y with operands of `dtype`, as exact as those given in it
  allow.

  Where keys repeat, the rows of an inverse, writes and the gradients of scores
  cancel in the sums they enter: rounded to bfloat16 they are by far the largest
  errors of a gradient. So what is float32 goes in as two parts of `dtype`:
  what rounding keeps of it and what it loses.
  """
  x, y = _parts(x, dtype), _parts(y, dtype)
  return sum(  # type: ignore[return-value]
    matmul(spec, a, b)
    for i, a in enumerate(x)
    for j, b in enumerate(y)
    if i + j < 2  # a product of two losses is lost anyway
  )


def _parts(x, dtype):
  info = jnp.finfo(dtype)
  if x.dtype == dtype or info.bits >= 32:
    return (x.astype(dtype),)
  # no cast there and back: a compiler may leave that out
  high = jax.lax.reduce_precision(x, info.nexp, info.nmant)
  return high.astype(dtype), (x - high).astype(dtype)
