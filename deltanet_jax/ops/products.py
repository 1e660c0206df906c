"""Matrix products that do not round float32 operands."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """einsum(spec, a, b) in float32, without rounding float32 operands."""
  return jnp.einsum(
    spec, a, b, precision='highest', preferred_element_type=jnp.float32
  )


def matmul_parts(
  spec: str, x: jax.Array, y: jax.Array, dtype: DTypeLike
) -> jax.Array:
  """einsum(spec, x, y) in float32, with matmul operands of `dtype`.

  A float32 operand enters as two of `dtype`, its rounded value and the rounding
  error. Where keys repeat, the rows of an inverse, writes and the gradients of
  scores cancel in the sums that they enter: rounded to bfloat16 alone they
  would be by far the largest errors of a gradient.
  """
  x, y = _parts(x, dtype), _parts(y, dtype)
  return sum(  # type: ignore[return-value]
    matmul(spec, a, b)
    for i, a in enumerate(x)
    for j, b in enumerate(y)
    if i + j < 2  # the product of two rounding errors is negligible
  )


def _parts(x, dtype):
  info = jnp.finfo(dtype)
  if x.dtype == dtype or info.bits >= 32:
    return (x.astype(dtype),)
  # not a cast to dtype and back, which a compiler may remove
  high = jax.lax.reduce_precision(x, info.nexp, info.nmant)
  return high.astype(dtype), (x - high).astype(dtype)
