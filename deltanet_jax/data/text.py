"""Batches of training text and held-out text."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import DataConfig
from deltanet_jax.data import files, tokenizer
from deltanet_jax.data.rows import HostBatch, Rows, stack_rows

PREFETCH = 4  # batches made in advance in the background


class TextData:
  """The documents of a `DataConfig`, split, tokenized and packed into rows.

  A document is held out if a hash of its content and the seed is below
  `heldout`, so adding files moves no other document and equal documents are on
  the same side. A batch is a dict of [B,T] arrays as in `data.rows.Rows`:
  tokens, targets, segment_ids, positions (int32) and weights (float32, 0 on
  padding, all 1 in training). An epoch has every training row once, shuffled; a
  batch may span two epochs.

  Bits per byte of the held-out text is the summed loss of its targets in nats /
  ln 2 / `heldout_bytes`: the loss of the eod after each document counts, a byte
  for it does not.

  Attributes: tokenizer, train_bytes, heldout_bytes.

  Raises:
    ConfigError: files, fields or tokenizer cannot be read, there is no document
      on one side, or less training text than one batch.
  """

  def __init__(self, cfg: DataConfig):
    paths = files.find_files(cfg.path)
    documents = list(files.read_documents(paths, cfg.field))
    # shuffled, so that the first held-out rows are a sample
    order = np.random.default_rng(cfg.seed).permutation(len(documents))
    heldout: list[files.Document] = []
    train: list[files.Document] = []
    for i in order:
      side = heldout if _is_heldout(documents[i].content, cfg) else train
      side.append(documents[i])
    _require_both(train, heldout, cfg)
    self.tokenizer = tokenizer.load_tokenizer(cfg.tokenizer)
    self._train, self._heldout = train, heldout
    self._train_rows = self._pack(train, cfg)
    self._heldout_rows = self._pack(heldout, cfg)
    self.train_bytes = sum(len(d.content) for d in train)
    self.heldout_bytes = sum(len(d.content) for d in heldout)
    if self._train_rows.full < cfg.batch:
      raise ConfigError(
        f'the training text has {self._train_rows.tokens} tokens, less than one'
        f' batch of {cfg.batch} rows x {cfg.seq_len}; give more text, or lower'
        ' data.batch or data.seq_len'
      )
    self._cfg, self._files = cfg, len(paths)
    self.begin(0)

  def _pack(self, documents, cfg):
    ids = self.tokenizer.encode_documents(documents)
    return Rows(ids, self.tokenizer.eod, self.tokenizer.vocab_size, cfg.seq_len)

  def fingerprint(self) -> dict[str, int | list[int]]:
    """{name: counts or checksums} that differ if rows, their order or the
    held-out text differ."""
    cfg = self._cfg
    rows = self._train_rows, self._heldout_rows
    return {
      'files': self._files,
      'documents': len(self._train) + len(self._heldout),
      'bytes': self.train_bytes + self.heldout_bytes,
      'held-out documents': len(self._heldout),
      'tokens': sum(side.tokens for side in rows),
      'data.seq_len': cfg.seq_len,
      'data.batch': cfg.batch,
      'data.seed': cfg.seed,
      'sums': [side.compute_crc() for side in rows],
    }

  def begin(self, step: int) -> None:
    """Makes `step` the first one on these rows, after steps on another text."""
    self._first_step = step
    self._batches = self._ordered()

  def _ordered(self, only=None):
    """Random access to all batches.   only: rows, as in `iterate`"""
    seed = self._cfg.seed
    if self._first_step:
      mixed = np.random.SeedSequence([seed, self._first_step])
      seed = int(mixed.generate_state(1)[0])
    return _batches(self._train_rows, self._cfg, only, seed)

  @property
  def train_documents(self) -> list[bytes]:
    """The contents of the training documents."""
    return [document.content for document in self._train]

  @property
  def heldout_row_count(self) -> int:
    """The number of rows of the held-out text."""
    return len(self._heldout_rows)

  @property
  def heldout_documents(self) -> list[bytes]:
    """The contents of the held-out documents."""
    return [document.content for document in self._heldout]

  def make_batch(self, step: int) -> HostBatch:
    """The batch of `step`, a function of the text, its first step, the seed and
    the step."""
    return self._batches[step - self._first_step]

  def iterate(
    self, start_step: int = 0, rows: Sequence[int] | np.ndarray | None = None
  ) -> Iterator[HostBatch]:
    """Endless iterator over the batches from `start_step` on.

    rows: only these row numbers of each batch; default: all
    Batches are made in advance in a background thread.
    """
    import grain

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
    iterator = iter(self._ordered(rows).to_iter_dataset(ahead))
    iterator.set_state({'next_index': start_step - self._first_step})
    return iterator

  def make_heldout_batches(
    self, size: int, rows: Sequence[int] | np.ndarray | None = None
  ) -> Iterator[HostBatch]:
    """Yields the held-out text in batches of `size` rows, always the same.

    rows: only these row numbers of each batch; default: all
    Every held-out token is a target of weight 1 once; the last batch is filled
    with rows of padding.
    """
    return self._heldout_rows.make_batches(size, rows)


def _batches(rows, cfg, only, seed):
  """Random access to the batches of all epochs.   only: as for `_ordered`"""
  import grain

  order = grain.MapDataset.range(rows.full).seed(seed).shuffle().repeat(None)
  only = range(cfg.batch) if only is None else only

  def make(step):
    first = int(step) * cfg.batch
    return stack_rows([rows[int(order[first + int(i)])] for i in only])

  return grain.MapDataset.range(len(order) // cfg.batch).map(make)


def _is_heldout(content, cfg):
  return _draw(content, cfg) < cfg.heldout * 2**64


def _draw(content, cfg):
  """A hash of a document and the seed, from 0 to 2^64."""
  digest = hashlib.blake2b(f'{cfg.seed}:'.encode(), digest_size=8)
  digest.update(content)
  return int.from_bytes(digest.digest(), 'big')


def _suggest_heldout(documents, cfg):
  """The shortest data.heldout, from the given one on, with documents on both
  sides; or None."""
  draws = [_draw(document.content, cfg) / 2**64 for document in documents]
  least, most = min(draws), max(draws)
  for digits in range(1, 10):
    # just above the lowest, or just below the highest
    unit = 10.0**-digits
    up = round((math.floor(least / unit) + 1) * unit, digits)
    down = round(math.floor(most / unit) * unit, digits)
    value = up if cfg.heldout <= least else down
    if least < value <= most:
      return value
  return None


def _require_both(train, heldout, cfg):
  if len(train) + len(heldout) == 1:
    raise ConfigError(
      f'data.path={cfg.path!r} has one document, and whole documents are held'
      ' out; give more files, or cut this one: split -C 64K'
      ' --additional-suffix=.txt FILE texts/'
    )
  for side, name, change in (
    (train, 'training', 'smaller'),
    (heldout, 'held-out', 'larger'),
  ):
    if not side:
      value = _suggest_heldout(train + heldout, cfg)
      advice = '' if value is None else f' ({value} would do)'
      raise ConfigError(
        f'data.path={cfg.path!r} has {len(train) + len(heldout)} documents,'
        f' none of them {name} with data.heldout={cfg.heldout}; give more'
        ' documents (a text file is one, a line of jsonl or a row of parquet is'
        f' one), a {change} data.heldout{advice} or another data.seed'
      )
