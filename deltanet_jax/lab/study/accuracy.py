"""How many questions of an `Example` were answered, and which ones?

All functions are pure jax and count, so that batches add up:
`jax.tree.map(jnp.add, a, b)`. `predicted` [B,T] is the argmax of the logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tally(NamedTuple):
  """Right answers and questions; arrays of one shape."""

  hits: jax.Array
  count: jax.Array

  @property
  def accuracy(self):
    """NaN where nothing was asked."""
    return self.hits / self.count


def tally(predicted, example):
  """`Tally` of all questions, []."""
  hits = example.weights * (predicted == example.targets)
  return Tally(hits.sum(), example.weights.sum())


def tally_rows(predicted, example):
  """`Tally` of every row, [B]: what confidence intervals resample."""
  hits = example.weights * (predicted == example.targets)
  return Tally(hits.sum(-1), example.weights.sum(-1))


def tally_whole(predicted, example):
  """`Tally` of rows that ask something, [], right if all of it is."""
  hits, count = tally_rows(predicted, example)
  questions = count > 0
  return Tally(jnp.sum(questions & (hits == count)), jnp.sum(questions))


def tally_by(predicted, example, name, levels):
  """`Tally` by the slice `name`, [len(levels)].

  levels: ascending numbers. A question belongs to the largest level that is
  not above its own value: exact for values listed one by one, a range for
  1, 2, 4, 8, ...; one below the first level is not counted.
  """
  value = example.slices[name]
  level = jnp.searchsorted(jnp.asarray(levels), value, side='right') - 1
  weights = jnp.where(level >= 0, example.weights, 0).reshape(-1)
  level = level.reshape(-1)
  right = (predicted == example.targets).reshape(-1)
  total = lambda x: jnp.zeros(len(levels)).at[level].add(x)
  return Tally(total(weights * right), total(weights))


def tally_prefixes(predicted, example):
  """`Tally` by position, [T]: rows whose answers are right up to and at it."""
  wrong = (example.weights > 0) & (predicted != example.targets)
  right = jnp.cumsum(wrong, -1) == 0
  rows = jnp.full(right.shape[1:], right.shape[0])
  return Tally(right.sum(0), rows)


def measure_majority(example, vocab):
  """Accuracy of always giving the most frequent target: the floor."""
  targets = example.targets.reshape(-1)
  counts = jnp.zeros(vocab).at[targets].add(example.weights.reshape(-1))
  return counts.max() / counts.sum()
