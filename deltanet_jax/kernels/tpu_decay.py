"""A decay per head and token inside one chunk, for kernels on TPUs.

Every exponent is the plain sum of the gates it spans: a product of gates, in
three bfloat16 parts that are all of float32, with zeros and ones.
"""

import jax
import jax.numpy as jnp

from deltanet_jax.kernels import tpu
from deltanet_jax.kernels.tpu import C, Layout, cat, dot, dot_ones, iota, split
from deltanet_jax.ops.scan import F32


def lower(strict: bool = False) -> jax.Array:
  """bool [C,C]: is the row's token after the column's, or the same one."""
  row, column = iota((C, C), 0), iota((C, C), 1)
  return row > column if strict else row >= column


def ones(mask: jax.Array) -> jax.Array:
  """1 where the mask is true, else 0, as an operand."""
  return jnp.where(mask, 1.0, 0.0).astype(tpu.BF16)


def _sum_gates(upto: list[jax.Array], mask: jax.Array, z: Layout) -> jax.Array:
  """Products of the parts of gates with a mask, summed."""
  if z.low == F32:
    # each is exact; in one product small parts would be added to a large sum
    return sum(dot(part, mask) for part in reversed(upto))  # type: ignore
  return dot(cat(upto, 1), cat([mask] * len(upto), 0))


def decays(
  gates: jax.Array, z: Layout
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Of gates [heads,C], lists over value heads of D [C,C],
  e^{g_{j+1} + .. + g_i}, above the diagonal without meaning, and of e^G [C,V],
  the same in all lanes."""
  # [s, j]: is s after j; and ones for sums from the start
  after = cat([ones(lower(True)), ones(iota((C, C), 0) >= 0)], 1)
  decay, read = [], []
  for h in range(z.heads):
    # [i, s]: the gate of s if it is not after i
    upto = [
      jnp.where(lower(), g[h : h + 1].astype(F32), 0.0).astype(tpu.BF16)
      for g in split(gates, 3)
    ]
    span = _sum_gates(upto, after, z)
    decay.append(jnp.exp(span[:, :C]))
    read.append(cat([jnp.exp(span[:, C:])] * (z.V // C), 1))
  return decay, read


def read_rows(gates: jax.Array, z: Layout) -> jax.Array:
  """e^G [heads,C] of gates [heads,C], tokens along lanes."""
  upto = ones(iota((C, C), 0) <= iota((C, C), 1))
  return jnp.exp(_sum_gates(split(gates, 3), upto, z))


def sum_spans(
  pairs: jax.Array,
  from_entry: jax.Array,
  to_exit: jax.Array,
  through: jax.Array,
  z: Layout,
) -> jax.Array:
  """dg_t [1,C]: what passes from before t to t or after.

  pairs [C,C]: of output i and write j, 0 but for j < i   from_entry [C,V]: of
  output i and the entry state   to_exit [C,V]: of write j and the exit state
  through [1,V]: of both states. Sums over lanes are products with ones, whose
  results stand in all lanes.
  """
  all_ones = ones(iota((z.V, C), 0) >= 0)
  # [j, t]: is j before t
  before = cat([ones(iota((C, C), 0) < iota((C, C), 1)), all_ones], 0)
  outputs = dot_ones(cat([pairs, from_entry], 1), before, z.parts)
  exits = dot_ones(to_exit, all_ones, z.parts)
  # [i, t]: outputs at or after t, writes before t
  within = jnp.sum(jnp.where(lower(), outputs, exits), 0, keepdims=True)
  return within + jnp.sum(through, 1, keepdims=True)


def side_by_side(xs: list[jax.Array], z: Layout) -> list[jax.Array]:
  """Matrices of value heads, those of a group in one: a product with what the
  group shares is then one pass."""
  return [cat([xs[h] for h in z.group(j)], 1) for j in range(z.keys)]
