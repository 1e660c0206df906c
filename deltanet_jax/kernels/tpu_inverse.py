"""The inverse of a unit lower triangle inside a kernel, as `ops.inverse` has it
in XLA: rows by substitution in blocks of 16, neighboring blocks merged.

Exact for any keys: no power series. Substitution is float32. A merge's products
take float32 operands as two bfloat16 parts each, where inputs are bfloat16, and
as three where they are float32, and leave out products of parts whose places
add up to less than the last that is kept: 16 or 24 bits.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from deltanet_jax.kernels.tpu import BF16, C, cat, divide, dot, iota, split
from deltanet_jax.ops.inverse import BLOCK
from deltanet_jax.ops.scan import F32

HALF = C // 2
REGISTER = 8  # rows


def inverses(links: Sequence[jax.Array], parts: int) -> list[jax.Array]:
  """(I + a)^-1 of every strictly lower a [C,C], stage by stage."""
  found = [_substitute(_pack(a)) for a in links]
  found = [_unpack(x) for x in found]
  size = BLOCK
  while size < C:
    found = [
      _merge(a, x, size, parts) for a, x in zip(links, found, strict=True)
    ]
    size *= 2
  return found


def _pack(a):
  """The diagonal blocks side by side, [16,C]: block b is in lanes 16 b as it
  is, so that this is a choice and no move."""
  block = divide(iota((BLOCK, C), 1), BLOCK)
  out = a[:BLOCK]
  for b in range(1, C // BLOCK):
    out = jnp.where(block == b, a[b * BLOCK : (b + 1) * BLOCK], out)
  return out


def _unpack(x):
  """The inverse of `_pack`: a block diagonal [C,C]."""
  block = divide(iota((BLOCK, C), 1), BLOCK)
  return cat([jnp.where(block == b, x, 0.0) for b in range(C // BLOCK)], 0)


def _take_lanes(x, index):
  return jnp.take_along_axis(x, index, axis=1, mode='promise_in_bounds')


def _substitute(a):
  """(I + a)^-1 of all packed blocks at once: a row that is known is taken off
  those below it."""
  eye = iota((BLOCK, C), 0) == (iota((BLOCK, C), 1) & (BLOCK - 1))
  tiles = range(0, BLOCK, REGISTER)
  rows = [eye[r : r + REGISTER].astype(F32) for r in tiles]
  first = iota((REGISTER, C), 1) & ~(BLOCK - 1)  # lane of a block's column 0
  for j in range(BLOCK - 1):
    known = rows[j // REGISTER][j % REGISTER : j % REGISTER + 1]
    for n in range((j + 1) // REGISTER, len(rows)):
      # column j of every block, over all lanes of the block
      tile = a[n * REGISTER : (n + 1) * REGISTER]
      rows[n] = rows[n] - _take_lanes(tile, first + j) * known
  return cat(rows, 0)


def _merge(a, x, size, parts):
  """Blocks of `size`, inverted, to blocks of twice that:
  [[X1, 0], [L, .]]^-1 has -X2 L X1 in its corner.

  Only the rows of second halves change, 64 of them, and of what each sums only
  64 terms are not zero: those columns are moved together, twice, side by side,
  so that one pass multiplies two parts of them.
  """
  pairs = C // (2 * size)

  def halves(y, second):
    start = size if second else 0
    return cat(
      [y[n + start : n + start + size] for n in range(0, C, 2 * size)], 0
    )

  lane = iota((HALF, C), 1) & (HALF - 1)
  first = (divide(lane, size) * 2 * size) + (lane & (size - 1))
  own = divide(iota((HALF, C), 0), size) == divide(lane, size)
  link = jnp.where(own, _take_lanes(halves(a, True), first), 0.0)
  inner = _times(link, halves(x, False), parts)
  second = halves(x, True)
  corner = _times(_take_lanes(second, first + size), inner, parts)
  new = second - corner
  rows = []
  for n in range(pairs):
    rows.append(x[2 * n * size : (2 * n + 1) * size])
    rows.append(new[n * size : (n + 1) * size])
  return cat(rows, 0)


def _times(left, y, parts):
  """left[:, :64] y for left [64,C] whose halves are one, y [64,C].

  With left = h + m + l and y = h' + m' + l' in bfloat16 parts,
  [h | m] [[h', m'], [h', m']] is four products in one pass, and [h | l]
  [[l'], [h']] the two more that float32 needs.
  """
  is_first = iota((HALF, C), 1) < HALF
  high = left.astype(BF16).astype(F32)
  middle = left - high
  both = jnp.where(is_first, high, middle).astype(BF16)
  y_parts = split(y, parts)
  row = cat(y_parts[:2], 1)
  out = dot(both, cat([row, row], 0))
  out = out[:, :C] + out[:, C:]
  if parts == 3:
    last = middle - middle.astype(BF16).astype(F32)
    both = jnp.where(is_first, high, last).astype(BF16)
    out = out + dot(both, cat([y_parts[2], y_parts[0]], 0))
  return out
