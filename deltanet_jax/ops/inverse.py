"""The inverse of a unit lower triangular matrix."""

import jax
import jax.numpy as jnp

from deltanet_jax.ops.products import matmul

BLOCK = 16  # rows inverted by substitution; larger matrices merge such blocks


def check_chunk(C: int) -> None:
  """Raises ValueError unless C is 16 * 2^n."""
  blocks = C // BLOCK
  if C < 1 or blocks * BLOCK != C or blocks & (blocks - 1):
    raise ValueError(f'chunk is {C}; give 16, 32, 64, 128 or another 16 * 2^n')


@jax.custom_jvp
def unit_lower_inverse(a: jax.Array) -> jax.Array:
  """(I + a)^-1 for strictly lower triangular a [...,C,C], C = 16 * 2^n.

  Forward substitution in blocks of 16 rows, then neighboring blocks are merged:
  [[P, 0], [L, R]]^-1 = [[P^-1, 0], [-R^-1 L P^-1, R^-1]]. A power series is
  inaccurate: for similar keys its terms exceed 1e9 and cancel.
  """
  C = a.shape[-1]
  check_chunk(C)

  def tiles(row, column, step, size):
    return jnp.stack(
      [
        a[..., n + row : n + row + size, n + column : n + column + size]
        for n in range(0, C, step)
      ],
      -3,
    )

  inverse = _substitute(tiles(0, 0, BLOCK, BLOCK))
  size = BLOCK
  while size < C:
    link = tiles(size, 0, 2 * size, size)
    first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
    corner = -matmul(
      '...ij,...jk->...ik', second, matmul('...ij,...jk->...ik', link, first)
    )
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    inverse = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
    size *= 2
  return inverse[..., 0, :, :]


def _substitute(a):
  """(I + a)^-1 of a [...,16,16]: row j, once final, is eliminated from the rows
  below it."""

  def eliminate(j, x):
    column = jax.lax.dynamic_index_in_dim(a, j, a.ndim - 1)
    row = jax.lax.dynamic_index_in_dim(x, j, a.ndim - 2)
    return x - column * row

  # a loop: unrolled, a TPU's compiler takes minutes for the layers of a model
  eye = jnp.broadcast_to(jnp.eye(BLOCK, dtype=a.dtype), a.shape)
  return jax.lax.fori_loop(0, BLOCK - 1, eliminate, eye)


@unit_lower_inverse.defjvp
def _inverse_jvp(primals, tangents):
  # d(X^-1) = -X^-1 dX X^-1: the loops above are never differentiated
  (a,), (d_a,) = primals, tangents
  inverse = unit_lower_inverse(a)
  product = lambda x, y: matmul('...ij,...jk->...ik', x, y)
  return inverse, -product(inverse, product(jnp.tril(d_a, -1), inverse))
