"""Chunks as affine maps of the state, S -> A S + U, composed in parallel.

carry A [M,...] and write U [M,B,H,K,V] of M chunks in order; apply(carry, x) is
the product of a carry and a state or another carry.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Apply = Callable[[jax.Array, jax.Array], jax.Array]


def affine_scan(
  carry: jax.Array, write: jax.Array, state: jax.Array, apply: Apply
) -> tuple[jax.Array, jax.Array]:
  """Entry states of the chunks and the last exit state.

  lax.associative_scan takes log M steps and keeps the composition of every
  prefix.
  """

  def compose(first, second):
    carry_1, write_1 = first
    carry_2, write_2 = second
    return apply(carry_2, carry_1), apply(carry_2, write_1) + write_2

  carries, writes = jax.lax.associative_scan(compose, (carry, write))
  exits = apply(carries, state[None]) + writes
  return jnp.concatenate([state[None], exits[:-1]]), exits[-1]


def multiply_pairs(carry: jax.Array, apply: Apply) -> list[jax.Array]:
  """The tree of carries: those of the chunks, of pairs of chunks, of pairs of
  pairs, .., of all chunks, [1,...]."""
  tree = [carry]
  while len(tree[-1]) > 1:
    first, second, rest = _pairs(tree[-1])
    tree.append(jnp.concatenate([apply(second, first), rest]))
  return tree


def tree_walk(
  tree: list[jax.Array],
  write: jax.Array,
  state: jax.Array,
  apply: Apply,
  *,
  reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Entry states of the chunks and the last exit state, in 2 log M steps.

  tree: of `multiply_pairs`. Writes of pairs are formed up the tree; down it,
  the chunk of a pair that comes second starts where the first one ends. Unlike
  `affine_scan` this multiplies carries once per pair, not per prefix.

  reverse: from the last chunk to the first. With apply(carry, x) = A^T x this
  is the gradient: of gradients `write` of entry states and `state` of the last
  exit state it makes those of every exit state and of the first entry state.
  """
  writes = [write]
  for carry in tree[:-1]:
    *pair, rest = _pairs(writes[-1])
    *carries, _ = _pairs(carry)
    near, far = reversed(pair) if reverse else pair
    writes.append(
      jnp.concatenate([apply(carries[0 if reverse else 1], near) + far, rest])
    )
  last = apply(tree[-1], state[None]) + writes[-1]
  entry = state[None]
  for carry, write in zip(tree[-2::-1], writes[-2::-1], strict=True):
    near = 1 if reverse else 0
    half = len(carry) // 2
    passed = apply(_pairs(carry)[near], entry[:half]) + _pairs(write)[near]
    pair = [passed, entry[:half]] if reverse else [entry[:half], passed]
    both = jnp.stack(pair, 1).reshape(2 * half, *entry.shape[1:])
    entry = jnp.concatenate([both, entry[half:]])
  return entry, last[0]


def _pairs(x):
  """The first and the second of each pair, and the one left over, if any."""
  even = len(x) // 2 * 2
  return x[0:even:2], x[1:even:2], x[even:]


@jax.custom_vjp
def scalar_walk(
  carry: jax.Array, write: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`tree_walk` of carries [M,B,H,1,1]."""
  tree = multiply_pairs(carry, jnp.multiply)
  return tree_walk(tree, write, state, jnp.multiply)


def _scalar_forward(carry, write, state):
  entry, last = scalar_walk(carry, write, state)
  return (entry, last), (carry, entry)


def _scalar_backward(residuals, cotangents):
  carry, entry = residuals
  tree = multiply_pairs(carry, jnp.multiply)
  d_exit, d_state = tree_walk(tree, *cotangents, jnp.multiply, reverse=True)
  d_carry = jnp.sum(d_exit * entry, (-1, -2), keepdims=True)
  return d_carry, d_exit, d_state


scalar_walk.defvjp(_scalar_forward, _scalar_backward)
