"""The loss of tokens that complete a repetition, by distance, and of new ones.

A token is repeated at length n if the n tokens that end with it stood earlier
in the same document. Attention predicts long repetitions almost without loss. A
model with a state of fixed size forgets them with distance, even where its loss
over all tokens is the same (arXiv:2312.04927).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import numpy as np

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.data.files import Document
from deltanet_jax.data.tokenizer import Tokenizer
from deltanet_jax.evals import perplexity
from deltanet_jax.objectives.score import Score, sum_scores
from deltanet_jax.parallel.sharding import Params

RESAMPLES = 2000
POWERS = tuple(4**i for i in range(1, 11))


class Share(NamedTuple):
  """The tokens of one row of the table. n: length of the repetition; its latest
  earlier place is [near, far) tokens back. None, None: new tokens; 1, None: all
  repeated ones. low, high: 95% confidence interval of the mean, None if fewer
  than two documents have such a token.
  """

  n: int
  near: int | None
  far: int | None
  tokens: int
  documents: int
  nats: float  # mean, per token
  low: float | None
  high: float | None

  @property
  def bits(self) -> float:
    """Bits per token; per byte if tokens are bytes."""
    return self.nats / math.log(2)


def find_earlier(
  tokens: np.ndarray, segment_ids: np.ndarray, n: int
) -> np.ndarray:
  """int64 [B,T]: how far back the n tokens that end here last stood, or 0.

  tokens, segment_ids [B,T]: a document is a run of equal segment ids in a row;
  0 is padding. Exact: n-grams are sorted, not hashed.

  Raises:
    ValueError: n below 1, or shapes that differ.
  """
  tokens, segment_ids = np.asarray(tokens), np.asarray(segment_ids)
  if n < 1:
    raise ValueError(f'n is {n}; give 1 token or more')
  if tokens.shape != segment_ids.shape or tokens.ndim != 2:
    raise ValueError(
      f'tokens are {tokens.shape} and segment_ids {segment_ids.shape}; give'
      ' two of one shape [B,T]'
    )
  document, start = _documents(segment_ids)
  where = np.arange(document.size)
  grams = _grams(tokens.reshape(-1), n)
  whole = (where - start + 1 >= n) & (segment_ids.reshape(-1) != 0)
  at = where[whole]
  # by document, n-gram and place: equal n-grams are adjacent, earlier first
  order = at[np.lexsort((at, grams[at], document[at]))]
  after, before = order[1:], order[:-1]
  same = (grams[after] == grams[before]) & (document[after] == document[before])
  distance = np.zeros(document.size, np.int64)
  distance[after[same]] = (after - before)[same]
  return distance.reshape(tokens.shape)


def compute_shares(
  tokens: np.ndarray,
  nats: np.ndarray,
  segment_ids: np.ndarray,
  *,
  lengths: Sequence[int] = (4, 16),
  edges: Sequence[int] = POWERS,
  seed: int = 0,
) -> list[Share]:
  """`Share`s for every n of `lengths`: new tokens, all repeated ones, and the
  repeated ones by distance: [1, edges[0]), [edges[0], edges[1]), ... Shares
  without tokens are left out.

  tokens [B,T]: the targets   nats [B,T]: the loss of each   segment_ids [B,T]:
  as for `find_earlier`. The confidence intervals resample documents, since
  tokens of a document are not independent. To compare two models, pass the
  difference of their nats, which pairs them by document.

  The first n - 1 tokens of a document count as new. A document that continues
  in the next row counts as two: no model here sees past its row.

  Raises:
    ValueError: shapes that differ, or nats that are not finite.
  """
  nats = np.asarray(nats, np.float64)
  segments = np.asarray(segment_ids)
  if nats.shape != segments.shape:
    raise ValueError(
      f'nats are {nats.shape} and segment_ids {segments.shape}; give one shape'
    )
  real = segments != 0
  if not np.isfinite(nats[real]).all():
    raise ValueError('nats are not all finite')
  document = _documents(segments)[0].reshape(nats.shape)
  shares = []
  for n in lengths:
    distance = find_earlier(tokens, segments, n)
    parts: list[tuple[int | None, int | None, np.ndarray]] = [
      (None, None, distance == 0),
      (1, None, distance > 0),
    ]
    bounds = [1, *edges, None] if edges else []
    for start, end in itertools.pairwise(bounds):
      nearer = True if end is None else distance < end
      parts.append((start, end, (distance >= start) & nearer))
    for near, far, part in parts:
      part = part & real
      if part.any():
        mean = _mean(nats[part], document[part], seed)
        shares.append(Share(n, near, far, int(part.sum()), *mean))
  return shares


def score_documents(
  cfg: ModelConfig,
  params: Params,
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  lengths: Sequence[int],
  **how: Unpack[perplexity.Scoring],
) -> tuple[Score, list[Share]]:
  """(Score, `compute_shares`) of documents at the `lengths`, see
  `perplexity.run_documents`."""
  tokens, nats, segments, sums = [], [], [], []
  make, given = perplexity.make_token_nats, (cfg, params, documents, tokenizer)
  for host_batch, batch_nats in perplexity.run_documents(make, *given, **how):
    tokens.append(host_batch['targets'])
    nats.append(batch_nats)
    segments.append(host_batch['segment_ids'])
    weighted = np.sum(host_batch['weights'] * batch_nats, dtype=np.float64)
    needed = {name: host_batch[name] for name in ('weights', 'targets')}
    sums.append((needed, weighted))
  join = np.concatenate
  shares = compute_shares(
    join(tokens), join(nats), join(segments), lengths=lengths
  )
  return sum_scores(sums, tokenizer.eod), shares


def format_shares(shares: Sequence[Share]) -> str:
  """The shares as a table, in nats per token."""
  lines = [f'{"n":>3}  {"distance":>18} {"tokens":>10} {"nats":>8}  95%']
  for s in shares:
    if s.near is None:
      where = 'new'
    elif (s.near, s.far) == (1, None):
      where = 'repeated'
    else:
      where = f'{s.near:,} to ' + (f'{s.far - 1:,}' if s.far else 'any')
    range_ = '-' if s.low is None else f'{s.low:.3f} to {s.high:.3f}'
    lines.append(
      f'{s.n:>3}  {where:>18} {s.tokens:>10,} {s.nats:>8.3f}  {range_}'
    )
  return '\n'.join(lines)


def _documents(segment_ids):
  """Per place of the concatenated rows: its document and where that starts."""
  changes = np.ones(segment_ids.shape, bool)
  changes[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
  changes = changes.reshape(-1)
  document = np.cumsum(changes) - 1
  return document, np.flatnonzero(changes)[document]


def _grams(tokens, n):
  """int64: an id of the n tokens that end at each place; undefined at the first
  n - 1 places.

  Lengths double: a 2m-gram is a pair of m-grams.
  """
  ids = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
  length = 1
  while length < n:
    step = min(length, n - length)  # the two may overlap
    before = np.zeros_like(ids)
    before[step:] = ids[:-step] if step < len(ids) else ids[:0]
    pairs = before * (ids.max() + 1) + ids  # below len(ids)^2
    ids = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
    length += step
  return ids


def _mean(nats, document, seed):
  """(documents, mean, low, high), the interval by bootstrap over documents."""
  which = np.unique(document, return_inverse=True)[1]
  total, count = np.bincount(which, nats), np.bincount(which)
  mean, D = nats.sum() / len(nats), len(count)
  if D < 2:
    return D, mean, None, None
  draw, means = np.random.default_rng(seed), []
  for _ in range(RESAMPLES):
    picked = draw.integers(0, D, D)
    means.append(total[picked].sum() / count[picked].sum())
  low, high = np.percentile(means, [2.5, 97.5])
  return D, mean, float(low), float(high)
