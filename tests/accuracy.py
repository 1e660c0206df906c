"""How many questions of an `Example` were answered, and which ones?

`predicted` [B,T] are tokens, as the argmax of logits gives them.
"""

from typing import NamedTuple

import numpy as np


class Tally(NamedTuple):
  """Right answers and questions; arrays of one shape."""

  hits: np.ndarray
  count: np.ndarray

  @property
  def accuracy(self):
    """NaN where nothing was asked."""
    return self.hits / self.count


def tally(predicted, example):
  """`Tally` of all questions, []."""
  hits = example.weights * (predicted == example.targets)
  return Tally(hits.sum(), example.weights.sum())


def tally_by(predicted, example, name, levels):
  """`Tally` by the slice `name`, [len(levels)].

  levels: ascending numbers. A question belongs to the largest level that is
  not above its own value: exact for values listed one by one, a range for
  1, 2, 4, 8, ...; one below the first level is not counted.
  """
  level = np.searchsorted(levels, example.slices[name], side='right') - 1
  weights = example.weights * (level >= 0)
  right = predicted == example.targets
  total = lambda x: np.bincount(level[level >= 0], x[level >= 0], len(levels))
  return Tally(total(weights * right), total(weights))


def measure_majority(example):
  """Accuracy of always giving the most frequent target: the floor."""
  counts = np.bincount(example.targets.ravel(), example.weights.ravel())
  return counts.max() / counts.sum()
