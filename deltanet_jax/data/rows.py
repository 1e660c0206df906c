"""Packs documents into rows of tokens."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

HostBatch = dict[str, np.ndarray]


class Rows:
  """Concatenated documents, cut into rows of T tokens.

  The stream is eod d_1 eod d_2 ... eod d_D eod. The eod before a document
  belongs to it: its first token is predicted from it. Row i is
  stream[iT : iT + T], its targets are the stream one token later, so every
  token of a document and the eod after it is a target once, and no document is
  predicted from another.

  Indexing returns a dict of [T] arrays: tokens, targets, segment_ids (1 for the
  first document of the row, 2 for the next, ..., 0 on padding), positions (0 at
  the eod before a document, and at the start of the row), all int32, and
  weights float32, 0 on padding. Only the last row may have padding.
  """

  def __init__(
    self,
    documents: Sequence[np.ndarray],
    eod: int,
    vocab_size: int,
    seq_len: int,
  ):
    """documents: ids of each, whose dtype decides the memory used"""
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    lengths = np.array([len(d) + 1 for d in documents], np.int64)
    self._starts = np.concatenate([[0], np.cumsum(lengths)])
    self.tokens = int(self._starts[-1])  # targets, with eod
    self._stream = np.full(self.tokens + 1, eod, dtype)
    for start, document in zip(self._starts[:-1], documents, strict=True):
      self._stream[start + 1 : start + 1 + len(document)] = document
    self._seq_len = seq_len
    self._eod = eod

  def compute_crc(self) -> int:
    """CRC-32 of all tokens in order and of the starts of documents."""
    return zlib.crc32(self._starts.data, zlib.crc32(self._stream.data))

  @property
  def full(self) -> int:
    """The number of rows without padding."""
    return self.tokens // self._seq_len

  def __len__(self) -> int:
    return -(-self.tokens // self._seq_len)

  def __getitem__(self, i: int) -> HostBatch:
    T = self._seq_len
    if not 0 <= i < len(self):
      raise IndexError(f'row {i} of {len(self)}')
    first = i * T
    last = min(first + T, self.tokens)
    at = np.arange(first, last)
    document = np.searchsorted(self._starts, at, side='right') - 1
    opened = np.maximum(self._starts[document], first)
    pad = (0, first + T - last)
    inputs = self._stream[first:last]
    targets = self._stream[first + 1 : last + 1]
    return {
      'tokens': _pad(inputs, pad, self._eod),
      'targets': _pad(targets, pad, self._eod),
      'segment_ids': _pad(document - document[0] + 1, pad, 0),
      'positions': _pad(at - opened, pad, 0),
      'weights': np.pad(np.ones(last - first, np.float32), pad),
    }

  def make_batches(
    self, size: int, rows: Sequence[int] | np.ndarray | None = None
  ) -> Iterator[HostBatch]:
    """Yields all rows in order as dicts of [size,T] arrays, the last one filled
    with rows of padding.   rows: only these row numbers of each batch"""
    rows = range(size) if rows is None else rows
    for first in range(0, len(self), size):
      at = (first + i for i in rows)
      yield stack_rows(
        [self[i] if i < len(self) else self._make_padding() for i in at]
      )

  def _make_padding(self) -> HostBatch:
    """A row of padding."""
    T = self._seq_len
    none, eod = np.zeros(T, np.int32), np.full(T, self._eod, np.int32)
    return {
      'tokens': eod,
      'targets': eod,
      'segment_ids': none,
      'positions': none,
      'weights': np.zeros(T, np.float32),
    }


def stack_rows(rows: Sequence[HostBatch]) -> HostBatch:
  """A batch of rows."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _pad(x, pad, value):
  return np.pad(x.astype(np.int32), pad, constant_values=value)
