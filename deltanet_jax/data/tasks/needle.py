"""Needle in a haystack: find the number for a key in a long text."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.data.tasks import base
from deltanet_jax.data.tokenizer import ByteTokenizer

# the repeated filler of RULER (arXiv:2404.06654)
NOISE = (
  b'The grass is green. The sky is blue. The sun is yellow. Here we go.'
  b' There and back again.\n'
)
NUMBERS = b'0123456789'
HEX = b'0123456789abcdef'
DEPTHS = 40
KEYS = (
  'acorn amber anchor apple arrow badge barn basil beacon birch blade bridge'
  ' candle canyon cedar cider clover comet copper coral cotton crane dagger'
  ' desert dune eagle ember falcon feather fern flint forest garnet ginger'
  ' glacier harbor hazel heron island ivory jasper kettle lagoon lantern lemon'
  ' maple marble meadow mirror needle nickel oak olive orchid otter pebble'
  ' pepper quartz raven river saddle silver tulip violet'
).split()


@dataclasses.dataclass(frozen=True)
class Needle:
  """`One of the special magic numbers for KEY is: VALUE.` What is VALUE?

  The needles of RULER (arXiv:2404.06654) for byte models, with one-word keys. A
  row is eod, the haystack with n needles of distinct keys between sentences,
  and ` The special magic number for KEY mentioned in the provided text is
  VALUE`; the answers are the bytes of VALUE. The haystack is a piece of `text`
  from the start of a sentence that fills the row.

    single 1   Needle(1024)                            repeated sentences
    single 2   Needle(1024, text=essays)               a text, e.g. a file's
    single 3   Needle(1024, text=essays, digits=8, alphabet=HEX, noun=b'code')
    multi-key  Needle(1024, text=essays, needles=(4,))

  The text is a constant of the compiled program: at most megabytes. Of several
  numbers in `needles` each row samples one.

  Slices: depth (0 to 39: position of the needle in the haystack, before it
  moves back to the start of a sentence), needles (n), digit.
  """

  length: int = 512
  needles: tuple[int, ...] = (1,)
  digits: int = 4
  alphabet: bytes = NUMBERS
  noun: bytes = b'number'
  text: bytes = NOISE

  def __post_init__(self):
    base.check_least(self, digits=1)
    base.check_sizes('needles', self.needles, 1, len(KEYS))
    if len(set(self.alphabet)) < 2:
      raise ValueError(f'alphabet is {self.alphabet!r}; give 2 bytes or more')
    if len(_starts(self.text)) < 2:
      raise ValueError(
        f'the {len(self.text)} bytes of text have fewer than two sentences;'
        ' give a text with more full stops or line ends'
      )
    longest = max(map(len, KEYS)) + self.digits
    needle = sum(map(len, self._needle)) + longest
    question = sum(map(len, self._question)) + longest
    least = max(self.needles) * needle + question + len(NOISE)
    if self.length < least:
      raise ValueError(
        f'{max(self.needles)} needles, the question and {len(NOISE)} bytes'
        f' around them need length {least}; it is {self.length}'
      )

  vocab = ByteTokenizer.vocab_size

  @property
  def levels(self) -> base.Levels:
    return {
      'depth': range(DEPTHS),
      'needles': sorted(self.needles),
      'digit': range(self.digits),
    }

  @property
  def _needle(self):
    """The text before the key, before the value and after it."""
    return b'One of the special magic %ss for ' % self.noun, b' is: ', b'. '

  @property
  def _question(self):
    """The text before the key and before the value."""
    before = b' The special magic %s for ' % self.noun
    return before, b' mentioned in the provided text is '

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    B, T, N, D = batch, self.length, max(self.needles), self.digits
    rngs = jax.random.split(key, 5)
    n = base.draw_sizes(rngs[0], B, self.needles)[:, None]
    which = base.draw_distinct(rngs[1], B, len(KEYS), N)
    word, letters = (x[which] for x in _words())
    digits = jax.random.randint(rngs[2], (B, N, D), 0, len(self.alphabet))
    value = _bytes(self.alphabet)[digits]
    depth = jax.random.randint(rngs[3], (B, N), 0, DEPTHS)
    before, between, after = self._needle
    needle, size = _join(
      before, (word, letters), between, (value, jnp.full((B, N), D)), after
    )
    size = jnp.where(jnp.arange(N) < n, size, 0)
    before, between = self._question
    # the first needle is asked for; depths and keys are random
    question, asks = _join(before, (word[:, 0], letters[:, 0]), between)
    # the last byte of the value is never an input
    H = T - 1 - size.sum(-1) - asks - (D - 1)
    text, first, start_of = self._haystack()
    start = jax.random.choice(rngs[4], first, (B, 1))
    cut = start_of[start + depth * H[:, None] // (DEPTHS - 1)] - start

    i = jnp.arange(N)
    earlier = (cut[:, None] < cut[..., None]) | (
      (cut[:, None] == cut[..., None]) & (i < i[:, None])
    )
    opens = 1 + cut + jnp.sum(earlier * size[:, None], -1)
    h = jnp.arange(T)
    passed = (cut[..., None] <= h) * size[..., None]
    tokens = jnp.full((B, T), ByteTokenizer.eod, jnp.int32)
    at = jnp.where(h < H[:, None], 1 + h + passed.sum(1), T)
    tokens = base.place_values(tokens, at, text[start + h])
    at = _run(opens, size, needle.shape[-1], T)
    tokens = base.place_values(tokens, at.reshape(B, -1), needle.reshape(B, -1))
    at = _run(T - (D - 1) - asks, asks, question.shape[-1], T)
    tokens = base.place_values(tokens, at, question)
    d = jnp.arange(D)
    queries = jnp.broadcast_to(T - D + d, (B, D))
    tokens = base.place_values(tokens, queries + 1, value[:, 0])
    slices = {'depth': depth[:, :1], 'needles': n, 'digit': d}
    return base.make_example(tokens, queries, value[:, 0], slices)

  def _haystack(self):
    """(text, starts of sentences with `length` bytes after them, start of the
    sentence of every byte)."""
    text = self.text * (1 + 2 * self.length // len(self.text))
    starts = _starts(text)
    sentence = np.searchsorted(starts, np.arange(len(text)), 'right') - 1
    start_of = starts[sentence]
    first = starts[starts <= len(text) - self.length]
    return _bytes(text), *(jnp.array(x, jnp.int32) for x in (first, start_of))


def _starts(text):
  """int [n]: starts of sentences and lines of `text`."""
  ends = [m.end() for m in re.finditer(rb'[.!?]\s+|\n+', text)]
  return np.array([0, *(e for e in ends if e < len(text))])


def _bytes(text):
  return jnp.array(np.frombuffer(text, np.uint8), jnp.int32)


def _words():
  """KEYS as bytes [64,longest], and their lengths [64]."""
  longest = max(map(len, KEYS))
  padded = [_bytes(word.ljust(longest).encode()) for word in KEYS]
  return jnp.stack(padded), jnp.array([len(word) for word in KEYS], jnp.int32)


def _join(*parts):
  """Concatenates parts: bytes, or (tokens [...,W], lengths [...]).

  Returns (tokens [...,most] padded with 0, lengths [...]).
  """
  lead = next(part[1].shape for part in parts if not isinstance(part, bytes))
  most = sum(len(p) if isinstance(p, bytes) else p[0].shape[-1] for p in parts)
  joined = jnp.zeros((np.prod(lead, dtype=int), most), jnp.int32)
  end = jnp.zeros(lead, jnp.int32)
  for part in parts:
    if isinstance(part, bytes):
      part = (
        jnp.broadcast_to(_bytes(part), (*lead, len(part))),
        jnp.full(lead, len(part)),
      )
    piece, size = part
    at = _run(end, size, piece.shape[-1], most)
    at, piece = (x.reshape(-1, x.shape[-1]) for x in (at, piece))
    joined = base.place_values(joined, at, piece)
    end = end + size
  return joined.reshape(*lead, most), end


def _run(start, size, most, none):
  """[...,most]: start, start + 1, ..., `size` of them, then `none`."""
  i = jnp.arange(most)
  return jnp.where(i < size[..., None], start[..., None] + i, none)
