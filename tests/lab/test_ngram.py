"""The counting baseline against plain dictionaries."""

import collections
import math
import random

import numpy as np
import pytest

from deltanet_jax.lab.quickstart import ngram


def words(seed, documents):
  """Documents of a small made-up language, some of them very short."""
  draw = random.Random(seed)
  lexicon = [b'abra', b'bar ', b'cad', b'a\xff\x00']
  return [
    b''.join(draw.choices(lexicon, k=draw.randint(1, 12)))[draw.randint(0, 3) :]
    for _ in range(documents)
  ] + [b'a', b'ba']


class SlowModel:
  """The same counts in dictionaries; the weights are the fast model's."""

  def __init__(self, documents, order, weights):
    self._order, self._weights = order, weights
    self._counts = collections.Counter()
    self._totals = collections.Counter()
    for document in documents:
      for context, symbol in events(document, order):
        for k in range(order + 1):
          short = context[len(context) - k :]
          self._counts[short, symbol] += 1
          self._totals[short] += 1

  def probability(self, context, symbol):
    p = 1 / 257
    for k in range(self._order + 1):
      short = context[len(context) - k :]
      total = self._totals[short]
      w = self._weights[k][int(math.log2(total)) + 1] if total else 0
      p = w * self._counts[short, symbol] / max(total, 1) + (1 - w) * p
    return p


def events(document, order):
  symbols = (256,) * order + tuple(document) + (256,)
  for i in range(order, len(symbols)):
    yield symbols[i - order : i], symbols[i]


@pytest.mark.parametrize('order', [0, 1, 2, 3])
def test_probabilities_equal_those_of_plain_dictionaries(order):
  train, heldout = words(0, 60), words(1, 9)
  fast = ngram.NGram(train, order)
  slow = SlowModel(train, order, fast._weights)
  expected = [
    slow.probability(*event) for d in heldout for event in events(d, order)
  ]
  np.testing.assert_allclose(fast.probabilities(heldout), expected, rtol=1e-12)


def test_counting_in_slices_changes_nothing(monkeypatch):
  train, heldout = words(0, 60), words(1, 9)
  whole = ngram.measure_bits_per_byte(train, heldout, 3)
  monkeypatch.setattr(ngram, 'SLICE_BYTES', 50)
  assert ngram.measure_bits_per_byte(train, heldout, 3) == whole


@pytest.mark.parametrize(
  'context', [b'', b'a', b'ab', b'bra', b'xbra', b'\xff\x00a', b'zzz']
)
def test_probabilities_sum_to_one_after_every_context(context):
  model = ngram.NGram(words(0, 60), 3)
  p = model.distribution(context)
  assert p.shape == (257,) and p.min() > 0
  np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)


def test_the_distribution_is_what_documents_are_scored_with():
  model = ngram.NGram(words(0, 60), 2)
  document = b'abra\xff'
  expected = [
    model.distribution(document[:i])[symbol]
    for i, symbol in enumerate([*document, ngram.END])
  ]
  np.testing.assert_allclose(model.probabilities([document]), expected)


def test_bits_count_the_end_of_documents_and_bytes_do_not():
  train, heldout = words(0, 60), [b'abra', b'bar']
  p = ngram.NGram(train, 2).probabilities(heldout)
  assert p.shape == (4 + 1 + 3 + 1,)
  bits = ngram.measure_bits_per_byte(train, iter(heldout), 2)
  np.testing.assert_allclose(bits, -np.log2(p).sum() / 7)


def test_the_weights_suit_the_slice_held_back_better_than_any_near_them():
  train, order = words(0, 400), 2
  model = ngram.NGram(train, order)
  held = train[:: ngram.FIT_SHARE]
  rest = [d for i, d in enumerate(train) if i % ngram.FIT_SHARE]
  codes, counts = ngram._count(rest, order)
  model._tables = ngram._tables(codes, counts, order)

  def loss():
    # one hit and one miss beforehand in every bucket are fitted as well
    prior = sum(np.log(w[1:] * (1 - w[1:])).sum() for w in model._weights)
    return -np.log(model.probabilities(held)).sum() - prior

  best = loss()
  events_in = [
    np.bincount(bucket, minlength=ngram.BUCKETS)
    for _, bucket in model._frequencies(ngram._windows(held, order))
  ]
  tried = 0
  for w, seen in zip(model._weights, events_in, strict=True):
    for b in np.flatnonzero(seen[1:] > 50) + 1:
      kept = w[b]
      for moved in (kept * 0.7, 1 - (1 - kept) * 0.7):
        w[b] = moved
        assert loss() > best
        tried += 1
      w[b] = kept
  assert tried > 4


def test_more_context_predicts_structured_text_better():
  train, heldout = words(0, 400), words(1, 40)
  bits = [ngram.measure_bits_per_byte(train, heldout, n) for n in (0, 1, 2)]
  assert bits[0] > bits[1] > bits[2]


def test_random_bytes_cost_eight_bits():
  draw = np.random.default_rng(0)
  train = [draw.bytes(2000) for _ in range(40)]
  bits = ngram.measure_bits_per_byte(train, [draw.bytes(2000)], 2)
  assert 7.95 < bits < 8.1


@pytest.mark.parametrize(
  'train, heldout, order, message',
  [
    ([b'a', b'b'], [b'a'], 7, 'order is 7'),
    ([b'a'], [b'a'], 2, '1 training documents'),
    ([b'a', b'b'], [], 2, 'no held-out text'),
  ],
)
def test_what_cannot_be_fitted_is_refused(train, heldout, order, message):
  with pytest.raises(ValueError, match=message):
    ngram.measure_bits_per_byte(train, heldout, order)
