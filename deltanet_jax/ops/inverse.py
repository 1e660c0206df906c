"""The inverse of a unit lower triangular matrix."""

import functools

import jax
import jax.numpy as jnp

from deltanet_jax.ops.products import matmul

BLOCK = 16  # rows inverted by substitution; larger matrices merge such blocks


def check_chunk(C: int) -> None:
  """Raises ValueError unless C is 16 * 2^n."""
  blocks = C // BLOCK
  if C < 1 or blocks * BLOCK != C or blocks & (blocks - 1):
    raise ValueError(f'chunk is {C}; give 16, 32, 64, 128 or another 16 * 2^n')


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_lower_inverse(a: jax.Array, loop: bool = True) -> jax.Array:
  """(I + a)^-1 for strictly lower triangular a [...,C,C], C = 16 * 2^n.

  Forward substitution in blocks of 16 rows, then neighboring blocks are merged:
  [[P, 0], [L, R]]^-1 = [[P^-1, 0], [-R^-1 L P^-1, R^-1]]. A power series is
  inaccurate: for similar keys its terms exceed 1e9 and cancel.

  loop: whether a loop goes through the 16 rows. Without it blocks are merged
  from single rows on, in fewer and larger operations.
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

  block = _substitute if loop else _halve
  inverse = block(tiles(0, 0, BLOCK, BLOCK))
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


def _halve(a):
  """(I + a)^-1 of a [...,16,16], merged from blocks of 1, 2, 4 and 8 rows: all
  blocks of a size in one product with the links between their halves."""
  x = jnp.broadcast_to(jnp.eye(BLOCK, dtype=a.dtype), a.shape)
  for size in (1, 2, 4, 8):
    # rows of the second half of a block, columns of its first
    below = [
      [i // size == j // size + 1 and i // size % 2 for j in range(BLOCK)]
      for i in range(BLOCK)
    ]
    link = jnp.where(jnp.asarray(below, bool), a, 0)
    if size > 1:
      product = functools.partial(matmul, '...ij,...jk->...ik')
      link = product(x, product(link, x))
    x = x - link
  return x


@unit_lower_inverse.defjvp
def _inverse_jvp(loop, primals, tangents):
  # d(X^-1) = -X^-1 dX X^-1: the loops above are never differentiated
  (a,), (d_a,) = primals, tangents
  inverse = unit_lower_inverse(a, loop)
  product = lambda x, y: matmul('...ij,...jk->...ik', x, y)
  return inverse, -product(inverse, product(jnp.tril(d_a, -1), inverse))
