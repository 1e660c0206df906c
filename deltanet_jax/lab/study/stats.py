"""Differences of accuracy with bootstrap intervals."""

from typing import NamedTuple

import numpy as np

HOLDS, VIOLATED, OPEN = 'holds', 'violated', 'undecided'
UNTRAINED = 'untrained'  # a model of the claim did not learn the task


class Part(NamedTuple):
  """A term of a sum: sign times right answers over questions.

  group: parts of a group share seeds and sequences and are resampled together
  right, questions: [S,I] of S seeds and I sequences
  """

  sign: float
  group: str
  right: np.ndarray
  questions: np.ndarray


class AccuracyEstimate(NamedTuple):
  """A value with its 95% interval."""

  value: float
  low: float
  high: float

  def above(self, bound):
    """The verdict on the claim that it is above bound."""
    if self.low > bound:
      return HOLDS
    return VIOLATED if self.high < bound else OPEN

  def within(self, margin):
    """The verdict on the claim that it is 0 within margin."""
    if -margin <= self.low and self.high <= margin:
      return HOLDS
    return VIOLATED if self.low > margin or self.high < -margin else OPEN


def make_part(sign, group, arrays, limits):
  """The Part of the arrays of a job over the questions in limits."""
  chosen = choose_questions(arrays, limits)
  questions = arrays['weights'].astype(np.float64) * chosen
  right = (questions * arrays['correct']).sum(-1)
  return Part(sign, group, right, questions.sum(-1))


def choose_questions(arrays, limits):
  """bool [S,I,T]: the questions whose slices are in limits {name: (least,
  most)}."""
  chosen = arrays['weights'] > 0
  for name, (least, most) in limits.items():
    labels = arrays[f'slice.{name}']
    chosen = chosen & (labels >= least) & (labels <= most)
  return chosen


def estimate_sum(parts, draws):
  """The AccuracyEstimate of sum_i sign_i right_i / questions_i.

  The bootstrap resamples seeds, then sequences of each; parts of a group share
  the resamples, so their difference is paired. With three seeds the interval
  underestimates the spread between seeds.
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
