"""Chunks as affine maps of the state, S -> A S + U, composed in parallel.

carry A [M,B,H,K,K] or, a number for each head, [M,B,H,1,1]; write U
[M,B,H,K,V]; M chunks in order. All in float32.
"""

import jax
import jax.numpy as jnp

from deltanet_jax.ops.products import matmul


def affine_scan(
  carry: jax.Array, write: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Entry states of the chunks and the last exit state.

  lax.associative_scan takes log M steps and keeps the composition of every
  prefix.
  """

  def compose(first, second):
    carry_1, write_1 = first
    carry_2, write_2 = second
    return _apply(carry_2, carry_1), _apply(carry_2, write_1) + write_2

  carries, writes = jax.lax.associative_scan(compose, (carry, write))
  exits = _apply(carries, state[None]) + writes
  return jnp.concatenate([state[None], exits[:-1]]), exits[-1]


def multiply_pairs(carry: jax.Array) -> list[jax.Array]:
  """The tree of carries: those of the chunks, of pairs of chunks, of pairs of
  pairs, .., of all chunks, [1,...]."""
  tree = [carry]
  while len(tree[-1]) > 1:
    first, second, rest = _pairs(tree[-1])
    tree.append(jnp.concatenate([_apply(second, first), rest]))
  return tree


def tree_walk(
  tree: list[jax.Array],
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
    writes.append(jnp.concatenate([passed, rest]))
  last = _apply(tree[-1], state[None], reverse) + writes[-1]
  entry = state[None]
  for carry, write in zip(tree[-2::-1], writes[-2::-1], strict=True):
    half = len(carry) // 2
    first = entry[:half]
    second = _apply(_pairs(carry)[near], first, reverse) + _pairs(write)[near]
    pair = [second, first] if reverse else [first, second]
    both = jnp.stack(pair, 1).reshape(2 * half, *entry.shape[1:])
    entry = jnp.concatenate([both, entry[half:]])
  return entry, last[0]


def _apply(carry, x, transposed=False):
  """A x or A^T x."""
  if carry.shape[-1] == 1:
    return carry * x
  spec = '...lk,...lx->...kx' if transposed else '...kl,...lx->...kx'
  return matmul(spec, carry, x)


def _pairs(x):
  """The first and the second of each pair, and the one left over, if any."""
  even = len(x) // 2 * 2
  return x[0:even:2], x[1:even:2], x[even:]


@jax.custom_vjp
def scalar_walk(
  carry: jax.Array, write: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`tree_walk` of carries [M,B,H,1,1], with the gradient of a scan."""
  return tree_walk(multiply_pairs(carry), write, state)


def _scalar_forward(carry, write, state):
  entry, last = scalar_walk(carry, write, state)
  return (entry, last), (carry, entry)


def _scalar_backward(residuals, cotangents):
  carry, entry = residuals
  tree = multiply_pairs(carry)
  d_exit, d_state = tree_walk(tree, *cotangents, reverse=True)
  d_carry = jnp.sum(d_exit * entry, (-1, -2), keepdims=True)
  return d_carry, d_exit, d_state


scalar_walk.defvjp(_scalar_forward, _scalar_backward)
