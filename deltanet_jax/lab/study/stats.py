"""Differences of accuracy with what the bootstrap says about them."""

from typing import NamedTuple

import numpy as np

HOLDS, VIOLATED, OPEN = 'holds', 'violated', 'not resolved'


class Part(NamedTuple):
  """One accuracy of a sum: sign times right answers over questions.

  group: parts of a group have the same seeds and sequences, and so are drawn
  together   right, questions [S,I] of S seeds and I sequences
  """

  sign: float
  group: str
  right: np.ndarray
  questions: np.ndarray


class AccuracyEstimate(NamedTuple):
  """A value with its 95 % interval."""

  value: float
  low: float
  high: float

  def above(self, bound):
    """The verdict on 'it is above bound'."""
    if self.low > bound:
      return HOLDS
    return VIOLATED if self.high < bound else OPEN

  def within(self, margin):
    """The verdict on 'it is zero up to margin'."""
    if -margin <= self.low and self.high <= margin:
      return HOLDS
    return VIOLATED if self.low > margin or self.high < -margin else OPEN


def make_part(sign, group, arrays, limits):
  """The Part of a cell's arrays over the questions in limits."""
  chosen = choose_questions(arrays, limits)
  questions = arrays['weights'].astype(np.float64) * chosen
  right = (questions * arrays['correct']).sum(-1)
  return Part(sign, group, right, questions.sum(-1))


def choose_questions(arrays, limits):
  """Questions [S,I,T] whose slices lie in limits {name: (least, most)}."""
  chosen = arrays['weights'] > 0
  for name, (least, most) in limits.items():
    labels = arrays[f'slice.{name}']
    chosen = chosen & (labels >= least) & (labels <= most)
  return chosen


def estimate_sum(parts, draws):
  """The AccuracyEstimate of sum_i sign_i right_i / questions_i.

  Seeds are drawn with replacement, then sequences in each; parts of a group
  take the same draw, which makes their difference a paired one. With three
  seeds the interval is what they allow: it knows of no fourth.
  """
  value, samples = 0.0, np.zeros(draws)
  rng = np.random.default_rng(0)
  index = {}
  for part in parts:
    S, N = part.right.shape
    if part.group not in index:
      seeds = rng.integers(S, size=(draws, S, 1))
      index[part.group] = seeds, rng.integers(N, size=(draws, S, N))
    at = index[part.group]
    total = lambda x, at=at: x[at].sum((1, 2))
    value += part.sign * part.right.sum() / part.questions.sum()
    samples += part.sign * total(part.right) / total(part.questions)
  low, high = np.percentile(samples, [2.5, 97.5])
  return AccuracyEstimate(float(value), float(low), float(high))
