"""Byte n-gram models, a baseline for bits per byte.

An order-n model predicts each symbol from the n symbols before it. Symbols are
the 256 bytes and END, which ends every document and precedes its first byte:
the events that `data.text.TextData` scores, so that the figures compare.
"""

import numpy as np

END = 256
SYMBOLS = 257
FIT_SHARE = 20  # one document in 20 fits the weights
EM_STEPS = 20
BUCKETS = 64
SLICE_BYTES = 8 << 20  # counted at a time, to bound memory


def measure_bits_per_byte(train, heldout, order):
  """Bits per byte of the order-`order` model of `train` on `heldout`.

  train, heldout: iterables of documents, as bytes. Counts the bits of the END
  after each document, but no byte for it. order: context length, 0 to 6.

  Raises:
    ValueError: order is out of range, or there are too few documents to fit.
  """
  heldout = list(heldout)
  size = sum(map(len, heldout))
  if not size:
    raise ValueError('no held-out text; give one document or more')
  probability = NGram(train, order).probabilities(heldout)
  return float(-np.log2(probability).sum() / size)


class NGram:
  """Interpolated byte model (Jelinek and Mercer, 1980).

    p_k(s | c) = w f_k(s | c) + (1 - w) p_{k-1}(s | c without its oldest symbol)

  p_{-1} is uniform; f_k is the relative frequency after the last k symbols; w
  depends on k and on the power of two below the count of the context, and is 0
  for an unseen context. EM fits w on one training document in `FIT_SHARE`, with
  counts of the others; the final counts are those of all documents.
  """

  def __init__(self, documents, order):
    documents = list(documents)
    if not 0 <= order <= 6:  # 257^7 is the last power that int64 holds
      raise ValueError(f'order is {order}; give 0 to 6 symbols of context')
    if len(documents) < 2:
      raise ValueError(
        f'{len(documents)} training documents; give 2 or more, one to fit'
        ' the weights'
      )
    self._order = order
    held = documents[::FIT_SHARE]
    rest = _count([d for i, d in enumerate(documents) if i % FIT_SHARE], order)
    self._tables = _tables(*rest, order)
    self._weights = self._fit(_windows(held, order))
    everything = _merge([rest, _count(held, order)])
    self._tables = _tables(*everything, order)

  def probabilities(self, documents):
    """float64 [events]: p of each byte and END of `documents`, in order."""
    return self._interpolate(_windows(list(documents), self._order))

  def distribution(self, context):
    """float64 [257]: p of every symbol after `context`, bytes of a document."""
    window = [END] * self._order + list(context)
    code = 0
    for symbol in window[len(window) - self._order :]:
      code = code * SYMBOLS + symbol
    return self._interpolate(code * SYMBOLS + np.arange(SYMBOLS))

  def _interpolate(self, codes):
    p = np.full(len(codes), 1 / SYMBOLS)
    levels = zip(self._frequencies(codes), self._weights, strict=True)
    for (f, bucket), weights in levels:
      w = weights[bucket]
      p = w * f + (1 - w) * p
    return p

  def _frequencies(self, codes):
    """Yields (f_k, bucket of the context's count) [events] for k = 0 ..."""
    for k, (windows, contexts) in enumerate(self._tables):
      code = codes % SYMBOLS ** (k + 1)
      count = _lookup(windows, code)
      total = _lookup(contexts, code // SYMBOLS)
      yield count / np.maximum(total, 1), _bucket(total)

  def _fit(self, codes):
    """Fits the weights [bucket] of every k to the events `codes`."""
    levels = list(self._frequencies(codes))
    weights = [np.full(BUCKETS, 0.5) for _ in levels]
    for w in weights:
      w[0] = 0  # the context was never seen
    for _ in range(EM_STEPS):
      p = [np.full(len(codes), 1 / SYMBOLS)]
      for (f, bucket), w in zip(levels, weights, strict=True):
        p.append(w[bucket] * f + (1 - w[bucket]) * p[-1])
      reach = np.ones(len(codes))  # posterior that the orders above passed
      for k in reversed(range(len(levels))):
        f, bucket = levels[k]
        stop = weights[k][bucket] * f / p[k + 1]
        hits = np.bincount(bucket, reach * stop, minlength=BUCKETS)
        tries = np.bincount(bucket, reach, minlength=BUCKETS)
        # one pseudo-count of hit and miss: no weight reaches 0 or 1
        weights[k][1:] = (hits[1:] + 1) / (tries[1:] + 2)
        reach = reach * (1 - stop)
    return weights


def _windows(documents, order):
  """int64 [events]: each symbol and the `order` before it, in base 257."""
  lengths = np.array([len(d) + 1 for d in documents], np.int64)
  symbols = np.frombuffer(b''.join(d + b'\0' for d in documents), np.uint8)
  symbols = symbols.astype(np.int64)
  ends = np.cumsum(lengths)
  symbols[ends - 1] = END
  codes = symbols.copy()
  for j in range(1, order + 1):
    earlier = np.empty_like(symbols)
    earlier[j:] = symbols[:-j]
    for document in range(j):
      # before a document's first symbols the context is END
      at = (ends - lengths) + document
      earlier[at[document < lengths]] = END
    codes += earlier * SYMBOLS**j
  return codes


def _count(documents, order):
  """(distinct windows of `documents` in order, how often each occurs)."""
  tables, batch, size = [], [], 0
  for i, document in enumerate(documents):
    batch.append(document)
    size += len(document)
    if size >= SLICE_BYTES or i + 1 == len(documents):
      tables.append(np.unique(_windows(batch, order), return_counts=True))
      batch, size = [], 0
  return _merge(tables)


def _merge(tables):
  """One table (codes in order, counts) out of several, in any order."""
  codes = np.concatenate([table[0] for table in tables])
  counts = np.concatenate([table[1] for table in tables])
  order = np.argsort(codes, kind='stable')
  codes, counts = codes[order], counts[order]
  first = np.flatnonzero(np.diff(codes, prepend=-1))
  return codes[first], np.add.reduceat(counts, first)


def _tables(codes, counts, order):
  """For k = 0 ... order: the (codes, counts) of windows and of contexts."""
  tables = []
  for k in range(order + 1):
    windows = _merge([(codes % SYMBOLS ** (k + 1), counts)])
    contexts = _merge([(windows[0] // SYMBOLS, windows[1])])
    tables.append((windows, contexts))
  return tables


def _lookup(table, codes):
  """int64: the count of each code, 0 where there is none."""
  known, counts = table
  at = np.minimum(np.searchsorted(known, codes), len(known) - 1)
  return np.where(known[at] == codes, counts[at], 0)


def _bucket(count):
  """0 for a count of 0, else 1 + floor(log2(count))."""
  return np.frexp(count)[1]
