"""Repeated tokens against a search by hand; means against sums."""

import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.config.experiment import (
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
)
from deltanet_jax.config.mixers import LinearAttentionConfig
from deltanet_jax.data.files import Document
from deltanet_jax.data.tokenizer import load_tokenizer
from deltanet_jax.evals import perplexity, repeats
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding


def by_hand(tokens, segments, n):
  """A quadratic search, one row and one document at a time."""
  found = np.zeros(tokens.shape, int)
  for b, row in enumerate(tokens.tolist()):
    for t in range(len(row)):
      segment = segments[b, t]
      start = t
      while start > 0 and segments[b, start - 1] == segment:
        start -= 1
      if segment == 0 or t - start + 1 < n:
        continue
      gram = row[t - n + 1 : t + 1]
      for s in range(t - 1, start + n - 2, -1):
        if row[s - n + 1 : s + 1] == gram:
          found[b, t] = t - s
          break
  return found


def drawn(seed, rows=6, length=60, symbols=2):
  draw = np.random.default_rng(seed)
  tokens = draw.integers(0, symbols, (rows, length)) * 1000
  # documents of several lengths, one number again later, padding
  segments = np.repeat(draw.integers(0, 3, (rows, length // 10)), 10, axis=1)
  segments[0] = 1
  return tokens, segments


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 8, 16, 60, 70])
def test_distances_are_those_of_a_search_by_hand(n):
  for seed in range(3):
    tokens, segments = drawn(seed)
    found = repeats.find_earlier(tokens, segments, n)
    np.testing.assert_array_equal(found, by_hand(tokens, segments, n))
  if n == 5:
    assert (found > 0).sum() > 20


def test_a_document_is_not_repeated_from_another():
  tokens = np.tile(np.arange(8), (2, 2))
  one = np.ones((2, 16), int)
  two = np.repeat([[1, 2]], 8, axis=1).repeat(2, 0)
  assert (repeats.find_earlier(tokens, one, 4) > 0).sum() == 2 * 5
  assert not repeats.find_earlier(tokens, two, 4).any()
  assert not repeats.find_earlier(tokens, 0 * one, 4).any()
  # documents of one n-gram each, the same one
  same = np.zeros((1, 8), int)
  assert not repeats.find_earlier(same, np.array([[1] * 4 + [2] * 4]), 4).any()


def test_the_table_counts_every_token_once_and_means_are_means():
  tokens, segments = drawn(3)
  nats = np.random.default_rng(1).random(tokens.shape)
  shares = repeats.compute_shares(
    tokens, nats, segments, lengths=(2, 5), edges=(4, 9)
  )
  for n in (2, 5):
    rows = {(s.near, s.far): s for s in shares if s.n == n}
    distance = by_hand(tokens, segments, n)
    real = segments > 0
    parts = {
      (None, None): distance == 0, (1, None): distance > 0,
      (1, 4): (distance > 0) & (distance < 4),
      (4, 9): (distance >= 4) & (distance < 9), (9, None): distance >= 9,
    }  # fmt: skip
    assert rows.keys() == parts.keys()
    for key, part in parts.items():
      part = part & real
      share = rows[key]
      assert share.tokens == part.sum()
      np.testing.assert_allclose(share.nats, nats[part].mean())
      np.testing.assert_allclose(share.bits, nats[part].mean() / np.log(2))
      assert share.low < share.nats < share.high
    assert rows[None, None].tokens + rows[1, None].tokens == real.sum()


def test_intervals_resample_documents_not_tokens():
  # 8 documents whose tokens all cost the same: as many facts as documents
  tokens = np.arange(800).reshape(8, 100)
  cost = np.array([0.0, 0, 0, 0, 1, 1, 1, 1])
  nats = np.repeat(cost[:, None], 100, 1)
  (share,) = repeats.compute_shares(
    tokens, nats, np.ones((8, 100), int), lengths=(1,)
  )
  # of 8 fair coins, 2.5% are below 2 heads: 0.125 to 0.25 of them
  assert 0.1 <= share.low <= 0.25 and 0.75 <= share.high <= 0.9
  assert share.documents == 8
  (share,) = repeats.compute_shares(
    tokens[:1], nats[:1], np.ones((1, 100), int), lengths=(1,)
  )
  assert (share.documents, share.low, share.high) == (1, None, None)
  assert 'new' in repeats.format_shares([share])


def test_documents_are_scored_token_by_token(quick_compile):
  layer = Layer(LinearAttentionConfig.tiny(), MLPConfig(4))
  cfg = ModelConfig(vocab=257, d_model=4, period=(layer,), repeats=1)
  draw = np.random.default_rng(0)
  documents = [
    Document('', bytes(draw.integers(97, 99, n).tolist())) for n in (9, 3, 14)
  ]
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = lambda: nn.unbox(HybridLM(cfg).init(jax.random.key(0), tokens))
  params = jax.jit(init)()['params']
  mesh = sharding.make_mesh(MeshConfig())
  how = {'dtype': 'float32', 'mesh': mesh, 'seq_len': 8, 'batch': 2}
  how['stream'] = io.StringIO()
  tokenizer = load_tokenizer('bytes')

  scored = list(
    perplexity.run_documents(
      perplexity.make_token_nats, cfg, params, documents, tokenizer, **how
    )
  )
  for batch, nats in scored:
    logits, _ = HybridLM(cfg).apply(
      {'params': params},
      batch['tokens'],
      positions=batch['positions'],
      segment_ids=batch['segment_ids'],
    )
    spread = jax.nn.log_softmax(logits)
    picked = np.take_along_axis(
      np.array(spread), batch['targets'][..., None], 2
    )
    np.testing.assert_allclose(nats, -picked[..., 0], rtol=1e-5)

  given = cfg, params, documents, tokenizer
  score, shares = repeats.score_documents(*given, (2,), **how)
  plain = perplexity.score_documents(*given, **how)
  assert score[1:] == plain[1:] == (29, 3)
  np.testing.assert_allclose(score.nats, plain.nats, rtol=1e-6)
  new, repeated = shares[:2]
  assert (new.near, repeated.near, repeated.far) == (None, 1, None)
  # every token and the end of every document, once
  assert new.tokens + repeated.tokens == score.tokens
  targets = np.concatenate([batch['targets'] for batch, _ in scored])
  segments = np.concatenate([batch['segment_ids'] for batch, _ in scored])
  assert repeated.tokens == (by_hand(targets, segments, 2) > 0).sum() > 0


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda x: repeats.find_earlier(x, x, 0), 'n is 0'),
    (lambda x: repeats.find_earlier(x, x[:1], 2), r'\(2, 3\) and .* \(1, 3\)'),
    (lambda x: repeats.compute_shares(x, x[:1], x), r'nats are \(1, 3\)'),
    (lambda x: repeats.compute_shares(x, x * np.nan, x), 'not all finite'),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.ones((2, 3), int))
