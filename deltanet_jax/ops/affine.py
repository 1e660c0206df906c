"""Chunks as affine maps of the state, S -> A S + U, composed in parallel.

M chunks in order, write U [M,B,H,K,V]. All in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.ops.products import matmul


class Carry(NamedTuple):
  """A = diag(scale) + mix, of M chunks.

  scale [M,B,H,K,1] or, the same for all channels, [M,B,H,1,1]
  mix [M,B,H,K,K], or None: zero

  They are apart since A is near the identity where nothing decays: on the
  diagonal the same rounding error of every chunk would add up.
  """

  scale: jax.Array
  mix: jax.Array | None = None


def affine_scan(
  carry: Carry, write: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Entry states of the chunks and the last exit state.

  lax.associative_scan takes log M steps and keeps the composition of every
  prefix.
  """

  def compose(first, second):
    carry_1, write_1 = first
    carry_2, write_2 = second
    return _multiply(carry_2, carry_1), _apply(carry_2, write_1) + write_2

  carries, writes = jax.lax.associative_scan(compose, (carry, write))
  exits = _apply(carries, state[None]) + writes
  return jnp.concatenate([state[None], exits[:-1]]), exits[-1]


def multiply_pairs(carry: Carry) -> list[Carry]:
  """The tree of carries: those of the chunks, of pairs of chunks, of pairs of
  pairs, .., of all chunks, [1,...]."""
  tree = [carry]
  while len(tree[-1].scale) > 1:
    first, second, rest = _pairs(tree[-1])
    tree.append(_join(_multiply(second, first), rest))
  return tree


def tree_walk(
  tree: list[Carry],
  write: jax.Array,
  state: jax.Array,
  *,
  reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Entry states of the chunks and the last exit state, in 2 log M steps.

  tree: of `multiply_pairs`. Writes of pairs are formed up the tree; down it,
  the second chunk of a pair starts where the first one ends. Unlike
  `affine_scan` this multiplies carries once for a pair, not for every prefix.

  reverse: the gradient, E -> A^T E + R from the last chunk to the first. Of R,
  the gradients of entry states but for what passes through the exit state, and
  that of the last exit state it makes those of all exit states and that of the
  first entry state.
  """
  near, far = (1, 0) if reverse else (0, 1)  # in the order of the walk
  writes = [write]
  for carry in tree[:-1]:
    *pair, rest = _pairs(writes[-1])
    passed = _apply(_pairs(carry)[far], pair[near], reverse) + pair[far]
    writes.append(_join(passed, rest))
  last = _apply(tree[-1], state[None], reverse) + writes[-1]
  entry = state[None]
  for carry, write in zip(tree[-2::-1], writes[-2::-1], strict=True):
    half = len(write) // 2
    first = entry[:half]
    second = _apply(_pairs(carry)[near], first, reverse) + _pairs(write)[near]
    pair = [second, first] if reverse else [first, second]
    both = jnp.stack(pair, 1).reshape(2 * half, *entry.shape[1:])
    entry = _join(both, entry[half:])
  return entry, last[0]


def _apply(carry, x, transposed=False):
  """A x or A^T x."""
  if carry.mix is None:
    return carry.scale * x
  spec = '...lk,...lx->...kx' if transposed else '...kl,...lx->...kx'
  return carry.scale * x + matmul(spec, carry.mix, x)


def _multiply(second, first):
  """The carry A_2 A_1."""
  scale = second.scale * first.scale
  if first.mix is None:
    return Carry(scale)
  on_columns = jnp.swapaxes(first.scale, -1, -2)
  return Carry(scale, _apply(second, first.mix) + second.mix * on_columns)


def _pairs(x):
  """The first and the second of each pair, and the one left over, if any."""
  even = len(jax.tree.leaves(x)[0]) // 2 * 2
  cuts = slice(0, even, 2), slice(1, even, 2), slice(even, None)
  return [jax.tree.map(lambda x, cut=cut: x[cut], x) for cut in cuts]


def _join(x, rest):
  return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), x, rest)


@jax.custom_vjp
def scalar_walk(
  carry: jax.Array, write: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`tree_walk` of scales [M,B,H,1,1], with the gradient of a scan."""
  return tree_walk(multiply_pairs(Carry(carry)), write, state)


def _scalar_forward(carry, write, state):
  entry, last = scalar_walk(carry, write, state)
  return (entry, last), (carry, entry)


def _scalar_backward(residuals, cotangents):
  carry, entry = residuals
  tree = multiply_pairs(Carry(carry))
  d_exit, d_state = tree_walk(tree, *cotangents, reverse=True)
  d_carry = jnp.sum(d_exit * entry, (-1, -2), keepdims=True)
  return d_carry, d_exit, d_state


scalar_walk.defvjp(_scalar_forward, _scalar_backward)
